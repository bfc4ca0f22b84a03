"""`evaluate bank`: train models on random subsets of the documents, and keep what they lose."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from flax import nnx

import converters
import converters.registry
from jhessians import demo
from jhessians.commands.evaluate.bank_config import BankConfig
from jhessians.commands.output import output_folder
from jhessians.commands.problem import data_options, read_batches
from jhessians.commands.resuming import resuming
from jhessians.config.option import name_flags, options_of
from jhessians.config.provenance import CONFIG_FILE, config_document
from jhessians.config.replay import DATA
from jhessians.config.units import count_in_words, seconds_in_words
from jhessians.data.answers import Tokenizer
from jhessians.data.batches import Batches
from jhessians.data.sources import DataOptions
from jhessians.devices.fingerprint import fingerprint
from jhessians.devices.mesh import make_mesh
from jhessians.errors import CheckpointError, DatasetError, NumericsError
from jhessians.evaluation.bank import MODEL, Bank, Contents
from jhessians.evaluation.retraining import Retraining, models_at_once, random_subsets
from jhessians.evaluation.training import Recipe, Training
from jhessians.report.progress import Progress


@dataclass(frozen=True)
class Experiment:
    """What models are trained on and asked.

    Attributes:
        training: The recipe with the model's beginning and the documents.
        documents: In batches as data are read; training makes its own.
        queries: In batches.
        tokenizer: That of both.
        settings: transformers' config of the model.
    """

    training: Training
    documents: Batches
    queries: Batches
    tokenizer: Tokenizer
    settings: Any

    @property
    def contents(self) -> Contents:
        """Hashes of what is read."""
        return Contents(
            self.documents.documents.fingerprint(), self.queries.documents.fingerprint()
        )


def read_experiment(config: BankConfig) -> Experiment:
    """Read all that models are made of.

    Args:
        config: The bank's options.

    Returns:
        The recipe, the documents and the queries.

    Raises:
        UserError: If something can't be read, or doesn't fit the rest.
    """
    source = Path(str(demo.TWIN if config.is_demo else config.model_config))
    folder = source.parent if source.name == "config.json" else source
    settings = converters.registry.read_config(folder)
    shape = converters.decoder_config(settings)
    name = config.tokenizer or str(demo.MODEL if config.is_demo else folder)
    tokenizer = converters.load_tokenizer(name, None)
    if tokenizer is None:
        raise CheckpointError(f"{name} has no tokenizer; name one with `tokenizer`")
    one = make_mesh(1)
    size = config.token_batch_size
    dataset = str(demo.DATASET if config.is_demo else config.dataset)
    documents = read_batches(
        data_options(config, dataset), tokenizer, shape, one, token_batch_size=size
    )
    queries = read_batches(_query_options(config), tokenizer, shape, one, token_batch_size=size)
    recipe = Recipe(
        epochs=config.epochs, learning_rate=config.learning_rate,
        weight_decay=config.weight_decay, token_batch_size=size, seed=config.seed,
    )  # fmt: skip
    model = converters.create(settings, rngs=nnx.Rngs(config.seed))
    training = Training(model, documents.documents, recipe)
    return Experiment(training, documents, queries, tokenizer, settings)


def open_experiment(bank: str | Path) -> Experiment:
    """What a finished bank's models were trained on and asked.

    Args:
        bank: Its folder.

    Returns:
        The training and the queries, as they were.

    Raises:
        UserError: If something can't be read, or changed since.
    """
    experiment = read_experiment(BankConfig.from_yaml(bank))
    if experiment.contents != Bank.load(bank).contents:
        raise DatasetError(f"documents or queries changed since {bank} was made; make it anew")
    return experiment


def make_bank(config: BankConfig) -> str:
    """Train the models and write the bank.

    Args:
        config: Validated.

    Returns:
        What there is to say.

    Raises:
        UserError: If the input is wrong in any of the ways that `jhessians.errors` knows.
    """
    mesh = make_mesh(config.world_size)
    names = {each.name for each in options_of(type(config))}
    progress = Progress(quiet=config.quiet, reword=partial(name_flags, names=names))
    with ExitStack() as stack:
        directory = output_folder(config, "run_path", config.command)
        part = stack.enter_context(directory)
        state = stack.enter_context(resuming(config, directory, mesh, progress))
        replayed, config = config.replayed, state.taken_up(config)
        config = replace(config, models_at_once=config.models_at_once or models_at_once(mesh))
        with progress.stage("Data"):
            experiment = read_experiment(config)
        contents = {
            DATA: experiment.contents.documents, "the queries": experiment.contents.queries,
            "the model's beginning": fingerprint(experiment.training.model()),
        }  # fmt: skip
        state.begin(config, contents, replayed)
        subsets = random_subsets(
            config.models, len(experiment.documents.documents), config.share, config.seed
        )
        retraining = Retraining(
            experiment.training, experiment.queries, mesh, config.models_at_once or 1
        )
        with progress.stage("Model of all documents"):
            everything = np.ones((1, subsets.shape[1]))
            (whole,) = retraining.run(everything)
            _require_finite(whole.losses, "all documents")
            trained = experiment.training.model(jax.tree.map(lambda x: x[0], whole.parameters))
            converters.save(trained, part / MODEL, tokenizer=experiment.tokenizer, overwrite=True)
        series = state.checkpoints.series("models")
        losses = _losses(retraining, subsets, len(whole.losses[0]), series, progress)
        Bank(subsets, losses, whole.losses[0], experiment.contents).save(part)
        _write_config(part, config)
        state.checkpoints.settle()
        stack.close()
    return _render(config, subsets, losses, whole.losses[0], progress)


def _losses(
    retraining: Retraining, subsets: np.ndarray, queries: int, series: Any, progress: Progress
) -> np.ndarray:
    """Every model's losses, going on from what an unfinished run has saved."""
    saved = series.load(lambda position: {"losses": np.dtype(np.float32)})
    losses = np.zeros((len(subsets), queries), np.float32)
    first = 0
    if saved is not None:
        first = int(saved.position["models"])
        losses[:first] = np.asarray(saved.arrays["losses"])[:first]
    with progress.stage("Models", len(subsets), "models") as stage:
        stage.advance(first)
        for each in retraining.run(subsets[first:]):
            last = first + len(each.losses)
            _require_finite(each.losses, f"subsets {first} to {last - 1}")
            losses[first:last] = each.losses
            stage.advance(last - first)
            first = last
            if series.due():
                series.save({"models": first}, {"losses": losses.copy()})
    return losses


