"""The order in which torch numbers a model's parameters, which is that of transformers' classes.

An optimizer's state is stored by these numbers. Neither checkpoint files nor configs tell them, so
they stand here, a table for each kind of model: modules as transformers' class makes them; a
weight comes before its bias.
"""

import itertools
import re
from typing import Any

from flax import nnx

from converters import registry, rules
from converters.loading import parameter_shapes
from jhessians.errors import CheckpointError
from jhessians.interop.optimizer_state import Parameter

_LLAMA = (
    "model.embed_tokens",
    "model.layers.{layer}.self_attn.q_proj",
    "model.layers.{layer}.self_attn.k_proj",
    "model.layers.{layer}.self_attn.v_proj",
    "model.layers.{layer}.self_attn.o_proj",
    "model.layers.{layer}.mlp.gate_proj",
    "model.layers.{layer}.mlp.up_proj",
    "model.layers.{layer}.mlp.down_proj",
    "model.layers.{layer}.input_layernorm",
    "model.layers.{layer}.post_attention_layernorm",
    "model.norm",
    "lm_head",
)
_GPT_NEOX = (
    "gpt_neox.embed_in",
    "gpt_neox.layers.{layer}.input_layernorm",
    "gpt_neox.layers.{layer}.post_attention_layernorm",
    "gpt_neox.layers.{layer}.attention.query_key_value",
    "gpt_neox.layers.{layer}.attention.dense",
    "gpt_neox.layers.{layer}.mlp.dense_h_to_4h",
    "gpt_neox.layers.{layer}.mlp.dense_4h_to_h",
    "gpt_neox.final_layer_norm",
    "embed_out",
)
_GPT2 = (
    "transformer.wte",
    "transformer.wpe",
    "transformer.h.{layer}.ln_1",
    "transformer.h.{layer}.attn.c_attn",
    "transformer.h.{layer}.attn.c_proj",
    "transformer.h.{layer}.ln_2",
    "transformer.h.{layer}.mlp.c_fc",
    "transformer.h.{layer}.mlp.c_proj",
    "transformer.ln_f",
    "lm_head",
)

MODULE_ORDERS: dict[str, tuple[str, ...]] = {
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}
"""`model_type` → modules with parameters, in order; `{layer}` is the layer's number."""


def named_parameters(config: Any) -> list[Parameter]:
    """What `named_parameters()` of transformers' model of this config lists, in its order.

    Args:
        config: transformers' config.

    Raises:
        CheckpointError: If the family isn't supported, or its order isn't known.
    """
    family = registry.family_of(config)
    order = MODULE_ORDERS.get(family.model_type)
    if order is None:
        raise CheckpointError(
            f"the order of a {family.model_type} model's parameters isn't known; expected one of "
            f"{', '.join(MODULE_ORDERS)}: estimate second moments from the data instead"
        )
    model = nnx.eval_shape(lambda: registry.create(config, rngs=nnx.Rngs(0)))
    slots = rules.slots(family, parameter_shapes(model))
    places = _places(order)

    def place(name: str) -> tuple[int, int, int, bool]:
        module = name.rpartition(".")[0]
        layer = re.search(r"\.(\d+)\.", module)
        segment, position = places[re.sub(r"\.\d+\.", ".{layer}.", module)]
        return segment, int(layer[1]) if layer else 0, position, name.endswith(".bias")

    prefix = f"{family.base_prefix}."
    weights = {slot.parameter for slot in slots.values() if slot.parameter.endswith(".kernel")}
    parameters = []
    for name in sorted(slots, key=place):
        slot = slots[name]
        owner = slot.parameter.rpartition(".")[0]
        module = None
        if f"{owner}.kernel" in weights:
            module = name.rpartition(".")[0].removeprefix(prefix)
        is_weight = slot.parameter.endswith(".kernel")
        # Our kernels are [in, out]: what is taken as it is, is stored so.
        transposed = is_weight and slot.transform is rules.IDENTITY
        parameters.append(Parameter(name, slot.shape, module, transposed))
    return parameters


def _places(order: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Each module's part of the model, before, in or after its layers, and its place there."""
    runs = itertools.groupby(order, key=lambda module: "{layer}" in module)
    return {
        module: (segment, position)
        for segment, (_, modules) in enumerate(runs)
        for position, module in enumerate(modules)
    }
