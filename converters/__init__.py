"""Hugging Face checkpoints ↔ Flax modules: `from converters import load`."""

from converters.hub import load_tokenizer
from converters.loading import LoadedModel, load
from converters.registry import create, decoder_config, register, supported
from converters.saving import save

__all__ = [
    "LoadedModel",
    "create",
    "decoder_config",
    "load",
    "load_tokenizer",
    "register",
    "save",
    "supported",
]
