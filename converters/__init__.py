"""Hugging Face checkpoints ↔ Flax modules: `from converters import load`."""

from converters.hub import load_tokenizer
from converters.loading import LoadedModel, load
from converters.registry import decoder_config, register, supported

__all__ = [
    "LoadedModel",
    "decoder_config",
    "load",
    "load_tokenizer",
    "register",
    "supported",
]
