"""Slices of our parameters, read from a checkpoint's tensors: no more of a file than is needed."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from converters import rules
from converters.reader import SlicedTensor, StoredTensor


def _reader(
    tensor: StoredTensor, transform: rules.Transform, dtype: np.dtype
) -> Callable[[rules.Slices], rules.Values]:
    """Reads slices of an entry of ours: from the file no more than those, where that can be."""

    def converted(values: rules.Values) -> rules.Values:
        with np.errstate(over="ignore"):  # infinity is found out on the devices
            return transform.to_ours(values).astype(dtype, copy=False)

    slices = transform.slices
    if slices is not None and isinstance(tensor, SlicedTensor):
        return lambda index: converted(tensor.read_slice(slices(index)))
    whole = cache(lambda: converted(tensor.read()))
    return lambda index: whole()[index]


def entry_reader(
    names: list[str],
    wanted: Mapping[str, rules.Home],
    stored: Mapping[str, StoredTensor],
    dtype: np.dtype,
    columns: int,
) -> Callable[[rules.Slices], rules.Values]:
    """Reads slices of an entry of ours that one tensor holds, or several side by side.

    Args:
        names: Of the tensors; put in order.
        wanted: Where each belongs.
        stored: The tensors.
        dtype: Number format.
        columns: Of the entry.

    Returns:
        What reads.
    """
    names.sort(key=lambda name: wanted[name].part)
    parts = [_reader(stored[name], wanted[name].transform, dtype) for name in names]
    return parts[0] if len(parts) == 1 else _side_by_side(parts, columns)


def _side_by_side(
    readers: Sequence[Callable[[rules.Slices], rules.Values]], columns: int
) -> Callable[[rules.Slices], rules.Values]:
    """Reads slices of an entry whose columns several tensors share equally."""
    width = columns // len(readers)

    def read(index: rules.Slices) -> rules.Values:
        start, stop, _ = index[-1].indices(columns)
        pieces = [
            reader((*index[:-1], slice(max(start - k * width, 0), min(stop - k * width, width))))
            for k, reader in enumerate(readers)
            if start < (k + 1) * width and stop > k * width
        ]
        return np.concatenate(pieces, axis=-1)

    return read


def stack_reader(
    entries: Mapping[tuple[int, ...], Callable[[rules.Slices], rules.Values]],
    shape: tuple[int, ...],
    dtype: np.dtype,
) -> Callable[[Any], np.ndarray]:
    """Reads slices of a parameter of which every entry is a tensor.

    Args:
        entries: Index of an entry, on axes that no slice cuts → what reads slices of it.
        shape: Of the whole parameter.
        dtype: Number format.

    Returns:
        What reads.
    """

    def read(slices: Any) -> np.ndarray:
        slices = slices or (slice(None),) * len(shape)
        found = np.empty([len(range(*s.indices(n))) for s, n in zip(slices, shape, strict=True)],
                         dtype)  # fmt: skip
        for index, entry in entries.items():
            found[index] = entry(slices[len(index) :])
        return found

    return read
