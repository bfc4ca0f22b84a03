"""What `build` does: read model and data, make the rows batch by batch, write each when made."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import cast

import jax
import numpy as np
from jax.sharding import Mesh

import converters
from jhessians.capture.coverage import Sites
from jhessians.capture.problem import Activations, Problem
from jhessians.capture.sites import unshared
from jhessians.commands.build.config import BuildConfig
from jhessians.commands.build.rows import (
    fitting_batches,
    gradient_rows,
    normalizers_of,
    settled,
    with_module_names,
)
from jhessians.commands.build.store import Place, Store, open_store
from jhessians.commands.hosts import join_hosts, require_same_files
from jhessians.commands.output import output_folder
from jhessians.commands.problem import (
    Inputs,
    find_linears,
    gradient_loss,
    load_model,
    read_inputs,
    require_parameter_order,
)
from jhessians.commands.resuming import contents_of, positions_of, resuming, version_of
from jhessians.config.option import name_flags, options_of
from jhessians.config.units import bytes_in_words, count_in_words
from jhessians.data.batches import Batches
from jhessians.devices.fingerprint import fingerprint
from jhessians.devices.hosts import together
from jhessians.devices.memory import free_memory
from jhessians.devices.mesh import make_mesh
from jhessians.devices.precision import require_supported
from jhessians.errors import OutputError
from jhessians.fitting import activations
from jhessians.fitting.autocorrelation import row_operands
from jhessians.folds.normalizers import Normalizer
from jhessians.folds.rows import GradientRows
from jhessians.influence.gradients import GradientPass, StoredRows
from jhessians.interop import torchfile
from jhessians.interop.data_folder import write_aggregate, write_documents
from jhessians.interop.export import write_config
from jhessians.interop.layout import DTYPES, TOTAL_FILE
from jhessians.interop.processor import GradientProcessor
from jhessians.interop.shards import raise_together
from jhessians.report.progress import Progress
from jhessians.report.summary import Summary, measure_trees


def build(config: BuildConfig) -> Summary | None:
    """Store the gradients that `config` asks for under its run path.

    Every process of a run on several hosts calls this; the first one writes.

    Args:
        config: Validated.

    Returns:
        What there is to say of the run; None on all hosts but the first.

    Raises:
        UserError: If the input is wrong in any of the ways that `jhessians.errors` knows.
    """
    first = join_hosts(config, "build")
    mesh = make_mesh(config.world_size, axes=config.mesh)
    require_supported(config.matmul_precision, jax.local_devices()[0])
    with ExitStack() as stack:
        with together():
            directory = output_folder(config, "run_path", "build", writer=first)
            part = stack.enter_context(directory)
        names = {each.name for each in options_of(type(config))}
        progress = Progress(
            quiet=config.quiet or not first, reword=partial(name_flags, names=names)
        )
        state = stack.enter_context(resuming(config, directory, mesh, progress))
        require_same_files(
            optimizers_states=config.optimizer_state, gradient_processors=config.processor_path
        )
        replayed, config = config.replayed, state.taken_up(config)
        with together():
            processor = None
            if config.processor_path is not None:
                processor = GradientProcessor.load(config.processor_path, skip_hessians=True)
            config = settled(config, processor)
        inputs = read_inputs(
            config, mesh, progress,
            token_batch_size=config.token_batch_size, devices=state.devices,
        )  # fmt: skip
        require_parameter_order(inputs, config.optimizer_state)
        problem, sites = _load_problem(config, inputs, mesh, progress)
        config = with_module_names(config, problem)
        rows = gradient_rows(config, problem)
        making = GradientPass(
            problem, rows, inputs.batches.documents.lengths,
            joint=config.projection_target == "global", rank=config.rank or None,
            unit_normalize=config.unit_normalize,
        )  # fmt: skip
        with together():
            _require_space(config, making, part, progress)
        given = config
        config, batches = fitting_batches(
            config, inputs, making, state.devices, settled=state.resumed
        )
        inputs = replace(inputs, batches=batches)
        config = _with_activations(config, problem, inputs.batches, mesh, progress)
        problem = replace(problem, activations=cast(Activations, config.activations))
        making.problem = problem
        with progress.stage("Fingerprints"), together():
            contents = contents_of(
                batches.documents.fingerprint(), fingerprint(problem.model), config.optimizer_state
            )
            if config.processor_path is not None:
                contents["the gradient processor"] = version_of(Path(config.processor_path))
            state.begin(config, contents, replayed)
        # Sizes of batches are left to the memory of the machine that replays it.
        _write_config(replace(given, activations=config.activations), inputs, part, mesh)
        normalizers = normalizers_of(
            config, inputs, problem, processor, progress, state.checkpoints
        )
        operands = row_operands(problem, rows, joint=making.joint, normalizers=normalizers)
        positions = inputs.batches.documents.positions
        with progress.stage("Gradients", positions, "positions") as stage:
            store = open_store(config, making, part, writer=first)
            place = Place(state.checkpoints.series("gradients"), making, store)
            ahead = iter(batches)
            stage.advance(positions_of(problem, islice(ahead, place.batches)))
            made = making.run(ahead, operands, advance=stage.advance)
            _fill(store, made, place, part)
        state.checkpoints.settle()
        with progress.stage("Files"):
            _write_beside(config, inputs, rows, normalizers, part)
        with together():
            stack.close()
    return _summary(config, inputs, sites, making, store, mesh, progress) if first else None


def _load_problem(
    config: BuildConfig, inputs: Inputs, mesh: Mesh, progress: Progress
) -> tuple[Problem, Sites]:
    """Load the weights and find the linears that the options take in."""
    model = load_model(
        inputs, mesh, progress,
        precision=config.precision, revision=config.revision, fsdp=config.fsdp,
    )  # fmt: skip
    loss = gradient_loss(config)
    sites = find_linears(loss, model, inputs, config, progress.note)
    problem = Problem(
        loss, model, unshared(sites),
        mesh=mesh if mesh.size > 1 else None, matmul_precision=config.matmul_precision,
    )  # fmt: skip
    return problem, sites


def _with_activations(
    config: BuildConfig, problem: Problem, batches: Batches, mesh: Mesh, progress: Progress
) -> BuildConfig:
    """The options with the choice of what to store for the backward pass, if it is left open."""
    if config.activations != activations.AUTOMATIC:
        return config
    largest = activations.largest_batch(batches.plan, next(iter(batches)), mesh.size)
    stored, free = activations.stored_bytes(problem, largest), int(free_memory() / 2)
    choice = activations.choose(stored, free)
    if choice == "recompute":
        progress.note(
            f"Activations are recomputed: stored they take {bytes_in_words(stored)} a device, "
            f"where {bytes_in_words(free)} are free beside model and gradients"
        )
    return replace(config, activations=choice)


def _require_space(
    config: BuildConfig, making: GradientPass, part: Path, progress: Progress
) -> None:
    """Say what the store takes on the disk, and refuse what the disk hasn't got.

    Raises:
        OutputError: If it is too little.
    """
    if not part.is_dir():  # another host's
        return
    rows = 1 if config.aggregation != "none" else making.row_count
    needed = making.width * rows * DTYPES[config.stored_as][1].itemsize
    free = shutil.disk_usage(part).free
    words = (
        f"{count_in_words(rows, 'row')} of {making.width:,} {config.stored_as} numbers take "
        f"{bytes_in_words(needed)}"
    )
    if needed > free:
        raise OutputError(
            f"cannot write {config.run_path}: {words}, where {bytes_in_words(free)} are free; "
            "choose another disk, or give `projection_dim`, `rank` or `store_dtype` bf16"
        )
    progress.note(f"Gradients: {words}, where {bytes_in_words(free)} are free")


def _fill(store: Store, made: Iterator[Iterator[StoredRows]], place: Place, part: Path) -> None:
    """Write the rows as they are made; a failure is raised when all hosts are done.

    Raises:
        OutputError: If the disk is full, read-only or not ours.
    """
    failure: OSError | None = None
    with store:
        for batch in made:
            try:
                for rows in batch:
                    if failure is None:
                        store.add(rows)
                place.move(failed=failure is not None)
            except OSError as error:
                failure = error
                if jax.process_count() == 1:
                    break
    raise_together(failure, part)


def _write_beside(
    config: BuildConfig,
    inputs: Inputs,
    rows: GradientRows,
    normalizers: Mapping[str, Normalizer],
    part: Path,
) -> None:
    """Write what bergson reads beside a store."""
    documents = inputs.batches.documents
    with together():
        if jax.process_index() == 0:
            GradientProcessor(
                normalizers,
                projection_dim=config.projection_dim or None,
                reshape_to_square=config.reshape_to_square,
                projection_type=rows.projection.distribution if rows.projection else "rademacher",
                projection_target="global"
                if config.projection_target == "global"
                else "per_module",
                projection_scale=rows.projection.scale if rows.projection else "jl",
                include_bias=config.include_bias,
                projection_seed=config.projection_seed,
            ).save(part)
            torchfile.save(np.array(documents.positions, np.int64), part / TOTAL_FILE)
            if config.aggregation != "none":
                write_aggregate(part)
            else:
                write_documents(part, documents)


def _write_config(config: BuildConfig, inputs: Inputs, part: Path, mesh: Mesh) -> None:
    """What replays the run."""
    document = config.document(
        model=inputs.model_name, dataset=inputs.dataset_name,
        devices=[str(device) for device in mesh.devices.flat],
    )  # fmt: skip
    write_config(part, document, config.resolved_dict(), layout="bergson")


def _summary(
    config: BuildConfig,
    inputs: Inputs,
    sites: Sites,
    making: GradientPass,
    store: Store,
    mesh: Mesh,
    progress: Progress,
) -> Summary:
    documents, plan = inputs.batches.documents, inputs.batches.plan
    facts = {"store": f"{count_in_words(store.rows, 'row')} of {making.width:,} numbers, "
                      f"{config.stored_as}"}  # fmt: skip
    if config.rank:
        lost = 1 - making.kept / making.square if making.square else 0.0
        facts["lost"] = f"{max(0.0, lost):.2%} of the squared norm, beyond rank {config.rank}"
    if store.cut:
        progress.warn(
            f"{count_in_words(store.cut, 'number')} beyond the range of {config.stored_as} were "
            "cut to its largest; `store_dtype` bf16 or fp32 has a wider one"
        )
    trees, disk_bytes = measure_trees(config.run_path)
    what = "low-rank" if config.rank else "projected" if config.projection_dim else "whole"
    reader = (
        f"import jhessians\njhessians.LowRankStore({config.run_path!r})"
        if config.rank
        else f"from bergson.data import load_gradients\nload_gradients({config.run_path!r})"
    )
    return Summary(
        run_path=config.run_path,
        method=what,
        product="gradients of tokens" if config.attribute_tokens else "gradients",
        modules=sum(len(site.module_names()) for site in sites.values()),
        documents=len(documents),
        skipped_documents=plan.skipped,
        positions=documents.positions,
        devices=f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        timings=progress.timings,
        trees=trees,
        disk_bytes=disk_bytes,
        padding_share=plan.padding_share,
        number_format=converters.number_format(making.problem.model),
        coverage=sites.coverage.lines(),
        notes=progress.notes,
        warnings=progress.warnings,
        next_python=reader,
        facts=facts,
    )
