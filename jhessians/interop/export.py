"""Lay a factored Hessian out on disk: bergson's tree, the seed's, or both.

Knows no method and no model, only kinds of named, row-sharded arrays (see `layout.KINDS`).
Where both trees hold the same tensors, one file has two names.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from jhessians.errors import OutputError
from jhessians.interop import torchfile
from jhessians.interop.layout import (
    HESSIAN_CFG_KEYS,
    INDEX_CFG_KEYS,
    KINDS,
    SEED_ROOT,
    SEED_TOTAL_LAMBDA_FILE,
    TOTAL_FILE,
    Layout,
    kind_folder,
)
from jhessians.interop.processor import (
    CONFIG_FILE as PROCESSOR_FILE,
)
from jhessians.interop.processor import (
    LEGACY_CONFIG_FILE,
    GradientProcessor,
)
from jhessians.interop.processor_files import LEGACY_NAMES
from jhessians.interop.shards import link_file, link_or_copy, raise_together, write_sharded
from jhessians.interop.sources import ArraySource, ScaledSource, TensorSource

__all__ = [
    "ArraySource",
    "ScaledSource",
    "TensorSource",
    "export_factored",
    "link_or_copy",
    "write_config",
    "write_kind",
    "write_processor",
    "write_sharded",
    "write_totals",
]


def write_kind(
    root: Path,
    kind: str,
    tensors: Mapping[str, TensorSource],
    *,
    layout: Layout,
    shards: int,
    dtype: str,
    n_docs: int,
    total_processed: int,
    among: Mapping[str, tuple[int, ...]] | None = None,
    fresh: bool = True,
    last: bool = True,
) -> None:
    """Write one kind of factor, where each tree of `layout` wants it.

    Args:
        root: The run directory.
        kind: A key of `KINDS`.
        tensors: Module name → rows, scaled as bergson has it.
        layout: Which trees.
        shards, dtype: See `write_sharded`.
        n_docs: Documents in the data set, short ones included.
        total_processed: Masked positions over the data set; the seed's divisor.
        among, fresh: See `write_sharded`, for a kind that several calls write.
        last: Whether this is the last of those.

    Raises:
        ValueError: If `kind` is unknown or a count is not positive.
        NumericsError, OutputError: See `write_sharded`.
    """
    if n_docs < 1 or total_processed < 1:
        raise ValueError(f"counts must be positive: {n_docs=}, {total_processed=}")
    written = kind_folder(root, kind, "bergson") if layout != "seed" else None
    if written is not None:
        write_sharded(
            written, tensors,
            shards=shards, dtype=dtype, replicated=KINDS[kind].replicated, among=among, fresh=fresh,
        )  # fmt: skip
    seed = kind_folder(root, kind, "seed") if layout != "bergson" else None
    if seed is None:
        return
    if KINDS[kind].seed_per_position:
        scale = n_docs / total_processed
        scaled = {name: ScaledSource(source, scale) for name, source in tensors.items()}
        write_sharded(seed, scaled, shards=shards, dtype=dtype, among=among, fresh=fresh)
    elif written is None:
        write_sharded(seed, tensors, shards=shards, dtype=dtype, among=among, fresh=fresh)
    elif last:
        link_or_copy(written, seed)


def write_totals(
    root: Path, *, layout: Layout, total_processed: int, corrected: bool, include_bias: bool = False
) -> None:
    """Write the small files beside the shards: position counts and the seed's processor files.

    Args:
        root: The run directory.
        layout: Which trees.
        total_processed: Masked positions over the data set.
        corrected: Whether there was a pass for the eigenvalue correction, which the seed
            counted separately.
        include_bias: Whether activations carry a column of ones for the bias.

    Raises:
        OutputError: If the disk is full, read-only or not ours.
    """
    count = np.array(total_processed, np.int64)
    failure: OSError | None = None
    if jax.process_index() == 0:
        try:
            root.mkdir(parents=True, exist_ok=True)
            if layout != "seed":
                torchfile.save(count, root / TOTAL_FILE)
            if layout != "bergson":
                (root / SEED_ROOT).mkdir(exist_ok=True)
                names = [TOTAL_FILE, *([SEED_TOTAL_LAMBDA_FILE] if corrected else [])]
                for name in names:
                    torchfile.save(count, root / SEED_ROOT / name)
                for name in ("normalizers.pth", "preconditioners.pth"):
                    torchfile.save({}, root / name)
                processor = GradientProcessor(include_bias=include_bias)
                _write_json(root / LEGACY_CONFIG_FILE, _seed_settings(processor))
        except OSError as error:
            failure = error
    raise_together(failure, root)


def write_processor(
    root: Path, processor: GradientProcessor, *, layout: Layout, total_processed: int
) -> None:
    """Write autocorrelation Hessians: bergson's files, their older names, or both, linked.

    Args:
        root: The run directory.
        processor: Everything.
        layout: Which names.
        total_processed: Masked positions over the data set.

    Raises:
        OutputError: If the disk is full, read-only or not ours.
    """
    failure: OSError | None = None
    if jax.process_index() == 0:
        try:
            processor.save(root)
            torchfile.save(np.array(total_processed, np.int64), root / TOTAL_FILE)
            if layout != "bergson":
                for name, older in LEGACY_NAMES.items():
                    link_file(root / name, root / older)
                _write_json(root / LEGACY_CONFIG_FILE, _seed_settings(processor))
            if layout == "seed":
                for name in (*LEGACY_NAMES, PROCESSOR_FILE):
                    (root / name).unlink()
        except OSError as error:
            failure = error
        except OutputError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            failure = error.__cause__
    raise_together(failure, root)


def export_factored(
    root: Path,
    factors: Mapping[str, Mapping[str, TensorSource]],
    *,
    layout: Layout,
    shards: int,
    dtype: str,
    n_docs: int,
    total_processed: int,
    include_bias: bool = False,
) -> None:
    """Write a whole factored Hessian: every kind given, then the small files.

    The stages of a run call `write_kind` and `write_totals` instead, as results come in.

    Args:
        root: The run directory.
        factors: Kind (see `KINDS`) → module name → rows; kinds that a method lacks are left out.
        layout, shards, dtype, n_docs, total_processed: See `write_kind`.
        include_bias: See `write_totals`.

    Raises:
        ValueError: If the kinds don't hold the same modules.
        NumericsError, OutputError: See `write_sharded`.
    """
    modules = {kind: list(tensors) for kind, tensors in factors.items()}
    if any(names != next(iter(modules.values())) for names in modules.values()):
        raise ValueError(f"kinds hold different modules, or in another order: {modules}")
    for kind, tensors in factors.items():
        write_kind(
            root, kind, tensors, layout=layout, shards=shards, dtype=dtype,
            n_docs=n_docs, total_processed=total_processed,
        )  # fmt: skip
    write_totals(
        root,
        layout=layout,
        total_processed=total_processed,
        corrected="eigenvalue_correction" in factors,
        include_bias=include_bias,
    )


def write_config(
    root: Path,
    document: Mapping[str, Any],
    resolved: Mapping[str, Any],
    *,
    layout: Layout = "both",
) -> None:
    """Write the run's options: `config.yaml` for bergson, `config.json` as the seed did.

    Args:
        root: The run directory.
        document: All of `config.yaml`, plain YAML values: `steps`, `metadata`, and any other
            top-level key, which bergson does not look at.
        resolved: Every option of the run, flat, for `config.json`.
        layout: Which trees.

    Raises:
        ValueError: If a step has a key that bergson does not know: it would drop it when it
            reads the run and refuse it when it replays the run.
        OutputError: If the disk is full, read-only or not ours.
    """
    for step in document["steps"]:
        for command in step.values():
            _check_bergson_knows(command)
    failure: OSError | None = None
    if jax.process_index() == 0:
        try:
            root.mkdir(parents=True, exist_ok=True)
            if layout != "seed":
                text = yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True)
                (root / "config.yaml").write_text(text, encoding="utf-8")
            if layout != "bergson":
                values = {**resolved, "metadata": document.get("metadata", {})}
                _write_json(root / "config.json", values)
        except OSError as error:
            failure = error
    raise_together(failure, root)


def _check_bergson_knows(command: Mapping[str, Any]) -> None:
    parts = {"hessian_cfg": HESSIAN_CFG_KEYS, "index_cfg": INDEX_CFG_KEYS}
    unknown = set(command) - set(parts)
    for part, known in parts.items():
        unknown |= set(command.get(part, {})) - known
    if unknown:
        raise ValueError(f"bergson does not know {sorted(unknown)}; put them at the top level")


def _seed_settings(processor: GradientProcessor) -> dict[str, Any]:
    """The seed's processor file; its reader took exactly these three keys and raised on others."""
    always = ["projection_dim", "reshape_to_square", "projection_type"]
    if processor.projection_dim:
        # Without them a reader takes the seed's own matrices, which ours are not: better it raises.
        always += ["projection_scale", "projection_version"]
    defaults = GradientProcessor().settings
    # Later readers know the rest; the first ones knew no gradients that were made that way.
    return {
        name: value
        for name, value in processor.settings.items()
        if name in always or value != defaults[name]
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
