"""A family of one's own: InternLM2, which transformers knows only as code in its checkpoints.

    python examples/own_family.py

A family is a function that reads the checkpoint's config, and a table that says which tensor holds
which parameter of the decoder. Loading, checking, saving and the modules' names follow.
"""

import tempfile

import jax.numpy as jnp
from flax import nnx
from transformers import PretrainedConfig

from converters import (  # isort: skip
    Family, Rule, create, decoder, head_size, linear, load, norm, register, rms, save,
)  # fmt: skip
from jhessians import RopeConfig

OURS, THEIRS = "layers.blocks", "model.layers.{layer}"


def decoder_config(config):
    """Llama's, with one linear for each key-value head's queries, its key, its value."""
    rope = RopeConfig(head_size(config), theta=config.rope_theta)
    return decoder(config, norm=rms(config), ropes=[rope], attention={"fused": "groups"})


INTERNLM2 = Family(
    model_type="internlm2",
    architecture="InternLM2ForCausalLM",
    base_prefix="model",
    config=decoder_config,
    rules=(
        Rule("embedding", "model.tok_embeddings.weight"),
        *norm(f"{OURS}.attention_norm", f"{THEIRS}.attention_norm"),
        *linear(f"{OURS}.attention.query_key_value", f"{THEIRS}.attention.wqkv"),
        *linear(f"{OURS}.attention.output", f"{THEIRS}.attention.wo"),
        *norm(f"{OURS}.mlp_norm", f"{THEIRS}.ffn_norm"),
        *linear(f"{OURS}.mlp.gate", f"{THEIRS}.feed_forward.w1"),
        *linear(f"{OURS}.mlp.up", f"{THEIRS}.feed_forward.w3"),
        *linear(f"{OURS}.mlp.down", f"{THEIRS}.feed_forward.w2"),
        *norm("final_norm", "model.norm"),
        Rule("head", "output.weight"),
    ),
)

if __name__ == "__main__":
    register(INTERNLM2)
    Config = type("Config", (PretrainedConfig,), {"model_type": "internlm2"})
    config = Config(
        vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        rms_norm_eps=1e-5, rope_theta=1e6, hidden_act="silu", tie_word_embeddings=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        save(create(config, rngs=nnx.Rngs(0)), f"{folder}/model")
        model = load(f"{folder}/model").model
    print(model.layers.blocks.attention.query_key_value.name, model(jnp.arange(9)[None]).shape)
