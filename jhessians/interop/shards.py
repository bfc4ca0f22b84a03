"""Write row-sharded safetensors with one block of rows in memory, however large a tensor is.

All shards are opened at once and get their headers. Then blocks of rows are fetched from the
devices one after the other, and each is appended to its shard. In a run of several processes
process 0 writes, and it alone receives the rows that the others' devices hold.

References:
    safetensors' format: 8 bytes little-endian header length, JSON header, then the tensors.
"""

import errno
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Shaped

from jhessians.devices.hosts import together
from jhessians.errors import NumericsError
from jhessians.interop.layout import DTYPES, RUN_ID, shard_bounds, shard_name
from jhessians.interop.rundir import output_error
from jhessians.interop.safetensors_file import safetensors_header
from jhessians.interop.tensors import TensorRows

BLOCK_BYTES = 64 << 20
"""Size of the block of rows that is fetched at a time, counted as float32."""

_NO_HARD_LINKS = {
    errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK,
}  # fmt: skip

Ranges = Mapping[str, tuple[int, int]]


def write_sharded(
    folder: Path,
    tensors: Mapping[str, TensorRows],
    *,
    shards: int,
    dtype: str,
    replicated: bool = False,
    block_bytes: int = BLOCK_BYTES,
    among: Mapping[str, tuple[int, ...]] | None = None,
    fresh: bool = True,
    run_id: str | None = None,
) -> None:
    """Write `shard_{r}.safetensors` for every r, each with its rows of every tensor.

    Shards that an earlier, interrupted call left are replaced. Every process calls this.

    Args:
        folder: Made if missing; holds nothing but the shards afterwards.
        tensors: Module name → rows, in the order in which they are written.
        shards: Number of shards, which need not divide the number of rows and may exceed it.
        dtype: "fp64", "fp32", "fp16" or "bf16".
        replicated: Put every tensor whole into every shard.
        block_bytes: Most bytes to fetch at a time, counted as float32; at least one row is.
        among: If several calls write these files, the shapes of the tensors of all calls.
        fresh: Whether this is the first of these calls, which creates the files.
        run_id: Of the run, for the files' metadata; process 0 alone has to know it.

    Raises:
        NumericsError: If a value is NaN or infinite, or overflows `dtype`.
        OutputError: If the disk is full, read-only or not ours, in every process.
        ValueError: If `dtype` or `shards` makes no sense.
    """
    if dtype not in DTYPES or shards < 1:
        raise ValueError(f"cannot write {shards} shards of {dtype!r}; known: {', '.join(DTYPES)}")
    target = DTYPES[dtype][1]
    shapes = among or {module: source.shape for module, source in tensors.items()}
    ranges = [
        {
            module: (0, shape[0]) if replicated else shard_bounds(shape[0], shards, shard)
            for module, shape in shapes.items()
        }
        for shard in range(shards)
    ]
    headers = [_header(shapes, each, target, run_id) for each in ranges]
    paths = [folder / shard_name(shard) for shard in range(shards)]
    blocks = _blocks(tensors, ranges, block_bytes)
    failure: OSError | None = None
    with together():
        wrong: NumericsError | None = None
        if jax.process_index() == 0:
            try:
                if fresh:
                    _make_empty(folder)
                converted = _converted(blocks, target, folder.name)
                _write_files(paths, headers, converted, fresh=fresh, whole=among is None)
            except OSError as error:
                failure = error
            except NumericsError as error:
                wrong = error
        if jax.process_count() > 1:
            # Sending needs all processes: also for what this one can't write, and doesn't look at.
            for _ in blocks:
                pass
        if wrong is not None:
            raise wrong
    raise_together(failure, folder)


def link_or_copy(source: Path, target: Path) -> None:
    """Give every file of `source` a second name in `target`, without a second copy of it.

    Copies where the file system has no hard links. Only process 0 does anything.

    Raises:
        OutputError: If neither a link nor a copy can be made.
    """
    failure: OSError | None = None
    if jax.process_index() == 0:
        try:
            _make_empty(target)
            for entry in sorted(source.iterdir()):
                link_file(entry, target / entry.name)
        except OSError as error:
            failure = error
    raise_together(failure, target)


