"""Runs of the real torch bergson on CPU: fits, reads, preconditioned gradients and scores.

All of them go to one process (`bergson_session`) that imports bergson once; fits are cached by the
content of model and data. In float64 they are the truth that our float32 is measured against.
Without bergson every call raises: a test of parity never skips.
"""

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.oracles.bergson_session import BergsonFailed, driver, session_folder

SHARDED_FOLDERS: tuple[str, ...] = (
    "activation_sharded",
    "gradient_sharded",
    "eigen_activation_sharded",
    "eigen_gradient_sharded",
    "eigenvalue_sharded",
    "eigenvalue_correction_sharded",
    "factor_eig_g",
)
WHOLE_FOLDERS: tuple[str, ...] = ("factor_eig_a",)


def run_command(argv: Sequence[Any], *, seed: int = 0) -> str:
    """Run `bergson <argv>` and return its output.

    Args:
        argv: The command line after `bergson`. `--max_batch_size` also caps the batches of a
            Hessian fit here, which bergson 2.5.1 itself ignores.
        seed: Of torch, for runs that sample labels.

    Raises:
        BergsonUnavailable: bergson or torch is not installed.
        BergsonFailed: bergson raised.
    """
    return driver().run("command", argv=[str(argument) for argument in argv], seed=seed)


