"""What a model says after prompts: greedy or sampled decoding of every family."""

from collections.abc import Sequence
from operator import index
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jhessians.devices.precision import HIGHEST, multiplying
from jhessians.errors import ConfigError, DatasetError
from jhessians.models.config import DecoderConfig
from jhessians.models.decoder import Decoder
from jhessians.models.decoding import Sampling, decode

MOST_SEEDS = 2**32
HIGHEST_TEMPERATURE = 1e30  # whose product with any noise float32 holds


def generate(
    model: Decoder,
    tokens: Any,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    first_document: int = 0,
) -> np.ndarray:
    """The tokens with which a model goes on after prompts.

    Everything is compiled once for a number of prompts, the longest prompt's length and
    `max_new_tokens`. Keys and values of earlier tokens are kept, so a new token costs one token's
    forward pass. Where rotary positions depend on the document's length (rope types `dynamic` and
    `longrope`), each new token is what the whole document so far gives: the keys and values are
    computed again whenever a document's angles change. (transformers' `generate` does so for Phi-3;
    elsewhere it keeps keys that were rotated for a shorter document.)

    Args:
        model: A decoder, such as `load(...).model`, with a LoRA adapter or without.
        tokens: Prompts: an integer array [document, position], or a sequence of sequences of
            token ids, whose lengths may differ.
        max_new_tokens: How many tokens to add to each prompt.
        temperature: 0 for the likeliest token each time; else tokens are drawn from
            softmax(logits / temperature).
        seed: Of the draws. A draw depends on seed, document number and step alone: not on the other
            prompts, on padding, or on JAX's default random number generator.
        eos_token_id: Token, or tokens, after which a document is complete: the rest of its row
            repeats that token. Default none.
        first_document: Number of the first prompt, from which the others are counted: whoever
            splits prompts into several calls gets the same draws with it.

    Returns:
        Token ids without the prompts, int32 [document, new token].

    Raises:
        DatasetError: If `tokens` are no token ids of the model, or a prompt is empty.
        ConfigError: If an option makes no sense, or a prompt with its new tokens is longer than the
            model's positions.
        TypeError: If `model` is no decoder.
    """
    if not isinstance(model, Decoder):
        raise TypeError(
            f"generate got a {type(model).__name__}; expected a decoder, such as load(...).model"
        )
    prompts = _prompts(tokens, model.config)
    new_tokens = _whole_number("max_new_tokens", max_new_tokens, 1, MOST_SEEDS)
    longest = max(map(len, prompts))
    if longest + new_tokens > model.config.positions:
        raise ConfigError(
            f"max_new_tokens {new_tokens} after a prompt of {longest} tokens is longer than the "
            f"{model.config.positions} positions of the model; ask for fewer, or shorten the prompt"
        )
    number = _whole_number("first_document", first_document, 0, MOST_SEEDS - len(prompts))
    ends = _ends(eos_token_id, model.config)
    padded = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    # Whatever the caller's configuration of random numbers is, the draws are the same.
    with multiplying(HIGHEST), jax.threefry_partitionable(True):
        sampling = _sampling(temperature, seed, number, len(prompts))
        found = decode(
            *nnx.split(model), jnp.asarray(padded), jnp.asarray(lengths), jnp.asarray(ends),
            sampling, new_tokens=new_tokens,
        )  # fmt: skip
    return np.asarray(found)


def _sampling(temperature: Any, seed: Any, first: int, documents: int) -> Sampling | None:
    """How to draw, or None for the likeliest token."""
    valid = isinstance(temperature, int | float | np.number) and not isinstance(temperature, bool)
    if not valid or not 0 <= temperature <= HIGHEST_TEMPERATURE:
        raise ConfigError(
            f"temperature is {temperature!r}; expected a number from 0, which asks for the "
            f"likeliest tokens, to {HIGHEST_TEMPERATURE:g}"
        )
    key = jax.random.key(np.uint32(_whole_number("seed", seed, 0, MOST_SEEDS)), impl="threefry2x32")
    if temperature == 0:
        return None
    numbers = np.arange(first, first + documents, dtype=np.uint32)
    return Sampling(jnp.float32(temperature), key, jnp.asarray(numbers))


def _prompts(tokens: Any, config: DecoderConfig) -> list[np.ndarray]:
    """Each document's token ids."""
    rows = tokens if isinstance(tokens, Sequence) else np.asarray(tokens)
    if isinstance(rows, np.ndarray) and rows.ndim != 2:
        raise DatasetError(
            f"tokens have the shape {rows.shape}; expected [document, position], or a list of "
            "token lists"
        )
    if len(rows) == 0:
        raise DatasetError("tokens hold no prompt; expected at least one")
    prompts = [np.asarray(row) for row in rows]
    for number, prompt in enumerate(prompts):
        if prompt.size == 0:
            raise DatasetError(
                f"prompt {number} is empty; expected at least one token, such as the tokenizer's "
                "beginning-of-sequence token"
            )
        if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
            raise DatasetError(
                f"prompt {number} is an array {prompt.dtype}{list(prompt.shape)}; expected a list "
                "of token ids, which a tokenizer makes of a text"
            )
        outside = prompt[(prompt < 0) | (prompt >= config.vocabulary_size)]
        if outside.size:
            raise DatasetError(
                f"prompt {number} has the token {outside[0]}; expected ids from 0 to "
                f"{config.vocabulary_size - 1}; use the model's own tokenizer"
            )
    return prompts


def _ends(eos_token_id: Any, config: DecoderConfig) -> np.ndarray:
    """The tokens that complete a document, [token]."""
    if eos_token_id is None:
        return np.zeros(0, np.int32)
    several = isinstance(eos_token_id, Sequence | np.ndarray) and not isinstance(eos_token_id, str)
    given = list(eos_token_id) if several else [eos_token_id]
    limit = config.vocabulary_size
    return np.array([_whole_number("eos_token_id", each, 0, limit) for each in given], np.int32)


def _whole_number(name: str, value: Any, least: int, limit: int) -> int:
    """An option as an int from `least` up to but without `limit`."""
    try:
        number = index(value) if not isinstance(value, bool) else None
    except TypeError:
        number = None
    if number is None or not least <= number < limit:
        raise ConfigError(
            f"{name} is {value!r}; expected a whole number from {least} to {limit - 1}"
        )
    return number
