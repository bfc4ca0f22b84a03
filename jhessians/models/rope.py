"""Rotary position embeddings.

The angles of a document depend on that document alone: where a stretch depends on the length
(`dynamic`, `longrope`), it is the document's own length, never that of the batch it happens to be
in.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jhessians.models.config import RopeConfig
from jhessians.typing import Array, Bool, Float, Int


def rotations(
    configs: Sequence[RopeConfig],
    lengths: Int[Array, " n"],
    positions: int | Int[Array, "n s"],
) -> tuple[Float[Array, "p m s r"], Float[Array, "p m s r"]]:
    """`rotation` of several kinds, stacked, and last of all the one that rotates nothing."""
    tables = [rotation(config, lengths, positions) for config in configs]
    cosines, sines = (jnp.broadcast_arrays(*tables_) for tables_ in zip(*tables, strict=True))
    nothing = jnp.ones_like(cosines[0]), jnp.zeros_like(sines[0])
    return jnp.stack([*cosines, nothing[0]]), jnp.stack([*sines, nothing[1]])


def rotation(
    config: RopeConfig, lengths: Int[Array, " n"], positions: int | Int[Array, "n s"]
) -> tuple[Float[Array, "m s r"], Float[Array, "m s r"]]:
    """Cosine and sine of every position's angles.

    Args:
        config: Kind and constants.
        lengths: Tokens of each document.
        positions: S, the padded length; or which positions are wanted, of each document.

    Returns:
        Two arrays [document or 1, position, dimensions / 2], float32.
    """
    frequencies = _frequencies(config, lengths)
    if isinstance(positions, int):
        numbers = jnp.arange(positions, dtype=jnp.float32)[None, :]
    else:
        numbers = positions.astype(jnp.float32)
    angles = numbers[:, :, None] * frequencies[:, None, :]
    scale = jnp.float32(config.scale)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def depends_on_length(configs: Sequence[RopeConfig]) -> bool:
    """Whether a document that grows may turn differently at the positions that it had before."""
    return any(config.variant in ("dynamic", "longrope") for config in configs)


def turns_differently(
    configs: Sequence[RopeConfig], before: Int[Array, " n"], after: Int[Array, " n"]
) -> Bool[Array, ""]:
    """Whether any document's angles change when the documents' lengths do."""
    changes = [(_frequencies(c, before) != _frequencies(c, after)).any() for c in configs]
    return jnp.stack(changes).any()


def rotate(
    x: Float[Array, "n s h d"],
    cosine: Float[Array, "m s r"],
    sine: Float[Array, "m s r"],
    *,
    interleaved: bool = False,
) -> Float[Array, "n s h d"]:
    """Rotate pairs of each head's first 2 r features by the angles of its position.

    Args:
        x: Queries or keys.
        cosine: Of the angles.
        sine: Of the angles.
        interleaved: Whether the pairs are (2 k, 2 k + 1), or (k, k + r).

    Returns:
        In the shape and dtype of `x`; features after the first 2 r are unchanged.
    """
    r = cosine.shape[-1]
    cosine, sine = (t[:, :, None, :].astype(x.dtype) for t in (cosine, sine))
    turning, rest = x[..., : 2 * r], x[..., 2 * r :]
    if interleaved:
        first, second = turning[..., ::2], turning[..., 1::2]
    else:
        first, second = turning[..., :r], turning[..., r:]
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    if interleaved:
        rotated = [jnp.stack(rotated, axis=-1).reshape(turning.shape)]
    return jnp.concatenate([*rotated, rest], axis=-1)


def _frequencies(config: RopeConfig, lengths: Int[Array, " n"]) -> Float[Array, "m r"]:
    """Radians per position, [document or 1, dimensions / 2].

    Rounded to float32 where the models' own code rounds: over thousands of positions an angle
    shows a difference in a frequency's last bit.

    Returns:
        One row for all documents, unless the stretch depends on a document's length.
    """
    exponents = np.arange(0, config.dimensions, 2, dtype=np.float32) / np.float32(config.dimensions)
    wavelengths = np.power(config.theta, exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / wavelengths
    if config.variant == "dynamic":
        # Peng & Quesnelle's dynamic NTK-aware base, from the document's own length. The power of
        # the stretch alone is small, and so is its error.
        length = jnp.maximum(lengths, config.original_positions).astype(jnp.float32)
        stretch = config.factor * length / config.original_positions - (config.factor - 1)
        powers = -exponents * np.float32(config.dimensions / (config.dimensions - 2))
        return jnp.asarray(frequencies)[None, :] * stretch[:, None] ** jnp.asarray(powers)[None, :]
    if config.variant == "longrope":
        # Ding et al. 2024, arXiv:2402.13753: two sets of factors, chosen by the document's length.
        factors = (np.array(f, np.float32) for f in (config.short_factors, config.long_factors))
        short, long = (jnp.asarray(np.float32(1) / (f * wavelengths))[None, :] for f in factors)
        return jnp.where((lengths > config.original_positions)[:, None], long, short)
    stretched = {"default": lambda c, f: f, "linear": lambda c, f: f / np.float32(c.factor),
                 "llama3": _llama3, "yarn": _yarn}[config.variant](config, frequencies)  # fmt: skip
    return jnp.asarray(stretched, jnp.float32)[None, :]


def _llama3(config: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Long wavelengths stretched, short ones kept, those between interpolated (Llama 3.1)."""
    rotations = config.original_positions * frequencies / (2 * np.pi)
    low, high = config.low_frequency_factor, config.high_frequency_factor
    keep = np.clip((rotations - low) / (high - low), 0, 1)
    return frequencies * keep + frequencies / config.factor * (1 - keep)


def _yarn(config: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Interpolation by parts, section 3.2 of Peng et al. 2023, arXiv:2309.00071."""

    def feature(rotations: float) -> float:
        context = config.original_positions / (rotations * 2 * math.pi)
        return config.dimensions * math.log(context) / (2 * math.log(config.theta))

    low, high = feature(config.beta_fast), feature(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dimensions - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(len(frequencies)) - low) / (high - low), 0, 1)
    return frequencies / config.factor * ramp + frequencies * (1 - ramp)
