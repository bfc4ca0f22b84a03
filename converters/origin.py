"""What a model remembers of where it came from, so that it can be written without being told."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from converters.hub import Source
from jhessians.models.decoder import Decoder


@dataclass(frozen=True)
class Origin:
    """Where a model came from; copies of it, such as those that `nnx.merge` makes, know it too.

    Attributes:
        config: transformers' config.
        source: Its files; None if it was made here.
        stored: Names of the number formats in the files.
        parts: Hashes of this host's part of the weights, and of the next host's as this host's
            files have it, if they were asked for.
    """

    config: Any = field(hash=False)  # can't be hashed, but compared
    source: Source | None = None
    stored: tuple[str, ...] = ()
    parts: tuple[str, str] = field(default=("", ""), compare=False)


class LoadedModel(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        model: The decoder; `model.config` is our `DecoderConfig`.
        config: transformers' config.
        tokenizer: transformers' tokenizer; None if the checkpoint has none.
    """

    model: Decoder
    config: Any
    tokenizer: Any

    @property
    def dtype(self) -> np.dtype:
        """Number format of the parameters, whatever that of the files was."""
        return np.dtype(self.model.embedding.dtype)


def whole(model: Decoder | LoadedModel, config: Any = None, tokenizer: Any = None) -> LoadedModel:
    """A model with all that is written with it.

    Args:
        model: As `load` gives it, or its module alone, or one that `create` made.
        config: transformers' config instead of the one that belongs to the model.
        tokenizer: Likewise.

    Returns:
        No tokenizer if `model` is a module and none is given: then its source's files hold it.

    Raises:
        ValueError: If it isn't known where `model` came from, and no config is given.
    """
    if isinstance(model, LoadedModel):
        config = model.config if config is None else config
        tokenizer = model.tokenizer if tokenizer is None else tokenizer
        model = model.model
    if config is None and model.origin is not None:
        config = model.origin.config
    if config is None:
        raise ValueError(
            "the model comes neither from converters.load nor from converters.create, so its "
            "config isn't known; expected transformers' config; give it as config="
        )
    return LoadedModel(model, config, tokenizer)


def number_format(model: nnx.Module) -> str:
    """A model's number format in words: `float32`, or `float32, stored in bfloat16`."""
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    loaded = tuple(sorted({leaf.dtype.name for leaf in leaves}))
    origin: Origin | None = getattr(model, "origin", None)
    stored = origin.stored if origin else ()
    words = " and ".join(loaded)
    return words if stored in ((), loaded) else f"{words}, stored in {' and '.join(stored)}"
