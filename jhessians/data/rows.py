"""Opening a data set: a file, a `save_to_disk` folder, or a name on the Hugging Face Hub.

Host only. Everything goes through `datasets`, whose Arrow files are memory-mapped, so a data set
larger than memory can be opened. Whatever exception it raises becomes an error of one line.
"""

import difflib
import glob
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jhessians.errors import ConfigError, DatasetError
from jhessians.files import open_input, require_ordinary, require_ordinary_files

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

FILE_READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
"""File ending → name of the `datasets` reader. A text file is one document per line."""

# How the messages of `datasets` about a split begin.
_SPLIT_ERRORS = ("Unknown split", "Unrecognized instruction", "Bad split", "Percent slice")

_UTF_16 = (b"\xff\xfe", b"\xfe\xff")

_NOISY_LOGGERS = ("datasets", "huggingface_hub", "transformers")


def open_rows(dataset: str, *, split: str = "train", subset: str | None = None) -> "Dataset":
    """The rows of one split.

    Args:
        dataset: A file whose ending `FILE_READERS` knows (a glob pattern or an address may stand
            for it), a folder written by `save_to_disk`, another folder of data files, or a name
            on the Hub.
        split: A split, a slice of it, or a sum of them: `train`, `train[:100]`,
            `train[:10%]+test`. A file has the one split `train`. A single saved data set knows
            no split names, so that any name stands for the whole of it.
        subset: The Hub's configuration name.

    Returns:
        A data set of the `datasets` library, memory-mapped; at least one row.

    Raises:
        ConfigError: If `subset` is given for a file or a `save_to_disk` folder.
        DatasetError: If it doesn't exist, can't be reached or parsed, has no such split, or
            holds no rows.
    """
    path = Path(dataset).expanduser()
    is_saved = path.is_dir() and any(
        (path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")
    )
    reader = None if path.is_dir() else FILE_READERS.get(path.suffix.lower())
    if subset is not None and (is_saved or reader):
        raise ConfigError(
            f"subset {subset!r} names a configuration on the Hub, but {dataset!r} is a local "
            "data set: leave `subset` out"
        )
    if reader is None and not path.is_dir():
        _refuse_other_files(dataset, path)

    from datasets import load_dataset, load_from_disk

    if not is_saved:
        _require_cache()
    try:
        _require_ordinary(path)
        if is_saved:
            rows = _select_split(load_from_disk(str(path)), split)
        elif reader is not None:
            files = dataset if "://" in dataset else str(path)
            rows = load_dataset(reader, data_files=files, split=split)
        else:
            rows = load_dataset(str(path) if path.is_dir() else dataset, subset, split=split)
    except Exception as error:  # datasets lets through whatever pyarrow, pandas and httpx raise
        raise _readable(error, dataset, split, path) from error
    if len(rows) == 0:
        raise _no_rows(dataset, split)
    return rows


def _require_ordinary(path: Path) -> None:
    """Check that reading a data set's files can't wait for ever; a pattern may name them.

    Raises:
        OSError: If one is a FIFO, a socket or a device.
    """
    for each in [path] if path.exists() else map(Path, glob.glob(str(path), recursive=True)):
        require_ordinary(each)
        if each.is_dir():
            require_ordinary_files(each)


def _require_cache() -> None:
    """Check that `datasets` can keep there what it makes of a data set."""
    from datasets.config import HF_DATASETS_CACHE

    cache, reason = Path(HF_DATASETS_CACHE), "no permission"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK):
            return
    except OSError as error:
        reason = error.strerror or reason
    raise DatasetError(
        f"the cache of data sets, {cache}, can't be written ({reason}); set HF_HOME to a folder "
        "that can be"
    )


def _no_rows(dataset: str, split: str) -> DatasetError:
    return DatasetError(f"split {split!r} of the data set {dataset!r} holds no rows")


def _refuse_other_files(dataset: str, path: Path) -> None:
    """Refuse names that can only mean a file, instead of asking the Hub for them."""
    if path.exists():
        try:
            require_ordinary(path)
        except OSError as error:
            raise DatasetError(
                f"the data set {dataset!r} can't be read: {error.strerror}"
            ) from None
        raise DatasetError(
            f"{dataset!r}: cannot tell the format of a file ending in {path.suffix!r}; "
            f"give one of {', '.join(FILE_READERS)}"
        )
    if dataset.startswith(("/", ".", "~")) or dataset.count("/") > 1:
        raise DatasetError(f"{dataset!r}: no such file or folder")


