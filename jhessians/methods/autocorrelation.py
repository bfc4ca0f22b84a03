"""The dense method: Grams of normalised, projected gradients, written as a gradient processor.

What torch bergson 2.5.1 does not do here, and we do: `--attribute_tokens` (its collectors know it,
its `hessian` command drops it) and sampled labels. `--reshape_to_square` is recorded in both and
changes no number in either.
"""

import os
from collections.abc import Mapping
from dataclasses import replace

from jhessians.capture.problem import Problem
from jhessians.capture.site import Site
from jhessians.capture.sites import unshared
from jhessians.commands.compute_config import ComputeConfig
from jhessians.config.units import bytes_in_words
from jhessians.errors import ConfigError
from jhessians.fitting.autocorrelation import fit_autocorrelations
from jhessians.fitting.passes import run_pass
from jhessians.folds.normalizers import Normalizer
from jhessians.folds.rows import GradientRows
from jhessians.folds.second_moment import SecondMoment
from jhessians.interop.export import write_processor
from jhessians.interop.optax_state import is_orbax
from jhessians.interop.optimizer_state import load_normalizers
from jhessians.interop.processor import GradientProcessor
from jhessians.linalg.projection import Projection
from jhessians.methods.run import Run

LARGE_BYTES = 1 << 30  # of all Grams, from which on a user is warned


def fit_run(run: Run) -> None:
    """Normalizers, Grams and eigendecompositions, then all files.

    Raises:
        ConfigError: If modules can't be split into the heads that are asked for.
        CheckpointError: If the optimizer's state has no normalizer for a module.
        NumericsError: If a loss or a Gram isn't finite.
        OutputError: If the disk is full, read-only or not ours.
    """
    config = run.config
    problem = replace(run.problem, sites=unshared(run.problem.sites))
    rows = GradientRows(
        projection=_projection(config),
        tokens=config.attribute_tokens,
        split=split_sites(config, problem.sites),
        heads=max(1, config.num_heads),
        dtype=run.dtype,
    )
    joint = config.projection_target == "global"
    if not joint:
        _check_memory(run, problem.sites, rows)
    normalizers = _normalizers(run, problem)
    documents = run.documents
    result = fit_autocorrelations(
        problem,
        run.batches,
        rows,
        count=documents.positions if config.attribute_tokens else len(documents),
        joint=joint,
        normalizers=normalizers,
        progress=run.progress,
        positions=documents.positions,
    )
    processor = GradientProcessor(
        normalizers,
        result.hessians,
        {name: (pair.values, pair.vectors) for name, pair in result.eigen.items()},
        projection_dim=config.projection_dim or None,
        reshape_to_square=config.reshape_to_square,
        projection_type=rows.projection.kind if rows.projection else "rademacher",
        projection_target="global" if joint else "per_module",
        projection_scale=rows.projection.scale if rows.projection else "jl",
        include_bias=config.include_bias,
        projection_seed=config.projection_seed,
    )
    with run.progress.stage("Export"):
        write_processor(
            run.part, processor, layout=config.layout, total_processed=documents.positions
        )


def split_sites(config: ComputeConfig, sites: Mapping[str, Site]) -> tuple[str, ...]:
    """Names of the sites whose modules `--split_attention_modules` names.

    Raises:
        ConfigError: If the heads don't make up a module, or some
            layers of a stack are split and others are not.
    """
    chosen = set(config.split_attention_modules)
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
        if config.num_heads * config.head_size != site.out_features:
            raise ConfigError(
                f"--num_heads {config.num_heads} x --head_size {config.head_size} is "
                f"{config.num_heads * config.head_size}, but {here[0]} has {site.out_features} "
                "output features; give sizes whose product that is"
            )
        split.append(site.name)
    return tuple(split)


def _projection(config: ComputeConfig) -> Projection | None:
    if not config.projection_dim:
        return None
    return Projection(
        config.projection_dim,
        "normal" if config.projection_type == "normal" else "rademacher",
        "row_norm" if config.projection_scale == "row_norm" else "jl",
        config.projection_seed,
    )


def _check_memory(run: Run, sites: Mapping[str, Site], rows: GradientRows) -> None:
    """Say so before hours go into Grams that no disk will hold; refuse what no memory will.

    Raises:
        ConfigError: If the Grams and their eigenvectors exceed this host's memory.
    """
    sizes = [
        rows.unit_size(site)
        for site in sites.values()
        for module in site.module_names()
        for _ in rows.unit_names(site, module)
    ]
    total = sum(size**2 for size in sizes) * run.dtype.itemsize
    if total < LARGE_BYTES:
        return
    advice = (
        f"lower --projection_dim {run.config.projection_dim}"
        if run.config.projection_dim
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


def _normalizers(run: Run, problem: Problem) -> dict[str, Normalizer]:
    """Those of an optimizer, those of a pass over the data, or none."""
    config = run.config
    if config.optimizer_state is not None:
        path = config.optimizer_state
        read = load_normalizers(
            path,
            model=problem.model,
            parameters=() if is_orbax(path) else run.parameters(),
            include_bias=config.include_bias,
        )
        modules = {name for site in problem.sites.values() for name in site.module_names()}
        return {name: each for name, each in read.items() if name in modules}
    if config.normalizer == "none":
        return {}
    fold = SecondMoment(factored=config.normalizer == "adafactor", dtype=run.dtype)
    with run.progress.stage("Normalizers", run.documents.positions, "positions") as stage:
        sums = run_pass(
            fold, problem, run.batches,
            dtype=run.dtype, advance=stage.advance,
        )  # fmt: skip
        return fold.finish(problem.sites, sums, documents=len(run.documents))
