"""The mechanism that shows every linear's input and output gradient to a fold.

A `Tape` travels with one forward pass and threads the running statistics through it. Each linear
passes the statistics on unchanged; in the backward pass their *cotangent* is the running sum, to
which the linear adds its fold's term (`jhessians.capture.taps`). So `jax.vjp`, started from the
sums accumulated so far, returns the new sums in place: no weight gradient exists, no second copy
of a factor exists, and no backward pass is written by hand.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.tracers import TraceState

from jhessians.capture.fold import Context, Fold, JointFold
from jhessians.capture.linears import Tapped, Weight
from jhessians.capture.products import Product
from jhessians.capture.routing import Routing
from jhessians.capture.shards import Shards, gather_weights
from jhessians.capture.site import Site, Statistics
from jhessians.capture.taps import collect, product, report, tap
from jhessians.typing import Array

TRANSFORMED = "it is called inside jit, scan, vmap, checkpoint or another transformation of the \
model's or the loss's own, from which nothing can be recorded"


class Tape:
    """One forward pass's running statistics; lives only while the pass is traced.

    Args:
        fold: What is computed at every linear.
        sites: The linears that are recorded.
        statistics: The running sums, by site.
        operands: Further arrays that the fold reads, by site.
        context: What the fold may know of the batch.
        layer: Inside a stack, the number of the layer.
        called: The names of the sites that were called, shared by the tapes of one pass.

    Attributes:
        backward_only: That derivatives are taken backwards alone.
    """

    backward_only = True

    def __init__(
        self,
        fold: Fold | JointFold,
        sites: Mapping[str, Site],
        statistics: Statistics,
        operands: Mapping[str, Mapping[str, Any]],
        context: Context,
        layer: Array | None = None,
        called: set[str] | None = None,
    ):
        self.fold = fold
        self.sites = sites
        self.statistics = dict(statistics)
        self.operands = operands
        self.context = context
        self.layer = layer
        self.called: set[str] = set() if called is None else called
        self.slots: dict[str, list[tuple[Array, Array]]] = {}
        self.trace = TraceState()

    def inside(self, statistics: Statistics, layer: Array, count: int) -> "Tape":
        """The tape of one of a stack's layers.

        Args:
            statistics: The running sums, which the scan over layers carries.
            layer: The number of the layer.
            count: How many layers the stack has.

        Returns:
            A tape of the same pass; its `close` gives the sums that the scan carries on.
        """
        return Tape(
            self.fold, self.sites, statistics, self.operands, self.context, layer, self.called
        )

    def gather_weights(self, module: nnx.Module) -> None:
        """Make whole, in place, the parameters of `module` that are sharded over the mesh."""
        gather_weights(module, self.context.axes)

    def record(
        self, linear: Tapped, x: Array, kernel: Array | Shards, routing: Routing | None = None
    ) -> Array:
        """Multiply for one of our own linears, which adds its term in the backward pass.

        Args:
            linear: The module that is called.
            x: [document, position..., in], or with a routing [row, in].
            kernel: [in, out]; or with a routing [expert, in, out], which may be shards.
            routing: Which expert reads which rows, if the linear is experts'.

        Returns:
            x @ kernel, without the bias.

        Raises:
            ValueError: If the linear is called inside a transformation such as jit, more often than
                `find_sites` saw, or on arrays of different forms; or if an expert's is called
                several times and the fold can't add the calls.
        """
        site = self._enter(linear.name or "")
        if site is None:
            return product(x, kernel, routing)
        if not self._adds_each_call(site):
            if routing is not None:
                raise ValueError(
                    f"{site.name} is called {site.calls} times in one pass; "
                    f"{type(self.fold).__name__} can add the calls of a linear only where that is "
                    "not an expert's: leave it out"
                )
            return self._report(site, x, product(x, kernel))
        key = self._key(site)
        y, self.statistics[key] = tap(
            self.fold, site, x, kernel, self.statistics[key], self._operands_of(site),
            self.context, self.layer, routing,
        )  # fmt: skip
        return y

    def observe(self, weight: Weight, how: Product, x: Array, kernel: Array, y: Array) -> Array:
        """See the product of a linear of Flax, which adds its term in the backward pass.

        Args:
            weight: What it multiplies with.
            how: Which axes of x, kernel and y are which.
            x: Its input.
            kernel: The weight's array.
            y: The product that Flax has computed of them.

        Returns:
            y, which the caller must go on with: its gradient is what is reported.

        Raises:
            ValueError: As `record`; or if the product is not that of a linear layer.
        """
        site = self._enter(weight.name)
        if site is None:
            return y
        if obstacle := how.obstacle(x.shape, kernel.shape):
            raise ValueError(f"{site.name} can't be recorded: {obstacle}")
        reported = self._report(site, how.flat_input(x), how.flat_output(y))
        return how.restored_output(reported, y)

    def close(self) -> Statistics:
        """End the pass, or a stack's layer.

        Returns:
            The statistics, which the linears have passed on.

        Raises:
            ValueError: If sites were called less often than `find_sites` saw.
        """
        for name, left in self.slots.items():
            if left:
                calls = self.sites[name].calls
                raise ValueError(
                    f"{name} is called {calls - len(left)} times here, but {calls} times in all "
                    f"when sites were found; {type(self.fold).__name__} needs as many calls in "
                    "every pass, and all of them in the same run of a stack"
                )
        if self.layer is None and (missing := self.sites.keys() - self.called):
            raise ValueError(
                f"the loss never calls {min(missing)}; expected it to call the linears that it "
                "called when sites were found: find them again"
            )
        return self.statistics

    def _enter(self, name: str) -> Site | None:
        """The site of a linear that is being called, if it is recorded."""
        site = self.sites.get(name)
        if site is not None:
            self.called.add(name)
            if not self.trace.is_valid():
                raise ValueError(f"{name} can't be recorded: {TRANSFORMED}; find sites again")
        return site

    def _adds_each_call(self, site: Site) -> bool:
        return site.calls == 1 or getattr(self.fold, "adds_calls", False)

    def _key(self, site: Site) -> str:
        return self.fold.joint if isinstance(self.fold, JointFold) else site.name

    def _operands_of(self, site: Site) -> dict[str, Any]:
        return {**self.operands.get(site.input_site, {}), **self.operands.get(site.name, {})}

    def _report(self, site: Site, x: Array, y: Array) -> Array:
        """y, whose gradient is reported together with x; opens the site at its first call."""
        together = 1 if self._adds_each_call(site) else site.calls
        if together == 1 or site.name not in self.slots:
            zeros = (jnp.zeros(x.shape, x.dtype), jnp.zeros(y.shape, y.dtype))
            key = self._key(site)
            self.statistics[key], self.slots[site.name] = collect(
                self.fold, site, self.statistics[key], [zeros] * together,
                self._operands_of(site), self.context, self.layer,
            )  # fmt: skip
        if not self.slots[site.name]:
            raise ValueError(
                f"{site.name} is called more often than the {site.calls} times that were counted "
                f"when sites were found; {type(self.fold).__name__} needs as many calls in every "
                "pass: find sites again"
            )
        slot = self.slots[site.name].pop(0)
        for array, expected in zip((x, y), slot, strict=True):
            if (array.shape, array.dtype) != (expected.shape, expected.dtype):
                raise ValueError(
                    f"{site.name} is called on arrays of different forms, {expected.shape} "
                    f"{expected.dtype} and {array.shape} {array.dtype}; {type(self.fold).__name__} "
                    "needs all calls of one pass to have the same"
                )
        return report(x, y, slot)
