"""Checkpoint → module, one tensor at a time.

The module is built from shapes alone. Each tensor is read, put on its devices and written into
its parameter, in place, before the next one is read: besides the module the host holds about one
tensor.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from converters import hub, registry, rules
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
        name_or_folder: A folder, or a name on the Hub such as `EleutherAI/pythia-160m`.
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
    decoder_config = registry.decoder_config(config)
    family = registry.family_of(config)
    source.obtain_weights()
    checkpoint = open_checkpoint(source.folder)

    def build(dtype: Any) -> Decoder:
        return nnx.eval_shape(lambda: Decoder(decoder_config, dtype=dtype, rngs=nnx.Rngs(0)))

    wanted = rules.slots(family, parameter_shapes(build(jnp.float32)))
    stored = rules.match(family, wanted, checkpoint)
    rules.check_tied(family, wanted, checkpoint)
    dtype = _parameter_dtype(stored) if dtype is None else jnp.dtype(dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise CheckpointError(
            f"{source.folder} would be loaded as {dtype}, which JAX has turned off; "
            "set JAX_ENABLE_X64=1, or load it as float32"
        )
    model = build(dtype)
    registry.name_linears(model, family)
    if mesh is not None and fsdp:
        mark_sharded(model, mesh)
    _fill(model, wanted, stored, mesh)
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
    mesh: Mesh | None,
) -> None:
    """Read every tensor into its parameter; `model` holds shapes before and arrays after."""
    state = nnx.state(model, nnx.Param)
    flat = dict(nnx.to_flat_state(state))
    specs = None if mesh is None else dict(nnx.to_flat_state(parameter_specs(state, mesh)))
    names: dict[str, list[str]] = {}
    for name, slot in wanted.items():
        names.setdefault(slot.parameter, []).append(name)
    for path, variable in flat.items():
        spec = P() if specs is None else specs[path].get_value()
        shape, dtype = tuple(variable.shape), variable.dtype
        whole = None if mesh is None else NamedSharding(mesh, spec)
        buffer = None
        for name in names[".".join(map(str, path))]:
            slot = wanted[name]
            values = slot.transform.to_ours(stored[name].read()).astype(dtype, copy=False)
            entry_spec = P(*tuple(spec)[len(slot.index) :])
            entry = None if mesh is None else NamedSharding(mesh, entry_spec)
            placed = _place(values, entry)
            if not bool(_is_finite(placed)):  # also waits, so that transfers don't pile up
                raise NumericsError(
                    f"{name} holds NaN or infinity as {dtype}; expected finite weights; "
                    "check the checkpoint, or load it in a wider type"
                )
            if not slot.index:
                buffer = placed
            else:
                buffer = _zeros(shape, dtype, whole) if buffer is None else buffer
                buffer = _write(buffer, placed, slot.index, whole)
        flat[path] = variable.replace(buffer)
    nnx.update(model, nnx.from_flat_state(flat))


def _place(values: Shaped[np.ndarray, "..."], sharding: Sharding | None) -> Array:
    if sharding is None:
        return jnp.asarray(values)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


@jax.jit
def _is_finite(values: Array) -> Array:
    return jnp.isfinite(values).all()


def _zeros(shape: tuple[int, ...], dtype: Any, sharding: Sharding | None) -> Array:
    return jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)()


def _write(buffer: Array, entry: Array, index: tuple[int, ...], sharding: Sharding | None) -> Array:
    """`buffer` with `entry` at `index`, in the memory of `buffer`."""
    return _writer(sharding)(buffer, entry, tuple(np.int32(i) for i in index))


_WRITERS: dict[Sharding | None, Any] = {}  # each compiles once per shape, however many checkpoints


def _writer(sharding: Sharding | None) -> Any:
    if sharding not in _WRITERS:
        set_entry = lambda buffer, entry, index: buffer.at[index].set(entry)  # noqa: E731
        _WRITERS[sharding] = jax.jit(set_entry, donate_argnums=0, out_shardings=sharding)
    return _WRITERS[sharding]
