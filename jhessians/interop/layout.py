"""The layout of factors on disk, as tables: folders, number formats and ranges of rows.

Two trees hold the same tensors: the one that bergson 2.5.1 reads, and the older one that the
command `python -m bergson.hessians` of earlier versions wrote in a folder `influence_results`. A
factor has one *kind*, and `KINDS` says which folder of either tree it goes to, so a new kind is a
new entry here. Both trees keep
`shard_{r}.safetensors` for r = 0 … N−1 in a folder, every shard with rows of every module.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import ml_dtypes
import numpy as np

Tree = Literal["bergson", "influence_results"]
"""One of the two trees."""

Layout = Literal["both", "bergson", "influence_results"]
"""Which trees to write; with "both" the older tree stands inside bergson's."""

INFLUENCE_RESULTS = "influence_results"
"""Folder of the older tree's shards, relative to the run directory."""

RUN_ID = "run_id"
"""Name of the run's id in a shard's metadata; its manifest has the same."""

TOTAL_FILE = "total_processed.pt"
OLDER_TOTAL_LAMBDA_FILE = "total_processed_lambda.pt"


@dataclass(frozen=True)
class Kind:
    """One kind of factor, of which every module has a matrix [rows, columns] or a vector.

    Attributes:
        folder: Its folder in bergson's tree.
        older_folder: Its folder in the older tree, if that has this kind.
        square: Whether rows and columns are the same dimension.
        replicated: Whether every shard holds a whole copy instead of its rows.
        older_per_position: Whether the older tree's values are divided by the number of positions
            where bergson's are by that of documents. They are then bergson's values times
            n_docs / total_processed.
    """

    folder: str
    older_folder: str | None = None
    square: bool = False
    replicated: bool = False
    older_per_position: bool = False


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "activation_covariance": Kind(
            "activation_sharded", "activation_covariance_sharded", square=True
        ),
        "gradient_covariance": Kind("gradient_sharded", "gradient_covariance_sharded", square=True),
        "activation_eigenvectors": Kind(
            "eigen_activation_sharded", "activation_eigen_sharded", square=True
        ),
        "gradient_eigenvectors": Kind(
            "eigen_gradient_sharded", "gradient_eigen_sharded", square=True
        ),
        "eigenvalue": Kind("eigenvalue_sharded"),
        "eigenvalue_correction": Kind(
            "eigenvalue_correction_sharded",
            "eigenvalue_correction_sharded",
            older_per_position=True,
        ),
        # Each shard of the eigenvalues holds some rows and all columns of [out, in], and bergson
        # reads the matching parts of these two: some of the first axis's, all of the second's.
        "activation_eigenvalues": Kind("factor_eig_a", replicated=True),
        "gradient_eigenvalues": Kind("factor_eig_g"),
    }
)

DTYPES: Mapping[str, tuple[str, np.dtype]] = MappingProxyType(
    {
        "fp64": ("F64", np.dtype("<f8")),
        "fp32": ("F32", np.dtype("<f4")),
        "fp16": ("F16", np.dtype("<f2")),
        "bf16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    }
)
"""For each `hessian_dtype` of bergson, safetensors' name of it and numpy's dtype."""

HESSIAN_CFG_KEYS = frozenset(
    {"method", "ev_correction", "hessian_dtype", "use_dataset_labels", "module_partitions"}
)
"""The fields of bergson 2.5.1's `HessianConfig`, of which `method` is required."""

INDEX_CFG_KEYS = frozenset(
    """run_path overwrite model precision revision distributed fsdp peft_init_kwargs
    model_kwargs moe_experts logit_scale data tokenizer drop_columns max_tokens
    use_tf32_matmuls debug projection_dim include_bias reshape_to_square projection_type
    projection_scale projection_target projection_seed token_batch_size max_batch_size
    auto_batch_size optimizer_state loss_fn loss_reduction label_smoothing
    split_attention_modules attention profile filter_modules force_math_sdp attribute_tokens
    modules""".split()
)
"""The fields of bergson 2.5.1's `IndexConfig`, of which `run_path` is required."""


PREPROCESS_CFG_KEYS = frozenset(
    {"unit_normalize", "hessian_path", "ev_correction", "inversion_cfg", "aggregation",
     "normalize_aggregated_grad"}
)  # fmt: skip
"""The fields of bergson 2.5.1's `PreprocessConfig`."""


def shard_bounds(dimension: int, shards: int, index: int) -> tuple[int, int]:
    """Row range [start, stop) of one shard; shard 0 also takes the rows that are left over.

    Args:
        dimension: Rows in all.
        shards: Number of shards, at least 1; may exceed `dimension`.
        index: Which shard, 0 … shards − 1.

    Returns:
        First row, and the one after the last; both are the same for an empty shard.

    Raises:
        ValueError: If `index` names no shard or `dimension` is negative.
    """
    if dimension < 0 or not 0 <= index < shards:
        raise ValueError(f"no shard {index} of {shards} over {dimension} rows")
    base, rest = divmod(dimension, shards)
    if index == 0:
        return 0, base + rest
    start = rest + index * base
    return start, start + base


def shard_name(index: int) -> str:
    """File name of one shard."""
    return f"shard_{index}.safetensors"


def kind_folder(root: Path, kind: str, tree: Tree) -> Path | None:
    """Folder of `kind` in one tree under `root`; None where that tree has no such kind.

    Returns:
        The folder's path, whether it exists or not.

    Raises:
        ValueError: If `kind` is not in `KINDS`.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of factor {kind!r}; known: {', '.join(KINDS)}")
    if tree == "bergson":
        return root / KINDS[kind].folder
    folder = KINDS[kind].older_folder
    return root / INFLUENCE_RESULTS / folder if folder else None