def _select_split(saved: "Dataset | DatasetDict", split: str) -> "Dataset":
    from datasets import DatasetDict, ReadInstruction, concatenate_datasets

    named = saved if isinstance(saved, DatasetDict) else None
    names = [part.split("[")[0].strip() for part in split.split("+")]
    lengths = (
        {name: len(saved) for name in names}
        if named is None
        else {name: len(rows) for name, rows in named.items()}
    )
    parts = [
        (saved if named is None else named[part.splitname]).select(range(part.from_, part.to))
        for part in ReadInstruction.from_spec(split).to_absolute(lengths)
    ]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _readable(error: Exception, dataset: str, split: str, path: Path) -> DatasetError:
    """One line about an exception from `datasets`."""
    from datasets.exceptions import DatasetNotFoundError

    if _wrong_byte(path):
        return not_utf8(dataset)
    # "An error occurred while generating the dataset" says nothing; its cause does.
    cause = error
    while isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    reason = one_line(cause)
    if "corresponds to no data" in str(error):
        return _no_rows(dataset, split)
    if str(error).startswith(_SPLIT_ERRORS):
        return DatasetError(
            f"split {split!r} of the data set {dataset!r}: {one_line(error)} "
            "(slices are written train[:100], sums train[:10%]+test)"
        )
    is_empty = path.is_file() and path.stat().st_size == 0
    if is_empty or isinstance(cause, StopIteration):
        return DatasetError(f"the data set {dataset!r} is empty")
    if isinstance(error, (ConnectionError, DatasetNotFoundError)):
        return DatasetError(
            f"data set {dataset!r} is no local file or folder and the Hub doesn't give it "
            f"({one_line(error)}): check the name, or give a local path"
        )
    if isinstance(error, FileNotFoundError):
        return DatasetError(f"{dataset!r}: no data found ({one_line(error)})")
    return DatasetError(f"the data set {dataset!r} can't be read: {reason}")


def not_utf8(dataset: str) -> DatasetError:
    """What to say of text in another encoding.

    Args:
        dataset: As in `open_rows`.

    Returns:
        One line: where, in which, and how to mend it; no place if the data set is no single file.
    """
    where, kind = _wrong_byte(Path(dataset).expanduser()) or ("", "another encoding")
    return DatasetError(
        f"the data set {dataset!r}{where} is no UTF-8, but {kind}; save it as UTF-8, for example "
        "by `iconv -f LATIN1 -t UTF-8`"
    )


def _wrong_byte(path: Path) -> tuple[str, str] | None:
    """Where a file's text first isn't UTF-8, and what it may be; None if it nowhere is."""
    if path.is_file() and FILE_READERS.get(path.suffix.lower()) != "parquet":
        with open_input(path) as file:
            for number, line in enumerate(file, start=1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    kind = "UTF-16" if line[:2] in _UTF_16 else "Latin-1 or the like"
                    return f", line {number}, byte 0x{line[error.start]:02x}", kind
    return None


def one_line(error: BaseException) -> str:
    """An exception's type and message on one line of bounded length."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:300]}" if message else type(error).__name__


def require_column(rows: "Dataset", column: str, option: str) -> None:
    """Check that the data set has a column.

    Args:
        rows: The data set.
        column: The column's name.
        option: The field of `DataOptions` that named it.

    Raises:
        DatasetError: If it hasn't; lists the columns there are and the one probably meant.
    """
    columns = list(rows.column_names)
    if column in columns:
        return
    near = difflib.get_close_matches(column, columns, n=1)
    raise DatasetError(
        f"the data set has no column {column!r}; it has {', '.join(map(repr, columns))}: "
        + (f"did you mean `{option}` {near[0]}?" if near else f"set `{option}`")
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and log lines of the Hugging Face libraries; put them back after.

    What matters in those lines reaches the user as a `DatasetError`.
    """
    import datasets
    import huggingface_hub.utils as hub

    # Both modules have the same three functions.
    bars: list[Any] = [module for module in (datasets, hub) if not _bars_are_off(module)]
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    for module in bars:
        module.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for module in bars:
            module.enable_progress_bars()


def _bars_are_off(module: Any) -> bool:
    return bool(module.are_progress_bars_disabled())