def raise_together(failure: OSError | None, path: Path) -> None:
    """Raise process 0's failed write to `path` in every process, so that none waits for it.

    Raises:
        OutputError: If process 0 passed a failure.
    """
    number = 0 if failure is None else failure.errno or errno.EIO
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    if number:
        failure = failure or OSError(number, os.strerror(number))
        raise output_error(failure, path) from failure


Block = tuple[int, str, Shaped[np.ndarray, "..."]]
"""Number of a shard, name of a module, and some of its rows."""


def _blocks(
    tensors: Mapping[str, TensorRows], ranges: Sequence[Ranges], block_bytes: int
) -> Iterator[Block]:
    """All rows, on the process that writes.

    All blocks of a module follow one another, so that a source which has to make its whole tensor
    does so once.

    Yields:
        Each block; elsewhere zeros may stand for its rows.
    """
    for module, source in tensors.items():
        step = max(1, block_bytes // max(1, 4 * math.prod(source.shape[1:])))
        for shard, each in enumerate(ranges):
            start, stop = each[module]
            for first in range(start, stop, step):
                last = min(first + step, stop)
                yield shard, module, source.rows(first, last, everywhere=False)


def _converted(blocks: Iterable[Block], target: np.dtype, folder: str) -> Iterator[Block]:
    """The blocks, checked and in the number format on disk."""
    for shard, module, block in blocks:
        where = f"{module} in {folder}"
        if not np.isfinite(block).all():
            raise NumericsError(
                f"{where} holds NaN or infinity; expected finite numbers; "
                "check the model and data, or compute in fp32"
            )
        with np.errstate(over="ignore"):
            cast = np.ascontiguousarray(block, dtype=target)
        if cast is not block and not np.isfinite(cast).all():
            raise NumericsError(
                f"{where} holds {float(np.abs(block).max()):.3g}, beyond {target.name}'s range; "
                "expected numbers that fit; use hessian_dtype fp32 or bf16"
            )
        yield shard, module, cast


def _header(
    shapes: Mapping[str, tuple[int, ...]], ranges: Ranges, dtype: np.dtype, run_id: str | None
) -> tuple[bytes, dict[str, int]]:
    """One shard's beginning, and where in it the rows of each module start."""
    rows = {module: stop - start for module, (start, stop) in ranges.items()}
    return safetensors_header(
        {module: ((rows[module], *shape[1:]), dtype) for module, shape in shapes.items()},
        {RUN_ID: run_id} if run_id else None,
    )


def _write_files(
    paths: Sequence[Path],
    headers: Sequence[tuple[bytes, Mapping[str, int]]],
    blocks: Iterable[Block],
    *,
    fresh: bool,
    whole: bool,
) -> None:
    """Append blocks to all shards; on any failure all of them are deleted.

    Args:
        paths: The shards.
        headers: Their headers.
        blocks: Shard, module and rows of each block.
        fresh: Whether the files are created.
        whole: Whether the blocks are all that the files hold, in the files' order. Otherwise each
            module's are written from where its tensor begins.
    """
    try:
        with ExitStack() as stack:
            # New files, never open old ones: those may be hard-linked elsewhere.
            mode = "xb" if fresh else "r+b"
            files = [stack.enter_context(open(path, mode)) for path in paths]
            if fresh:
                for file, (text, _) in zip(files, headers, strict=True):
                    file.write(text)
            current: str | None = None
            for shard, module, block in blocks:
                if module != current and not whole:
                    for file, (_, starts) in zip(files, headers, strict=True):
                        file.seek(starts[module])
                    current = module
                files[shard].write(block.reshape(-1).view(np.uint8).data)
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise


def _make_empty(folder: Path) -> None:
    """Make `folder`, or remove an earlier call's shards from it: there may have been more."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("shard_*.safetensors"):
        stale.unlink()


def link_file(source: Path, target: Path) -> None:
    """Give a file a second name, or a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        shutil.copyfile(source, target)
