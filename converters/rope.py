"""Rotary position settings of a Hugging Face config → `RopeConfig`.

The constants and their defaults are transformers' (`modeling_rope_utils.py`), which brings the
older spellings (`rope_theta`, `rope_scaling`, `rotary_pct`) into one `rope_parameters`.
"""

import math
from collections.abc import Mapping
from typing import Any

from jhessians.errors import CheckpointError
from jhessians.models.config import RopeConfig

_SETTINGS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}
    ),
    "longrope": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "short_factor",
         "long_factor"}
    ),
    "yarn": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
         "beta_slow", "mscale", "mscale_all_dim", "truncate"}
    ),
}  # fmt: skip
_ALWAYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
# Written by tools that keep every variant's settings in one table; without effect at these values.
_OPTIONAL = {"attn_factor": (1, None), "finetuned": (True, False, None)}


def rope_config(
    config: Any,
    head_size: int,
    *,
    partial: bool = False,
    interleaved: bool = False,
    layer_type: str | None = None,
) -> RopeConfig:
    """The rotary positions of a model's layers.

    Args:
        config: transformers' config.
        head_size: Features per head.
        partial: Whether the architecture can rotate only the first features of a head.
        interleaved: Whether it rotates pairs of neighbours.
        layer_type: Of the layers that are meant, where a config has settings for each type.

    Returns:
        Rotated features, base, and how the frequencies are stretched for long documents.

    Raises:
        CheckpointError: If the variant is unknown, or a setting is missing, unknown or senseless.
    """
    given: Mapping[str, Any] = config.rope_parameters or {}
    if layer_type is not None:
        given = given.get(layer_type) or {}
    variant = given.get("rope_type", "default")
    if variant not in _SETTINGS:
        raise CheckpointError(
            f"config.json asks for rope_type {variant!r}; expected one of {', '.join(_SETTINGS)}"
        )
    for name, value in given.items():
        known = name in _ALWAYS | _SETTINGS[variant] or value in _OPTIONAL.get(name, ())
        if not known and value is not None:
            raise CheckpointError(
                f"config.json sets {name} for rope_type {variant!r}, which has no such setting; "
                f"expected {', '.join(sorted(_SETTINGS[variant])) or 'rope_theta alone'}"
            )

    def number(name: str, default: float | None = None) -> float:
        value = given.get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise CheckpointError(
                f"config.json sets {name} of rope_type {variant!r} to {value!r}; "
                "expected a positive number"
            )
        return float(value)

    share = number("partial_rotary_factor", 1.0)
    dimensions = int(head_size * share)
    if not 2 <= dimensions <= head_size or (share != 1 and not partial):
        raise CheckpointError(
            f"config.json rotates {share:g} of {head_size} features per head; expected "
            f"{'2 to all' if partial else 'all'} of them"
        )
    if variant == "dynamic" and dimensions < 4:
        raise CheckpointError(f"rope_type 'dynamic' rotates {dimensions} features; expected 4 on")
    theta = number("rope_theta", 10000.0)
    original = config.max_position_embeddings
    if variant in ("llama3", "yarn", "longrope"):
        original = number("original_max_position_embeddings", original)
    if variant == "default":
        factor = 1.0
    else:
        # longrope's factor may be left to the two contexts' ratio.
        ratio = config.max_position_embeddings / original if variant == "longrope" else None
        factor = number("factor", ratio)
    if variant == "longrope":
        return RopeConfig(
            dimensions, theta, variant, factor, int(original),
            short_factors=_wavelength_factors(given, "short_factor", dimensions),
            long_factors=_wavelength_factors(given, "long_factor", dimensions),
            scale=_longrope_scale(given, factor, original),
            interleaved=interleaved,
        )  # fmt: skip
    if variant != "yarn":
        return RopeConfig(
            dimensions, theta, variant, factor, int(original),
            interleaved=interleaved,
            low_frequency_factor=number("low_freq_factor", 1.0),
            high_frequency_factor=number("high_freq_factor", 4.0),
        )  # fmt: skip
    return RopeConfig(
        dimensions, theta, variant, factor, int(original),
        interleaved=interleaved,
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        truncate=bool(given.get("truncate", True)),
        scale=_yarn_scale(given, factor),
    )  # fmt: skip


def _yarn_scale(given: Mapping[str, Any], factor: float) -> float:
    """Factor on cosine and sine, equation 22 of arXiv:2309.00071 unless the config gives it."""

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    if given.get("mscale") and given.get("mscale_all_dim"):
        return temperature(given["mscale"]) / temperature(given["mscale_all_dim"])
    return temperature(1.0)


def _longrope_scale(given: Mapping[str, Any], factor: float, original: float) -> float:
    """Factor on cosine and sine, as LongRoPE's paper recommends unless the config gives it."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _wavelength_factors(given: Mapping[str, Any], name: str, dimensions: int) -> tuple[float, ...]:
    """A list of longrope's, one factor for each pair of features."""
    values = given.get(name)
    if not isinstance(values, list | tuple) or len(values) != dimensions // 2:
        length = len(values) if isinstance(values, list | tuple) else values
        raise CheckpointError(
            f"config.json gives {length} values of {name} for rope_type 'longrope'; "
            f"expected a list of {dimensions // 2}"
        )
    return tuple(float(value) for value in values)
