"""Checkpoint → module, one tensor at a time.

The module is built from shapes alone. Each tensor is read, put on its devices and written into
its parameter, in place, before the next one is read: besides the module the host holds about one
tensor. Where parameters are sharded, a host reads the slices that its own devices hold.
"""

import logging
from collections.abc import Callable, Mapping
from functools import cache, reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from converters import adapters, flax_checkpoint, hub, matching, registry, rules
from converters.flax_checkpoint import FlaxCheckpoint
from converters.origin import LoadedModel, Origin
from converters.parts import Parts
from converters.reader import StoredTensor, open_checkpoint
from converters.slices import entry_reader, stack_reader
from jhessians.devices.mesh import mark_sharded, parameter_specs
from jhessians.devices.offloading import in_host, is_in_host, may_lie_in_host
from jhessians.errors import CheckpointError, NumericsError
from jhessians.interop.manifest import read_manifest
from jhessians.models.decoder import Decoder

STORED = "stored"
"""As a dtype: the number format of the files."""

_log = logging.getLogger("jhessians")


def load(
    name_or_folder: str | Path,
    *,
    dtype: Any = None,
    revision: str | None = None,
    mesh: Mesh | None = None,
    fsdp: bool = False,
    compared: bool = False,
    offload: bool = False,
) -> LoadedModel:
    """Load a checkpoint, Hugging Face's or one that `jhessians convert` wrote, as a Flax module.

    Args:
        name_or_folder: A folder, or a name on the Hub such as `EleutherAI/pythia-160m`. That of a
            LoRA adapter loads its base model, frozen, with the adapter beside it.
        dtype: Of the parameters, such as "bfloat16" or `jnp.bfloat16`, or "stored" for the
            checkpoint's own, the widest if it has several. Default float32, as in the command
            line; then a warning says so if the files hold something else.
        revision: The Hub's branch, tag or commit.
        mesh: The devices that get the parameters; default JAX's default device.
        fsdp: Shard parameters over `mesh` instead of giving each device all of them.
        compared: Hash what this host reads, and what the next one should have read, for which with
            `fsdp` it reads as much again; see `Origin.parts`.
        offload: Leave the layers' matrices in host memory, from where the devices fetch one layer
            at a time.

    Returns:
        Model, config and tokenizer. The model's linears are named as Hugging Face's base model
        names them, with `{layer}` for the layer's number.

    Raises:
        CheckpointError: If it can't be found, isn't whole, isn't supported, or its tensors don't
            fit its config.json.
        NumericsError: If a weight is NaN or infinite; the message names the tensor.
        MeshError: If `offload` is asked for of devices that can't read host memory.
        ValueError: If `fsdp` is asked for without a mesh, or `dtype` is no floating-point format.
    """
    asked = _asked(dtype)
    if fsdp and mesh is None:
        raise ValueError("fsdp shards parameters over a mesh; give one")
    source = hub.find(name_or_folder, revision)
    flax = flax_checkpoint.is_flax(source.folder)
    config = registry.read_config(source.folder)
    registry.decoder_config(config)  # refuses before anything large is downloaded
    family = registry.family_of(config)
    adapter = adapters.open_adapter(source.adapter) if source.adapter else None
    model = nnx.eval_shape(lambda: registry.create(config, rngs=nnx.Rngs(0)))
    model.layers.offloaded = offload
    if flax:
        if adapter is not None:
            raise CheckpointError(
                f"{source.folder} is a Flax checkpoint; expected a Hugging Face one as an "
                f"adapter's base; make one with `jhessians convert {source.folder} FOLDER`"
            )
        parameters_on_disk = flax_checkpoint.open_flax(source.folder, config.model_type)
        kinds = parameters_on_disk.dtypes
        target = _parameter_dtype(kinds, asked, source.folder)
        if mesh is not None and fsdp:
            mark_sharded(model, mesh)
        parts = Parts(compared)
        _restore(model, parameters_on_disk, target, mesh, parts)
        return _loaded(model, config, source, kinds, parts, said=dtype is not None)

    source.obtain_weights()
    checkpoint = open_checkpoint(source.folder)
    matching.check_count(family, parameter_shapes(model), checkpoint)
    wanted = rules.homes(family, parameter_shapes(model))
    stored = matching.match(family, wanted, checkpoint)
    matching.check_tied(family, wanted, checkpoint)
    if adapter is not None:
        shapes = parameter_shapes(model)
        homes, tensors = adapters.attach(model, adapter, family, wanted, shapes)
        wanted, stored = {**wanted, **homes}, {**stored, **tensors}
    kinds = {tensor.dtype for tensor in stored.values()}
    target = _parameter_dtype(kinds, asked, source.folder)
    if mesh is not None and fsdp:
        mark_sharded(model, mesh)
    parts = Parts(compared)
    _fill(model, wanted, stored, target, mesh, parts)
    return _loaded(model, config, source, kinds, parts, said=dtype is not None)


