"""Exact products of the Gauss-Newton Hessian with vectors (Martens 2020, arXiv:1412.1193).

    G = Σ over documents and positions of Jᵀ (diag p - p pᵀ) J

J is the derivative of a position's logits by the recorded weights, p their softmax. A product takes
one pass forwards, of many vectors' tangents beside one another, and one backwards. Neither J nor a
whole batch's logits ever exist.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jhessians.capture.linears import attach
from jhessians.capture.problem import Problem, keep_activations
from jhessians.capture.quiet import QuietTape
from jhessians.capture.shards import gather_weights
from jhessians.devices.compiling import compiled
from jhessians.devices.mesh import axis_names, parameter_specs, put_batches, where_explicit
from jhessians.devices.precision import multiplying
from jhessians.fitting.passes import untraced
from jhessians.influence.parameters import Path, Place, path_of, places_of
from jhessians.typing import Array, Float, PyTree

Vectors = Mapping[str, Float[Array | np.ndarray, "vector _ _"]]
"""Module → matrices of its weight gradient's shape, one for each vector; a bias that counts is the
last input."""


VECTORS_AT_ONCE = 16
"""Whose activations of a layer are in memory together. Each such block goes through the model anew,
which is one pass more to three for each vector."""


@runtime_checkable
class Convex(Protocol):
    """A loss that is a convex function of a model's outputs, as `NextTokenLoss` is."""

    def outputs(self, model: Any, batch: Any) -> Array:
        """The outputs, [document, ...]."""
        ...

    def hessian_products(self, model: Any, batch: Any, outputs: Array, tangents: Array) -> Array:
        """Products of the loss's Hessian by the outputs with some vectors [vector, *outputs]."""
        ...


def gauss_newton_product(
    problem: Problem, batches: Iterable[PyTree[np.ndarray]], vectors: Vectors
) -> dict[str, Float[Array, "vector _ _"]]:
    """G V over all batches, a sum over documents.

    Divided by the number of documents it is a product of the Hessian that `fit` approximates. The
    time grows linearly with the vectors; on a device are, beside the model, three arrays as large
    as all vectors, a batch's hidden states of each vector, and one layer's activations of
    `VECTORS_AT_ONCE` of them.

    Args:
        problem: A loss with the methods of `Convex`, model, linears and devices.
        batches: This host's rows of each batch.
        vectors: V, of all the problem's modules.

    Returns:
        As `vectors`.

    Raises:
        TypeError: If the loss has no such methods; inside a caller's own jit, where
            `add_gauss_newton_product` can be called.
        ValueError: If `vectors` aren't those of the problem's modules, or there are no batches.
        CheckpointError: If a module's weight is no matrix.
    """
    return GaussNewtonPass(problem).run(batches, vectors)


