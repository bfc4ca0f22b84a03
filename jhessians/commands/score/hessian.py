"""The run of a Hessian, ours or bergson's: its options, and the Hessian itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jhessians.commands.compute.config import ComputeConfig
from jhessians.config.option import options_of
from jhessians.config.provenance import CONFIG_FILE, OLDER_CONFIG_FILE, read_options
from jhessians.errors import CheckpointError, ConfigError
from jhessians.files import read_yaml
from jhessians.interop.manifest import check_files
from jhessians.methods.table import METHODS

if TYPE_CHECKING:  # JAX takes seconds to import: --help must not wait for it
    from jhessians.capture.problem import Problem
    from jhessians.influence.curvature import FactorSource
    from jhessians.influence.row_metrics import DenseHessian


def options_of_run(path: str | Path) -> dict[str, Any]:
    """The options that a Hessian was fitted with, under our names.

    Args:
        path: The run's folder.

    Returns:
        Name → value, as far as the run says.

    Raises:
        ConfigError: If there is no such folder, or nothing says how it was made.
        CheckpointError: If these files have another size than the run's manifest says.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(
            f"--hessian {path} is no folder; give a finished run of jhessians compute or of "
            "bergson, or none"
        )
    if path.name == "influence_results":
        path = path.parent
    check_files(path, {CONFIG_FILE, OLDER_CONFIG_FILE}.__contains__)
    try:
        return read_options(path)
    except ConfigError as error:
        theirs = _bergson_options(path)
        if theirs is None:
            raise error from None
        return theirs


def open_hessian(
    path: str | Path, config: ComputeConfig, problem: Problem
) -> FactorSource | DenseHessian:
    """The Hessian in a run's folder; its tensors are read when they are asked for.

    Args:
        path: The folder.
        config: The run's options, which say what its settings leave out.
        problem: The linears.

    Returns:
        Kronecker factors, or a dense Hessian with the way its rows were made.

    Raises:
        CheckpointError: If there is no Hessian, or one that is damaged.
    """
    from jhessians.interop.layout import Tree
    from jhessians.interop.load import FactorStore

    path = Path(path)
    trees: tuple[Tree, ...] = ("bergson", "influence_results")
    if any(any(path.glob(pattern)) for pattern in ("eigen_activation_sharded",
                                                   "influence_results/activation_eigen_sharded",
                                                   "activation_eigen_sharded")):  # fmt: skip
        store = FactorStore(path)
        if store.layout == trees[1]:
            raise CheckpointError(
                f"{path} has the older tree alone, whose eigenvalues are in another unit; expected "
                "folders such as eigen_activation_sharded: fit with --layout both"
            )
        return store
    return _dense(path, config, problem)


def _dense(path: Path, config: ComputeConfig, problem: Problem) -> DenseHessian:
    import jax.numpy as jnp

    from jhessians.folds.rows import GradientRows
    from jhessians.influence.metric import JOINT
    from jhessians.influence.row_metrics import DenseHessian
    from jhessians.interop.processor import PROJECTION_VERSION, GradientProcessor
    from jhessians.interop.processor_files import open_hessians
    from jhessians.linalg.projection import Projection
    from jhessians.methods.autocorrelation import split_sites

    there = any((path / f"{name}.pth").exists() for name in ("hessians", "preconditioners"))
    hessians = open_hessians(path)[0] if there else {}
    if not hessians:
        raise CheckpointError(
            f"{path} holds no Hessian, neither Kronecker factors nor autocorrelations; expected a "
            "finished run of jhessians compute or bergson"
        )
    settings = GradientProcessor.load(path, skip_hessians=True)
    if settings.include_bias != config.include_bias:
        biases = "with" if settings.include_bias else "without"
        raise CheckpointError(
            f"{path} was fitted {biases} biases, but `include_bias` is "
            f"{str(config.include_bias).lower()}; leave it out"
        )
    projection = None
    if settings.projection_dim:
        if settings.projection_version != PROJECTION_VERSION:
            raise CheckpointError(
                f"{path} was projected with version {settings.projection_version} of the random "
                f"matrices; version {PROJECTION_VERSION} can be made: fit it again"
            )
        projection = Projection(
            settings.projection_dim, settings.projection_type, settings.projection_scale,
            settings.projection_seed,
        )  # fmt: skip
    options = config.method_options if config.method == "autocorrelation" else None
    rows = GradientRows(
        projection=projection,
        split=split_sites(options, problem.sites) if options else (),
        heads=max(1, options.num_heads) if options else 1,
        dtype=jnp.float64 if config.precision == "fp64" else jnp.float32,
    )
    joint = settings.projection_target == "global" and JOINT in hessians
    return DenseHessian(hessians, rows, settings.normalizers, joint)


def _bergson_options(path: Path) -> dict[str, Any] | None:
    """Our names for what bergson's config.yaml says of a `hessian` step, or of a pipeline's."""
    try:
        document = read_yaml(path / CONFIG_FILE)
    except (OSError, ValueError):
        return None
    steps = document.get("steps") if isinstance(document, dict) else None
    for step in reversed(steps if isinstance(steps, list) else []):
        for tables in step.values() if isinstance(step, dict) else ():
            if isinstance(tables, dict) and "index_cfg" in tables:
                return _our_names(tables)
    return None


def _our_names(tables: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    settings = tables.get("hessian_cfg")
    method = settings.get("method", "kfac") if isinstance(settings, Mapping) else "kfac"
    own = {each.name for each in options_of(METHODS[method].options)} if method in METHODS else ()
    others = {each.name for other in METHODS.values() for each in options_of(other.options)}
    for each in options_of(ComputeConfig):
        if each.name in others and each.name not in own:
            continue
        value: Any = tables
        for part in each.bergson.split(".") if each.bergson else ():
            value = value.get(part) if isinstance(value, Mapping) else None
        if not each.bergson or value is None or (value == "" and each.default is None):
            continue
        options[each.name] = value
    options["method"] = method
    if options.get("precision") == "auto":
        options.pop("precision")
    for name in ("debug", "overwrite", "optimizer_state"):
        options.pop(name, None)
    return options
