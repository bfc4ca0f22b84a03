"""Rotary position embeddings.

The angles of a document depend on that document alone: where a stretch depends on the length
(`dynamic`), it is the document's own length, never that of the batch it happens to be in.
"""

import math

import jax.numpy as jnp
import numpy as np

from jhessians.models.config import RopeConfig
from jhessians.typing import Array, Float, Int


def rotation(
    config: RopeConfig, lengths: Int[Array, " n"], positions: int
) -> tuple[Float[Array, "m s r"], Float[Array, "m s r"]]:
    """Cosine and sine of every position's angles.

    Args:
        config: Kind and constants.
        lengths: Tokens of each document.
        positions: S, the padded length.

    Returns:
        Two arrays [document or 1, position, dimensions / 2], float32.
    """
    frequencies = _frequencies(config, lengths)
    angles = jnp.arange(positions, dtype=jnp.float32)[None, :, None] * frequencies[:, None, :]
    scale = jnp.float32(config.scale)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
    x: Float[Array, "n s h d"], cosine: Float[Array, "m s r"], sine: Float[Array, "m s r"]
) -> Float[Array, "n s h d"]:
    """Rotate the pairs (x[k], x[k + r]) of each head by the angles of its position."""
    r = cosine.shape[-1]
    cosine, sine = (t[:, :, None, :].astype(x.dtype) for t in (cosine, sine))
    first, second, rest = x[..., :r], x[..., r : 2 * r], x[..., 2 * r :]
    rotated = [first * cosine - second * sine, second * cosine + first * sine, rest]
    return jnp.concatenate(rotated, axis=-1)


def _frequencies(config: RopeConfig, lengths: Int[Array, " n"]) -> Float[Array, "m r"]:
    """Radians per position, [document or 1, dimensions / 2].

    Rounded to float32 where the models' own code rounds: over thousands of positions an angle
    shows a difference in a frequency's last bit.
    """
    exponents = np.arange(0, config.dimensions, 2, dtype=np.float32) / np.float32(config.dimensions)
    wavelengths = np.power(config.theta, exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / wavelengths
    if config.kind == "dynamic":
        # Peng & Quesnelle's dynamic NTK-aware base, from the document's own length. The power of
        # the stretch alone is small, and so is its error.
        length = jnp.maximum(lengths, config.original_positions).astype(jnp.float32)
        stretch = config.factor * length / config.original_positions - (config.factor - 1)
        powers = -exponents * np.float32(config.dimensions / (config.dimensions - 2))
        return jnp.asarray(frequencies)[None, :] * stretch[:, None] ** jnp.asarray(powers)[None, :]
    stretched = {"default": lambda c, f: f, "linear": lambda c, f: f / np.float32(c.factor),
                 "llama3": _llama3, "yarn": _yarn}[config.kind](config, frequencies)  # fmt: skip
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
