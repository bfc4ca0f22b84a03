"""Lay a factored Hessian out on disk: bergson's tree, the older one, or both.

Knows no method and no model, only kinds of named, row-sharded arrays (see `layout.KINDS`).
Where both trees hold the same tensors, one file has two names.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from jhessians.errors import OutputError
from jhessians.interop import torchfile
from jhessians.interop.hold import marked_run_id
from jhessians.interop.layout import (
    HESSIAN_CFG_KEYS,
    INDEX_CFG_KEYS,
    INFLUENCE_RESULTS,
    KINDS,
    OLDER_TOTAL_LAMBDA_FILE,
    PREPROCESS_CFG_KEYS,
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
from jhessians.interop.tensors import ArrayRows, ScaledRows, TensorRows

__all__ = [
    "ArrayRows",
    "Destination",
    "ScaledRows",
    "TensorRows",
    "link_or_copy",
    "write_config",
    "write_sharded",
]


@dataclass(frozen=True)
class Destination:
    """The place and form of a fit's results. Every process of a run has an equal one.

    Attributes:
        root: The run directory.
        documents: N, the number of documents in the data set, short ones included.
        total_processed: n, the number of terms in the sums over the data set: of positions,
            unless the method sums over documents.
        layout: Which trees to write.
        shards: Files per factor.
        dtype: Number format of stored factors: "fp64", "fp32", "fp16" or "bf16".

    Raises:
        ValueError: If a count is not positive.
    """

    root: Path
    documents: int
    total_processed: int
    layout: Layout = "both"
    shards: int = 1
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        if self.documents < 1 or self.total_processed < 1:
            raise ValueError(f"counts must be positive: {self.documents=}, {self.total_processed=}")

    def write_kind(
        self,
        kind: str,
        tensors: Mapping[str, TensorRows],
        *,
        among: Mapping[str, tuple[int, ...]] | None = None,
        fresh: bool = True,
        last: bool = True,
    ) -> None:
        """Write one kind of factor into its folder in each tree.

        Args:
            kind: A key of `KINDS`.
            tensors: Module name → rows, scaled as bergson has it.
            among: If several calls write this kind, the shapes of all its modules.
            fresh: Whether this is the first of these calls.
            last: Whether this is the last of them.

        Raises:
            ValueError: If `kind` is unknown.
            NumericsError: If a value isn't finite, or overflows the number format.
            OutputError: If the disk is full, read-only or not ours.
        """
        write = partial(
            write_sharded, shards=self.shards, dtype=self.dtype, among=among, fresh=fresh,
            run_id=marked_run_id(self.root),
        )  # fmt: skip
        written = None
        if self.layout != "influence_results":
            written = kind_folder(self.root, kind, "bergson")
        if written is not None:
            write(written, tensors, replicated=KINDS[kind].replicated)
        older = None
        if self.layout != "bergson":
            older = kind_folder(self.root, kind, "influence_results")
        if older is None:
            return
        if KINDS[kind].older_per_position:
            scale = self.documents / self.total_processed
            write(older, {name: ScaledRows(source, scale) for name, source in tensors.items()})
        elif written is None:
            write(older, tensors)
        elif last:
            link_or_copy(written, older)

    def write_totals(self, *, corrected: bool, include_bias: bool = False) -> None:
        """Write the small files beside the shards: counts, and the older processor files.

        Args:
            corrected: Whether there was a pass for the eigenvalue correction, which the older
                tree counts separately.
            include_bias: Whether activations carry a column of ones for the bias.

        Raises:
            OutputError: If the disk is full, read-only or not ours.
        """
        count = np.array(self.total_processed, np.int64)

        def write() -> None:
            if self.layout != "influence_results":
                torchfile.save(count, self.root / TOTAL_FILE)
            if self.layout != "bergson":
                (self.root / INFLUENCE_RESULTS).mkdir(exist_ok=True)
                names = [TOTAL_FILE, *([OLDER_TOTAL_LAMBDA_FILE] if corrected else [])]
                for name in names:
                    torchfile.save(count, self.root / INFLUENCE_RESULTS / name)
                for name in ("normalizers.pth", "preconditioners.pth"):
                    torchfile.save({}, self.root / name)
                processor = GradientProcessor(include_bias=include_bias)
                _write_json(self.root / LEGACY_CONFIG_FILE, _older_settings(processor))

        _on_first_process(write, self.root)

    def write_processor(self, processor: GradientProcessor) -> None:
        """Write autocorrelation Hessians under the names of one tree, or hard-linked under both.

        Raises:
            OutputError: If the disk is full, read-only or not ours.
        """

        def write() -> None:
            processor.save(self.root)
            torchfile.save(np.array(self.total_processed, np.int64), self.root / TOTAL_FILE)
            if self.layout != "bergson":
                for name, older in LEGACY_NAMES.items():
                    link_file(self.root / name, self.root / older)
                _write_json(self.root / LEGACY_CONFIG_FILE, _older_settings(processor))
            if self.layout == "influence_results":
                for name in (*LEGACY_NAMES, PROCESSOR_FILE):
                    (self.root / name).unlink()

        _on_first_process(write, self.root)

    def write_factors(
        self,
        factors: Mapping[str, Mapping[str, TensorRows]],
        *,
        include_bias: bool = False,
    ) -> None:
        """Write a whole factored Hessian: every kind given, then the small files.

        A fit calls `write_kind` and `write_totals` instead, whenever a stage has a result.

        Args:
            factors: Kind (see `KINDS`) → module name → rows; kinds that a method lacks are left
                out.
            include_bias: Whether activations carry a column of ones for the bias.

        Raises:
            ValueError: If the kinds don't hold the same modules.
            NumericsError: If a value isn't finite, or overflows the number format.
            OutputError: If the disk is full, read-only or not ours.
        """
        modules = {kind: list(tensors) for kind, tensors in factors.items()}
        if any(names != next(iter(modules.values())) for names in modules.values()):
            raise ValueError(f"kinds hold different modules, or in another order: {modules}")
        for kind, tensors in factors.items():
            self.write_kind(kind, tensors)
        self.write_totals(corrected="eigenvalue_correction" in factors, include_bias=include_bias)


def write_config(
    root: Path,
    document: Mapping[str, Any],
    resolved: Mapping[str, Any],
    *,
    layout: Layout = "both",
) -> None:
    """Write the run's options: `config.yaml` for bergson, `config.json` for the older tree.

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

    def write() -> None:
        if layout != "influence_results":
            text = yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True)
            (root / "config.yaml").write_text(text, encoding="utf-8")
        if layout != "bergson":
            values = {**resolved, "metadata": document.get("metadata", {})}
            _write_json(root / "config.json", values)

    _on_first_process(write, root)


