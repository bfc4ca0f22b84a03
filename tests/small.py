"""Tiny models and data sets, filled by numpy: a test compiles nothing before it starts."""

import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jhessians.data.batching import Batch, iterate_batches, plan_batches
from jhessians.data.documents import Documents
from jhessians.models.config import (
    AttentionConfig,
    DecoderConfig,
    MLPConfig,
    NormConfig,
    RopeConfig,
)
from jhessians.models.decoder import Decoder


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of a process with so many virtual devices, for the rest those of the tests."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"


def fill(create: Callable[[], nnx.Module], seed: int = 0) -> nnx.Module:
    """A module with random parameters: kernels scaled by fan-in, vectors that are not trivial."""
    graph, state = nnx.split(nnx.eval_shape(create))
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        names = jax.tree_util.keystr(path)
        values = random.standard_normal(leaf.shape)
        if "kernel" in names or ("router" in names and "bias" not in names):
            values *= leaf.shape[-2] ** -0.5
        elif "scale" in names:
            values = 1 + 0.1 * values
        elif "bias" in names:
            values *= 0.3
        elif "head" in names:
            values *= leaf.shape[-1] ** -0.5
        return jnp.asarray(values, leaf.dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))


def decoder(seed: int = 0, **changes) -> Decoder:
    """A decoder of GPT-NeoX's kind, 2 layers and 4 linears each, unless `changes` say otherwise.

    Args:
        seed: Of the parameters.
        changes: Fields of `DecoderConfig`, or one of `SIZES`; `attention` and `mlp` are dicts of
            their parts' fields.
    """
    sizes = {"hidden_size": 16, "heads": 2, "head_size": 8, "mlp_size": 24} | {
        name: changes.pop(name) for name in SIZES & changes.keys()
    }
    attention = AttentionConfig(
        **{
            "heads": sizes["heads"],
            "key_value_heads": sizes.get("key_value_heads", sizes["heads"]),
            "head_size": sizes["head_size"],
            "fused": "groups",
            "bias": True,
            "output_bias": True,
            "ropes": (RopeConfig(8),),
        }
        | changes.pop("attention", {})
    )
    mlp = {"activation": "gelu", "variant": "plain", "bias": True} | changes.pop("mlp", {})
    settings = {
        "family": "gpt_neox",
        "vocabulary_size": 53,
        "layers": 2,
        "positions": 64,
        "norm": NormConfig("layer", 1e-5, bias=True),
        "hidden_size": sizes["hidden_size"],
        "attention": attention,
        "mlp": MLPConfig(sizes["mlp_size"], **mlp),
    }
    config = DecoderConfig(**settings | changes)
    return fill(lambda: Decoder(config, rngs=nnx.Rngs(0)), seed)


SIZES = {"hidden_size", "heads", "key_value_heads", "head_size", "mlp_size"}

LLAMA = {
    "family": "llama",
    "key_value_heads": 1,
    "norm": NormConfig("rms", 1e-5, wide_scale=False),
    "attention": {"fused": None, "bias": False, "output_bias": False},
    "mlp": {"activation": "silu", "variant": "gated", "bias": False},
}


def documents(lengths: Sequence[int], *, vocabulary: int = 53, seed: int = 0) -> Documents:
    """Random tokens; labels are the tokens."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.random.default_rng(seed).integers(0, vocabulary, offsets[-1], dtype=np.int32)
    return Documents(tokens, None, offsets)


def batches(data: Documents, **plan) -> list[Batch]:
    """All batches; arguments as for `plan_batches`, by default one shape of up to 256 tokens."""
    settings = {"token_batch_size": 256, "max_shapes": 1} | plan
    return list(iterate_batches(data, plan_batches(data.lengths, **settings)))


def relative_error(actual, expected) -> float:
    """Largest absolute difference over the largest absolute value expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
