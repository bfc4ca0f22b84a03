"""Our logits beside transformers', on the same documents."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import AutoModelForCausalLM

from converters import load

LENGTHS = (7, 50, 33)

torch.set_num_threads(1)  # more cost more than they bring at this size


def documents(vocabulary: int = 320) -> list[np.ndarray]:
    """Random documents of `LENGTHS`."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocabulary, n).astype(np.int32) for n in LENGTHS]


def our_logits(model: nnx.Module, batch: list[np.ndarray]) -> list[np.ndarray]:
    """Logits of every document, computed in one batch that is padded on the right."""
    longest = max(map(len, batch)) + 3
    tokens = np.stack([np.pad(d, (0, longest - len(d)), constant_values=5) for d in batch])
    lengths = jnp.asarray([len(d) for d in batch], jnp.int32)
    with jax.default_matmul_precision("highest"):
        logits = nnx.jit(lambda m, t, n: m(t, n))(model, jnp.asarray(tokens), lengths)
    return [np.asarray(x, np.float32)[: len(d)] for x, d in zip(logits, batch, strict=True)]


@torch.no_grad()
def their_logits(
    folder: Path, batch: list[np.ndarray], dtype: str = "float32", attention: str = "eager"
) -> list[np.ndarray]:
    """Logits of every document, each computed alone, without padding."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation=attention
    ).eval()
    logits: dict[int, np.ndarray] = {}
    # From the shortest on: `dynamic` rope remembers the longest document that it has seen.
    for i in sorted(range(len(batch)), key=lambda i: len(batch[i])):
        tokens = torch.from_numpy(batch[i].astype(np.int64))[None]
        logits[i] = model(tokens).logits[0].float().numpy()
    return [logits[i] for i in range(len(batch))]


def error(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """Largest difference over the largest logit."""
    difference = max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))
    return float(difference / max(np.abs(b).max() for b in theirs))


def logit_error(ours: Path, theirs: Path | None = None, **options: Any) -> float:
    """How far the logits of one folder by us are from those of another by transformers."""
    batch = documents()
    return error(
        our_logits(load(ours, **options).model, batch), their_logits(theirs or ours, batch)
    )
