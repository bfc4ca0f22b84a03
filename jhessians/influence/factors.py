"""Kronecker factors as an object of JAX: a mapping that is applied to a Flax module's gradients.

`load_factors` reads a run; the result is a pytree, so that it can be an argument of `jax.jit`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jhessians.devices.mesh import axis_names
from jhessians.errors import CheckpointError
from jhessians.influence.curvature import corrects
from jhessians.influence.inversion import Inverse
from jhessians.influence.parameters import Place, path_of, places_of
from jhessians.interop.load import FactorStore
from jhessians.linalg.inverse import (
    Inversion,
    in_eigenbasis,
    inverse_multiplier,
    out_of_eigenbasis,
)
from jhessians.typing import Array, Float, PyTree

Others = Literal["zero", "keep"]
"""What becomes of gradients of which the Hessian knows nothing: embeddings, norms, the head."""


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class Factors(Mapping[str, dict[str, Any]]):
    """Kronecker factors: kind → module's name → array, with their inverse.

    Attributes:
        tensors: The arrays; kinds are keys of `jhessians.interop.layout.KINDS`.
        inverse: How the Hessian is inverted, unless a call says otherwise.
        places: Where a Flax module keeps the weights of the modules; empty without one.
    """

    tensors: dict[str, dict[str, Any]]
    inverse: Inverse = Inverse()
    places: tuple[Place, ...] = ()

    def __getitem__(self, kind: str) -> dict[str, Any]:
        return self.tensors[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """For JAX: the arrays, and all else."""
        return (self.tensors,), (self.inverse, self.places)

    @classmethod
    def tree_unflatten(cls, fixed: tuple[Any, ...], arrays: tuple[Any, ...]) -> "Factors":
        """For JAX: the opposite of `tree_flatten`."""
        return cls(arrays[0], *fixed)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of factor that there are."""
        return tuple(self.tensors)

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that have factors."""
        return tuple(next(iter(self.tensors.values()), {}))

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Module → shape of its tensor of a kind."""
        return {name: tuple(x.shape) for name, x in self.tensors[kind].items()}

    def read(self, kind: str, module: str) -> np.ndarray:
        """One tensor, on the host."""
        return np.asarray(self.tensors[kind][module])

    def damping(self, factor: float, *, inversion: Inversion | None = None) -> "Factors":
        """The same factors with another damping, and perhaps another inversion, by default.

        Args:
            factor: Relative to the mean eigenvalue of each module.
            inversion: One of `jhessians.linalg.inverse.INVERSIONS`; as before if left out.

        Returns:
            Factors that share the arrays.
        """
        inversion = inversion or self.inverse.inversion
        changed = replace(self.inverse, damping_factor=factor, inversion=inversion)
        return replace(self, inverse=changed)

    def apply(
        self,
        gradients: PyTree[Any],
        *,
        inversion: Inversion | None = None,
        damping_factor: float | None = None,
        ev_correction: bool | None = None,
        others: Others = "zero",
    ) -> PyTree[Any]:
        """(H + damping)⁻¹ times a gradient, in the gradient's own form; may stand inside `jit`.

        Args:
            gradients: What `nnx.grad` gives for the Flax module that the factors were loaded for, a
                State or a pure dict of it, stacks included; or module's name → [*batch, out, in].
            inversion: One of `jhessians.linalg.inverse.INVERSIONS`; default that of `inverse`.
            damping_factor: Default that of `inverse`.
            ev_correction: Whether eigenvalues are the corrected ones; default that of `inverse`.
            others: Whether the gradients of other parameters become zero or stay as they are.

        Returns:
            The same structure, shapes and number formats.

        Raises:
            CheckpointError: If a name or a shape doesn't match the factors'.
            ValueError: If the gradients are a Flax module's and the factors were loaded without.
        """
        apply = partial(_applied, self, self._inverse(inversion, damping_factor, ev_correction))
        return self._mapped(gradients, apply, others)

    def log_determinant(
        self,
        *,
        inversion: Inversion | None = None,
        damping_factor: float | None = None,
        ev_correction: bool | None = None,
    ) -> Float[Array, ""]:
        """log det (H + damping), over all modules: minus the sum of the multipliers' logarithms.

        Directions that an inversion leaves out (`pseudoinverse`) don't count. Arguments as in
        `apply`.

        Returns:
            A number, in nats.
        """
        inverse = self._inverse(inversion, damping_factor, ev_correction)
        total = jnp.zeros(())
        for module in self.modules:
            multiplier = self._multiplier(inverse, module)
            there = multiplier > 0
            total -= jnp.where(there, jnp.log(jnp.where(there, multiplier, 1)), 0).sum()
        return total

    def sample(
        self,
        key: Array,
        *,
        documents: int = 1,
        like: PyTree[Any] = None,
        inversion: Inversion | None = None,
        damping_factor: float | None = None,
        ev_correction: bool | None = None,
    ) -> PyTree[Array]:
        """A deviation of the weights, normal with covariance (documents · (H + damping))⁻¹.

        Added to trained weights it is a sample of the Laplace approximation of their posterior
        (Ritter et al. 2018). Other arguments as in `apply`.

        Args:
            key: JAX's random key.
            documents: How many documents the posterior is of; H is that of one.
            like: A State or dict of the Flax module's parameters, whose form the sample then has,
                with zeros where the Hessian knows nothing.
            inversion: See `apply`.
            damping_factor: See `apply`.
            ev_correction: See `apply`.

        Returns:
            Module's name → [out, in], or what `like` says.

        Raises:
            ValueError: If `like` is given and the factors were loaded without a Flax module.
        """
        inverse = self._inverse(inversion, damping_factor, ev_correction)
        keys = dict(zip(self.modules, jax.random.split(key, len(self.modules)), strict=True))

        def draw(module: str, gradient: Array) -> Array:
            q_s, q_a = self._vectors(module)
            noise = jax.random.normal(keys[module], (q_s.shape[0], q_a.shape[0]), q_s.dtype)
            scaled = jnp.sqrt(self._multiplier(inverse, module) / documents) * noise
            return out_of_eigenbasis(scaled, q_s, q_a)

        if like is None:
            return {module: draw(module, jnp.zeros(())) for module in self.modules}
        return self._mapped(like, draw, "zero")

    def _inverse(
        self, inversion: Inversion | None, damping: float | None, ev_correction: bool | None
    ) -> Inverse:
        mine = self.inverse
        return Inverse(
            inversion or mine.inversion,
            mine.damping_factor if damping is None else damping,
            mine.ev_correction if ev_correction is None else ev_correction,
        )

    def _vectors(self, module: str) -> tuple[Array, Array]:
        of_s, of_a = (self.tensors[f"{x}_eigenvectors"][module] for x in ("gradient", "activation"))
        return jnp.asarray(of_s), jnp.asarray(of_a)

    def _multiplier(self, inverse: Inverse, module: str) -> Float[Array, "o i"]:
        kind = "eigenvalue_correction" if corrects(self, inverse) else "eigenvalue"
        own = {f"{side}_eigenvalues": jnp.asarray(self.tensors[f"{side}_eigenvalues"][module])
               for side in ("gradient", "activation")
               if inverse.inversion == "factored_tikhonov"}  # fmt: skip
        return inverse_multiplier(
            jnp.asarray(self.tensors[kind][module]), inversion=inverse.inversion,
            damping_factor=inverse.damping_factor, axes=(-2, -1), **own,
        )  # fmt: skip

    def _mapped(
        self, tree: PyTree[Any], change: Callable[[str, Array], Array], others: Others
    ) -> PyTree[Any]:
        """Change every module's gradient, wherever the tree keeps it."""
        if isinstance(tree, Mapping) and tree.keys() <= set(self.modules):
            return {name: change(name, x).astype(x.dtype) for name, x in tree.items()}
        if not self.places:
            raise ValueError(
                "the factors don't know where a Flax module keeps its weights; load them with it, "
                "load_factors(run, model=model), or give module's name → gradient"
            )
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
        arrays = {path_of(path): leaf for path, leaf in leaves}
        changed = dict(arrays) if others == "keep" else jax.tree.map(jnp.zeros_like, arrays)
        for place in self.places:
            changed |= place.changed(arrays, change)
        return jax.tree_util.tree_unflatten(structure, [changed[path_of(p)] for p, _ in leaves])


