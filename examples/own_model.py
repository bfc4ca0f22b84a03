"""KFAC for a model of one's own, inside one's own `jax.jit` and mesh: a natural gradient method.

    python examples/own_model.py

All that a model has to do is to use `jhessians.Linear`. Here it is a multilayer perceptron that
learns a curve, by steps of (A ⊗ S + damping)⁻¹ gradient; on several devices documents and rows of
the factors are spread over all of them (try XLA_FLAGS=--xla_force_host_platform_device_count=8).
"""

import jax
import jax.numpy as jnp
from flax import nnx

import jhessians


class Perceptron(nnx.Module):
    """x [document, 1] -> [document, 1]."""

    def __init__(self, rngs: nnx.Rngs):
        self.inner = jhessians.Linear(1, 32, rngs=rngs)
        self.middle = jhessians.Linear(32, 32, rngs=rngs)
        self.outer = jhessians.Linear(32, 1, rngs=rngs)

    def __call__(self, x):
        return self.outer(jnp.tanh(self.middle(jnp.tanh(self.inner(x)))))


def squared_error(model, batch):
    """A *sum* over documents, as every loss whose curvature is wanted."""
    return 0.5 * jnp.sum((model(batch["x"]) - batch["y"]) ** 2)


def sampled_error(model, batch):
    """The same with y drawn from the model's own distribution N(f(x), 1): its Fisher is the
    Gauss-Newton matrix, where that of the data's y would shrink as the fit improves."""
    own = jax.lax.stop_gradient(model(batch["x"])) + batch["noise"]
    return squared_error(model, {"x": batch["x"], "y": own})


def main(documents: int = 512, steps: int = 30) -> float:
    mesh = jhessians.make_mesh()  # every device there is; any mesh of yours will do
    x = jnp.linspace(-3, 3, documents)[:, None]
    batch = {"x": x, "y": jnp.sin(2 * x) + 0.3 * x, "noise": x}
    sites = jhessians.find_sites(
        sampled_error, Perceptron(nnx.Rngs(0)), batch, include_bias=True
    )  # by name; with its bias a linear has one more input, which is always one
    problem = jhessians.Problem(sampled_error, Perceptron(nnx.Rngs(0)), sites, mesh=mesh)
    graph, state = nnx.split(problem.model)
    fold = jhessians.Covariance()

    @jax.jit
    def step(state, key):
        def loss(state):
            return squared_error(nnx.merge(graph, state), batch) / documents

        value, gradient = jax.value_and_grad(loss)(state)

        # One forward and backward pass for A = Σ aaᵀ and S = Σ ggᵀ of every linear.
        noise = jax.random.normal(key, batch["y"].shape)
        factors, _ = jhessians.accumulate(
            fold, problem.of(nnx.merge(graph, state)), {**batch, "noise": noise},
            jhessians.initialize(fold, problem),
        )  # fmt: skip
        for name, whole in jhessians.unpack(fold, problem, factors).items():
            a, s = whole["activation"] / documents, whole["gradient"] / documents
            (lambda_a, q_a), (lambda_s, q_s) = jnp.linalg.eigh(a), jnp.linalg.eigh(s)
            kernel, bias = gradient[name]["kernel"], gradient[name]["bias"]
            direction = jhessians.inverse_vector_product(
                jnp.concatenate([kernel[...].T, bias[...][:, None]], axis=1),  # [out, in + 1]
                gradient_eigenvectors=q_s,
                activation_eigenvectors=q_a,
                eigenvalues=jnp.outer(lambda_s, lambda_a),
            )  # fmt: skip
            kernel[...], bias[...] = direction[:, :-1].T, direction[:, -1]
        return jax.tree.map(lambda p, d: p - 0.3 * d, state, gradient), value

    for i, key in enumerate(jax.random.split(jax.random.key(0), steps)):
        state, value = step(state, key)
        if i % 5 == 0 or i == steps - 1:
            print(f"step {i:3}: loss {value:.5f}")
    return float(value)


if __name__ == "__main__":
    main()