def parameters(model: nnx.Module) -> dict[str, nnx.Variable]:
    """A module's parameters by path."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): variable for path, variable in flat}


def parameter_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's parameters by path."""
    return {path: tuple(variable.shape) for path, variable in parameters(model).items()}


def _asked(dtype: Any) -> np.dtype | None:
    """The format that `load` is asked for; None for that of the files."""
    if isinstance(dtype, str) and dtype == STORED:
        return None
    try:
        found = jnp.dtype(jnp.float32 if dtype is None else dtype)
    except TypeError:
        found = np.dtype(object)
    if not jnp.issubdtype(found, jnp.floating):
        raise ValueError(
            f"dtype is {dtype!r}; expected a floating-point format such as float32 or bfloat16, or "
            f"{STORED!r} for the checkpoint's own"
        )
    return found


def _parameter_dtype(stored: set[np.dtype], asked: np.dtype | None, folder: Path) -> np.dtype:
    """The one that is asked for, or else the narrowest that holds all stored ones without loss."""
    dtype = reduce(np.promote_types, stored) if asked is None else asked
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise CheckpointError(
            f"{folder} would be loaded as {dtype}, which JAX has turned off; "
            "set JAX_ENABLE_X64=1, or load it as float32"
        )
    return dtype


def _loaded(
    model: Decoder,
    config: Any,
    source: hub.Source,
    kinds: set[np.dtype],
    parts: Parts,
    *,
    said: bool,
) -> LoadedModel:
    """The finished model, with a word on its number format if nobody `said` which he wants."""
    stored = tuple(sorted(kind.name for kind in kinds))
    model.origin = Origin(config, source, stored, parts.hashes())
    loaded = LoadedModel(model, config, hub.tokenizer_of(source))
    if jax.process_index() == 0:
        same, formats = stored == (loaded.dtype.name,), " and ".join(stored)
        _log.log(
            logging.INFO if said or same else logging.WARNING,
            "%s is stored in %s and loaded as %s%s", source.repository or source.folder, formats,
            loaded.dtype.name, "" if same else f"; dtype={STORED!r} keeps what is stored",
        )  # fmt: skip
    return loaded


def _restore(
    model: Decoder,
    checkpoint: FlaxCheckpoint,
    dtype: np.dtype,
    mesh: Mesh | None,
    parts: Parts,
) -> None:
    """Read every parameter of a Flax checkpoint; `model` holds shapes before and arrays after."""
    state = nnx.state(model, nnx.Param)
    variables = dict(nnx.to_flat_state(state))
    paths = {".".join(map(str, path)): path for path in variables}
    specs = {} if mesh is None else dict(nnx.to_flat_state(parameter_specs(state, mesh)))
    default = jnp.zeros(()).sharding
    wanted = {}
    offloaded = _offloaded(model)
    for name, path in paths.items():
        spec = None if mesh is None else tuple(specs[path].get_value())
        sharding = _sharding(mesh, spec) or default
        sharding = in_host(sharding) if path in offloaded else sharding
        wanted[name] = jax.ShapeDtypeStruct(variables[path].shape, dtype, sharding=sharding)
    manifest = read_manifest(checkpoint.folder)
    parts.know(repr(manifest and sorted(manifest.files.items())))
    arrays = checkpoint.restore(wanted)
    for name, array in arrays.items():
        if not (_is_finite_here(array) if is_in_host(array) else bool(_is_finite(array))):
            raise _not_finite(name, dtype)
        parts.add(array)
        variables[paths[name]] = variables[paths[name]].replace(array)
    nnx.update(model, nnx.from_flat_state(variables))


