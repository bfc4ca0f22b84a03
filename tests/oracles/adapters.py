"""Small random LoRA adapters, made and run by peft."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


@torch.no_grad()
def build(base: Path, folder: Path, *, seed: int, beside: bool = False, **settings: Any) -> Path:
    """Write an adapter of the checkpoint `base` whose every tensor moves the logits.

    Args:
        base: A checkpoint folder.
        folder: Created if missing.
        seed: Of the weights, of standard deviation 1/sqrt(fan-in): peft's own B is zero.
        beside: Name the base model by its path from `folder`, not by its whole path.
        **settings: Of `LoraConfig`.

    Returns:
        The folder.
    """
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    name = os.path.relpath(base, folder) if beside else str(base)
    adapted.peft_config["default"].base_model_name_or_path = name
    adapted.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(
    base: Path, folder: Path, batch: Sequence[np.ndarray], dtype: str = "float32"
) -> list[np.ndarray]:
    """Logits of every document by peft, each computed alone."""
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    adapted = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval()
    tokens = (torch.from_numpy(document.astype(np.int64))[None] for document in batch)
    return [adapted(document).logits[0].float().numpy() for document in tokens]
