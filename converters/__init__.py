"""Hugging Face checkpoints ↔ Flax modules: `from converters import load`."""

from converters.hub import load_tokenizer
from converters.loading import LoadedModel, load
from converters.registry import create, decoder_config, register, supported
from converters.rules import Family, Rule, conv1d, linear, norm
from converters.saving import save

__all__ = [
    "Family",
    "LoadedModel",
    "Rule",
    "conv1d",
    "create",
    "decoder_config",
    "linear",
    "load",
    "load_tokenizer",
    "norm",
    "register",
    "save",
    "supported",
]
