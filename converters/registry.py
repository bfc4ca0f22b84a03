"""Which kinds of checkpoints there are.

`register` is open to everybody: a family of one's own is a `Family`, which is a config function
and a table.
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from converters import (
    bloom,
    cohere,
    exaone4,
    falcon,
    gemma,
    glm4,
    gpt2,
    gpt_neo,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    helium,
    llama,
    mistral,
    nemotron,
    olmo,
    opt,
    phi,
    phi3,
    qwen,
    smollm3,
    stablelm,
    starcoder2,
)
from converters.origin import Origin
from converters.reader import read_json
from converters.rules import Family, module_names
from converters.settings import check_neutral, check_sizes
from jhessians.errors import CheckpointError, quoted, shown
from jhessians.models.config import DecoderConfig
from jhessians.models.decoder import Decoder

_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make checkpoints of `family.model_type` loadable.

    Returns:
        The same family, so that a module can register and name it in one line.

    Raises:
        ValueError: If there is another family of that name.
    """
    if _FAMILIES.setdefault(family.model_type, family) is not family:
        raise ValueError(f"a family for model_type {family.model_type!r} exists already")
    return family


def supported() -> tuple[str, ...]:
    """Every `model_type` that can be loaded, sorted."""
    return tuple(sorted(_FAMILIES))


def families() -> tuple[Family, ...]:
    """Every registered family, by `model_type`."""
    return tuple(_FAMILIES[model_type] for model_type in supported())


def family_of(config: Any) -> Family:
    """The family of a config of transformers', in the variant that the config asks for.

    Returns:
        What reads and writes checkpoints like this one.

    Raises:
        CheckpointError: If there is none; the message says which there are.
    """
    family = _family(config.model_type, "this config")
    return family if family.variant is None else family.variant(family, config)


def decoder_config(config: Any) -> DecoderConfig:
    """What our decoder needs to know of a config of transformers'.

    Returns:
        A config whose numbers of heads go together.

    Raises:
        CheckpointError: If the config asks for something that the decoder doesn't have.
    """
    check_sizes(config)
    family = family_of(config)
    check_neutral(family, config)
    try:
        ours = family.config(config)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Settings of the wrong kind: a word for a number, a table without its entries.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(
            f"config.json isn't a valid {family.model_type} config: {reason}; compare it with the "
            "model's original one"
        ) from error
    _check_decoder(ours)
    heads, shared = ours.attention.heads, ours.attention.key_value_heads
    if heads % shared:
        raise CheckpointError(
            f"config.json shares num_key_value_heads {shared} among {heads} "
            "heads; expected a divisor of the heads"
        )
    return ours


def _check_decoder(ours: DecoderConfig) -> None:
    """Refuse a decoder with a part of no size."""
    attention, mlps = ours.attention, [ours.mlp]
    if ours.experts is not None:
        mlps = [each for each in (ours.experts.mlp, ours.experts.shared) if each is not None]
    sizes = {
        "features per head": [attention.head_size],
        "heads": [attention.heads, attention.key_value_heads],
        "features that are rotated": [rope.dimensions for rope in attention.ropes],
        "features of an MLP": [mlp.size for mlp in mlps],
        "positions of a window": [size for size in attention.windows if size is not None],
        "positions": [ours.positions],
    }
    for what, counts in sizes.items():
        for count in counts:
            if type(count) is not int or count < 1:
                raise CheckpointError(
                    f"config.json makes a decoder of {count!r} {what}; expected 1 or more; "
                    "compare it with the model's original one"
                )


def create(config: Any, *, dtype: Any = jnp.float32, rngs: nnx.Rngs) -> Decoder:
    """A model with random parameters, as `converters.save` can write it.

    Args:
        config: transformers' config.
        dtype: Of the parameters.
        rngs: Seeds them.

    Returns:
        The module, which knows its family and config, so that its linears have the checkpoint's
            names.

    Raises:
        CheckpointError: As for `decoder_config`.
    """
    model = Decoder(decoder_config(config), dtype=jnp.dtype(dtype), rngs=rngs)
    name_linears(model, family_of(config))
    model.origin = Origin(config)
    return model


def name_linears(model: Decoder, family: Family) -> None:
    """Name every linear as Hugging Face's base model does, which is how bergson knows it."""
    for path, name in module_names(family).items():
        module: Any = model
        for step in path.split("."):
            module = getattr(module, step, None)
        if module is not None:
            module.name = name


def read_config(folder: Path) -> Any:
    """transformers' config of a checkpoint folder; runs no code from the folder.

    Returns:
        An instance of the class that transformers has for the `model_type`.

    Raises:
        CheckpointError: If there is no config.json, or it is of an unsupported or quantised model,
            or transformers refuses it.
    """
    path = folder / "config.json"
    if not path.exists():
        hint = (
            "it is an adapter; give its base model"
            if (folder / "adapter_config.json").is_file()
            else "expected a folder that save_pretrained wrote"
        )
        raise CheckpointError(f"{folder} has no config.json; {hint}")
    raw = read_json(path)
    text = raw.get("text_config")
    if raw.get("model_type") not in supported() and isinstance(text, dict):
        raise CheckpointError(
            f"{path} describes a multimodal model ({raw.get('model_type')}); expected one of text "
            f"alone; save its text model, of model_type {text.get('model_type', 'unknown')!r}, "
            "as a checkpoint of its own"
        )
    family = _family(raw.get("model_type"), path)
    if quantised := raw.get("quantization_config"):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "?"
        raise CheckpointError(
            f"{path} describes a quantised checkpoint ({method}); expected plain floating-point "
            "weights; give the model that it was made from"
        )
    from transformers import CONFIG_MAPPING, PretrainedConfig

    if family.model_type in CONFIG_MAPPING:
        kind = CONFIG_MAPPING[family.model_type]
    else:  # a class, or the model_type would be lost when it is saved
        kind = type("OwnConfig", (PretrainedConfig,), {"model_type": family.model_type})
    try:
        return kind.from_dict(raw)
    except Exception as error:  # transformers raises whatever the offending setting leads to
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} isn't a valid {family.model_type} config: {reason}"
        ) from None


def _family(model_type: Any, where: Any) -> Family:
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        word = isinstance(model_type, str | None)
        given = shown(json.dumps(model_type)) if word else quoted(model_type)
        raise CheckpointError(
            f"{where} has the model_type {given}, which is not supported; "
            f"expected one of {', '.join(supported())}"
        )
    return _FAMILIES[model_type]


BUILT_IN = (
    bloom, cohere, exaone4, falcon, gemma, glm4, gpt2, gpt_neo, gpt_neox, gpt_oss, gptj, granite,
    helium, llama, mistral, nemotron, olmo, opt, phi, phi3, qwen, smollm3, stablelm, starcoder2,
)  # fmt: skip

for _module in BUILT_IN:
    for _one in _module.FAMILIES:
        register(_one)
