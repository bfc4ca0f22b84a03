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


def _order(before: str, layer: str, inside: str, after: str) -> tuple[str, ...]:
    """Modules before the layers, in layer `layer`, and after; words are names."""
    return (*before.split(), *(f"{layer}.{name}" for name in inside.split()), *after.split())


# Not every model of this kind has all of these.
_LLAMA = _order(
    "model.embed_tokens",
    "model.layers.{layer}",
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj self_attn.dense "
    "self_attn.q_norm self_attn.k_norm "
    "mlp.gate_proj mlp.gate_up_proj mlp.up_proj mlp.down_proj mlp.fc1 mlp.fc2 mlp.c_fc mlp.c_proj "
    "input_layernorm post_attention_layernorm pre_feedforward_layernorm "
    "post_feedforward_layernorm post_self_attn_layernorm post_mlp_layernorm",
    "model.norm model.final_layernorm lm_head",
)
_ALIKE = (
    "cohere", "cohere2", "exaone4", "gemma", "gemma2", "gemma3_text", "glm4", "granite", "helium",
    "llama", "mistral", "nemotron", "olmo", "olmo2", "olmo3", "phi", "qwen2", "qwen3", "smollm3",
    "starcoder2",
)  # fmt: skip

MODULE_ORDERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_ALIKE, _LLAMA),
    "bloom": _order(
        "transformer.word_embeddings transformer.word_embeddings_layernorm",
        "transformer.h.{layer}",
        "input_layernorm self_attention.query_key_value self_attention.dense "
        "post_attention_layernorm mlp.dense_h_to_4h mlp.dense_4h_to_h",
        "transformer.ln_f lm_head",
    ),
    "gpt2": _order(
        "transformer.wte transformer.wpe",
        "transformer.h.{layer}",
        "ln_1 attn.c_attn attn.c_proj ln_2 mlp.c_fc mlp.c_proj",
        "transformer.ln_f lm_head",
    ),
    "gpt_neo": _order(
        "transformer.wte transformer.wpe",
        "transformer.h.{layer}",
        "ln_1 attn.attention.k_proj attn.attention.v_proj attn.attention.q_proj "
        "attn.attention.out_proj ln_2 mlp.c_fc mlp.c_proj",
        "transformer.ln_f lm_head",
    ),
    "gpt_neox": _order(
        "gpt_neox.embed_in",
        "gpt_neox.layers.{layer}",
        "input_layernorm post_attention_layernorm attention.query_key_value attention.dense "
        "mlp.dense_h_to_4h mlp.dense_4h_to_h",
        "gpt_neox.final_layer_norm embed_out",
    ),
    "gptj": _order(
        "transformer.wte",
        "transformer.h.{layer}",
        "ln_1 attn.k_proj attn.v_proj attn.q_proj attn.out_proj mlp.fc_in mlp.fc_out",
        "transformer.ln_f lm_head",
    ),
    "opt": _order(
        "model.decoder.embed_tokens model.decoder.embed_positions model.decoder.final_layer_norm",
        "model.decoder.layers.{layer}",
        "self_attn.k_proj self_attn.v_proj self_attn.q_proj self_attn.out_proj "
        "self_attn_layer_norm fc1 fc2 final_layer_norm",
        "lm_head",
    ),
    "phi3": _order(
        "model.embed_tokens",
        "model.layers.{layer}",
        "self_attn.o_proj self_attn.qkv_proj mlp.gate_up_proj mlp.down_proj input_layernorm "
        "post_attention_layernorm",
        "model.norm lm_head",
    ),
}
"""`model_type` → modules with parameters, in order; `{layer}` is the layer's number."""


def named_parameters(config: Any) -> list[Parameter]:
    """What `named_parameters()` of transformers' model of this config lists, in its order.

    Args:
        config: transformers' config.

    Returns:
        Name and shape of each; tied parameters once, where they come first.

    Raises:
        CheckpointError: If the family isn't supported, or its order isn't known.
    """
    family = registry.family_of(config)
    places = _places(MODULE_ORDERS.get(family.model_type, ()))
    model = nnx.eval_shape(lambda: registry.create(config, rngs=nnx.Rngs(0)))
    homes = rules.homes(family, parameter_shapes(model))
    if not {_template(name) for name in homes} <= set(places):
        raise CheckpointError(
            f"the order of a {family.model_type} model's parameters isn't known; expected one of "
            f"{', '.join(MODULE_ORDERS)}: estimate second moments from the data instead"
        )

    def place(name: str) -> tuple[int, int, int, bool]:
        layer = re.search(r"\.(\d+)\.", name)
        segment, position = places[_template(name)]
        return segment, int(layer[1]) if layer else 0, position, name.endswith(".bias")

    prefix = f"{family.base_prefix}."
    weights = {home.parameter for home in homes.values() if home.parameter.endswith(".kernel")}
    parameters = []
    for name in sorted(homes, key=place):
        home = homes[name]
        owner = home.parameter.rpartition(".")[0]
        module = None
        if f"{owner}.kernel" in weights:
            module = name.rpartition(".")[0].removeprefix(prefix)
        is_weight = home.parameter.endswith(".kernel")
        # Our kernels are [in, out]: what is taken as it is, is stored so.
        transposed = is_weight and home.transform is rules.IDENTITY
        parameters.append(Parameter(name, home.shape, module, transposed))
    return parameters


def _template(name: str) -> str:
    """The module of a parameter, with `{layer}` for its number."""
    return re.sub(r"\.\d+\.", ".{layer}.", name.rpartition(".")[0])


def _places(order: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Each module's part of the model, before, in or after its layers, and its place there."""
    runs = itertools.groupby(order, key=lambda module: "{layer}" in module)
    return {
        module: (segment, position)
        for segment, (_, modules) in enumerate(runs)
        for position, module in enumerate(modules)
    }