def _fingerprint(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if not isinstance(part, Path):
            digest.update(repr(part).encode())
            continue
        files = [part] if part.is_file() else sorted(p for p in part.iterdir() if p.is_file())
        for file in files:
            # Corpora may lie beside a model, whose content they are not.
            if file == part or file.suffix != ".jsonl":
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def fit(
    model_dir: str | Path,
    dataset: str | Path,
    out: str | Path | None = None,
    *,
    precision: str = "fp64",
    hessian_dtype: str = "fp64",
    method: str = "kfac",
    ev_correction: bool = True,
    use_dataset_labels: bool = True,
    token_batch_size: int = 128,
    max_batch_size: int | None = None,
    loss_reduction: str = "sum",
    include_bias: bool = False,
    processes: int = 1,
    seed: int = 0,
    extra: Sequence[str] = (),
) -> Path:
    """Fit with `bergson hessian`, or return an earlier fit of the same content and options.

    Args:
        model_dir: Checkpoint folder with its tokenizer.
        dataset: jsonl of `text`, or of `input_ids` (and `labels`, and `length`).
        out: Run folder to write, whose parent may be missing; one of the session's own if omitted.
        precision: Of the model: fp64, fp32, bf16.
        hessian_dtype: Of accumulators and files.
        method: kfac, tkfac, shampoo or autocorrelation.
        ev_correction: Whether to add the eigenvalue correction.
        use_dataset_labels: Empirical Fisher; otherwise labels are sampled, from `seed`.
        token_batch_size: Padded tokens per batch. Documents are truncated to it, and bergson
            refuses one above the model's maximum positions.
        max_batch_size: Documents per batch; 1 makes a document the unit of tkfac and shampoo.
        loss_reduction: sum or mean.
        include_bias: Whether modules with a bias get the column of ones.
        processes: Ranks, hence shards.
        seed: Of sampled labels.
        extra: Further flags.

    Returns:
        The run folder.

    Raises:
        FileExistsError: `out` holds something else.
        BergsonUnavailable, BergsonFailed: See `run_command`.
    """
    flags = [
        *("--method", method, "--precision", precision, "--hessian_dtype", hessian_dtype),
        *("--token_batch_size", str(token_batch_size), "--loss_reduction", loss_reduction),
        *("--nproc_per_node", str(processes), "--truncation"),
        *(["--ev_correction"] if ev_correction else []),
        *(["--use_dataset_labels"] if use_dataset_labels else []),
        *(["--include_bias"] if include_bias else []),
        *(["--max_batch_size", str(max_batch_size)] if max_batch_size else []),
        *extra,
    ]
    model_dir, dataset = Path(model_dir).resolve(), Path(dataset).resolve()
    digest = _fingerprint(model_dir, dataset, flags, seed)
    out = session_folder() / "fits" / digest[:20] if out is None else Path(out).resolve()
    record = out.parent / f"{out.name}.request"
    if out.exists():
        if not record.exists() or record.read_text() != digest:
            raise FileExistsError(f"{out} exists and is not this fit; give another folder")
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    run_command(["hessian", out, "--model", model_dir, "--dataset", dataset, *flags], seed=seed)
    record.write_text(digest)
    return out


def build(
    model_dir: str | Path,
    dataset: str | Path,
    *,
    precision: str = "fp64",
    token_batch_size: int = 128,
    **options: Any,
) -> Path:
    """Store gradients with `bergson build`, or return an earlier store of the same content.

    Args:
        model_dir: Checkpoint folder with its tokenizer.
        dataset: As in `fit`.
        precision: Of the model, and so of the store.
        token_batch_size: Padded tokens per batch; longer documents are truncated to it.
        options: Further flags; a tuple is a list, True a bare flag.

    Returns:
        The store's folder.

    Raises:
        BergsonUnavailable, BergsonFailed: See `run_command`.
    """
    flags = ["--precision", precision, "--token_batch_size", str(token_batch_size), "--truncation"]
    for name, value in options.items():
        values = value if isinstance(value, tuple) else [value]
        flags += [f"--{name}", *([] if value is True else map(str, values))]
    model_dir, dataset = Path(model_dir).resolve(), Path(dataset).resolve()
    digest = _fingerprint(model_dir, dataset, "build", flags)
    out = session_folder() / "stores" / digest[:20]
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        run_command(["build", out, "--model", model_dir, "--dataset", dataset, *flags])
    return out


def shard_rows(dimension: int, shards: int) -> list[int]:
    """Rows of each shard: the first takes the remainder."""
    base, rest = divmod(dimension, shards)
    return [base + rest, *[base] * (shards - 1)]


def read(path: str | Path) -> dict[str, Any]:
    """A factored Hessian directory, bergson's or ours, put together again in float64.

    Args:
        path: The directory that holds `activation_sharded` and its siblings.

    Returns:
        Folder -> module -> array, for every folder present, and `total_processed` as an int.

    Raises:
        ValueError: Files that bergson would trip over or misread: a stray or missing shard,
            different modules in one folder's shards, rows not split as bergson splits them, or
            differing copies of a tensor that every shard holds whole.
    """
    import torch
    from safetensors.torch import load_file

    path = Path(path)
    result: dict[str, Any] = {}
    for folder in (*SHARDED_FOLDERS, *WHOLE_FOLDERS):
        if not (path / folder).is_dir():
            continue
        count = len(list((path / folder).iterdir()))
        files = [path / folder / f"shard_{rank}.safetensors" for rank in range(count)]
        if not all(file.is_file() for file in files):
            raise ValueError(f"{folder}: {count} files, but not shard_0 to shard_{count - 1}")
        shards = [load_file(file) for file in files]
        if any(set(shard) != set(shards[0]) for shard in shards):
            raise ValueError(f"{folder}: its shards hold different modules")
        arrays = {}
        for module in shards[0]:
            parts = [shard[module].to(torch.float64).numpy() for shard in shards]
            if folder in WHOLE_FOLDERS:
                if not all(np.array_equal(part, parts[0]) for part in parts):
                    raise ValueError(f"{folder}: {module} differs between shards")
                arrays[module] = parts[0]
                continue
            arrays[module] = np.concatenate(parts)
            rows = [len(part) for part in parts]
            if rows != shard_rows(sum(rows), count):
                raise ValueError(f"{folder}: {module} has {rows} rows in its shards")
        result[folder] = arrays
    total = torch.load(path / "total_processed.pt", map_location="cpu", weights_only=True)
    if total.dtype != torch.int64 or total.ndim != 0:
        raise ValueError(f"total_processed.pt holds {total.dtype} of shape {tuple(total.shape)}")
    result["total_processed"] = int(total)
    return result


def _consume(
    kind: str, ranks: int, hessian_dir: Path, gradients: Mapping[str, np.ndarray], **options: Any
) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file, save_file

    with tempfile.TemporaryDirectory(dir=session_folder()) as scratch:
        source = f"{scratch}/gradients.safetensors"
        save_file({k: np.ascontiguousarray(v, np.float64) for k, v in gradients.items()}, source)
        result = f"{scratch}/applied"
        driver().run(
            kind, hessian=str(hessian_dir.resolve()), gradients=source, result=result, **options
        )
        applied = [load_file(f"{result}-{rank}.safetensors") for rank in range(ranks)]
    for rank, other in enumerate(applied):
        for module, value in applied[0].items():
            if not np.array_equal(other[module], value):
                raise BergsonFailed(f"rank {rank} and rank 0 disagree about {module}")
    return applied[0]


def consume_from_path(
    hessian_dir: str | Path,
    gradients: Mapping[str, np.ndarray],
    *,
    ev_correction: bool = True,
    damping_factor: float = 0.1,
    inversion: str = "damped_inverse",
) -> dict[str, np.ndarray]:
    """Apply bergson's inverse, read by `FactoredPreconditioner.from_path` in one process.

    Args:
        hessian_dir: Factored Hessian directory of any number of shards.
        gradients: Module -> [n, O, I']. A module that bergson finds no factors for comes back
            unchanged, without a word.
        ev_correction: Use the corrected eigenvalues.
        damping_factor: Relative to the mean eigenvalue.
        inversion: bergson's name of the eigenvalue function.

    Returns:
        Module -> [n, O, I'] in float64; bergson computed it in float32.
    """
    options = {"ev_correction": ev_correction, "damping_factor": damping_factor}
    return _consume("apply", 1, Path(hessian_dir), gradients, inversion=inversion, **options)


def consume_from_shards(
    hessian_dir: str | Path,
    gradients: Mapping[str, np.ndarray],
    *,
    processes: int,
    ev_correction: bool = True,
    damping_factor: float = 0.1,
    inversion: str = "damped_inverse",
) -> dict[str, np.ndarray]:
    """`consume_from_path` by `from_shards` on `processes` gloo ranks, one per shard.

    Raises:
        BergsonFailed: A rank failed, or two ranks returned different results.
    """
    options = {"ev_correction": ev_correction, "damping_factor": damping_factor}
    return _consume(
        "apply_on_ranks",
        processes,
        Path(hessian_dir),
        gradients,
        processes=processes,
        inversion=inversion,
        **options,
    )


def ekfac_scores(
    run_dir: str | Path,
    model_dir: str | Path,
    dataset: str | Path,
    query_dataset: str | Path,
    *,
    method: str = "kfac",
    ev_correction: bool = True,
    damping_factor: float = 0.1,
    inversion: str = "damped_inverse",
    precision: str = "fp64",
    hessian_dtype: str = "fp64",
    token_batch_size: int = 128,
    loss_reduction: str = "sum",
    include_bias: bool = False,
    use_dataset_labels: bool = True,
    aggregation: str = "none",
    processes: int = 1,
    extra: Sequence[str] = (),
) -> np.ndarray:
    """Influence scores of `bergson ekfac RUN --resume true`, with the factors in RUN if there.

    Args:
        run_dir: Run folder. Factors in `run_dir/hessian/<method>` are used as they are, with as
            many shards as `processes`; without them bergson fits its own.
        model_dir: Checkpoint folder with its tokenizer.
        dataset: Documents to score.
        query_dataset: Documents whose loss they influence.
        method, ev_correction, precision, hessian_dtype, token_batch_size, loss_reduction,
            include_bias, use_dataset_labels, processes, extra: As in `fit`.
        damping_factor, inversion: As in `consume_from_path`.
        aggregation: `none` for a column per query, `mean` or `sum` for one column.

    Returns:
        [documents, queries], positive for a proponent; 0 for documents under 2 tokens, which
        bergson skips.

    Raises:
        BergsonFailed: bergson raised, did not use the factors that lay in `run_dir`, or left
            other documents than the skipped ones without a score.
    """
    run_dir, model_dir = Path(run_dir).resolve(), Path(model_dir).resolve()
    factors = run_dir / "hessian" / method
    given = factors.is_dir()
    output = run_command(
        [
            *("ekfac", run_dir, "--resume", "true"),
            *("--model", model_dir, "--index_cfg.precision", precision),
            *("--data.dataset", Path(dataset).resolve(), "--data.truncation", "true"),
            *("--query.dataset", Path(query_dataset).resolve(), "--query.truncation", "true"),
            *("--query.aggregation", aggregation),
            *("--method", method, "--hessian_dtype", hessian_dtype),
            *("--hessian_cfg.ev_correction", str(ev_correction).lower()),
            *("--use_dataset_labels", str(use_dataset_labels).lower()),
            *("--hessian_pipeline_cfg.inversion_cfg.inversion", inversion),
            *("--hessian_pipeline_cfg.inversion_cfg.damping_factor", damping_factor),
            *("--token_batch_size", token_batch_size, "--loss_reduction", loss_reduction),
            *("--include_bias", str(include_bias).lower(), "--nproc_per_node", processes),
            *extra,
        ]
    )
    skipped = f"Skipping (already complete at {factors})" in output
    if skipped != given:
        raise BergsonFailed(f"factors given: {given}, but used: {skipped}\n{output[-2000:]}")
    result = run_dir / "scores" / "matrix.npy"
    driver().run("scores", scores=str(run_dir / "scores"), result=str(result))
    scores = np.load(result)
    # Here, because it imports torch, whose absence `driver` reports better.
    from tests.oracles import checkpoints

    documents = checkpoints.encode(model_dir, dataset, max_length=token_batch_size)
    too_short = np.array([len(tokens) < 2 for tokens in documents])
    if not np.array_equal(np.isnan(scores), np.broadcast_to(too_short[:, None], scores.shape)):
        raise BergsonFailed(f"scored other documents than expected\n{output[-2000:]}")
    return np.nan_to_num(scores)
