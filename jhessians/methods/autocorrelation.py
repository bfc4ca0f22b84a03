"""The dense method: Grams of normalised, projected gradients, written as a gradient processor.

TRAK's kernel, Park et al. 2023, arXiv:2303.14186; TrackStar's, Chang et al. 2024, arXiv:2410.17413.
What torch bergson 2.5.1 does not do here, and we do: `--attribute_tokens` (its collectors know it,
its `hessian` command drops it) and sampled labels. `--reshape_to_square` is recorded in both and
changes no number in either.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jhessians.config.option import matching
from jhessians.config.units import bytes_in_words
from jhessians.errors import ConfigError
from jhessians.fitting import arithmetic
from jhessians.methods.autocorrelation_options import AutocorrelationOptions
from jhessians.methods.method import Method, PlannedPass

if TYPE_CHECKING:
    import numpy as np

    from jhessians.capture.problem import Problem
    from jhessians.capture.site import Site
    from jhessians.folds.rows import GradientRows
    from jhessians.linalg.projection import Projection
    from jhessians.methods.method import Run

LARGE_BYTES = 1 << 30  # of all Grams, from which on a user is warned


@dataclass(frozen=True, kw_only=True)
class AutocorrelationMethod(Method):
    """A method whose Hessian is a dense Gram for each module, or one for all of them."""

    product: ClassVar[str] = "Hessians"
    factored: ClassVar[bool] = False
    labels: ClassVar[Literal["sampled", "dataset"]] = "dataset"
    mean_reduction: ClassVar[Literal["mean", "mean_gradient"]] = "mean_gradient"

    def fit(self, run: Run) -> None:
        """Normalizers, Grams and eigendecompositions, then all files.

        Raises:
            ConfigError: If modules can't be split into the heads that are asked for.
            CheckpointError: If the optimizer's state has no normalizer for a module.
            NumericsError: If a loss or a Gram isn't finite.
            OutputError: If the disk is full, read-only or not ours.
        """
        from jhessians.capture.sites import unshared
        from jhessians.fitting.autocorrelation import fit_autocorrelations
        from jhessians.fitting.normalizers import make_normalizers
        from jhessians.interop.processor import GradientProcessor

        options: AutocorrelationOptions = run.options
        problem = replace(run.problem, sites=unshared(run.problem.sites))
        rows = rows_of(options, problem.sites, run.dtype)
        joint = options.projection_target == "global"
        if not joint:
            _check_memory(run, problem.sites)
        normalizers = make_normalizers(
            problem,
            run.batches,
            kind=options.normalizer,
            optimizer_state=options.optimizer_state,
            parameters=run.parameters,
            include_bias=run.include_bias,
            dtype=run.dtype,
            progress=run.progress,
            kept=run.kept,
        )
        documents = run.batches.documents
        result = fit_autocorrelations(
            problem,
            run.batches,
            rows,
            count=documents.positions if options.attribute_tokens else len(documents),
            joint=joint,
            normalizers=normalizers,
            progress=run.progress,
            positions=documents.positions,
            kept=run.kept,
        )
        processor = GradientProcessor(
            normalizers,
            result.hessians,
            {name: (pair.values, pair.vectors) for name, pair in result.eigen.items()},
            projection_dim=options.projection_dim or None,
            reshape_to_square=options.reshape_to_square,
            projection_type=rows.projection.distribution if rows.projection else "rademacher",
            projection_target="global" if joint else "per_module",
            projection_scale=rows.projection.scale if rows.projection else "jl",
            include_bias=run.include_bias,
            projection_seed=options.projection_seed,
        )
        with run.progress.stage("Export"):
            run.destination.write_processor(processor)

    def settled(self, options: AutocorrelationOptions, modules: Sequence[str]) -> dict[str, Any]:
        """Globs of modules to split become names, since bergson takes no globs here."""
        split = matching("split_attention_modules", options.split_attention_modules, modules)
        return {"split_attention_modules": tuple(split)}

    def flop(self, work: arithmetic.Work, options: AutocorrelationOptions) -> dict[str, float]:
        """Of the passes for normalizers and for Grams."""
        chosen = set(options.split_attention_modules)
        heads = {
            each.name: options.num_heads
            for each in work.linears
            if chosen & set(each.module_names())
        }
        grams = arithmetic.autocorrelation(
            work.linears, work.lengths,
            projection_dim=options.projection_dim, tokens=options.attribute_tokens,
            joint=options.projection_target == "global", heads=heads, draws=work.draws,
        )  # fmt: skip
        moments = arithmetic.second_moments(work.linears, work.lengths, draws=work.draws)
        return {"Normalizers": moments, "Grams": grams}

    def passes(
        self,
        problem: Problem,
        options: AutocorrelationOptions,
        dtype: np.dtype,
        *,
        correct_eigenvalues: bool,
    ) -> dict[str, PlannedPass]:
        """Of the normalizers, where they are estimated, and of the Grams."""
        from jhessians.capture.sites import unshared
        from jhessians.fitting.autocorrelation import row_operand_shapes
        from jhessians.folds.gram import Gram, JointGram
        from jhessians.folds.second_moment import SecondMoment

        problem = replace(problem, sites=unshared(problem.sites))
        rows, joint = rows_of(options, problem.sites, dtype), options.projection_target == "global"
        factored = options.normalizer == "adafactor"
        passes = {}
        estimated = options.normalizer != "none" and options.optimizer_state is None
        if estimated:
            moments = SecondMoment(factored=factored, dtype=dtype)
            passes["Normalizers"] = PlannedPass(problem, moments, {}, dtype)
        fold = JointGram(rows) if joint else Gram(rows)
        normalizer = "none"
        if estimated or options.optimizer_state is not None:
            normalizer = "adafactor" if factored else "adam"
        operands = row_operand_shapes(problem, rows, joint=joint, normalizer=normalizer)
        passes["Grams"] = PlannedPass(problem, fold, operands, dtype)
        return passes

    def between_bytes(
        self,
        sites: Mapping[str, Site],
        options: AutocorrelationOptions,
        dtype: np.dtype,
        *,
        devices: int,
        hosts: int,
    ) -> int:
        """Of the Grams; their eigenpairs stay on the hosts."""
        return self.statistics_bytes(sites, options, dtype, partitions=1) // devices

    def matrix_sizes(self, sites: Mapping[str, Site], options: AutocorrelationOptions) -> list[int]:
        """Of every Gram."""
        import numpy as np

        if options.projection_target == "global":
            return [options.projection_dim]
        rows = rows_of(options, sites, np.dtype(np.float32))
        return [
            rows.unit_size(site)
            for site in sites.values()
            for module in site.module_names()
            for _ in rows.unit_names(site, module)
        ]

    def result_numbers(
        self,
        sites: Mapping[str, Site],
        options: AutocorrelationOptions,
        *,
        correct_eigenvalues: bool,
    ) -> int:
        """Of Grams, eigenvectors and eigenvalues."""
        return sum(2 * size**2 + size for size in self.matrix_sizes(sites, options))

    def statistics_bytes(
        self,
        sites: Mapping[str, Site],
        options: AutocorrelationOptions,
        dtype: np.dtype,
        *,
        partitions: int,
    ) -> int:
        """Of the Grams."""
        from jhessians.fitting.memory import gram_numbers

        if options.projection_target == "global":
            return options.projection_dim**2 * dtype.itemsize
        numbers = (gram_numbers(site, options.projection_dim) for site in sites.values())
        return sum(numbers) * dtype.itemsize


AUTOCORRELATION = AutocorrelationMethod(
    name="autocorrelation",
    summary="dense Grams of projected gradients",
    formula="H = Σ r rᵀ / N, r = vec(L G Rᵀ)",
    cost="p (I + O) + p² + p⁴ / 2T",
    disk="2 p⁴",
    papers=("2410.17413", "2303.14186"),
    bergson="autocorrelation",
    options=AutocorrelationOptions,
    rank=6,
)


def split_sites(options: AutocorrelationOptions, sites: Mapping[str, Site]) -> tuple[str, ...]:
    """Names of the sites whose modules `--split_attention_modules` names.

    Returns:
        In the order of `sites`; empty if nothing is to be split.

    Raises:
        ConfigError: If the heads don't make up a module, or some
            layers of a stack are split and others are not.
    """
    chosen = set(options.split_attention_modules)
    split = []
    for site in sites.values():
        modules = site.module_names()
        here = [name for name in modules if name in chosen]
        if not here:
            continue
        if len(here) < len(modules):
            (whole, *_) = (name for name in modules if name not in chosen)
            raise ConfigError(
                f"--split_attention_modules takes {here[0]} but not {whole}; split the same module "
                f"of all layers, as {site.name.format(layer='*')!r} does"
            )
        if options.num_heads * options.head_size != site.out_features:
            raise ConfigError(
                f"--num_heads {options.num_heads} x --head_size {options.head_size} is "
                f"{options.num_heads * options.head_size}, but {here[0]} has {site.out_features} "
                "output features; give sizes whose product that is"
            )
        split.append(site.name)
    return tuple(split)


def rows_of(
    options: AutocorrelationOptions, sites: Mapping[str, Site], dtype: np.dtype
) -> GradientRows:
    """How gradients become rows."""
    from jhessians.folds.rows import GradientRows

    return GradientRows(
        projection=projection_of(options),
        tokens=options.attribute_tokens,
        split=split_sites(options, sites),
        heads=max(1, options.num_heads),
        dtype=dtype,
    )


def projection_of(options: AutocorrelationOptions) -> Projection | None:
    """The random matrices that the options ask for; None for whole gradients."""
    from jhessians.linalg.projection import Projection

    if not options.projection_dim:
        return None
    return Projection(
        options.projection_dim,
        "normal" if options.projection_type == "normal" else "rademacher",
        "row_norm" if options.projection_scale == "row_norm" else "jl",
        options.projection_seed,
    )


def _check_memory(run: Run, sites: Mapping[str, Site]) -> None:
    """Say so before hours go into Grams that no disk will hold; refuse what no memory will.

    Raises:
        ConfigError: If the Grams and their eigenvectors exceed this host's memory.
    """
    sizes = AUTOCORRELATION.matrix_sizes(sites, run.options)
    total = sum(size**2 for size in sizes) * run.dtype.itemsize
    if total < LARGE_BYTES:
        return
    advice = (
        f"lower --projection_dim {run.options.projection_dim}"
        if run.options.projection_dim
        else "give --projection_dim, such as 16"
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 2 * total > memory:
        raise ConfigError(
            f"{len(sizes)} Grams of up to {max(sizes)} x {max(sizes)} and their eigenvectors take "
            f"{bytes_in_words(2 * total)}, but this host has {bytes_in_words(memory)}; {advice}"
        )
    run.progress.warn(
        f"{len(sizes)} Grams of up to {max(sizes)} x {max(sizes)} take "
        f"{bytes_in_words(total)}; {advice}, unless they are wanted whole"
    )
