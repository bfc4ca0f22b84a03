"""Logits equal transformers', and a model that is wrong in one setting is told apart."""

import pytest
import torch

from converters import load
from tests import tolerances
from tests.converters.comparison import documents, error, logit_error, our_logits, their_logits

# Documents are up to 50 tokens long, beyond the original context of 32.
SHORT = {"max_position_embeddings": 32}


def _rope(kind, **settings):
    return {**SHORT, "rope_parameters": {"rope_type": kind, "rope_theta": 5e3, **settings}}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS = {
    "llama": ("llama", {}),
    "llama-tied-biased": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-ungrouped-wide-heads": (
        "llama",
        {"num_key_value_heads": 4, "head_dim": 16, "hidden_act": "gelu"},
    ),
    "llama-linear": ("llama", _rope("linear", factor=2.5)),
    "llama-dynamic": ("llama", _rope("dynamic", factor=2.0)),
    "llama-llama3": (
        "llama",
        {**_rope("llama3", factor=8.0, **LLAMA3), "max_position_embeddings": 128},
    ),
    "llama-yarn": ("llama", _rope("yarn", factor=4.0, beta_fast=8.0)),
    "llama-yarn-all-settings": (
        "llama",
        _rope("yarn", factor=4.0, mscale=0.7, mscale_all_dim=1.0, truncate=False),
    ),
    "gpt_neox-parallel": ("gpt_neox", {"rotary_pct": 0.25}),
    "gpt_neox-sequential": (
        "gpt_neox",
        {"use_parallel_residual": False, "rotary_pct": 1.0, "attention_bias": False},
    ),
    "gpt_neox-dynamic-tied": (
        "gpt_neox",
        {**_rope("dynamic", factor=2.0, partial_rotary_factor=0.5), "tie_word_embeddings": True},
    ),
    "gpt2": ("gpt2", {}),
    "gpt2-scaled-by-layer": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "n_inner": None},
    ),
    "gpt2-unscaled-untied": (
        "gpt2",
        {"scale_attn_weights": False, "activation_function": "relu", "tie_word_embeddings": False},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant, checkpoint):
    family, settings = VARIANTS[variant]
    assert logit_error(checkpoint(family, **settings)) < tolerances.LOGITS


TWINS = {
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 11000.0}}),
    "llama-epsilon": ("llama", {"rms_norm_eps": 1e-3}),
    "llama-heads": (
        "llama",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24},
    ),
    "gpt_neox-theta": (
        "gpt_neox",
        {"rope_parameters": {"rope_theta": 11000.0, "partial_rotary_factor": 0.5}},
    ),
    "gpt_neox-epsilon": ("gpt_neox", {"layer_norm_eps": 1e-3}),
    "gpt_neox-heads": ("gpt_neox", {"num_attention_heads": 2}),
    "gpt2-epsilon": ("gpt2", {"layer_norm_epsilon": 1e-3}),
    "gpt2-heads": ("gpt2", {"n_head": 2}),
}


@pytest.fixture(scope="module")
def truth(checkpoint):
    cache = {}

    def get(family):
        if family not in cache:
            cache[family] = their_logits(checkpoint(family), documents())
        return cache[family]

    return get


@pytest.mark.parametrize("twin", TWINS)
def test_a_wrong_twin_fails(twin, checkpoint, altered, truth):
    family, settings = TWINS[twin]
    wrong = altered(checkpoint(family), **settings)
    ours = our_logits(load(wrong).model, documents())
    assert error(ours, truth(family)) > 10 * tolerances.LOGITS


def test_the_short_context_matters_to_dynamic_rope(checkpoint, altered):
    """Documents within the original context turn as without any scaling, longer ones don't."""
    folder = checkpoint("llama", **_rope("dynamic", factor=2.0))
    plain = altered(folder, rope_parameters={"rope_type": "default", "rope_theta": 5e3})
    batch = documents()
    short, longest, _ = (
        error([a], [b])
        for a, b in zip(
            our_logits(load(folder).model, batch), our_logits(load(plain).model, batch), strict=True
        )
    )
    assert short < tolerances.LOGITS < longest / 10


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_bfloat16_loads_and_agrees_to_its_rounding(family, checkpoint):
    folder = checkpoint(family, dtype=torch.bfloat16)
    model = load(folder, dtype="stored").model
    assert model.embedding.dtype == model.layers.blocks.mlp.down.kernel.dtype == "bfloat16"
    batch = documents()[:1]  # torch's bfloat16 is slow on CPU
    ours, theirs = our_logits(model, batch), their_logits(folder, batch, "bfloat16")
    exact = their_logits(folder, batch)
    # Both round at every step, so neither may be much farther from the truth than the other.
    assert error(ours, exact) < 2 * error(theirs, exact) < 0.2
