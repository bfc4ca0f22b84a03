"""A gradient store's documents as a Hugging Face data set, which some of bergson's readers want.

A folder `data.hf` with a row for each document: `input_ids`, `length`, and `labels` where they
aren't the tokens themselves. An aggregated store has one row, `query_index`.
"""

from pathlib import Path
from typing import Any

import numpy as np

from jhessians.data.documents import Documents
from jhessians.data.rows import quiet

DATA_FOLDER = "data.hf"
AT_ONCE = 65536  # documents of an array, whose offsets must stay below 2³¹


def write_documents(root: Path, documents: Documents) -> None:
    """Write the documents beside a store.

    Args:
        root: The store's folder.
        documents: The data set.

    Raises:
        OSError: If they can't be written.
    """
    columns: dict[str, Any] = {"input_ids": _lists(documents.tokens, documents.offsets)}
    if documents.labels is not None:
        columns["labels"] = _lists(documents.labels, documents.offsets)
    columns["length"] = documents.lengths
    _write(root, columns)


def write_aggregate(root: Path) -> None:
    """Write the data set of a store with one row for all documents.

    Args:
        root: The store's folder.

    Raises:
        OSError: If it can't be written.
    """
    _write(root, {"query_index": np.zeros(1, np.int64)})


def _lists(values: np.ndarray, offsets: np.ndarray) -> Any:
    """A list for each document."""
    import pyarrow as pa

    parts = []
    for first in range(0, len(offsets) - 1, AT_ONCE):
        bounds = offsets[first : first + AT_ONCE + 1]
        flat = pa.array(values[bounds[0] : bounds[-1]])
        parts.append(
            pa.ListArray.from_arrays(pa.array((bounds - bounds[0]).astype(np.int32)), flat)
        )
    return pa.chunked_array(parts)


def _write(root: Path, columns: dict[str, Any]) -> None:
    import datasets
    import pyarrow as pa

    with quiet():
        datasets.Dataset(pa.table(columns)).save_to_disk(str(root / DATA_FOLDER))
