"""Mixture of experts: a router sends every token to a few of many MLPs.

Shazeer et al. 2017, arXiv:1701.06538; beside them there may be one that all tokens share, Dai et
al. 2024, arXiv:2401.06066.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jhessians.capture.linears import Attached, Tapped
from jhessians.capture.routing import Routing, collect, dispatch, route
from jhessians.capture.shards import weight
from jhessians.capture.taps import product
from jhessians.models.config import DecoderConfig, ExpertsConfig
from jhessians.models.layers import PRODUCT, Linear, at_least_float32, per_feature
from jhessians.models.mlp import MLP, gated
from jhessians.typing import Array, DTypeLike, Float, Int


class ExpertLinear(Tapped):
    """One linear of every expert: y = x W_e + b_e for the rows routed to expert e.

    Args:
        experts: E.
        in_features: I.
        out_features: O.
        use_bias: Whether there are b_e.
        name: Under which name statistics are reported, by default its path in the model;
            `{expert}` stands for the expert's number.
        dtype: Of the parameters.
        rngs: Seeds the kernels, normal with standard deviation 1 / sqrt(I).
    """

    suffix = ".{expert}"
    tables = ("kernel",)

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        name: str | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (experts, in_features, out_features)
        self.kernel = nnx.Param(in_features**-0.5 * jax.random.normal(rngs.params(), shape, dtype))
        self.bias = nnx.Param(jnp.zeros((experts, out_features), dtype)) if use_bias else None
        self.name = name

    def __call__(self, rows: Float[Array, "r i"], routing: Routing) -> Float[Array, "r o"]:
        """Each row's product with its expert's kernel, and its expert's bias."""
        kernel = weight(self.kernel)
        if self.tape is None:
            y = product(rows, kernel, routing)
        else:
            y = self.tape.record(self, rows, kernel, routing)
        y = checkpoint_name(y, PRODUCT)
        if self.bias is None:
            return y
        experts = jnp.arange(len(routing.counts))
        expert = jnp.repeat(experts, routing.sizes, total_repeat_length=len(rows))
        return y + self.bias[...][expert]


class MixtureOfExperts(Attached):
    """Σ weight_e · MLP_e(x) over the experts that the router chooses for x, and the shared MLP."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        assert config.experts is not None
        c, hidden = config.experts, config.hidden_size

        def linear(inputs: int, outputs: int) -> ExpertLinear:
            return ExpertLinear(
                c.count, inputs, outputs, use_bias=c.mlp.bias, dtype=dtype, rngs=rngs
            )

        router = hidden**-0.5 * jax.random.normal(rngs.params(), (hidden, c.count), dtype)
        self.router = nnx.Param(router)
        self.router_bias = nnx.Param(jnp.zeros(c.count, dtype)) if c.router_bias else None
        self.gate_up = linear(hidden, 2 * c.mlp.size)
        self.down = linear(c.mlp.size, hidden)
        self.shared = MLP(hidden, c.shared, dtype=dtype, rngs=rngs) if c.shared else None
        self.shared_gate = (
            Linear(hidden, 1, use_bias=False, dtype=dtype, rngs=rngs) if c.shared else None
        )
        self.config = c

    def __call__(self, h: Float[Array, "n s d"]) -> Float[Array, "n s d"]:
        """The chosen experts' outputs, weighted by the router, and the shared expert's."""
        c = self.config
        logits = h @ self.router[...]
        if self.router_bias is not None:
            logits = logits + per_feature(self.router_bias[...], logits)
        choices, weights = choose(c, logits)
        # Without a tape, gradients are what is wanted as a rule.
        backward_only = self.tape is None or self.tape.backward_only
        routing = route(choices, c.count, backward_only=backward_only)
        rows = dispatch(h.reshape(-1, h.shape[-1]), routing)
        rows = self.down(gated(c.mlp, self.gate_up(rows, routing)), routing)
        chosen = collect(rows, routing).astype(weights.dtype)
        mixed = jnp.einsum("tk,tkd->td", weights.reshape(-1, c.chosen), chosen)
        mixed = mixed.astype(h.dtype).reshape(h.shape)
        if self.shared is None or self.shared_gate is None:
            return mixed
        return mixed + jax.nn.sigmoid(self.shared_gate(h)) * self.shared(h)


def choose(
    config: ExpertsConfig, logits: Float[Array, "n s e"]
) -> tuple[Int[Array, "n s k"], Float[Array, "n s k"]]:
    """Each token's experts, those of the highest logits, and their weights; at least in float32."""
    wide = logits.astype(at_least_float32(logits.dtype))
    best, choices = lax.top_k(wide, config.chosen)
    if config.normalize:
        return choices, jax.nn.softmax(best, axis=-1)
    return choices, jnp.exp(best - jax.nn.logsumexp(wide, axis=-1, keepdims=True))
