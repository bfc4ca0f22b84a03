"""A fit without weights: the model as shapes, the data as lengths of documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import converters.hub
import converters.registry
from jhessians.capture.problem import Problem
from jhessians.capture.site import Site
from jhessians.capture.sites import find_sites
from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.compute.pipeline import loss_of
from jhessians.commands.plan.config import LENGTH, TOKENS, PlanConfig
from jhessians.commands.problem import data_options, read_tokenizer
from jhessians.commands.selection import select_sites
from jhessians.data.batching import Batch, BatchPlan, plan_batches
from jhessians.data.sources import load_documents
from jhessians.devices.mesh import AnyMesh, mark_sharded
from jhessians.errors import ConfigError
from jhessians.interop.layout import DTYPES
from jhessians.models.config import DecoderConfig
from jhessians.planning.hardware import Machines


@dataclass(frozen=True)
class AbstractFit:
    """A fit of shapes.

    Attributes:
        config: Its options.
        shape: The decoder's dimensions.
        model: The decoder, whose parameters are shapes.
        sites: The linears that the options take in.
        lengths: Tokens of each document.
    """

    config: ComputeConfig
    shape: DecoderConfig
    model: nnx.Module
    sites: Mapping[str, Site]
    lengths: np.ndarray

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(x.size for x in jax.tree.leaves(nnx.state(self.model, nnx.Param)))

    def batches(self, token_batch_size: int, devices: int) -> BatchPlan:
        """How the documents are divided.

        Args:
            token_batch_size: Tokens that a device takes at once.
            devices: Over which a batch is spread.

        Returns:
            The batches of a pass.
        """
        return plan_batches(
            self.lengths, token_batch_size=token_batch_size, devices=devices,
            max_length=self.shape.positions,
        )  # fmt: skip

    def problem(self, mesh: AnyMesh | None, activations: str) -> Problem:
        """What all passes have in common.

        Args:
            mesh: The devices, or how many there are.
            activations: `store` or `recompute`.

        Returns:
            A problem of shapes.
        """
        config, model = self.config, nnx.clone(self.model)
        devices: Any = mesh
        if mesh is not None and config.fsdp:
            mark_sharded(model, mesh)
        chosen: Any = activations
        return Problem(
            loss_of(config), model, self.sites, mesh=devices, draws=config.mc_samples,
            matmul_precision=config.matmul_precision, activations=chosen,
        )  # fmt: skip


def read_fit(config: PlanConfig, note: Callable[[str], None]) -> AbstractFit:
    """Read the model's config, and the data if there are some.

    Args:
        config: The options.
        note: Is told of experts that nobody asked for.

    Returns:
        The fit.

    Raises:
        UserError: If the model or the data can't be read, or don't fit one another.
    """
    fit = config.fit
    name = config.model
    source = converters.hub.find(name, fit.revision)
    if source.adapter is not None:
        raise ConfigError(
            f"{name} is an adapter, whose linears only its weights tell; plan its base model, "
            "which takes more"
        )
    settings = converters.registry.read_config(source.folder)
    shape = converters.registry.decoder_config(settings)
    dtype = DTYPES[fit.precision][1]
    model = nnx.eval_shape(
        lambda: converters.registry.create(settings, dtype=dtype, rngs=nnx.Rngs(0))
    )
    lengths = _lengths(config, fit, name, shape)
    longest = int(lengths.max())
    everything = find_sites(
        loss_of(fit), model, batch_shapes(1, longest), include_bias=fit.include_bias
    )
    family = converters.registry.family_of(settings)
    sites = select_sites(everything, fit, family.base_prefix, note)
    modules = [each for site in sites.values() for each in site.module_names()]
    fit = replace(fit, **fit.chosen.settled(fit.method_options, modules))
    return AbstractFit(fit, shape, model, dict(sites), lengths)


def _lengths(config: PlanConfig, fit: ComputeConfig, name: str, shape: DecoderConfig) -> np.ndarray:
    """Tokens of each document, or of those that are assumed."""
    most = min(shape.positions, fit.token_batch_size)
    if config.dataset is not None:
        documents = load_documents(
            data_options(fit, config.dataset), read_tokenizer(fit, name),
            max_length=most, vocab_size=shape.vocabulary_size,
        )  # fmt: skip
        return np.asarray(documents.lengths)
    length = config.document_length or fit.chunk_length or min(LENGTH, most)
    if length > most:
        raise ConfigError(
            f"documents of {length} tokens are given, but the model and --token_batch_size take "
            f"{most}; give shorter ones, or a larger batch"
        )
    tokens = fit.max_tokens or TOKENS
    return np.full(-(-tokens // length), length, np.int64)


def batch_shapes(rows: int, length: int) -> Batch:
    """A batch of shapes."""
    tokens = jax.ShapeDtypeStruct((rows, length), np.int32)
    mask = jax.ShapeDtypeStruct((rows, length), np.bool_)
    number = jax.ShapeDtypeStruct((rows,), np.int32)
    found: Any = Batch._make((tokens, tokens, mask, number))
    return found  # type: ignore[no-any-return]


def abstract_mesh(machines: Machines) -> Any:
    """A mesh of devices that aren't there; None for a single one."""
    if machines.count == 1:
        return None
    device = AbstractDevice(machines.device.name, None, machines.device.platform)
    return AbstractMesh(
        tuple(machines.axes.values()), tuple(machines.axes),
        axis_types=(AxisType.Auto,) * len(machines.axes), abstract_device=device,
    )  # fmt: skip
