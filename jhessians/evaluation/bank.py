"""A bank: models trained on random subsets, kept as what they lose on queries.

bank.json    format, sizes, and hashes of the documents and queries
subsets.npy  [model, document] of bool: what each model was trained on
losses.npy   [model, query] of float32: in nats, summed over a query's labelled tokens
whole.npy    [query] of float32: the same of the model trained on all documents
model/       that model, with its tokenizer, in Hugging Face's format
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32

from jhessians.errors import CheckpointError
from jhessians.files import open_input, read_json
from jhessians.interop.manifest import check_files

INFO = "bank.json"
FORMAT = 1
MODEL = "model"
_ARRAYS = {"subsets": (np.bool_, 2), "losses": (np.float32, 2), "whole": (np.float32, 1)}


@dataclass(frozen=True)
class Contents:
    """What a bank was made of, by hashes.

    Attributes:
        documents: Of the documents' tokens.
        queries: Of the queries' tokens and labels.
    """

    documents: str
    queries: str


@dataclass(frozen=True)
class Bank:
    """What models trained on subsets lose on queries.

    Attributes:
        subsets: What each model was trained on.
        losses: Of each model.
        whole: Of the model that was trained on everything.
        contents: The documents and queries.
    """

    subsets: Bool[np.ndarray, "model document"]
    losses: Float32[np.ndarray, "model query"]
    whole: Float32[np.ndarray, " query"]
    contents: Contents

    def save(self, folder: Path) -> None:
        """Write the files, all but the model."""
        for name in _ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name))
        models, documents = self.subsets.shape
        sizes = {"models": models, "documents": documents, "queries": self.losses.shape[1]}
        info = {"format": FORMAT, **sizes, **asdict(self.contents)}
        (folder / INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Bank:
        """Read the files, all but the model.

        Args:
            folder: That of a finished bank.

        Returns:
            All of the bank's numbers.

        Raises:
            CheckpointError: If a file is missing, damaged, or doesn't fit the others.
        """
        folder = Path(folder)
        files = {INFO, *(f"{name}.npy" for name in _ARRAYS)}
        check_files(folder, files.__contains__)
        try:
            info = read_json(folder / INFO)
            arrays = {name: _read(folder / f"{name}.npy", *kind) for name, kind in _ARRAYS.items()}
            found = cls(**arrays, contents=Contents(str(info["documents"]), str(info["queries"])))
        except OSError as error:
            raise CheckpointError(
                f"cannot read {error.filename} ({error.strerror}); expected a folder that "
                "jhessians evaluate bank wrote"
            ) from None
        except (ValueError, KeyError, TypeError, EOFError) as error:
            raise CheckpointError(
                f"{folder} is damaged: {str(error).splitlines()[0]}; make the bank again"
            ) from None
        models, queries = found.losses.shape
        if len(found.subsets) != models or len(found.whole) != queries:
            raise CheckpointError(f"{folder} is damaged: its files differ in size; make it again")
        if not (np.isfinite(found.losses).all() and np.isfinite(found.whole).all()):
            raise CheckpointError(
                f"{folder} holds NaN or infinity; make the bank again, with a lower learning rate"
            )
        return found


def _read(path: Path, dtype: type, dimensions: int) -> np.ndarray:
    with open_input(path) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{path.name} has another version of numpy's format than 1.0")
        shape, is_fortran, found = np.lib.format.read_array_header_1_0(file)
        if found != dtype or len(shape) != dimensions or is_fortran:
            raise ValueError(f"{path.name} holds {found} in {len(shape)} dimensions")
        start, size = file.tell(), math.prod(shape) * found.itemsize
        if file.seek(0, 2) - start != size:
            raise ValueError(f"{path.name} has another size than that of its header")
        file.seek(start)
        return np.frombuffer(bytearray(file.read()), found).reshape(shape)
