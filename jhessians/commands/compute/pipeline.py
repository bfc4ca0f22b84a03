"""What `compute` does: read model and data, let the method fit and write, describe the run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import jax
import numpy as np
from jax.sharding import Mesh

import converters.parameter_order
from jhessians.capture.coverage import Sites
from jhessians.capture.problem import Activations, Problem
from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.compute.next_steps import next_steps
from jhessians.commands.hosts import join_hosts, require_same_files
from jhessians.commands.output import output_folder
from jhessians.commands.problem import (
    Inputs,
    find_linears,
    load_model,
    read_inputs,
    require_parameter_order,
    settled_activations,
)
from jhessians.commands.resuming import contents_of, resuming
from jhessians.config.option import name_flags, options_of
from jhessians.devices.fingerprint import fingerprint
from jhessians.devices.hosts import together
from jhessians.devices.mesh import make_mesh
from jhessians.devices.precision import require_supported
from jhessians.fitting.partitions import needed_partitions
from jhessians.influence.spectra import factor_spectra
from jhessians.interop.export import Destination, write_config
from jhessians.interop.layout import DTYPES, INFLUENCE_RESULTS
from jhessians.interop.load import FactorStore
from jhessians.methods.method import Run
from jhessians.models.loss import NextTokenLoss
from jhessians.report.progress import Progress
from jhessians.report.recorder import needed, recording
from jhessians.report.spectrum import spectrum_lines
from jhessians.report.summary import Summary, measure_trees


def is_first_host() -> bool:
    """Whether this process writes and speaks for all hosts of the run."""
    return jax.process_index() == 0


def compute(config: ComputeConfig, *, into: Path | None = None) -> Summary:
    """Fit the Hessian that `config` asks for and write it under its run path.

    Every process of a run on several hosts calls this; the first one writes.

    Args:
        config: Validated.
        into: Another folder than the run path to write, which another run will move there.

    Returns:
        What there is to say of the run.

    Raises:
        UserError: If the input is wrong in any of the ways that `jhessians.errors` knows.
    """
    first = join_hosts(config, "compute")
    mesh = make_mesh(config.world_size, axes=config.mesh)
    require_supported(config.matmul_precision, jax.local_devices()[0])
    with ExitStack() as stack:
        with together():
            directory = output_folder(config, "run_path", "compute", into=into, writer=first)
            part = stack.enter_context(directory)
            recorder = stack.enter_context(
                recording(part, profile=config.profile, trace=config.profile_trace)
            )
        names = {each.name for each in options_of(type(config))}
        progress = Progress(
            quiet=config.quiet or not first,
            around=recorder.around,
            reword=partial(name_flags, names=names),
        )
        replayed = config.replayed
        state = stack.enter_context(resuming(config, directory, mesh, progress))
        require_same_files(optimizers_states=config.optimizer_state)
        config = state.taken_up(config)
        inputs = read_inputs(
            config, mesh, progress,
            token_batch_size=config.token_batch_size, devices=state.devices,
        )  # fmt: skip
        require_parameter_order(inputs, config.optimizer_state)
        problem, sites = load_problem(config, inputs, mesh, progress)
        config = _settled(config, inputs, problem, mesh, progress)
        problem = replace(problem, activations=cast(Activations, config.activations))
        shards = config.num_shards or state.devices
        with progress.stage("Fingerprints"), together():
            documents = inputs.batches.documents.fingerprint()
            weights = fingerprint(problem.model)
            contents = contents_of(documents, weights, config.optimizer_state)
            state.begin(config, contents, replayed)
        run = Run(
            problem,
            inputs.batches,
            options=config.method_options,
            correct_eigenvalues=config.corrects_eigenvalues,
            partitions=cast(int, config.module_partitions),
            dtype=sum_dtype(config),
            include_bias=config.include_bias,
            destination=Destination(
                part,
                documents=len(inputs.batches.documents),
                total_processed=inputs.batches.documents.positions,
                layout=config.layout,
                shards=shards,
                dtype=config.hessian_dtype,
            ),
            progress=progress,
            parameters=partial(converters.parameter_order.named_parameters, inputs.settings),
            kept=state.checkpoints,
        )
        _write_config(run, config, inputs, mesh)
        config.chosen.fit(run)
        state.checkpoints.settle()
        with together():
            profile = None
            if config.profile:
                profile = recorder.finish(
                    needed(run, config.chosen), inputs.batches, mesh,
                    numbers=config.precision, matmul_precision=config.matmul_precision,
                )  # fmt: skip
        with together():
            stack.close()
    # Only the first process is sure to see the folder, and only it has something to say.
    trees, disk_bytes = measure_trees(into or config.run_path) if first else ([], 0)
    shell, python = next_steps(
        config, model=inputs.model_name, dataset=inputs.dataset_name, shards=shards,
        model_max_length=inputs.shape.positions,
    )  # fmt: skip
    return Summary(
        run_path=config.run_path,
        method=config.method,
        product=config.chosen.product,
        modules=sum(len(site.module_names()) for site in problem.sites.values()),
        documents=len(inputs.batches.documents),
        skipped_documents=inputs.batches.plan.skipped,
        positions=inputs.batches.documents.positions,
        devices=f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        timings=progress.timings,
        trees=trees,
        disk_bytes=disk_bytes,
        padding_share=inputs.batches.plan.padding_share,
        number_format=converters.number_format(problem.model),
        profile=profile,
        coverage=sites.coverage.lines(),
        spectrum=_spectrum(config, into or Path(config.run_path)) if first else (),
        notes=progress.notes,
        warnings=progress.warnings,
        next_shell=shell,
        next_python=python,
    )


def _spectrum(config: ComputeConfig, folder: Path) -> Sequence[str]:
    """What the eigenvalues that were written say; the older tree alone has none."""
    if not config.chosen.factored or config.layout == INFLUENCE_RESULTS:
        return ()
    store = FactorStore(folder)
    said = spectrum_lines(factor_spectra(store), store.total_processed)
    return (*said, f"jhessians advise {config.run_path} says whether there are enough tokens")


def load_problem(
    config: ComputeConfig, inputs: Inputs, mesh: Mesh, progress: Progress
) -> tuple[Problem, Sites]:
    """Load the weights and find the linears that the options take in.

    Args:
        config: Of the fit.
        inputs: Names the model.
        mesh: The devices.
        progress: Is told of the stage.

    Returns:
        Loss, model and linears; and the linears with what is passed over.

    Raises:
        UserError: If the weights can't be loaded, or a pattern matches no linear.
    """
    model = load_model(
        inputs, mesh, progress,
        precision=config.precision, revision=config.revision, fsdp=config.fsdp,
        offload=config.offload == "weights",
    )  # fmt: skip
    loss = loss_of(config)
    sites = find_linears(loss, model, inputs, config, progress.note)
    problem = Problem(
        loss, model, sites,
        mesh=mesh if mesh.size > 1 else None,
        draws=config.mc_samples, matmul_precision=config.matmul_precision,
    )  # fmt: skip
    return problem, sites


def loss_of(config: ComputeConfig) -> NextTokenLoss:
    """The loss whose curvature the options ask for."""
    return NextTokenLoss(
        labels="dataset" if config.takes_dataset_labels else "sampled",
        reduction=config.gradient_reduction,
        seed=config.seed,
        draws=config.mc_samples,
        function="log_odds" if config.loss_fn == "log_odds" else "cross_entropy",
        label_smoothing=config.label_smoothing,
    )


def _settled(
    config: ComputeConfig, inputs: Inputs, problem: Problem, mesh: Mesh, progress: Progress
) -> ComputeConfig:
    """The options with everything settled that they leave to the model and the memory."""
    sites, dtype = problem.sites, sum_dtype(config)
    names = [name for site in sites.values() for name in site.module_names()]
    settled = config.chosen.settled(config.method_options, names)
    partitions, choice = config.module_partitions, config.activations
    if isinstance(partitions, str):
        partitions = needed_partitions(
            sites, dtype.itemsize, mesh.size, hosts=problem.hosts,
            shares_inputs=config.chosen.shares_inputs(config.method_options), warn=progress.warn,
        )  # fmt: skip
    taken = config.chosen.statistics_bytes(
        sites, config.method_options, dtype, partitions=partitions
    )
    choice = settled_activations(choice, problem, inputs.batches, mesh, taken, progress.note)
    return replace(config, module_partitions=partitions, activations=choice, **settled)


def _write_config(run: Run, config: ComputeConfig, inputs: Inputs, mesh: Mesh) -> None:
    """The configuration that replays the run, and says where it ran."""
    document = config.document(
        model=inputs.model_name, dataset=inputs.dataset_name, shards=run.destination.shards,
        processes=jax.process_count(), devices=[str(device) for device in mesh.devices.flat],
    )  # fmt: skip
    write_config(run.destination.root, document, config.resolved_dict(), layout=config.layout)


def sum_dtype(config: ComputeConfig) -> np.dtype:
    """The number format of a fit's sums: wide enough, even where results are stored in 16 bits."""
    return np.promote_types(np.float32, DTYPES[config.hessian_dtype][1])