class GaussNewtonPass:
    """The pass that makes products, compiled once for each shape of a batch.

    Args:
        problem: As in `gauss_newton_product`.
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        graph, self._state = nnx.split(problem.model)

        def step(
            state: PyTree[Array], batch: PyTree[Array], vectors: Vectors, sums: Vectors
        ) -> dict[str, Array]:
            here = problem.of(nnx.merge(graph, state))
            return add_gauss_newton_product(here, batch, vectors, sums)

        self._step = compiled(step, donate_argnums=3)

    def run(
        self, batches: Iterable[PyTree[np.ndarray]], vectors: Vectors
    ) -> dict[str, Float[Array, "vector _ _"]]:
        """G V; arguments, result and errors are those of `gauss_newton_product`."""
        require_vectors(self.problem, vectors)
        arrays = {name: self.put(vectors[name]) for name in _inputs(self.problem)}
        sums, seen = jax.tree.map(jnp.zeros_like, arrays), False
        for batch in untraced(self.problem, batches):
            alone = jax.tree.map(lambda x: np.asarray(x)[None], batch)
            whole = jax.tree.map(lambda x: x[0], put_batches(alone, self.problem.mesh))
            sums, seen = self._step(self._state, whole, arrays, sums), True
        if not seen:
            raise ValueError("there are no batches; expected at least one")
        return sums

    def put(self, x: Any) -> Array:
        """An array that every host has, on all devices."""
        mesh = self.problem.mesh
        return jnp.asarray(x) if mesh is None else jax.device_put(x, NamedSharding(mesh, P()))


def add_gauss_newton_product(
    problem: Problem, batch: PyTree, vectors: Vectors, sums: Vectors
) -> dict[str, Float[Array, "vector _ _"]]:
    """Add one batch's G V to running sums; a pure function that can stand inside a caller's jit.

    Args:
        problem: As in `gauss_newton_product`.
        batch: A pytree whose arrays have documents as their first axis, a multiple of the mesh.
        vectors: V.
        sums: Of the batches before.

    Returns:
        The new sums.

    Raises:
        TypeError: If the loss lacks a method of `Convex`.
        CheckpointError: If a module's weight is no matrix.
    """
    loss, mesh = problem.loss, problem.mesh
    if not isinstance(loss, Convex):
        raise TypeError(
            f"{type(loss).__name__} has no methods `outputs` and `hessian_products`; expected a "
            "loss whose Hessian by the model's outputs is known, such as NextTokenLoss"
        )
    places = places_of(problem.model, _inputs(problem))
    graph, state = nnx.split(problem.model)
    leaves, tree = jax.tree.flatten(state)
    paths = [path_of(keys) for keys, _ in jax.tree.flatten_with_path(state)[0]]
    parameters = dict(zip(paths, leaves, strict=True))
    axes = () if mesh is None else axis_names(mesh)

    def local(
        parameters: dict[Path, Array], tangents: dict[Path, Array], batch: PyTree[Array]
    ) -> dict[Path, Array]:
        def whole(chosen: Mapping[Path, Array]) -> Any:
            arrays = [chosen.get(path, parameters[path]) for path in paths]
            copy = nnx.merge(graph, tree.unflatten(arrays), copy=True)
            gather_weights(copy, axes, keep_tables=False)
            return copy

        def outputs(backward_only: bool, chosen: Mapping[Path, Array]) -> Array:
            copy = whole(chosen)
            keep_activations(copy, problem.activations)
            attach(copy, QuietTape(axes, backward_only=backward_only))
            return loss.outputs(copy, batch)

        chosen = {path: parameters[path] for path in tangents}

        def along(tangent: dict[Path, Array]) -> Array:
            return jax.jvp(partial(outputs, False), (chosen,), (tangent,))[1]

        changes = lax.map(along, tangents, batch_size=VECTORS_AT_ONCE)
        found, back = jax.vjp(partial(outputs, True), chosen)
        cotangents = loss.hessian_products(whole({}), batch, found, changes)
        (products,) = lax.map(back, cotangents, batch_size=VECTORS_AT_ONCE)
        # What was gathered from shards is summed over devices by the gathering's own derivative.
        return {
            path: lax.psum(x, left) if (left := _left_out(specs[path], axes)) else x
            for path, x in products.items()
        }

    tangents = _tangents(places, parameters, vectors)
    specs = dict.fromkeys(paths, P())
    batch = jax.tree.map(jnp.asarray, batch)
    with multiplying(problem.matmul_precision, mesh):
        if mesh is None:
            products = local(parameters, tangents, batch)
        else:
            spread = jax.tree.leaves(
                parameter_specs(state, mesh), is_leaf=lambda x: isinstance(x, P)
            )
            specs = dict(zip(paths, spread, strict=True))
            of_vectors = {path: P(None, *specs[path]) for path in tangents}
            given = (specs, of_vectors, P(axes))
            arguments = where_explicit(mesh, given, (parameters, tangents, batch))
            products = jax.shard_map(
                local, mesh=mesh, in_specs=given, out_specs=of_vectors, check_vma=False
            )(*arguments)
            products = jax.device_put(products, NamedSharding(mesh, P()))
    return {
        name: sums[name] + x.astype(sums[name].dtype)
        for place in places
        for name, x in place.matrices(products).items()
    }


def _left_out(spec: P, axes: tuple[str, ...]) -> tuple[str, ...]:
    """The mesh axes over which a parameter is copied."""
    return tuple(axis for axis in axes if axis not in jax.tree.leaves(tuple(spec)))


def require_vectors(problem: Problem, vectors: Vectors) -> None:
    """Check that vectors are those of the problem's modules.

    Args:
        problem: The linears.
        vectors: V.

    Raises:
        ValueError: If a module is missing or unknown, has another shape than its gradients, or
            another number of vectors than the others.
    """
    shapes = {
        name: (site.out_features, site.inputs)
        for site in problem.sites.values()
        for name in site.module_names()
    }
    if different := sorted(shapes.keys() ^ vectors.keys()):
        what = "no vectors of" if different[0] in shapes else "vectors of an unknown module"
        raise ValueError(f"there are {what} {different[0]}; expected all recorded modules, no more")
    count = len(next(iter(vectors.values()), ()))
    for name, (outputs, inputs) in shapes.items():
        if vectors[name].shape != (count, outputs, inputs):
            raise ValueError(
                f"the vectors of {name} have shape {list(vectors[name].shape)}; expected "
                f"{[count, outputs, inputs]}: [vector, out, in], the bias's input included"
            )


def _inputs(problem: Problem) -> dict[str, int]:
    return {name: site.inputs for site in problem.sites.values() for name in site.module_names()}


def _tangents(
    places: Iterable[Place], parameters: Mapping[Path, Array], vectors: Vectors
) -> dict[Path, Array]:
    """The vectors as changes of the parameters, [vector, *parameter]."""
    found: dict[Path, Array] = {}
    for place in places:
        matrices = {name: jnp.asarray(vectors[name]) for name, _ in place.names}
        found |= place.arrays(matrices, parameters)
    return found
