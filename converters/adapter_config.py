"""adapter_config.json, as far as plain LoRA goes: which modules, of which rank and at what scale.

Every setting is read here, or known to leave the finished model as it is, or must be at rest.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from jhessians.errors import CheckpointError

READ = frozenset({
    "peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora",
    "rank_pattern", "alpha_pattern", "init_lora_weights", "bias", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern",
})  # fmt: skip
NO_EFFECT = frozenset({
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "runtime_config", "task_type",
})  # fmt: skip
"""Settings that, with those of `READ` as we accept them, leave the finished model as it is."""

OWN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base model's weights alone."""

MERGE = "merge it into its base model (peft's merge_and_unload) and give that"


def check(settings: Mapping[str, Any], path: str) -> None:
    """Refuse adapters of another kind than scale · (x A) B beside linears.

    Args:
        settings: The table in adapter_config.json.
        path: Of that file, for messages.

    Raises:
        CheckpointError: If a setting is not one of plain LoRA, isn't known or makes no sense.
    """
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path} has the peft_type {kind!r}; expected 'LORA'; {MERGE}")
    start = settings.get("init_lora_weights")
    if not any(start is value or start == value for value in OWN_INITS):
        raise CheckpointError(
            f"{path} has init_lora_weights {start!r}, which changes the base model's weights too; "
            "expected an adapter of the unchanged base; convert it when saving it with peft "
            "(path_initial_model_for_weight_conversion)"
        )
    bias = settings.get("bias", "none")
    refused = {"bias": bias} if bias != "none" else {}
    refused |= {n: v for n, v in settings.items() if v and n not in READ | NO_EFFECT}
    if refused:
        name, value = next(iter(refused.items()))
        raise CheckpointError(
            f"{path} sets {name} to {value!r}; expected plain LoRA, which has only lora_A and "
            f"lora_B beside linears; {MERGE}"
        )
    patterns = {name: settings.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, given in patterns.items():
        if not isinstance(given, dict) or not all(map(_is_pattern, given)):
            raise CheckpointError(
                f"{path} has {name} {given!r}; expected a table of patterns and numbers; correct it"
            )
    numbers = [("r", settings.get("r")), ("lora_alpha", settings.get("lora_alpha"))]
    for name, value in numbers + [(name, v) for name, p in patterns.items() for v in p.values()]:
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise CheckpointError(
                f"{path} has {name} {value!r}; expected a positive number; correct it"
            )
    targets = settings.get("target_modules") or []
    if not (isinstance(targets, list) or _is_pattern(targets)):
        raise CheckpointError(
            f"{path} has target_modules {targets!r}; expected names or one pattern; correct it"
        )


def rank_and_scale(settings: Mapping[str, Any], module: str) -> tuple[int, float]:
    """A module's rank and scale; patterns match the ends of names, the first one wins."""

    def own(patterns: str, default: str) -> Any:
        given = settings.get(patterns) or {}
        match = (v for k, v in given.items() if re.match(rf"(.*\.)?({k})$", module))
        return next(match, settings[default])

    rank, alpha = own("rank_pattern", "r"), own("alpha_pattern", "lora_alpha")
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def aims_at(settings: Mapping[str, Any]) -> Callable[[str], bool]:
    """Tells which modules the settings name, where they don't leave some out by other means."""
    targets = settings.get("target_modules")
    if settings.get("exclude_modules") or settings.get("layers_to_transform") is not None:
        return lambda name: False
    if isinstance(targets, str):
        return lambda name: targets != "all-linear" and bool(re.fullmatch(targets, name))
    return lambda name: any(name == t or name.endswith(f".{t}") for t in targets or ())


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return isinstance(value, str)
