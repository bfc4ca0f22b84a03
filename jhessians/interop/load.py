"""Read factors back, from either tree and any number of shards, with numpy only.

A store looks at the headers once and reads a tensor when it is asked for. What does not add
up — a missing shard, shards that hold different modules or are of different runs, rows that don't
fit, numbers that aren't finite — is an error. What bergson wrote names no run and has no manifest,
so that less can be checked.
"""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from jhessians.errors import CheckpointError, NumericsError, quoted, shown
from jhessians.interop import torchfile
from jhessians.interop.hold import MARK
from jhessians.interop.layout import (
    DTYPES,
    INFLUENCE_RESULTS,
    KINDS,
    RUN_ID,
    TOTAL_FILE,
    Tree,
    kind_folder,
    shard_bounds,
    shard_name,
)
from jhessians.interop.manifest import check_files
from jhessians.interop.safetensors_file import SafetensorsTensor, open_described

Shapes = dict[str, tuple[int, ...]]


class FactorStore:
    """Factors in a run directory, read one tensor at a time.

    bergson's tree is read where it exists, the older one otherwise. The older tree's
    `eigenvalue_correction` is returned as it is stored: divided by the number of positions, not
    of documents.

    Args:
        root: The directory that holds the factor folders, or `influence_results`.
        layout: Take this tree and no other.

    Attributes:
        root: The directory as given.
        layout: The tree that is read, "bergson" or "influence_results".
        kinds: Kinds of factor that are there, in `KINDS` order.
        shards: Number of shards of every kind.

    Raises:
        CheckpointError: If there are no factors, or the run isn't finished; if their numbers of
            shards differ, or files are missing or have another size than the run's manifest says.
    """

    def __init__(self, root: str | Path, layout: Tree | None = None):
        self.root = Path(root)
        # One folder has the same name in both trees, so the name above it decides.
        trees: list[Tree] = ["bergson", "influence_results"]
        if layout is not None:
            trees = [layout]
        elif self.root.name == INFLUENCE_RESULTS:
            trees = ["influence_results"]
        run = self.root.parent if self.root.name == INFLUENCE_RESULTS else self.root
        if (run / MARK).exists():
            raise CheckpointError(
                f"{run} is what an unfinished run has written so far; expected a finished run's "
                "directory"
            )
        found = {tree: _folders(run, tree) for tree in trees}
        self.layout: Tree = next((tree for tree in trees if found[tree]), trees[0])
        # Also those of a tree that would have been read, were it there.
        manifest = check_files(run, _files_of(trees[: trees.index(self.layout) + 1]))
        # The run of all shards, and what says so; None until something does.
        self._run: tuple[str | None, str] | None = None
        if manifest is not None:
            self._run = (manifest.run_id, "the manifest")
        if not found[self.layout]:
            raise CheckpointError(
                f"{self.root} holds no factors; expected folders such as "
                "eigen_activation_sharded or influence_results; give a finished run's directory"
            )
        self._folders = found[self.layout]
        self._parts: dict[str, list[dict[str, SafetensorsTensor]]] = {}
        self.kinds = tuple(self._folders)
        counts = {folder: _count_shards(folder) for folder in self._folders.values()}
        self.shards = max(counts.values())
        for folder, count in counts.items():
            if count < self.shards:
                raise CheckpointError(
                    f"{folder} has {count} shards where another folder has {self.shards}; "
                    f"expected equal numbers; restore {shard_name(count)} or export again"
                )

    @functools.cached_property
    def modules(self) -> tuple[str, ...]:
        """Module names in the order they were written, the same in every kind.

        Raises:
            CheckpointError: If two kinds hold different modules.
        """
        names = {kind: tuple(self.shapes(kind)) for kind in self.kinds}
        first = names[self.kinds[0]]
        for kind, others in names.items():
            if set(others) != set(first):
                odd = sorted(set(others) ^ set(first))
                raise CheckpointError(
                    f"{self._folders[kind]} and {self._folders[self.kinds[0]]} hold different "
                    f"modules; expected the same, not {_some(odd)} in one only; export again"
                )
        return first

    @functools.cached_property
    def total_processed(self) -> int:
        """Masked positions over the data set.

        Raises:
            CheckpointError: If `total_processed.pt` is missing or is no count.
        """
        path = next(iter(self._folders.values())).parent / TOTAL_FILE
        if not path.exists():
            raise CheckpointError(f"{path} is missing; expected a saved count; export again")
        count = torchfile.load(path)
        if isinstance(count, np.ndarray) and count.size == 1:
            count = count.item()
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count < 2**63:
            raise CheckpointError(
                f"{path} holds {quoted(count)}; expected a count of at least 1; get a whole "
                "copy of it or make it again"
            )
        return count

    def shapes(self, kind: str) -> Shapes:
        """Module name → full shape, read from the shards' headers and checked.

        Returns:
            Shapes with the rows of all shards together.

        Raises:
            KeyError: If the store has no such kind.
            CheckpointError: If a file is damaged or the shards do not add up.
        """
        folder, parts = self._folders[kind], self._opened(kind)
        return {
            module: _full_shape(folder, kind, module, [part[module].shape for part in parts])
            for module in parts[0]
        }

    def read(self, kind: str, module: str) -> Shaped[np.ndarray, "..."]:
        """One whole tensor in the dtype that it is stored in.

        Returns:
            An array of its own; changing it changes no file.

        Raises:
            KeyError: If the store has no such kind or module.
            CheckpointError: If a file is damaged or the shards do not add up.
            NumericsError: If a value is NaN or infinite.
        """
        parts = [part[module] for part in self._opened(kind)]
        shape = _full_shape(self._folders[kind], kind, module, [part.shape for part in parts])
        if len(parts) == 1 or KINDS[kind].replicated:
            return _finite(parts[0], module)
        whole = np.empty(shape, parts[0].dtype)
        row = 0
        for part in parts:
            whole[row : row + part.shape[0]] = _finite(part, module)
            row += part.shape[0]
        return whole

    def _opened(self, kind: str) -> list[dict[str, SafetensorsTensor]]:
        """Every shard's tensors, which are all of the same modules; none of them read yet."""
        if kind not in self._parts:
            folder = self._folders[kind]
            parts: list[dict[str, SafetensorsTensor]] = []
            for number in range(self.shards):
                path = folder / shard_name(number)
                part, metadata = open_described(path)
                self._require_same_run(path, metadata.get(RUN_ID))
                if odd := sorted(set(part) ^ set(parts[0] if parts else part)):
                    raise CheckpointError(
                        f"{folder}: shards 0 and {number} hold different modules; expected the "
                        f"same, not {_some(odd)} in one only; export again"
                    )
                _require_one_format(path, part, parts[0] if parts else part)
                parts.append(part)
            self._parts[kind] = parts
        return self._parts[kind]

    def _require_same_run(self, path: Path, run_id: str | None) -> None:
        self._run = self._run or (run_id, path.name)
        expected, source = self._run
        if run_id != expected:
            names = [f"of run {shown(each)}" if each else "of no known run"
                     for each in (run_id, expected)]  # fmt: skip
            raise CheckpointError(
                f"{path} is {names[0]}, but {source} is {names[1]}; expected the files of one run: "
                "get a whole copy of it"
            )


