"""`compute`: load → covariances → eigendecompositions → correction, each exported as it is done."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

import converters.hub
import converters.registry
from jhessians import demo
from jhessians.config import ComputeConfig
from jhessians.data.batching import Batch, BatchPlan, iterate_batches, plan_batches
from jhessians.data.documents import Documents
from jhessians.data.sources import DataOptions, load_documents
from jhessians.errors import CheckpointError, ConfigError
from jhessians.factors import Kinds
from jhessians.fitting import fit_stages
from jhessians.folds.covariance import Covariance, FactorFold
from jhessians.folds.shampoo import Shampoo
from jhessians.folds.tkfac import TraceCovariance
from jhessians.interop.export import write_config, write_kind, write_totals
from jhessians.interop.layout import DTYPES
from jhessians.mesh import make_mesh, start_hosts
from jhessians.models.loss import NextTokenLoss
from jhessians.options import did_you_mean
from jhessians.progress import Progress
from jhessians.provenance import config_document
from jhessians.report.summary import Summary, measure_trees, next_steps
from jhessians.rundir import RunDirectory
from jhessians.stages import Problem
from jhessians.tape import Site
from jhessians.traversal import find_sites, restrict

FACTOR_FOLDS: dict[str, Callable[[ComputeConfig, np.dtype], FactorFold]] = {
    "kfac": lambda config, dtype: Covariance(dtype),
    "tkfac": lambda config, dtype: TraceCovariance(dtype, config.normalize_trace),
    "shampoo": lambda config, dtype: Shampoo(dtype),
}


def compute(config: ComputeConfig, progress: Progress) -> Summary:
    """Fit the factors that `config` asks for and write them under its run path.

    Every process of a run on several hosts calls this; the first one writes.

    Raises:
        UserError: If the input is wrong in any of the ways that `jhessians.errors` knows.
    """
    config.validate()
    start_hosts()
    first = jax.process_index() == 0
    progress.quiet |= not first
    mesh = make_mesh(config.world_size)
    with RunDirectory(config.run_path, config.overwrite, writer=first) as part:
        run = _prepare(config, mesh, progress, part)
        run.fit()
        run.write_description()
    trees, disk_bytes = measure_trees(config.run_path)
    shell, python = next_steps(
        config, model=run.model_name, dataset=run.dataset_name, shards=run.shards,
        model_max_length=run.longest,
    )  # fmt: skip
    return Summary(
        run_path=config.run_path,
        method=config.method,
        modules=sum(len(site.module_names()) for site in run.problem.sites.values()),
        documents=len(run.documents),
        skipped_documents=run.plan.skipped,
        positions=run.documents.positions,
        devices=f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        timings=progress.timings,
        trees=trees,
        disk_bytes=disk_bytes,
        next_shell=shell,
        next_python=python,
    )


@dataclass(frozen=True)
class Run:
    """One run's inputs, and the stages that turn them into files."""

    config: ComputeConfig
    progress: Progress
    part: Path
    mesh: Mesh
    model_name: str
    dataset_name: str
    documents: Documents
    plan: BatchPlan
    longest: int
    problem: Problem

    @property
    def shards(self) -> int:
        return self.config.num_shards or self.mesh.size

    def fit(self) -> None:
        """All stages, each exported before the next one needs its memory."""
        # Wide enough to sum in, even where results are stored in 16 bits.
        dtype = np.promote_types(np.float32, DTYPES[self.config.hessian_dtype][1])
        stages = fit_stages(
            self.problem,
            _Batches(self.documents, self.plan),
            positions=self.documents.positions,
            documents=len(self.documents),
            method=FACTOR_FOLDS[self.config.bergson_method](self.config, dtype),
            correct_eigenvalues=self.config.corrects_eigenvalues,
            dtype=dtype,
            progress=self.progress,
        )
        for kinds in stages:
            self._export(kinds)

    def write_description(self) -> None:
        """Position counts, the seed's small files, and the configuration that replays the run."""
        config = self.config
        write_totals(
            self.part,
            layout=config.layout,
            total_processed=self.documents.positions,
            corrected=config.corrects_eigenvalues,
            include_bias=config.include_bias,
        )
        document = config_document(
            config, model=self.model_name, dataset=self.dataset_name, shards=self.shards,
            processes=jax.process_count(), devices=[str(d) for d in self.mesh.devices.flat],
        )  # fmt: skip
        write_config(self.part, document, config.resolved_dict(), layout=config.layout)

    def _export(self, kinds: Kinds) -> None:
        with self.progress.stage("Export", len(kinds), "kinds of factor") as stage:
            for kind, tensors in kinds.items():
                write_kind(
                    self.part,
                    kind,
                    tensors,
                    layout=self.config.layout,
                    shards=self.shards,
                    dtype=self.config.hessian_dtype,
                    n_docs=len(self.documents),
                    total_processed=self.documents.positions,
                )
                stage.advance()


