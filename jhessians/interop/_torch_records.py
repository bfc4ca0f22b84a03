"""What a torch pickle may hold: dtypes, storages, tensors, and the names of functions.

A pickle names functions that rebuild its values. Each admitted name has a function in a table of
this module, which checks its arguments and returns a record of them. No name is looked up or
imported, and one that is not in the table is refused.

References:
    torch `torch/_utils.py` (rebuild functions), `torch/storage.py` (storage classes).
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

_MAX_DIMENSIONS = 64  # numpy's and torch's

STORAGE_DTYPES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
}
# torch gave these no storage class: the tensor names its dtype beside an untyped storage.
UNTYPED_DTYPES: dict[str, np.dtype] = {
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}


class RefusedPickleError(ValueError):
    """The program is damaged or asks for something that this machine does not do."""


@dataclass(frozen=True, slots=True)
class StorageRecord:
    """A storage that the pickle names; `dtype` is None where it is untyped (bytes)."""

    dtype: np.dtype | None
    key: str
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes that the pickle claims for it."""
        return self.count * (1 if self.dtype is None else self.dtype.itemsize)


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor as the pickle describes it, which may be wrong about the storage's size.

    `offset` and `strides` count elements.
    """

    storage: StorageRecord
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Name:
    """An admitted name on the stack; only the name, not what it names."""

    name: str


def is_count(value: Any) -> bool:
    """Whether it is an integer from 0, and no bool."""
    return type(value) is int and value >= 0


def is_counts(value: Any) -> bool:
    """Whether it is a tuple of counts, no longer than a tensor has dimensions."""
    # The length first: the same long tuple may be offered many times.
    return type(value) is tuple and len(value) <= _MAX_DIMENSIONS and all(map(is_count, value))


def quoted(thing: Any) -> str:
    """A value from a file, made safe and short for an error of one line."""
    if isinstance(thing, str):
        return ascii(thing[:60] + "..." if len(thing) > 60 else thing)
    if isinstance(thing, int | float):
        return repr(thing) if abs(thing) < 2**63 else "a number beyond 64 bits"
    return f"a {type(thing).__name__}"


def need(holds: bool, otherwise: str, *about: Any) -> None:
    """Refuse the file unless a condition holds.

    Args:
        holds: The condition.
        otherwise: The message, with a "{}" for each value of `about`.
        about: Values from the file, which are quoted.

    Raises:
        RefusedPickleError: If not `holds`.
    """
    if not holds:
        raise RefusedPickleError(otherwise.format(*map(quoted, about)))


# The functions of admitted names. Each takes the tuple of arguments of a REDUCE instruction.


def _tensor(arguments: tuple, dtype: np.dtype | None, metadata: tuple) -> TensorRecord:
    storage, offset, shape, strides = arguments
    need(type(storage) is StorageRecord, "a tensor is rebuilt from something not a storage")
    found = storage.dtype if dtype is None else dtype
    need(found is not None, "a tensor without dtype lies in an untyped storage")
    need(is_count(offset), "a tensor's storage offset is {}", offset)
    for what, numbers in (("shape", shape), ("strides", strides)):
        need(is_counts(numbers), "a tensor's {} is no short tuple of non-negative integers", what)
    need(len(shape) == len(strides), "a tensor's shape and strides differ in length")
    # Conjugate and negative views keep the plain bytes: ignoring the flag would change values.
    need(not any(metadata), "a tensor carries view flags (conj, neg); save it after .clone()")
    return TensorRecord(storage, found, offset, shape, strides)


def _rebuild_tensor(arguments: tuple) -> TensorRecord:
    need(len(arguments) == 4, "_rebuild_tensor takes 4 arguments")
    return _tensor(arguments, None, ())


def _rebuild_tensor_v2(arguments: tuple) -> TensorRecord:
    need(len(arguments) in (6, 7), "_rebuild_tensor_v2 takes 6 or 7 arguments")
    return _tensor(arguments[:4], None, arguments[6:])


def _rebuild_tensor_v3(arguments: tuple) -> TensorRecord:
    need(len(arguments) in (7, 8), "_rebuild_tensor_v3 takes 7 or 8 arguments")
    dtype = _DTYPE_NAMES.get(arguments[6].name) if type(arguments[6]) is Name else None
    need(dtype is not None, "_rebuild_tensor_v3 is given no known dtype")
    return _tensor(arguments[:4], dtype, arguments[7:])


def _rebuild_parameter(arguments: tuple) -> TensorRecord:
    # data, requires_grad, backward_hooks and perhaps Python attributes: the data is the value.
    need(len(arguments) in (3, 4), "_rebuild_parameter takes 3 or 4 arguments")
    need(type(arguments[0]) is TensorRecord, "a parameter is rebuilt from something not a tensor")
    return arguments[0]


def _rebuild_ordered_dict(arguments: tuple) -> OrderedDict:
    # Filled afterwards by SETITEMS. Items given here could be one long list, given many times.
    need(arguments == (), "OrderedDict is rebuilt with arguments")
    return OrderedDict()


def _rebuild_size(arguments: tuple) -> tuple:
    need(len(arguments) == 1 and is_counts(arguments[0]), "torch.Size of no sizes")
    return arguments[0]


REBUILD: dict[str, Callable[[tuple], Any]] = {
    "torch._utils _rebuild_tensor": _rebuild_tensor,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils _rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
    "torch._utils _rebuild_parameter_with_state": _rebuild_parameter,
    "collections OrderedDict": _rebuild_ordered_dict,
    "torch Size": _rebuild_size,
}
STORAGE_NAMES: dict[str, np.dtype | None] = {
    "torch.storage UntypedStorage": None,
    "torch UntypedStorage": None,
    **{f"torch {name}": dtype for name, dtype in STORAGE_DTYPES.items()},
}
_DTYPE_NAMES = {
    **{f"torch {name}": dtype for name, dtype in UNTYPED_DTYPES.items()},
    **{f"torch {dtype.name}": dtype for dtype in STORAGE_DTYPES.values()},
}
ADMITTED_NAMES = frozenset(REBUILD) | frozenset(STORAGE_NAMES) | frozenset(_DTYPE_NAMES)