def _finite(part: SafetensorsTensor, module: str) -> np.ndarray:
    """A shard's rows of a module, if all are finite."""
    rows = part.read()
    if not np.isfinite(rows).all():
        raise NumericsError(
            f"{part.path}: {module} holds NaN or infinity; expected finite numbers; get a whole "
            "copy of it or compute it again"
        )
    return rows


def _require_one_format(
    path: Path, part: dict[str, SafetensorsTensor], first: dict[str, SafetensorsTensor]
) -> None:
    """Check that a shard's numbers are of a format of factors, and the same as the first one's."""
    known = [dtype for _, dtype in DTYPES.values()]
    for module, tensor in part.items():
        if tensor.dtype not in known or tensor.dtype != first[module].dtype:
            raise CheckpointError(
                f"{path}: {shown(module)} is stored in {tensor.dtype.name}, in shard 0 in "
                f"{first[module].dtype.name}; expected one of {', '.join(DTYPES)}, the same in all "
                "shards; get a whole copy of it"
            )


def _files_of(trees: Iterable[Tree]) -> Callable[[str], bool]:
    """Tells a factor's file by its path below the run's folder."""
    folders = {kind_folder(Path(), kind, tree) for tree in trees for kind in KINDS} - {None}
    beside = {folder.parent / TOTAL_FILE for folder in folders if folder}
    return lambda name: Path(name).parent in folders or Path(name) in beside


def _folders(root: Path, tree: Tree) -> dict[str, Path]:
    folders = {kind: kind_folder(root, kind, tree) for kind in KINDS}
    return {kind: folder for kind, folder in folders.items() if folder and folder.is_dir()}


def _count_shards(folder: Path) -> int:
    names = {path.name for path in folder.glob("shard_*.safetensors")}
    for index in range(len(names) or 1):
        if shard_name(index) not in names:
            raise CheckpointError(
                f"{folder / shard_name(index)} is missing; expected shards 0 to N-1 without a "
                "gap; restore it or export again"
            )
    return len(names)


def _full_shape(
    folder: Path, kind: str, module: str, parts: list[tuple[int, ...]]
) -> tuple[int, ...]:
    """Shape of the whole tensor, from each shard's; checks that they are a row split of it."""
    total = parts[0][0] if KINDS[kind].replicated else sum(part[0] for part in parts)
    shape = (total, *parts[0][1:])
    for index, part in enumerate(parts):
        start, stop = (
            (0, total) if KINDS[kind].replicated else shard_bounds(total, len(parts), index)
        )
        expected = (stop - start, *shape[1:])
        if part != expected:
            raise CheckpointError(
                f"{folder / shard_name(index)}: {module} has shape {part}; expected {expected} "
                f"in shard {index} of {len(parts)}; restore the missing rows or export again"
            )
    if KINDS[kind].square and shape != (total, total):
        raise CheckpointError(
            f"{folder}: {module} has {total} rows in {len(parts)} shards; expected "
            f"{' x '.join(map(str, shape[1:]))}; restore the missing shards or export again"
        )
    return shape


def _some(names: list[str]) -> str:
    return ", ".join(map(shown, names[:3])) + (" …" if len(names) > 3 else "")
