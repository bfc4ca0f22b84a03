"""Hugging Face checkpoints ↔ Flax modules: `from converters import load`."""

import os

# Before transformers is imported: it would warn that there is no torch, which we do without.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from converters.common import decoder, head_size, rms  # noqa: E402
from converters.flax_checkpoint import save_flax  # noqa: E402
from converters.generate import generate  # noqa: E402
from converters.hub import load_tokenizer  # noqa: E402
from converters.loading import load  # noqa: E402
from converters.origin import LoadedModel, number_format  # noqa: E402
from converters.registry import create, decoder_config, register, supported  # noqa: E402
from converters.rules import Family, Rule, conv1d, linear, norm  # noqa: E402
from converters.saving import save  # noqa: E402

__all__ = [
    "Family",
    "LoadedModel",
    "Rule",
    "conv1d",
    "create",
    "decoder",
    "decoder_config",
    "generate",
    "head_size",
    "linear",
    "load",
    "load_tokenizer",
    "norm",
    "number_format",
    "register",
    "rms",
    "save",
    "save_flax",
    "supported",
]