def _applied(
    factors: Factors, inverse: Inverse, module: str, gradient: Float[Array, "*batch o i"]
) -> Float[Array, "*batch o i"]:
    q_s, q_a = factors._vectors(module)
    if gradient.shape[-2:] != (len(q_s), len(q_a)):
        raise CheckpointError(
            f"the gradient of {module} has shape {list(gradient.shape[-2:])}; its factors are for "
            f"[{len(q_s)}, {len(q_a)}], [out, in]: expected the model that the Hessian is of"
        )
    with jax.default_matmul_precision("highest"):
        rotated = in_eigenbasis(gradient.astype(q_s.dtype), q_s, q_a)
        multiplier = jnp.broadcast_to(factors._multiplier(inverse, module), rotated.shape)
        return out_of_eigenbasis(multiplier * rotated, q_s, q_a)


def load_factors(
    path: str | Path,
    kinds: Iterable[str] | None = None,
    *,
    model: nnx.Module | None = None,
    mesh: Mesh | None = None,
    inverse: Inverse | None = None,
) -> Factors:
    """The factors of a run, ours or bergson's, in memory.

    Args:
        path: The run's directory, or its `influence_results`. bergson's tree is read where it
            exists, the older one otherwise, whose eigenvalue correction is in another unit; see
            `jhessians.interop.load.FactorStore`, which reads one tensor at a time.
        kinds: Keys of `layout.KINDS`; all that are there if left out.
        model: The Flax module whose gradients `Factors.apply` will be given.
        mesh: Devices over which each array's rows are spread, where they can be divided; without
            one the arrays are numpy's.
        inverse: How `apply` inverts by default.

    Returns:
        Kind → module's name → array, in the dtypes of the files.

    Raises:
        CheckpointError: If there are no factors, or damaged ones; or if they are of other modules
            than the model's.
        KeyError: If a kind is not there.
    """
    store = FactorStore(path)

    def place(array: np.ndarray) -> Any:
        if mesh is None:
            return array
        spec = P(axis_names(mesh)) if array.shape[0] % mesh.size == 0 else P()
        return jax.device_put(array, NamedSharding(mesh, spec))

    tensors = {
        kind: {module: place(store.read(kind, module)) for module in store.shapes(kind)}
        for kind in (store.kinds if kinds is None else kinds)
    }
    places: tuple[Place, ...] = ()
    if model is not None:
        sides = store.shapes("activation_eigenvectors")
        places = places_of(model, {name: shape[0] for name, shape in sides.items()})
    return Factors(tensors, inverse or Inverse(), places)


def precondition_by_factors(
    factors: Factors, damping_factor: float | None = None, *, inversion: Inversion | None = None
) -> optax.GradientTransformation:
    """An optax transformation that multiplies gradients with (H + damping)⁻¹.

    The gradients of parameters that have no factors stay as they are; give these another
    transformation by `optax.partition`, or none.

    Args:
        factors: Loaded with the Flax module that is trained.
        damping_factor: Relative to the mean eigenvalue; default that of the factors.
        inversion: One of `jhessians.linalg.inverse.INVERSIONS`.

    Returns:
        Without a state; the factors don't change.
    """

    def update(updates: PyTree[Any], state: Any, params: Any = None) -> tuple[PyTree[Any], Any]:
        del params
        applied = factors.apply(
            updates, damping_factor=damping_factor, inversion=inversion, others="keep"
        )
        return applied, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
