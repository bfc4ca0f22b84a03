"""What commands have in common before they compute: data, weights, and the linears to record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

import converters.hub
import converters.registry
from jhessians import demo
from jhessians.capture.coverage import Sites
from jhessians.capture.problem import Loss, Problem
from jhessians.capture.sites import find_sites
from jhessians.commands.selection import select_sites
from jhessians.config.inputs import InputOptions
from jhessians.config.statistics import GradientOptions
from jhessians.config.units import bytes_in_words
from jhessians.data.answers import Tokenizer
from jhessians.data.batches import Batches
from jhessians.data.batching import plan_batches
from jhessians.data.documents import Documents
from jhessians.data.sources import DataOptions, load_documents
from jhessians.devices.hosts import require_same, require_same_in_turn, together
from jhessians.devices.memory import free_memory
from jhessians.errors import CheckpointError, ConfigError
from jhessians.fitting import activations
from jhessians.interop.layout import DTYPES
from jhessians.models.config import DecoderConfig
from jhessians.models.loss import NextTokenLoss
from jhessians.report.progress import Progress


@dataclass(frozen=True)
class Inputs:
    """What a run works on.

    Attributes:
        model_name, dataset_name: The demo's too.
        settings: transformers' config of the model.
        shape: The decoder's dimensions.
        is_adapter: Whether the model is a LoRA adapter.
        tokenizer: The one that the data were read with.
        batches: The data set.
    """

    model_name: str
    dataset_name: str
    settings: Any
    shape: DecoderConfig
    is_adapter: bool
    tokenizer: Tokenizer
    batches: Batches

    def text_of(self, documents: Documents, number: int, position: int | None = None) -> str:
        """A document's text, or that of one of its tokens.

        Args:
            documents: Read with the same tokenizer.
            number: Which of them.
            position: Of the token; None for all.

        Returns:
            Without special tokens.
        """
        tokens, _ = documents.document(number)
        chosen = tokens if position is None else tokens[position : position + 1]
        decoder: Any = self.tokenizer
        text: str = decoder.decode(np.asarray(chosen).tolist(), skip_special_tokens=True)
        return text


def read_inputs(
    config: InputOptions,
    mesh: Mesh,
    progress: Progress,
    *,
    token_batch_size: int,
    devices: int | None = None,
) -> Inputs:
    """Read settings and data, the cheap and error-prone things, before any weights.

    Args:
        config: Names the model and the data set.
        mesh: The devices.
        progress: Where the stage is shown.
        token_batch_size: Tokens that a device takes at once.
        devices: Over how many the documents of a batch are divided, if not over those of the mesh.

    Returns:
        The data in batches, and what is known of the model.

    Raises:
        UserError: If the model or the data can't be read, or don't fit one another.
    """
    model_name = str(demo.MODEL) if config.is_demo else str(config.model)
    dataset_name = str(demo.DATASET) if config.is_demo else str(config.dataset)
    with progress.stage("Data"), together():
        source = converters.hub.find(model_name, config.revision)
        settings = converters.registry.read_config(source.folder)
        shape = converters.decoder_config(settings)
        tokenizer = read_tokenizer(config, model_name)
        batches = read_batches(
            data_options(config, dataset_name), tokenizer, shape, mesh,
            token_batch_size=token_batch_size, devices=devices,
        )  # fmt: skip
    require_same("settings of models", shape)
    require_same_data(batches)
    return Inputs(
        model_name, dataset_name, settings, shape, source.adapter is not None, tokenizer, batches
    )


def read_batches(
    options: DataOptions,
    tokenizer: Tokenizer,
    shape: DecoderConfig,
    mesh: Mesh,
    *,
    token_batch_size: int,
    devices: int | None = None,
) -> Batches:
    """A data set in batches that the devices can take.

    Args:
        options: What to read.
        tokenizer: Makes its tokens.
        shape: The decoder's, for its positions and vocabulary.
        mesh: The devices.
        token_batch_size: Tokens that a device takes at once.
        devices: Over how many the documents of a batch are divided, if not over those of the mesh.

    Returns:
        The documents with their plan.

    Raises:
        UserError: If the data can't be read or don't fit the model.
    """
    documents = load_documents(
        options, tokenizer,
        max_length=min(shape.positions, token_batch_size), vocab_size=shape.vocabulary_size,
    )  # fmt: skip
    plan = plan_batches(
        documents.lengths,
        token_batch_size=token_batch_size,
        devices=devices or mesh.size,
        max_length=shape.positions,
    )
    return Batches(documents, plan)


def require_same_data(batches: Batches) -> None:
    """Check that all hosts read the same.

    Args:
        batches: What this host read.

    Raises:
        UserError: If another host read something else.
    """
    documents, plan = batches.documents, batches.plan
    require_same("data sets", documents.tokens, documents.labels, documents.offsets)
    numbers = [batch.documents for batch in plan.batches]
    require_same("batches", [batch.shape for batch in plan.batches], *numbers)


def load_model(
    inputs: Inputs,
    mesh: Mesh,
    progress: Progress,
    *,
    precision: str,
    revision: str | None,
    fsdp: bool,
    offload: bool = False,
) -> nnx.Module:
    """Load the weights, on all devices.

    Args:
        inputs: Names the model.
        mesh: The devices.
        progress: Where the stage is shown.
        precision: Number format of the weights.
        revision: The model's on the Hub.
        fsdp: Whether to spread the weights instead of copying them to each device.
        offload: Whether the layers' weights stay in host memory.

    Returns:
        The decoder.

    Raises:
        UserError: If they can't be loaded.
    """
    spread = mesh if mesh.size > 1 else None
    with progress.stage("Model"), together():
        model = converters.load(
            inputs.model_name,
            dtype=DTYPES[precision][1],
            revision=revision,
            mesh=spread,
            fsdp=fsdp and spread is not None,
            compared=True,
            offload=offload,
        ).model
    require_same_in_turn("weights", *model.origin.parts)
    return model


def gradient_loss(config: GradientOptions) -> NextTokenLoss:
    """The loss whose gradients are wanted themselves, not a curvature that is quadratic in them.

    Args:
        config: The options.

    Returns:
        On the data set's own labels.
    """
    return NextTokenLoss(
        labels="dataset",
        reduction="sum" if config.loss_reduction == "sum" else "mean_gradient",
        function="log_odds" if config.loss_fn == "log_odds" else "cross_entropy",
        label_smoothing=config.label_smoothing,
    )


def find_linears(
    loss: Loss,
    model: nnx.Module,
    inputs: Inputs,
    config: GradientOptions,
    note: Callable[[str], None],
) -> Sites:
    """The linears that the options take in.

    Args:
        loss: Calls them.
        model: The decoder.
        inputs: An example of the data, and the model's family.
        config: The options.
        note: Is told of experts that nobody asked for.

    Returns:
        The sites, by name.

    Raises:
        ConfigError: If a pattern matches nothing, or nothing is left.
    """
    example = next(iter(inputs.batches))
    sites = find_sites(loss, model, example, include_bias=config.include_bias)
    family = converters.registry.family_of(inputs.settings)
    return select_sites(sites, config, family.base_prefix, note)


def settled_activations(
    choice: str,
    problem: Problem,
    batches: Batches,
    mesh: Mesh,
    taken: int,
    note: Callable[[str], None],
) -> str:
    """`store` or `recompute`, by memory where the option leaves that open.

    Args:
        choice: The option's value.
        problem: Loss, model and linears.
        batches: The data.
        mesh: The devices.
        taken: Bytes that the run's other arrays will take, over all devices.
        note: Is told where activations don't fit.

    Returns:
        The choice.
    """
    if choice != activations.AUTOMATIC:
        return choice
    largest = activations.largest_batch(batches.plan, next(iter(batches)), mesh.size)
    stored = activations.stored_bytes(problem, largest)
    free = max(0, free_memory() - taken // mesh.size)
    settled = activations.choose(stored, free)
    if settled == "recompute":
        note(
            f"Activations are recomputed: stored they take {bytes_in_words(stored)} a device, "
            f"where {bytes_in_words(free)} are free beside model and statistics"
        )
    return settled


def require_parameter_order(inputs: Inputs, optimizer_state: str | None) -> None:
    """Check that an optimizer's state can be matched with the model's parameters.

    Args:
        inputs: The model.
        optimizer_state: The option; None if there is no such state.

    Raises:
        ConfigError: If the model is an adapter.
    """
    if inputs.is_adapter and optimizer_state is not None:
        raise ConfigError(
            f"--optimizer_state is given, but {inputs.model_name} is an adapter, whose "
            "parameters' order in an optimizer isn't known here; estimate with --normalizer "
            "adam"
        )


def data_options(config: InputOptions, dataset: str) -> DataOptions:
    """The options of the data set `dataset`."""
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


def read_tokenizer(config: InputOptions, model_name: str) -> Tokenizer:
    """The tokenizer that the options name, or the model's own.

    Args:
        config: The options.
        model_name: Whose tokenizer it is, if they name none.

    Returns:
        The tokenizer.

    Raises:
        CheckpointError: If there is none.
    """
    name = config.tokenizer or model_name
    revision = None if config.tokenizer else config.revision
    tokenizer = converters.load_tokenizer(name, revision)
    if tokenizer is None:
        raise CheckpointError(f"{name} has no tokenizer; name one with --tokenizer")
    return tokenizer
