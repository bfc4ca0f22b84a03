"""`mix`: two autocorrelation Hessians into one, a matrix at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jhessians.commands.command import Command
from jhessians.config.machine import OUTPUT, ConsoleOptions
from jhessians.config.option import option, plain_dict
from jhessians.errors import CheckpointError, ConfigError, NumericsError

STATISTICS = "statistics"


@dataclass(frozen=True)
class MixConfig(ConsoleOptions):
    """Options of `mix`; those of bergson's command of that name, and three of ours."""

    query_path: str | None = option(
        None,
        "Folder of the queries' autocorrelation Hessian, a gradient processor.",
        group=STATISTICS, metavar="PATH", default_text="required",
    )  # fmt: skip
    index_path: str | None = option(
        None,
        "Folder of the index's, that is the training data's, autocorrelation Hessian.",
        group=STATISTICS, metavar="PATH", default_text="required",
    )  # fmt: skip
    target_downweight_components: int = option(
        1000,
        "How many of the queries' strongest directions to weigh down: the two spectra cross at "
        "this eigenvalue, counted over all modules. 0 takes the queries' Hessian alone.",
        group=STATISTICS, unit="components", metavar="N", minimum=0,
    )  # fmt: skip
    output_path: str | None = option(
        None,
        "Folder to write the mixed gradient processor to; must not exist yet.",
        group=OUTPUT, metavar="PATH", default_text="required",
    )  # fmt: skip

    @property
    def needs_float64(self) -> bool:
        """Whether some array of JAX's must be in 64 bits."""
        return False

    def validate(self) -> None:
        """Raise ConfigError unless all folders are named."""
        for name in ("query_path", "index_path", "output_path"):
            if not (getattr(self, name) or "").strip():
                raise ConfigError(f"--{name} is missing; give the folder")

    def resolved_dict(self) -> dict[str, Any]:
        """Every option under its name, in plain YAML types."""
        return plain_dict(self)


@dataclass(frozen=True)
class MixSummary:
    """What `mix` did, for its last line."""

    output_path: str
    modules: int
    eigenvalues: int
    coefficient: float
    component: int
    degenerate: bool

    def render(self) -> str:
        """One line for the terminal."""
        hessians = f"{self.modules:,} autocorrelation Hessian{'s' if self.modules != 1 else ''}"
        where = f"eigenvalue {self.component:,} of {self.eigenvalues:,}"
        if self.degenerate:
            where += ", where both are zero: a smaller --target_downweight_components is needed"
        return (
            f"mixed {hessians} into {self.output_path}: {self.coefficient:.6g} of the query's and "
            f"{1 - self.coefficient:.6g} of the index's ({where})"
        )


def mix(config: MixConfig) -> MixSummary:
    """Mix the two processors' Hessians and write a processor with the query's settings.

    Eigenpairs are not written, as by bergson: its readers decompose the Hessian themselves.

    Returns:
        The coefficient, the eigenvalue at which the spectra cross, and how many there are.

    Raises:
        ConfigError: If an option is missing.
        CheckpointError: If a folder can't be read, or the two can't be mixed: other modules,
            shapes or projections.
        NumericsError: If a Hessian isn't finite.
        OutputError: If the result can't be written.
    """
    # JAX takes long to import: --help must not wait for it.
    import yaml

    from jhessians.commands.output import output_folder
    from jhessians.config.provenance import CONFIG_FILE, config_document
    from jhessians.interop.processor import GradientProcessor
    from jhessians.interop.processor_files import open_hessians
    from jhessians.linalg.mixing import mixing

    paths = Path(str(config.query_path)), Path(str(config.index_path))
    output = str(config.output_path)
    with output_folder(config, "output_path", "mix") as part:
        query, index = (_settings(path) for path in paths)
        differences = query.projection_differences(index)
        if query.reshape_to_square != index.reshape_to_square:
            differences.append(
                f"reshape_to_square {query.reshape_to_square} against {index.reshape_to_square}"
            )
        if differences:
            raise CheckpointError(
                f"{paths[0]} and {paths[1]} were projected differently: {'; '.join(differences)}; "
                "make one of them again with the other's settings"
            )
        (query_hessians, query_eigen), (index_hessians, index_eigen) = map(open_hessians, paths)
        _check_alike(paths, query_hessians, index_hessians)
        spectra = [
            _spectrum(path, hessians, eigen, query_hessians)
            for path, hessians, eigen in zip(
                paths, (query_hessians, index_hessians), (query_eigen, index_eigen), strict=True
            )
        ]
        found = mixing(*spectra, components=config.target_downweight_components)
        hessians: Any = {
            name: _Mixed(name, query_hessians[name], index_hessians[name], found.coefficient)
            for name in query_hessians
        }
        GradientProcessor(query.normalizers, hessians, **query.settings).save(part)
        options = config.resolved_dict()
        theirs = ("query_path", "index_path", "output_path", "target_downweight_components")
        step = {"mix": {name: options[name] for name in theirs}}
        document = config_document("mix", options, step)
        document["jhessians"]["mixing"] = found._asdict()
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        (part / CONFIG_FILE).write_text(text, encoding="utf-8")
    return MixSummary(
        output_path=output,
        modules=len(hessians),
        eigenvalues=len(spectra[0]),
        coefficient=found.coefficient,
        component=found.component,
        degenerate=found.query_eigenvalue + found.index_eigenvalue == 0 and found.coefficient < 1,
    )


