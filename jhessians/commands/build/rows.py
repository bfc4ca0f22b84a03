"""What the rows of a store are made with: projection, heads and normalizers, as the options say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

import converters.parameter_order
from jhessians.capture.problem import Problem
from jhessians.commands.build.config import BuildConfig
from jhessians.commands.problem import Inputs
from jhessians.config.option import options_of
from jhessians.config.units import bytes_in_words
from jhessians.data.batches import Batches
from jhessians.data.batching import plan_batches
from jhessians.devices.memory import free_memory
from jhessians.errors import CheckpointError, ConfigError
from jhessians.fitting.checkpoints import Checkpoints
from jhessians.fitting.normalizers import make_normalizers
from jhessians.fitting.reporting import Reporter
from jhessians.folds.normalizers import AdamNormalizer, Normalizer
from jhessians.folds.rows import GradientRows
from jhessians.influence.gradients import GradientPass
from jhessians.interop.processor import PROJECTION_VERSION, GradientProcessor
from jhessians.methods.autocorrelation import AUTOCORRELATION, projection_of, split_sites

SHARE = 1 / 8
"""Of the free memory, what a batch's rows may take: there are those of two batches, the running
sums that they begin as, a copy on the host, and what the linears need meanwhile."""


def settled(config: BuildConfig, processor: GradientProcessor | None) -> BuildConfig:
    """The options with those that a gradient processor decides.

    Args:
        config: As given.
        processor: That of `--processor_path`; None without one.

    Returns:
        The options, in which those left at their defaults are the processor's.

    Raises:
        CheckpointError: If the processor projects in a way that isn't ours.
        ConfigError: If an option that is given contradicts it.
    """
    if processor is None:
        return config
    if processor.projection_dim and processor.projection_version != PROJECTION_VERSION:
        raise CheckpointError(
            f"{config.processor_path} has projections of version {processor.projection_version}; "
            f"expected version {PROJECTION_VERSION}, the only one that can be made again: fit it "
            "anew"
        )
    theirs = processor.settings | {"projection_dim": processor.projection_dim or 0}
    names: tuple[str, ...] = ("projection_dim", "include_bias")
    if processor.projection_dim:
        names += ("projection_type", "projection_scale", "projection_target", "projection_seed",
                  "reshape_to_square")  # fmt: skip
    changes: dict[str, Any] = {}
    for each in options_of(BuildConfig):
        if each.name not in names:
            continue
        mine = getattr(config, each.name)
        if mine == each.default:
            changes[each.name] = theirs[each.name]
        elif mine != theirs[each.name]:
            raise ConfigError(
                f"--{each.name} {mine} contradicts {config.processor_path}, which has "
                f"{theirs[each.name]}; leave one of them out"
            )
    return replace(config, **changes)


def gradient_rows(config: BuildConfig, problem: Problem) -> GradientRows:
    """How gradients become rows.

    Args:
        config: With names, no globs, of the modules to split.
        problem: The linears.

    Returns:
        The fold, which computes in float32, or float64 where that is asked for.

    Raises:
        ConfigError: If modules can't be split into the heads that are asked for.
    """
    return GradientRows(
        projection=projection_of(config),
        tokens=config.attribute_tokens,
        split=split_sites(config, problem.sites),
        heads=max(1, config.num_heads),
        dtype=np.dtype(np.float64 if config.needs_float64 else np.float32),
    )


def with_module_names(config: BuildConfig, problem: Problem) -> BuildConfig:
    """The options with names for the globs of modules to split."""
    names = [name for site in problem.sites.values() for name in site.module_names()]
    return replace(config, **AUTOCORRELATION.settled(config, names))


def normalizers_of(
    config: BuildConfig,
    inputs: Inputs,
    problem: Problem,
    processor: GradientProcessor | None,
    progress: Reporter,
    kept: Checkpoints,
) -> Mapping[str, Normalizer]:
    """Those of the processor, of an optimizer or of a pass over the data; or none.

    Args:
        config: The options.
        inputs: The data, and the model's family.
        problem: Loss, model, linears and devices.
        processor: That of `--processor_path`; None without one.
        progress: Where the stage is shown.
        kept: Where sums are saved, and from where they are continued.

    Returns:
        Module → its normalizer.

    Raises:
        CheckpointError: If an optimizer's state can't be read.
        ConfigError: If a gradient of low rank would be scaled in every entry.
        NumericsError: If a loss isn't finite.
    """
    modules = {name for site in problem.sites.values() for name in site.module_names()}
    if processor is not None:
        made = {name: each for name, each in processor.normalizers.items() if name in modules}
        if processor.normalizers and not made:
            raise CheckpointError(
                f"{config.processor_path} has normalizers of none of the modules, but of "
                f"{next(iter(processor.normalizers))}; expected the same model's"
            )
    else:
        made = make_normalizers(
            problem,
            inputs.batches,
            kind=config.normalizer,
            optimizer_state=config.optimizer_state,
            parameters=partial(converters.parameter_order.named_parameters, inputs.settings),
            include_bias=config.include_bias,
            dtype=np.dtype(np.float64 if config.needs_float64 else np.float32),
            progress=progress,
            kept=kept,
        )
    if config.rank and any(isinstance(each, AdamNormalizer) for each in made.values()):
        raise ConfigError(
            f"--rank {config.rank} keeps a few outer products of a document's gradient, while "
            "adam's normalizers scale every entry, to any rank; leave out one of them"
        )
    return made


def fitting_batches(
    config: BuildConfig, inputs: Inputs, making: GradientPass, devices: int, *, settled: bool
) -> tuple[BuildConfig, Batches]:
    """The same data in batches whose rows fit in memory.

    Args:
        config: The options.
        inputs: The data, in batches that suit the model alone.
        making: The pass that makes the rows.
        devices: Over which documents are spread.
        settled: Whether the options are those of a run that is continued, in which they fit.

    Returns:
        The options with the sizes of batches settled, and batches of fewer documents, if need be.

    Raises:
        ConfigError: If one document's rows take more memory than there is.
    """
    documents = inputs.batches.documents
    lengths = documents.lengths
    one = making.width * np.dtype(making.rows.dtype).itemsize
    free = free_memory()
    longest = int(lengths.max())
    tokens = config.attribute_tokens
    least = one * (longest if tokens else 1)
    if least > free / 2:
        whose = "the tokens of the longest document" if tokens else "a document"
        raise ConfigError(
            f"the gradients of {whose} take {bytes_in_words(least)}, but each device has "
            f"{bytes_in_words(free)} free; give --projection_dim, such as 16, or fewer --modules"
        )
    budget = config.token_batch_size
    most = config.max_batch_size
    fit = max(1, int(SHARE * free) // one)
    if settled:
        pass
    elif tokens:
        budget = max(longest, min(budget, fit))
    else:
        most = min(most or fit, fit)
    plan = plan_batches(
        lengths,
        token_batch_size=budget,
        devices=devices,
        max_length=inputs.shape.positions,
        max_documents=most,
    )
    return replace(config, token_batch_size=budget, max_batch_size=most), Batches(documents, plan)
