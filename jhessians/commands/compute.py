"""`compute`: load model and data, let the method fit and write its Hessian, describe the run."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

import converters.hub
import converters.parameter_order
import converters.registry
from jhessians import demo
from jhessians.capture.problem import Problem
from jhessians.capture.site import Site
from jhessians.capture.sites import find_sites
from jhessians.commands.compute_config import ComputeConfig
from jhessians.commands.next_steps import next_steps
from jhessians.commands.selection import select_sites
from jhessians.config.option import matching
from jhessians.config.provenance import config_document
from jhessians.config.units import bytes_in_words
from jhessians.data.batching import Batch, BatchPlan, iterate_batches, plan_batches
from jhessians.data.documents import Documents
from jhessians.data.sources import DataOptions, load_documents
from jhessians.devices.hosts import require_same, start_hosts, together
from jhessians.devices.memory import free_memory
from jhessians.devices.mesh import make_mesh
from jhessians.devices.precision import require_supported
from jhessians.errors import CheckpointError, ConfigError
from jhessians.fitting import activations
from jhessians.fitting.memory import gram_numbers
from jhessians.fitting.partitions import AUTOMATIC, factor_bytes, needed_partitions
from jhessians.interop.export import write_config
from jhessians.interop.layout import DTYPES
from jhessians.interop.rundir import RunDirectory
from jhessians.methods.fits import FITS
from jhessians.methods.run import Run, sum_dtype
from jhessians.models.loss import NextTokenLoss
from jhessians.report import recorder as profiling
from jhessians.report.progress import Progress
from jhessians.report.summary import Summary, measure_trees


def compute(config: ComputeConfig, progress: Progress) -> Summary:
    """Fit the Hessian that `config` asks for and write it under its run path.

    Every process of a run on several hosts calls this; the first one writes.

    Raises:
        UserError: If the input is wrong in any of the ways that `jhessians.errors` knows.
    """
    config.validate()
    start_hosts()
    first = jax.process_index() == 0
    progress.quiet |= not first
    mesh = make_mesh(config.world_size)
    require_supported(config.matmul_precision, jax.local_devices()[0])
    with ExitStack() as stack:
        with together():
            directory = RunDirectory(config.run_path, config.overwrite, writer=first)
            part = stack.enter_context(directory)
            recorder = stack.enter_context(profiling.observed(config, progress, part))
        run = _prepare(config, mesh, progress, part)
        FITS[config.bergson_method](run)
        _write_config(run)
        with together():
            profile = recorder.finish(run) if recorder else None
        with together():
            stack.close()
    # Only the first process is sure to see the folder, and only it has something to say.
    trees, disk_bytes = measure_trees(config.run_path) if first else ([], 0)
    shell, python = next_steps(
        run.config, model=run.model_name, dataset=run.dataset_name, shards=run.shards,
        model_max_length=run.longest,
    )  # fmt: skip
    return Summary(
        run_path=config.run_path,
        method=config.method,
        product="factors" if config.is_factored else "Hessians",
        modules=sum(len(site.module_names()) for site in run.problem.sites.values()),
        documents=len(run.documents),
        skipped_documents=run.plan.skipped,
        positions=run.documents.positions,
        devices=f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        timings=progress.timings,
        trees=trees,
        disk_bytes=disk_bytes,
        padding_share=run.plan.padding_share,
        number_format=converters.number_format(run.problem.model),
        profile=profile,
        warnings=progress.warnings,
        next_shell=shell,
        next_python=python,
    )


def _write_config(run: Run) -> None:
    """The configuration that replays the run, and says where it ran."""
    document = config_document(
        run.config, model=run.model_name, dataset=run.dataset_name, shards=run.shards,
        processes=jax.process_count(), devices=[str(d) for d in run.mesh.devices.flat],
    )  # fmt: skip
    write_config(run.part, document, run.config.resolved_dict(), layout=run.config.layout)


@dataclass(frozen=True)
class _Batches:
    """This host's rows of every batch, to iterate as often as there are passes."""

    documents: Documents
    plan: BatchPlan

    def __iter__(self) -> Iterator[Batch]:
        batches = iterate_batches(
            self.documents, self.plan,
            process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip
        for number, batch in enumerate(batches):
            with jax.profiler.StepTraceAnnotation("batch", step_num=number):
                yield batch


def _prepare(config: ComputeConfig, mesh: Mesh, progress: Progress, part: Path) -> Run:
    """Read model and data, the cheap and error-prone things first."""
    model_name = str(demo.MODEL) if config.is_demo else str(config.model)
    dataset_name = str(demo.DATASET) if config.is_demo else str(config.dataset)
    with progress.stage("Data"), together():
        source = converters.hub.find(model_name, config.revision)
        if source.adapter is not None and config.optimizer_state is not None:
            raise ConfigError(
                f"--optimizer_state is given, but {model_name} is an adapter, whose parameters' "
                "order in an optimizer isn't known here; estimate with --normalizer adam"
            )
        settings = converters.registry.read_config(source.folder)
        shape = converters.decoder_config(settings)
        tokenizer = _tokenizer(config, model_name)
        documents = load_documents(
            _data_options(config, dataset_name),
            tokenizer,
            max_length=min(shape.positions, config.token_batch_size),
            vocab_size=shape.vocabulary_size,
        )
        plan = plan_batches(
            documents.lengths,
            token_batch_size=config.token_batch_size,
            devices=mesh.size,
            max_length=shape.positions,
        )
    require_same("data sets", documents.tokens, documents.labels, documents.offsets)
    spread = mesh if mesh.size > 1 else None
    with progress.stage("Model"), together():
        model = converters.load(
            model_name,
            dtype=DTYPES[config.precision][1],
            revision=config.revision,
            mesh=spread,
            fsdp=config.fsdp and spread is not None,
        ).model
    loss = NextTokenLoss(
        labels="dataset" if config.takes_dataset_labels else "sampled",
        reduction=config.gradient_reduction,
        seed=config.seed,
        draws=config.mc_samples,
        function="log_odds" if config.loss_fn == "log_odds" else "cross_entropy",
        label_smoothing=config.label_smoothing,
    )
    batches = _Batches(documents, plan)
    example = next(iter(batches))
    sites = find_sites(loss, model, example, include_bias=config.include_bias)
    family = converters.registry.family_of(settings)
    sites = select_sites(sites, config, family.base_prefix, progress.note)
    names = [name for site in sites.values() for name in site.module_names()]
    split = matching("split_attention_modules", config.split_attention_modules, names)
    # As names: bergson takes no globs here.
    config = replace(config, split_attention_modules=tuple(split))
    if config.module_partitions == AUTOMATIC:
        count = needed_partitions(sites, sum_dtype(config).itemsize, mesh.size)
        config = replace(config, module_partitions=count)
    problem = Problem(
        loss, model, sites,
        mesh=spread, draws=config.mc_samples, matmul_precision=config.matmul_precision,
    )  # fmt: skip
    if config.activations == activations.AUTOMATIC:
        largest = activations.largest_batch(plan, example, mesh.size)
        stored = activations.stored_bytes(problem, largest)
        config = replace(config, activations=_choose(config, stored, sites, mesh, progress))
    problem = replace(
        problem, activations="store" if config.activations == "store" else "recompute"
    )
    return Run(
        config,
        progress,
        part,
        mesh,
        model_name,
        dataset_name,
        documents,
        plan,
        batches,
        shape.positions,
        partial(converters.parameter_order.named_parameters, settings),
        problem,
    )


def _choose(
    config: ComputeConfig, stored: int, sites: Mapping[str, Site], mesh: Mesh, progress: Progress
) -> str:
    """Whether to store activations of so many bytes a device, or to recompute them."""
    itemsize = sum_dtype(config).itemsize
    if config.is_factored:
        taken = factor_bytes(sites, config.module_partitions, itemsize, mesh.size)
    elif config.projection_target == "global":
        taken = config.projection_dim**2 * itemsize // mesh.size
    else:
        numbers = sum(gram_numbers(site, config.projection_dim) for site in sites.values())
        taken = numbers * itemsize // mesh.size
    free = max(0, free_memory() - taken)
    choice = activations.choose(stored, free)
    if choice == "recompute":
        progress.note(
            f"Activations are recomputed: stored they take {bytes_in_words(stored)} a device, "
            f"where {bytes_in_words(free)} are free beside model and statistics"
        )
    return choice


def _tokenizer(config: ComputeConfig, model_name: str):
    name = config.tokenizer or model_name
    revision = None if config.tokenizer else config.revision
    tokenizer = converters.load_tokenizer(name, revision)
    if tokenizer is None:
        raise CheckpointError(f"{name} has no tokenizer; name one with --tokenizer")
    return tokenizer


def _data_options(config: ComputeConfig, dataset: str) -> DataOptions:
    return DataOptions(
        dataset=dataset,
        split=config.split,
        subset=config.subset,
        prompt_column=config.prompt_column,
        completion_column=config.completion_column,
        conversation_column=config.conversation_column,
        truncation=config.truncation,
        chunk_length=config.chunk_length,
        max_tokens=config.max_tokens,
    )