@dataclass(frozen=True)
class _Mixed:
    """A mixed matrix, computed when it is written: never more than one is in memory."""

    name: str
    query: Any
    index: Any
    coefficient: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.query.shape

    @property
    def dtype(self) -> np.dtype:
        return self.query.dtype

    def read(self) -> Float[np.ndarray, "d d"]:
        from jhessians.linalg.mixing import mixed

        result = mixed(self.query.read(), self.index.read(), self.coefficient)
        _check_finite(result, f"the mixed Hessian of {self.name}")
        return result


def _settings(path: Path) -> Any:
    """The processor without its Hessians; what else a folder may be is told apart."""
    from jhessians.interop.processor import GradientProcessor

    factors = next(path.glob("*_sharded"), None) if path.is_dir() else None
    if factors is not None:
        raise CheckpointError(
            f"{path} holds Kronecker factors ({factors.name}); expected an autocorrelation "
            "Hessian: make one with --method autocorrelation"
        )
    return GradientProcessor.load(path, skip_hessians=True)


def _check_alike(paths: tuple[Path, Path], query: dict[str, Any], index: dict[str, Any]) -> None:
    if not query and not index:
        raise CheckpointError(f"{paths[0]} holds no Hessian; expected one for each module")
    if odd := sorted(set(query) ^ set(index)):
        which, other = paths if odd[0] in query else paths[::-1]
        more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
        raise CheckpointError(
            f"{which} has a Hessian of {odd[0]}{more}, {other} has none; expected the same "
            "modules in both"
        )
    for name, matrix in query.items():
        if matrix.shape != index[name].shape:
            raise CheckpointError(
                f"the Hessian of {name} has shape {matrix.shape} in {paths[0]} and "
                f"{index[name].shape} in {paths[1]}; expected the same"
            )


def _spectrum(path: Path, hessians: dict[str, Any], eigen: dict[str, Any], order: Any):
    """All modules' eigenvalues in float64; those that weren't stored are computed."""
    values = []
    for name in order:
        if name in eigen:
            each = eigen[name][0].read().astype(np.float64)
        else:
            matrix = hessians[name].read().astype(np.float64)
            _check_finite(matrix, f"the Hessian of {name} in {path}")
            each = np.linalg.eigvalsh((matrix + matrix.T) / 2)
        _check_finite(each, f"the eigenvalues of {name} in {path}")
        values.append(each)
    return np.concatenate(values)


def _check_finite(array: np.ndarray, name: str) -> None:
    if not np.isfinite(array).all():
        raise NumericsError(f"{name} holds NaN or infinity; expected finite numbers: make it again")


DESCRIPTION = """\
Mix two autocorrelation Hessians into one, with the coefficient at which their
spectra cross (Chang et al. 2024, arXiv:2410.17413, section A.1.3).
"""
EXAMPLES = """\
  jhessians mix --query_path runs/queries --index_path runs/index \\
      --output_path runs/mixed
"""

MIX = Command(
    name="mix",
    summary="mix two autocorrelation Hessians into one",
    usage="--query_path PATH --index_path PATH --output_path PATH [options]",
    description=DESCRIPTION,
    examples=EXAMPLES,
    config=MixConfig,
    positionals=(),
    run=lambda config: mix(config).render(),
)