@dataclass(frozen=True)
class _Batches:
    """This host's rows of every batch, to iterate as often as there are passes."""

    documents: Documents
    plan: BatchPlan

    def __iter__(self) -> Iterator[Batch]:
        return iterate_batches(
            self.documents, self.plan,
            process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip


def _prepare(config: ComputeConfig, mesh: Mesh, progress: Progress, part: Path) -> Run:
    """Read model and data, the cheap and error-prone things first."""
    model_name = str(demo.MODEL) if config.is_demo else str(config.model)
    dataset_name = str(demo.DATASET) if config.is_demo else str(config.dataset)
    folder = converters.hub.find(model_name, config.revision).folder
    shape = converters.decoder_config(converters.registry.read_config(folder))
    with progress.stage("Data"):
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
    spread = mesh if mesh.size > 1 else None
    with progress.stage("Model"):
        model = converters.load(
            model_name,
            dtype=DTYPES[config.precision][1],
            revision=config.revision,
            mesh=spread,
            fsdp=config.fsdp and spread is not None,
        ).model
    loss = NextTokenLoss(
        labels="dataset" if config.takes_dataset_labels else "sampled",
        reduction="mean" if config.loss_reduction == "mean" else "sum",
        seed=config.seed,
        draws=config.mc_samples,
        function="log_odds" if config.loss_fn == "log_odds" else "cross_entropy",
        label_smoothing=config.label_smoothing,
    )
    example = next(iter(_Batches(documents, plan)))
    sites = find_sites(loss, model, example, include_bias=config.include_bias)
    sites = _select(sites, config)
    problem = Problem(loss, model, sites, mesh=spread, draws=config.mc_samples)
    return Run(
        config,
        progress,
        part,
        mesh,
        model_name,
        dataset_name,
        documents,
        plan,
        shape.positions,
        problem,
    )


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


def _select(sites: Mapping[str, Site], config: ComputeConfig) -> dict[str, Site]:
    """The sites that `--modules` takes in and `--filter_modules` leaves alone.

    Raises:
        ConfigError: If a pattern matches nothing, or nothing is left.
    """
    names = [name for site in sites.values() for name in site.module_names()]
    leave_out = [p.strip() for p in (config.filter_modules or "").split(",") if p.strip()]
    for flag, patterns in (("modules", config.modules), ("filter_modules", leave_out)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                hint = did_you_mean(pattern, names) or f"; there is {names[0]}, for example"
                raise ConfigError(
                    f"--{flag} {pattern!r} matches none of {len(names)} modules{hint}"
                )

    def wanted(name: str) -> bool:
        taken = not config.modules or any(fnmatchcase(name, p) for p in config.modules)
        return taken and not any(fnmatchcase(name, p) for p in leave_out)

    chosen = restrict(sites, wanted)
    if not chosen:
        raise ConfigError(
            f"--modules and --filter_modules leave none of {len(names)} modules; leave some"
        )
    return chosen