def _require_finite(losses: np.ndarray, what: str) -> None:
    if not np.isfinite(losses).all():
        raise NumericsError(
            f"training on {what} ended in NaN or infinity; give a lower `learning_rate`"
        )


def _query_options(config: BankConfig) -> DataOptions:
    if config.is_demo:
        return DataOptions(
            str(demo.QUESTIONS), prompt_column="prompt", completion_column="completion"
        )
    names = ("split", "subset", "prompt_column", "completion_column", "conversation_column",
             "truncation")  # fmt: skip
    return DataOptions(
        dataset=str(config.query), **{name: getattr(config, f"query_{name}") for name in names}
    )


def _write_config(part: Path, config: BankConfig) -> None:
    document = config_document(config.command, config.resolved_dict(), None)
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    (part / CONFIG_FILE).write_text(text, encoding="utf-8")


def _render(
    config: BankConfig, subsets: np.ndarray, losses: np.ndarray, whole: np.ndarray,
    progress: Progress,
) -> str:  # fmt: skip
    seconds = sum(progress.timings.values())
    size = int(subsets[0].sum())
    return "\n".join([
        f"A bank of {count_in_words(len(subsets), 'model')} is in {config.run_path} "
        f"({seconds_in_words(seconds)})",
        f"  Each was trained on {size:,} of {subsets.shape[1]:,} documents and asked "
        f"{losses.shape[1]:,} queries",
        f"  Loss of a query, in nats: {whole.mean():.3f} with all documents, "
        f"{losses.mean():.3f} with a subset",
        f"  To measure scores of the model in {Path(config.run_path) / MODEL}: "
        f"jhessians evaluate lds SCORES --bank {config.run_path}",
    ])  # fmt: skip
