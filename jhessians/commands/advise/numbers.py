"""All numbers of an advice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

from jhessians.commands.advise.halves import Examined
from jhessians.influence.halves import ModuleAgreement
from jhessians.influence.spectra import Curvature, Sides, dead_modules
from jhessians.linalg.agreement import Products
from jhessians.linalg.spectra import median
from jhessians.version import __version__

Part = Callable[[ModuleAgreement], Products]
PARTS: dict[str, Part] = {
    "activation_covariance": lambda found: found.activation,
    "gradient_covariance": lambda found: found.gradient,
    "hessian": lambda found: found.hessian,
}
"""What halves are compared by, besides inverses."""


@dataclass(frozen=True)
class Advice:
    """What is known of a run.

    Attributes:
        run: Its folder.
        damping_factor: Of the inverse that halves are compared by.
        terms: How many positions (of a method that sums documents: documents) the run summed.
        spectra: Module → the spectra of its factors.
        curvatures: Module → the eigenvalues of its Hessian.
        examined: What passes over the data found; None without them.
        warnings: What the passes warned of.
    """

    run: str
    damping_factor: float
    terms: int
    spectra: Mapping[str, Sides]
    curvatures: Mapping[str, Curvature]
    examined: Examined | None = None
    warnings: tuple[str, ...] = ()

    def error(self, part: Part, modules: Iterable[str] | None = None) -> float:
        """The whole fit's relative error, the median over modules.

        Args:
            part: One of `PARTS`.
            modules: Which ones; all if left out.

        Returns:
            A share; NaN where nothing is known.
        """
        assert self.examined is not None
        found, share = self.examined.agreements, self.examined.share
        return median(part(found[name]).error(share) for name in modules or found)

    def inverse_error(self, damping: float, modules: Iterable[str] | None = None) -> float:
        """That of (H + damping)⁻¹ q, of all modules together as one vector.

        Args:
            damping: One of the damping factors.
            modules: Which ones; all if left out.

        Returns:
            A share; NaN where nothing is known.
        """
        assert self.examined is not None
        found = self.examined.agreements
        products = [found[name].inverses[damping] for name in modules or found]
        return reduce(Products.plus, products).error(self.examined.share)

    def shared_error(self, damping: float) -> float:
        """What of (H + damping)⁻¹ q is wrong in both halves alike, scaled to the whole fit by 1/n.

        Args:
            damping: One of the damping factors.

        Returns:
            A share; NaN where it can't be told.
        """
        assert self.examined is not None
        found, share = self.examined.agreements, self.examined.share
        products = [each.shared[damping] for each in found.values() if each.shared]
        if not products or share >= 1:
            return math.nan
        return reduce(Products.plus, products).difference() * share / (1 - share)

    def contradicted(self, modules: Iterable[str] | None = None) -> float:
        """The share of eigenvalues, A's and S's, that the other half of the data contradicts.

        Args:
            modules: Which ones; all if left out.

        Returns:
            0 to 1.
        """
        assert self.examined is not None
        total = wrong = 0.0
        for name in modules or self.spectra:
            sides, found = self.spectra[name], self.examined.agreements[name]
            shares = (found.activation_contradicted, found.gradient_contradicted)
            for spectrum, share in zip(sides, shares, strict=True):
                total += spectrum.dimension
                wrong += share * spectrum.dimension
        return wrong / total


def numbers(advice: Advice) -> dict[str, Any]:
    """Everything that is known, in plain types.

    Args:
        advice: What is known.

    Returns:
        Nested tables; numbers that aren't finite are None.
    """
    dead, _ = dead_modules(advice.spectra)
    document: dict[str, Any] = {
        "jhessians_version": __version__,
        "run": advice.run,
        "terms": advice.terms,
        "damping_factor": advice.damping_factor,
        "dead_modules": dead,
        "modules": {name: _of_module(advice, name) for name in advice.spectra},
    }
    examined = advice.examined
    if examined is not None:
        document["halves"] = {
            "documents": examined.half_documents,
            "positions": examined.half_positions,
            "queries": examined.queries,
            "positions_of_the_run": examined.positions,
            "contradicted": advice.contradicted(),
            "errors": {name: advice.error(part) for name, part in PARTS.items()},
            "inverse_errors": {
                f"{damping:g}": advice.inverse_error(damping) for damping in _dampings(examined)
            },
            "inverse_errors_shared": {
                f"{damping:g}": advice.shared_error(damping) for damping in _dampings(examined)
            },
        }
    if examined is not None and examined.trial is not None and examined.choice is not None:
        trial = examined.trial
        document["damping"] = {
            "held_out_documents": examined.held_out,
            "tried": list(trial.dampings),
            "gains": trial.gains.tolist(),
            "residuals": trial.residuals.tolist(),
            "suggested": examined.choice._asdict(),
        }
    found: dict[str, Any] = _finite(document)
    return found


def _dampings(examined: Examined) -> list[float]:
    return list(next(iter(examined.agreements.values())).inverses)


def _of_module(advice: Advice, name: str) -> dict[str, Any]:
    sides = advice.spectra[name]
    found = {
        "activation": sides.activation._asdict(),
        "gradient": sides.gradient._asdict(),
        "dead": sides.dead,
        "hessian": advice.curvatures[name]._asdict(),
    }
    examined = advice.examined
    if examined is not None:
        agreement = examined.agreements[name]
        found["halves"] = {
            "errors": {part: of(agreement).error(examined.share) for part, of in PARTS.items()},
            "inverse_errors": {
                f"{damping:g}": products.error(examined.share)
                for damping, products in agreement.inverses.items()
            },
            "activation_contradicted": agreement.activation_contradicted,
            "gradient_contradicted": agreement.gradient_contradicted,
        }
    return found


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
