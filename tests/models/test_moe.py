"""A mixture of experts and attention sinks against loops in float64 numpy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jhessians.models.attention import attend
from jhessians.models.config import (
    AttentionConfig,
    DecoderConfig,
    ExpertsConfig,
    MLPConfig,
    NormConfig,
)
from jhessians.models.moe import MixtureOfExperts
from tests import small
from tests.small import relative_error

# Only the order of float64 additions differs; of central differences, all but the first half.
ROUNDING, DIFFERENCE = 1e-12, 1e-7
HIDDEN = 6


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


ACTIVATIONS = {"silu": lambda x: x * sigmoid(x), "quick_gelu": lambda x: x * sigmoid(1.702 * x)}


def inside(config, gate_up):
    """What an expert makes of one token's gate and up."""
    if config.variant == "interleaved":
        gate, up = gate_up[0::2], gate_up[1::2]
    else:
        gate, up = gate_up[: config.size], gate_up[config.size :]
    if config.limit is not None:
        gate = np.minimum(gate, config.limit)
        up = np.maximum(np.minimum(up, config.limit), -config.limit)
    return ACTIVATIONS[config.activation](gate) * (up + config.up_offset)


def by_token(config: ExpertsConfig, p: dict[str, np.ndarray], h: np.ndarray) -> np.ndarray:
    """The mixture, one token and one of its experts at a time."""
    out = np.zeros_like(h)
    for where in np.ndindex(h.shape[:-1]):
        x = h[where]
        logits = x @ p["router"] + p.get("router_bias", 0)
        every = np.exp(logits - logits.max())
        best = np.argsort(-logits)[: config.chosen]
        weights = every[best] / every[best].sum() if config.normalize else every[best] / every.sum()
        for weight, e in zip(weights, best, strict=True):
            gate_up = x @ p["gate_up.kernel"][e]
            if config.mlp.bias:
                gate_up = gate_up + p["gate_up.bias"][e]
            down = inside(config.mlp, gate_up) @ p["down.kernel"][e]
            if config.mlp.bias:
                down = down + p["down.bias"][e]
            out[where] += weight * down
        if config.shared is not None:
            gated = ACTIVATIONS[config.shared.activation](x @ p["shared.gate.kernel"])
            shared = (gated * (x @ p["shared.up.kernel"])) @ p["shared.down.kernel"]
            out[where] += sigmoid(x @ p["shared_gate.kernel"]) * shared
    return out


FUSED = MLPConfig(9, "silu", "fused")
CASES = {
    "normalized": ExpertsConfig(5, 2, FUSED),
    "not normalized, shared": ExpertsConfig(
        4, 3, FUSED, normalize=False, shared=MLPConfig(7, "silu")
    ),
    "interleaved, bounded, biased": ExpertsConfig(
        6, 2, MLPConfig(9, "quick_gelu", "interleaved", bias=True, limit=0.8, up_offset=1.0),
        router_bias=True,
    ),
    "one of one": ExpertsConfig(1, 1, FUSED),
    "all, biased": ExpertsConfig(3, 3, replace(FUSED, bias=True), normalize=False),
}  # fmt: skip


def mixture(config, dtype):
    decoder = DecoderConfig(
        "test", 5, HIDDEN, 1, 8, NormConfig("rms", 1e-5), AttentionConfig(1, 1, HIDDEN), FUSED,
        experts=config,
    )  # fmt: skip
    return small.fill(lambda: MixtureOfExperts(decoder, dtype=dtype, rngs=nnx.Rngs(0)))


def parameters(state):
    return {
        ".".join(map(str, path)): np.asarray(value[...], np.float64)
        for path, value in nnx.to_flat_state(state)
    }


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name):
    config, random = CASES[name], np.random.default_rng(0)
    with jax.enable_x64(True):
        graph, state = nnx.split(mixture(config, jnp.float64))
        h = random.standard_normal((3, 5, HIDDEN))
        weight = random.standard_normal(h.shape)

        @jax.jit
        def forward(state, h):
            out = nnx.merge(graph, state)(h)
            return (out * weight).sum(), out

        (_, found), (of_state, of_h) = jax.value_and_grad(forward, (0, 1), has_aux=True)(
            state, jnp.asarray(h)
        )
    values, gradients = parameters(state), parameters(of_state)
    assert relative_error(found, by_token(config, values, h)) < ROUNDING

    # Along a random direction in each parameter and in the input.
    for key in [*values, "h"]:
        direction = random.standard_normal((values | {"h": h})[key].shape)

        def moved(step, key=key, direction=direction):
            there = values | {"h": h}
            there[key] = there[key] + step * direction
            return (by_token(config, there, there["h"]) * weight).sum()

        expected = (moved(1e-6) - moved(-1e-6)) / 2e-6
        gradient = np.asarray(of_h) if key == "h" else gradients[key]
        scale = np.abs(gradient * direction).sum() + 1e-3
        assert abs((gradient * direction).sum() - expected) < DIFFERENCE * scale, key


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes_stay_what_they_are(dtype):
    """The router's softmax is at least in float32 all the same."""
    config = CASES["not normalized, shared"]
    model = mixture(config, dtype)
    h = np.random.default_rng(0).standard_normal((2, 4, HIDDEN)).astype(np.float32)
    out = nnx.jit(lambda m, h: m(h))(model, jnp.asarray(h, dtype))
    assert out.dtype == dtype
    values = parameters(nnx.state(model))
    expected = by_token(config, values, np.asarray(jnp.asarray(h, dtype), np.float64))
    error = relative_error(out, expected)
    assert error < (1e-6 if dtype == jnp.float32 else 0.05)


def test_attention_sinks():
    """Each head's own logit takes its share of the softmax and gives nothing."""
    n, s, heads, groups, d = 2, 7, 4, 2, 3
    random = np.random.default_rng(0)
    query = random.standard_normal((n, s, heads, d))
    key, value = random.standard_normal((2, n, s, groups, d))
    sinks, scale, window = random.standard_normal(heads) * 2, 0.7, 4
    expected = np.zeros((n, s, heads, d))
    for b, t, h in np.ndindex(n, s, heads):
        seen = range(max(0, t - window + 1), t + 1)
        of = h // (heads // groups)
        weights = np.exp([scale * query[b, t, h] @ key[b, u, of] for u in seen])
        weights /= weights.sum() + np.exp(sinks[h])
        expected[b, t, h] = sum(w * value[b, u, of] for w, u in zip(weights, seen, strict=True))
    with jax.enable_x64(True):
        arrays = map(jnp.asarray, (query, key, value, np.float64(scale), np.int32(window)))
        found = attend(*arrays, sinks=jnp.asarray(sinks))
        assert relative_error(found, expected) < ROUNDING
        # So far below all others that it is not there.
        query, key, value = (jnp.asarray(x) for x in (query, key, value))
        limits = jnp.float64(scale), jnp.int32(window)
        without = attend(query, key, value, *limits)
        far = attend(query, key, value, *limits, sinks=jnp.full(heads, -1e9))
        assert relative_error(far, without) < ROUNDING
        assert relative_error(found, without) > 0.01
