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
    "yarn": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
         "beta_slow", "mscale", "mscale_all_dim", "truncate"}
    ),
}  # fmt: skip
_ALWAYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
# Written by tools that keep every kind's settings in one table; without effect at these values.
_OPTIONAL = {"attn_factor": (1, None), "finetuned": (True, False, None)}


def rope_config(config: Any, head_size: int, *, partial: bool = False) -> RopeConfig:
    """The rotary positions of a model all of whose layers share them.

    Args:
        config: transformers' config.
        head_size: Features per head.
        partial: Whether the architecture can rotate only the first features of a head.

    Raises:
        CheckpointError: If the kind is unknown, or a setting is missing, unknown or senseless.
    """
    given: Mapping[str, Any] = config.rope_parameters or {}
    kind = given.get("rope_type", "default")
    if kind not in _SETTINGS:
        raise CheckpointError(
            f"config.json asks for rope_type {kind!r}; expected one of {', '.join(_SETTINGS)}"
        )
    for name, value in given.items():
        known = name in _ALWAYS | _SETTINGS[kind] or value in _OPTIONAL.get(name, ())
        if not known and value is not None:
            raise CheckpointError(
                f"config.json sets {name} for rope_type {kind!r}, which has no such setting; "
                f"expected {', '.join(sorted(_SETTINGS[kind])) or 'rope_theta alone'}"
            )

    def number(name: str, default: float | None = None) -> float:
        value = given.get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise CheckpointError(
                f"config.json sets {name} of rope_type {kind!r} to {value!r}; "
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
    if kind == "dynamic" and dimensions < 4:
        raise CheckpointError(f"rope_type 'dynamic' rotates {dimensions} features; expected 4 on")
    theta = number("rope_theta", 10000.0)
    factor = 1.0 if kind == "default" else number("factor")
    original = config.max_position_embeddings
    if kind in ("llama3", "yarn"):
        original = number("original_max_position_embeddings", original)
    if kind != "yarn":
        return RopeConfig(
            dimensions, theta, kind, factor, int(original),
            low_frequency_factor=number("low_freq_factor", 1.0),
            high_frequency_factor=number("high_freq_factor", 4.0),
        )  # fmt: skip
    return RopeConfig(
        dimensions, theta, kind, factor, int(original),
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        truncate=bool(given.get("truncate", True)),
        scale=_yarn_scale(given, factor),
    )  # fmt: skip


def longest_document(config: Any, rope: RopeConfig) -> int:
    """Positions for which a model is meant: its context, or that stretched by its rope."""
    return max(config.max_position_embeddings, int(rope.original_positions * rope.factor))


def _yarn_scale(given: Mapping[str, Any], factor: float) -> float:
    """Factor on cosine and sine, equation 22 of arXiv:2309.00071 unless the config gives it."""

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    if given.get("mscale") and given.get("mscale_all_dim"):
        return temperature(given["mscale"]) / temperature(given["mscale_all_dim"])
    return temperature(1.0)