def _on_first_process(write: Callable[[], None], root: Path) -> None:
    """Call `write` on process 0 alone; a failure to write there is raised on all of them.

    Raises:
        OutputError: If the disk is full, read-only or not ours.
    """
    failure: OSError | None = None
    if jax.process_index() == 0:
        try:
            root.mkdir(parents=True, exist_ok=True)
            write()
        except OSError as error:
            failure = error
        except OutputError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            failure = error.__cause__
    raise_together(failure, root)


def _check_bergson_knows(command: Mapping[str, Any]) -> None:
    parts = {
        "hessian_cfg": HESSIAN_CFG_KEYS,
        "index_cfg": INDEX_CFG_KEYS,
        "preprocess_cfg": PREPROCESS_CFG_KEYS,
    }
    unknown = set(command) - set(parts)
    for part, known in parts.items():
        unknown |= set(command.get(part, {})) - known
    if unknown:
        raise ValueError(f"bergson does not know {sorted(unknown)}; put them at the top level")


def _older_settings(processor: GradientProcessor) -> dict[str, Any]:
    """The older processor file, whose readers took these three keys and raised on any other."""
    always = ["projection_dim", "reshape_to_square", "projection_type"]
    if processor.projection_dim:
        # Without them an older reader draws its own matrices, which ours are not: better it raises.
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
