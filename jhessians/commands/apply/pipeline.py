"""What `apply` does: an inverse Hessian times the gradients of a store, one module at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jhessians.commands.apply.config import ApplyConfig
from jhessians.config.option import name_flags, options_of
from jhessians.config.units import bytes_in_words, count_in_words, seconds_in_words
from jhessians.errors import CheckpointError, NumericsError, OutputError

if TYPE_CHECKING:
    import numpy as np

    from jhessians.influence.inverses import StoredInverse
    from jhessians.interop.gradient_store import GradientStore, GradientWriter
    from jhessians.interop.processor import GradientProcessor

SHARE = 1 / 24
"""Of the free memory, what a slice of rows may take: products make several of its size."""


@dataclass(frozen=True)
class ApplySummary:
    """What `apply` did.

    Attributes:
        out: Folder with the result.
        rows: How many gradients.
        modules: How many modules each has.
        inversion: How the Hessian was inverted.
        damping_factor: With which damping.
        eigenvalues: Which ones, in words.
        seconds: How long it took.
        warnings: One line each.
    """

    out: str
    rows: int
    modules: int
    inversion: str
    damping_factor: float
    eigenvalues: str
    seconds: float
    warnings: tuple[str, ...]

    def render(self) -> str:
        """One line for the terminal; the warnings were said before."""
        rows, modules = count_in_words(self.rows, "row"), count_in_words(self.modules, "module")
        return (
            f"{self.out}: {rows} of {modules}, times the inverse Hessian ({self.inversion}, "
            f"damping factor {self.damping_factor:g}, {self.eigenvalues}), in "
            f"{seconds_in_words(self.seconds)}"
        )


def apply(config: ApplyConfig) -> ApplySummary:
    """Multiply a store's gradients by an inverse Hessian and write a store of the same form.

    Returns:
        What was done, and with which eigenvalues.

    Raises:
        ConfigError: If an option is missing.
        CheckpointError: If a folder can't be read, or the two don't belong together.
        NumericsError: If a Hessian is singular and not damped, or a number isn't finite.
        OutputError: If the result can't be written.
    """
    import shutil

    import numpy as np
    import yaml

    from jhessians.commands.output import output_folder
    from jhessians.config.provenance import CONFIG_FILE, config_document
    from jhessians.influence.inverses import JOINT, open_inverse
    from jhessians.influence.inversion import Inverse
    from jhessians.interop.gradient_store import GradientStore, GradientWriter, store_bytes
    from jhessians.interop.low_rank_store import LOW_RANK_INFO_FILE
    from jhessians.report.progress import Progress

    dtype = np.dtype(np.float64 if config.precision == "fp64" else np.float32)
    names = {each.name for each in options_of(ApplyConfig)}
    progress = Progress(quiet=config.quiet, reword=lambda line: name_flags(line, names))
    hessian, source = str(config.hessian), Path(str(config.gradients))
    with output_folder(config, "out", "apply") as part:
        if (source / LOW_RANK_INFO_FILE).exists():
            raise CheckpointError(
                f"{source} holds gradients as a few outer products; expected whole or projected "
                "ones: build it without --rank"
            )
        store = GradientStore(source)
        how: Any = config.inversion
        inverse = open_inverse(
            hessian, Inverse(how, config.damping_factor, config.ev_correction), dtype
        )
        processor = _check_together(config, store, inverse, progress)
        needed = store_bytes(store.matrix.shape[1], dtype, store.rows)
        if needed > (free := shutil.disk_usage(part).free):
            raise OutputError(
                f"cannot write {config.out}: its rows take {bytes_in_words(needed)}, where "
                f"{bytes_in_words(free)} are free; choose another disk"
            )
        counts = None if store.offsets is None else np.diff(store.offsets)
        width = store.matrix.shape[1]
        with (
            GradientWriter(part, store.sizes, dtype, store.rows, counts=counts) as writer,
            progress.stage("Products", len(inverse.sizes) * store.rows, "rows") as stage,
        ):
            for name in [JOINT] if JOINT in inverse.sizes else store.sizes:
                columns = slice(0, width) if name == JOINT else store.columns(name)
                _apply_module(store, writer, inverse, name, columns, dtype, stage.advance)
        processor.save(part)
        document = config_document("apply", config.resolved_dict(), None)
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        (part / CONFIG_FILE).write_text(text, encoding="utf-8")
    return ApplySummary(
        out=config.out,
        rows=store.rows,
        modules=len(store.sizes),
        inversion=config.inversion,
        damping_factor=config.damping_factor,
        eigenvalues=_in_words(inverse),
        seconds=sum(progress.timings.values()),
        warnings=tuple(progress.warnings),
    )


def _apply_module(
    store: GradientStore,
    writer: GradientWriter,
    inverse: StoredInverse,
    name: str,
    columns: slice,
    dtype: np.dtype,
    advance: Callable[[int], None],
) -> None:
    """One module's rows, as many at a time as memory holds.

    Raises:
        NumericsError: If a gradient isn't finite, or becomes so.
    """
    import jax.numpy as jnp
    import numpy as np

    from jhessians.devices.memory import free_memory
    from jhessians.influence.inverses import JOINT

    product = inverse.of(name)
    row_bytes = (columns.stop - columns.start) * dtype.itemsize
    at_once = max(1, min(store.rows, int(SHARE * free_memory()) // row_bytes))
    for start in range(0, store.rows, at_once):
        rows = np.asarray(store.matrix[start : start + at_once, columns]).astype(dtype)
        _require_finite(rows, start, name, "holds NaN or infinity; build the store again")
        found = np.asarray(product(jnp.asarray(rows)))
        _require_finite(found, start, name, "overflows when it is multiplied; give more damping")
        writer.write(start, found, module=None if name == JOINT else name)
        advance(len(rows))


def _require_finite(rows: np.ndarray, start: int, name: str, what: str) -> None:
    import numpy as np

    finite = np.isfinite(rows).all(1)
    if not finite.all():
        raise NumericsError(f"row {start + int(np.argmin(finite))} of {name} {what}")


def _check_together(
    config: ApplyConfig, store: GradientStore, inverse: StoredInverse, progress: Any
) -> GradientProcessor:
    """Check that the store's gradients are of the Hessian's kind.

    Returns:
        The store's gradient processor, or an empty one if it has none.

    Raises:
        CheckpointError: If they were projected differently, or modules or sizes differ.
    """
    from jhessians.influence.inverses import JOINT
    from jhessians.interop.processor import CONFIG_FILE, LEGACY_CONFIG_FILE, GradientProcessor

    files = CONFIG_FILE, LEGACY_CONFIG_FILE
    known = any((store.root / file).exists() for file in files)
    processor = GradientProcessor.load(store.root, skip_hessians=True) if known else None
    if _is_factored(inverse):
        if processor is not None and processor.projection_dim:
            raise CheckpointError(
                f"{store.root} has projected gradients (projection_dim "
                f"{processor.projection_dim}), but {config.hessian} is a Hessian of Kronecker "
                "factors; expected whole gradients: build them without --projection_dim"
            )
        theirs = None
    else:
        theirs = GradientProcessor.load(str(config.hessian), skip_hessians=True)
        if processor is not None and (found := theirs.projection_differences(processor)):
            raise CheckpointError(
                f"{config.hessian} and {store.root} were projected differently: "
                f"{'; '.join(found)}; build the gradients with --processor_path {config.hessian}"
            )
    if processor is not None:
        mine, other = bool(processor.normalizers), bool(theirs and theirs.normalizers)
        if mine != other:
            scaled, plain = str(store.root), str(config.hessian)
            if other:
                scaled, plain = plain, scaled
            progress.warn(
                f"{scaled} was made with normalizers, {plain} without; they measure gradients "
                "differently"
            )
    if JOINT in inverse.sizes:
        width = store.matrix.shape[1]
        if width != inverse.sizes[JOINT]:
            raise CheckpointError(
                f"the joint Hessian in {config.hessian} is for rows of {inverse.sizes[JOINT]:,} "
                f"numbers; those of {store.root} have {width:,}: build them with --processor_path "
                f"{config.hessian}"
            )
    else:
        _check_modules(config, store, inverse)
    return processor or GradientProcessor()


def _check_modules(config: ApplyConfig, store: GradientStore, inverse: StoredInverse) -> None:
    there, wanted = set(inverse.sizes), set(store.sizes)
    for odd, has, lacks in (
        (wanted - there, f"gradients of {{}} are in {store.root}", f"{config.hessian} has none"),
        (there - wanted, f"a Hessian of {{}} is in {config.hessian}", f"{store.root} has none"),
    ):
        if odd:
            first = next(name for name in (*store.sizes, *inverse.sizes) if name in odd)
            more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
            raise CheckpointError(
                f"{has.format(first + more)}, but {lacks}; expected the same modules in both: "
                "choose them with --modules or --filter_modules when these are made"
            )
    for name, size in store.sizes.items():
        if size != inverse.sizes[name]:
            raise CheckpointError(
                f"the gradient of {name} has {size:,} numbers in {store.root}, but its Hessian in "
                f"{config.hessian} is for {inverse.sizes[name]:,}; expected the same model, "
                "projection and biases in both"
            )


def _in_words(inverse: StoredInverse) -> str:
    if not _is_factored(inverse):
        return "dense"
    return f"{'corrected' if inverse.corrected else 'uncorrected'} eigenvalues"


def _is_factored(inverse: StoredInverse) -> bool:
    from jhessians.influence.inverses import FactoredInverse

    return isinstance(inverse, FactoredInverse)
