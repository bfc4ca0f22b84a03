"""Our list of a torch model's parameters against the model's own."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

import converters
from converters import parameter_order
from converters.parameter_order import MODULE_ORDERS, named_parameters
from jhessians.errors import CheckpointError

# Settings without which a family's config class gives no model, or none that we support.
SETTINGS = {
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "nemotron": {"num_hidden_layers": 2, "num_key_value_heads": 8, "head_dim": 128},
}


@pytest.mark.parametrize("family", sorted(set(MODULE_ORDERS) & set(converters.supported())))
def test_names_shapes_and_order_are_the_models_own(family):
    config = CONFIG_MAPPING[family](**SETTINGS.get(family, {"num_hidden_layers": 2}))
    with torch.device("meta"):  # its full width, without memory
        model = AutoModelForCausalLM.from_config(config)
    ours, theirs = named_parameters(config), list(model.named_parameters())
    assert [p.shape for p in ours] == [tuple(p.shape) for _, p in theirs]
    head = {"embed_out.weight": "lm_head.weight"}  # renamed in transformers 5, not in the files
    assert [head.get(p.name, p.name) for p in ours] == [name for name, _ in theirs]
    base = {module: name for name, module in model.base_model.named_modules()}
    linears = {}
    for name, module in model.named_modules():
        if module in base and isinstance(module, torch.nn.Linear | Conv1D):
            linears[f"{name}.weight"] = base[module]
    found = {p.name: p.module for p in ours if p.module and p.name.endswith(".weight")}
    assert found == linears
    assert any(p.transposed for p in ours) == (family == "gpt2")


def test_biases_belong_to_their_modules():
    found = {p.name: p for p in named_parameters(GPT2Config(n_layer=1))}
    assert found["transformer.h.0.attn.c_attn.bias"].module == "h.0.attn.c_attn"
    assert found["transformer.h.0.attn.c_attn.weight"].transposed
    assert not found["transformer.h.0.attn.c_attn.bias"].transposed
    assert found["transformer.h.0.ln_1.bias"].module is None


def test_a_family_of_unknown_order_is_refused(monkeypatch):
    monkeypatch.setattr(parameter_order, "MODULE_ORDERS", {"llama": ()})
    with pytest.raises(CheckpointError, match="order of a gpt_neox model's parameters") as caught:
        named_parameters(GPTNeoXConfig(num_hidden_layers=1))
    assert "\n" not in str(caught.value)