def _fill(
    model: Decoder,
    wanted: Mapping[str, rules.Home],
    stored: Mapping[str, StoredTensor],
    dtype: np.dtype,
    mesh: Mesh | None,
    parts: Parts,
) -> None:
    """Read every tensor into its parameter; `model` holds shapes before and arrays after."""
    entries: dict[str, dict[tuple[int, ...], list[str]]] = {}  # of an entry, its tensors
    for name, home in wanted.items():
        entries.setdefault(home.parameter, {}).setdefault(home.index, []).append(name)
    state = nnx.state(model, nnx.Param)
    flat = dict(nnx.to_flat_state(state))
    specs = {} if mesh is None else dict(nnx.to_flat_state(parameter_specs(state, mesh)))
    offloaded = _offloaded(model)
    for path, variable in flat.items():
        spec = None if mesh is None else tuple(specs[path].get_value())
        sharding = _sharding(mesh, spec)
        array: Array | None = None
        here = {
            index: entry_reader(names, wanted, stored, dtype, variable.shape[-1])
            for index, names in entries[".".join(map(str, path))].items()
        }
        if path in offloaded:
            read = stack_reader(here, variable.shape, dtype)
            array = jax.make_array_from_callback(
                variable.shape, in_host(sharding), read, dtype=dtype
            )
            parts.add(array, read)
            if not _is_finite_here(array):
                raise _not_finite(".".join(map(str, path)), dtype)
            here = {}
        for index, read in here.items():
            shape = variable.shape[len(index) :]
            entry = _place(read, shape, _sharding(mesh, spec, len(index)))
            parts.add(entry, read)
            if not index:
                array, finite = entry, _is_finite(entry)
            else:
                if array is None:
                    array = jnp.zeros(variable.shape, dtype, device=sharding)
                where = tuple(np.int32(i) for i in index)
                array, finite = _writer(sharding)(array, entry, where)
            # Asking for the answer also waits for the transfer: tensors don't pile up on the host.
            if not bool(finite):
                raise _not_finite(" or ".join(entries[".".join(map(str, path))][index]), dtype)
        flat[path] = variable.replace(array)
    nnx.update(model, nnx.from_flat_state(flat))


def _offloaded(model: Decoder) -> set[tuple[Any, ...]]:
    """Paths of the parameters that stay in host memory."""
    if not model.layers.offloaded:
        return set()
    return {
        path
        for path, variable in nnx.to_flat_state(nnx.state(model))
        if path[0] == "layers" and may_lie_in_host(variable.shape)
    }


def _sharding(mesh: Mesh | None, spec: tuple | None, leading: int = 0) -> Sharding | None:
    """How a parameter lies on the mesh, or its entry without the `leading` axes."""
    return None if mesh is None or spec is None else NamedSharding(mesh, P(*spec[leading:]))


def _place(
    read: Callable[[rules.Slices], rules.Values], shape: tuple[int, ...], sharding: Sharding | None
) -> Array:
    """An entry on its devices, of which each host reads what its own devices hold."""
    if sharding is None:
        return jnp.asarray(read((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, lambda index: read(index or ()))


def _is_finite_here(array: Array) -> bool:
    """Whether what this host has of an array in host memory is finite."""
    return all(np.isfinite(np.asarray(shard.data)).all() for shard in array.addressable_shards)


def _not_finite(name: str, dtype: np.dtype) -> NumericsError:
    return NumericsError(
        f"{name} holds NaN or infinity as {dtype}; expected finite weights; check the checkpoint, "
        "or load it in a wider type"
    )


@jax.jit
def _is_finite(values: Array) -> Array:
    return jnp.isfinite(values).all()


@cache
def _writer(sharding: Sharding | None) -> Any:
    """Writes an entry into a stack, in the stack's own memory, and tells whether it is finite."""

    def write(stack: Array, entry: Array, index: tuple[Array, ...]) -> tuple[Array, Array]:
        # Not `stack.at[index].set`: XLA's scatter copies a stack of bfloat16 on CPU.
        place = (*index, *(jnp.int32(0),) * entry.ndim)
        written = lax.dynamic_update_slice(stack, entry[(None,) * len(index)], place)
        return written, jnp.isfinite(entry).all()

    return jax.jit(write, donate_argnums=0, out_shardings=(sharding, None))
