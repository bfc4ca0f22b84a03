"""Checkpoint → module, one tensor at a time.

The module is built from shapes alone. Each tensor is read, put on its devices and written into
its parameter, in place, before the next one is read: besides the module the host holds about one
tensor.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from converters import adapters, hub, registry, rules
from converters.reader import StoredTensor, open_checkpoint
from jhessians.errors import CheckpointError, NumericsError
from jhessians.mesh import mark_sharded, parameter_specs
from jhessians.models.decoder import Decoder


class LoadedModel(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        model: The decoder; `model.config` is our `DecoderConfig`.
        config: transformers' config.
        tokenizer: transformers' tokenizer; None if the checkpoint has none.
    """

    model: Decoder
    config: Any
    tokenizer: Any


def load(
    name_or_folder: str | Path,
    *,
    dtype: Any = None,
    revision: str | None = None,
    mesh: Mesh | None = None,
    fsdp: bool = False,
) -> LoadedModel:
    """Load a Hugging Face checkpoint as a Flax module.

    Args:
        name_or_folder: A folder, or a name on the Hub such as `EleutherAI/pythia-160m`. That of a
            LoRA adapter loads its base model, frozen, with the adapter beside it.
        dtype: Of the parameters, "bfloat16" or `jnp.bfloat16`; default the checkpoint's own, the
            widest if it has several.
        revision: The Hub's branch, tag or commit.
        mesh: The devices that get the parameters; default JAX's default device.
        fsdp: Shard parameters over `mesh` instead of giving each device all of them.

    Returns:
        Model, config and tokenizer. The model's linears are named as Hugging Face's base model
        names them, with `{layer}` for the layer's number.

    Raises:
        CheckpointError: If it can't be found, isn't whole, isn't supported, or its tensors don't
            fit its config.json.
        NumericsError: If a weight is NaN or infinite; the message names the tensor.
        ValueError: If `fsdp` is asked for without a mesh.
    """
    if fsdp and mesh is None:
        raise ValueError("fsdp shards parameters over a mesh; give one")
    source = hub.find(name_or_folder, revision)
    config = registry.read_config(source.folder)
    registry.decoder_config(config)  # refuses before anything large is downloaded
    family = registry.family_of(config)
    adapter = adapters.open_adapter(source.adapter) if source.adapter else None
    source.obtain_weights()
    checkpoint = open_checkpoint(source.folder)

    model = nnx.eval_shape(lambda: registry.create(config, rngs=nnx.Rngs(0)))
    wanted = rules.slots(family, parameter_shapes(model))
    stored = rules.match(family, wanted, checkpoint)
    rules.check_tied(family, wanted, checkpoint)
    if adapter is not None:
        shapes = parameter_shapes(model)
        slots, tensors = adapters.attach(model, adapter, family, wanted, shapes)
        wanted, stored = {**wanted, **slots}, {**stored, **tensors}
    dtype = _parameter_dtype(stored) if dtype is None else jnp.dtype(dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise CheckpointError(
            f"{source.folder} would be loaded as {dtype}, which JAX has turned off; "
            "set JAX_ENABLE_X64=1, or load it as float32"
        )
    if mesh is not None and fsdp:
        mark_sharded(model, mesh)
    _fill(model, wanted, stored, dtype, mesh)
    return LoadedModel(model, config, hub.tokenizer_of(source))


def parameters(model: nnx.Module) -> dict[str, nnx.Variable]:
    """A module's parameters by path."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): variable for path, variable in flat}


def parameter_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's parameters by path."""
    return {path: tuple(variable.shape) for path, variable in parameters(model).items()}


def _parameter_dtype(stored: Mapping[str, StoredTensor]) -> np.dtype:
    """The narrowest dtype that holds every tensor without loss."""
    dtypes = {tensor.dtype for tensor in stored.values()}
    widest = dtypes.pop()
    for dtype in dtypes:
        widest = np.promote_types(widest, dtype)
    return widest


def _fill(
    model: Decoder,
    wanted: Mapping[str, rules.Slot],
    stored: Mapping[str, StoredTensor],
    dtype: np.dtype,
    mesh: Mesh | None,
) -> None:
    """Read every tensor into its parameter; `model` holds shapes before and arrays after."""
    names: dict[str, list[str]] = {}
    for name, slot in wanted.items():
        names.setdefault(slot.parameter, []).append(name)
    state = nnx.state(model, nnx.Param)
    flat = dict(nnx.to_flat_state(state))
    specs = {} if mesh is None else dict(nnx.to_flat_state(parameter_specs(state, mesh)))
    for path, variable in flat.items():
        spec = None if mesh is None else tuple(specs[path].get_value())
        sharding = _sharding(mesh, spec)
        array = None
        for name in names[".".join(map(str, path))]:
            slot = wanted[name]
            with np.errstate(over="ignore"):  # found out below
                values = slot.transform.to_ours(stored[name].read()).astype(dtype, copy=False)
            entry = _place(values, _sharding(mesh, spec, len(slot.index)))
            if not slot.index:
                array, finite = entry, _is_finite(entry)
            else:
                if array is None:
                    array = jnp.zeros(variable.shape, dtype, device=sharding)
                index = tuple(np.int32(i) for i in slot.index)
                array, finite = _writer(sharding)(array, entry, index)
            # Asking for the answer also waits for the transfer: tensors don't pile up on the host.
            if not bool(finite):
                raise NumericsError(
                    f"{name} holds NaN or infinity as {dtype}; expected finite weights; "
                    "check the checkpoint, or load it in a wider type"
                )
        flat[path] = variable.replace(array)
    nnx.update(model, nnx.from_flat_state(flat))


def _sharding(mesh: Mesh | None, spec: tuple | None, leading: int = 0) -> Sharding | None:
    """How a parameter lies on the mesh, or its entry without the `leading` axes."""
    return None if mesh is None or spec is None else NamedSharding(mesh, P(*spec[leading:]))


def _place(values: Shaped[np.ndarray, "..."], sharding: Sharding | None) -> Array:
    if sharding is None:
        return jnp.asarray(values)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


@jax.jit
def _is_finite(values: Array) -> Array:
    return jnp.isfinite(values).all()


@cache
def _writer(sharding: Sharding | None) -> Any:
    """Writes an entry into a stack, in the stack's own memory, and tells whether it is finite."""

    def write(stack: Array, entry: Array, index: tuple[Array, ...]) -> tuple[Array, Array]:
        return stack.at[index].set(entry), jnp.isfinite(entry).all()

    return jax.jit(write, donate_argnums=0, out_shardings=(sharding, None))
