"""What to do with a finished run: commands and Python that hand it to torch bergson 2.5.1."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from converters.flax_checkpoint import FORMAT_FILE
from jhessians.commands.compute.config import ComputeConfig
from jhessians.config.option import options_of
from jhessians.methods.autocorrelation_options import AUTOCORRELATION
from jhessians.report.summary import WIDTH

Flags = dict[str, str]


def next_steps(
    config: ComputeConfig,
    *,
    model: str,
    dataset: str,
    shards: int,
    model_max_length: int | None = None,
) -> tuple[str, str]:
    """Commands that score the data set against itself, and Python that loads the Hessian.

    Args:
        config: The run's options.
        model: Name or folder of the model, the demo's too.
        dataset: The same for the data set.
        shards: Files per factor; `bergson ekfac` needs as many processes.
        model_max_length: Tokens that the model's positions allow; bergson refuses a larger
            token batch.

    Returns:
        Both are empty with `--layout influence_results`, which bergson 2.5.1 does not read. For a
        method that bergson lacks there is no command, and the Python is ours. There is no command
        with `--modules` either, since bergson, which does not know it, would score the other
        modules without a preconditioner, in silence; nor for a Flax checkpoint, nor where bergson
        could not make the gradients that a dense Hessian belongs to.
    """
    if config.layout == "influence_results":
        return "", ""
    if config.chosen.bergson is None:
        return "", f"import jhessians\njhessians.load_factors({config.run_path!r})"
    data = _data_flags(config, dataset)
    run = {"model": model} | _run_flags(config, model_max_length)
    if config.chosen.factored:
        shell, python = _of_factors(config, run, data, shards)
    else:
        shell, python = _of_processor(config, run, data)
    unknown = config.modules or (Path(model) / FORMAT_FILE).is_file()
    return "" if unknown else shell, python


def _of_factors(config: ComputeConfig, run: Flags, data: Flags, shards: int) -> tuple[str, str]:
    """`bergson ekfac`, which skips its own fit where it finds factors."""
    python = (
        "from bergson.hessians.preconditioner import FactoredPreconditioner\n"
        f"FactoredPreconditioner.from_path({config.run_path!r}"
        + (", ev_correction=True)" if config.corrects_eigenvalues else ")")
    )
    run_path = Path(config.run_path)
    method = str(config.chosen.bergson)
    lines = []
    if run_path.parts[-2:] == ("hessian", method):
        scores = os.fspath(run_path.parent.parent)
    else:
        # bergson looks for the factors in RUN/hessian/<method>: lead it to ours.
        scores = f"{run_path}-scores"
        lines.append(f"mkdir -p {shlex.quote(f'{scores}/hessian')}")
        words = [shlex.quote(os.path.abspath(run_path)), shlex.quote(f"{scores}/hessian/{method}")]
        lines.append(_continued("ln -sfn", words))
    flags = {"method": method, "resume": "true"} | run
    if "precision" in flags:  # several configurations have one
        flags["index_cfg.precision"] = flags.pop("precision")
    for source in ("data", "query"):
        flags |= {f"{source}.{name}": value for name, value in data.items()}
    if config.corrects_eigenvalues:
        flags["hessian_cfg.ev_correction"] = "true"
    flags["nproc_per_node"] = str(shards)
    lines.append(_continued(f"bergson ekfac {shlex.quote(scores)}", _words(flags)))
    return "\n".join(lines), python


def _of_processor(config: ComputeConfig, run: Flags, data: Flags) -> tuple[str, str]:
    """An index of query gradients, and scores against it, preconditioned."""
    python = f"from bergson import GradientProcessor\nGradientProcessor.load({config.run_path!r})"
    if not _makes_the_same_gradients(config):
        return "", python
    flags = run | data
    for each in options_of(ComputeConfig):
        value = getattr(config, each.name)
        # What a Hessian sums over does not bind those who use it.
        if each.group == AUTOCORRELATION and each.bergson and each.name != "attribute_tokens":
            if value != each.default:
                flags[each.name] = _word(value)
    if config.split_attention_modules:
        flags["head_dim"] = str(config.head_dim)  # bergson's own default splits documents
    queries, scores = (f"{config.run_path}-{name}" for name in ("queries", "scores"))
    of_scores = {"query_path": queries, "hessian_path": config.run_path} | flags
    return (
        _continued(f"bergson build {shlex.quote(queries)}", _words(flags))
        + "\n"
        + _continued(f"bergson score {shlex.quote(scores)}", _words(of_scores))
    ), python


def _makes_the_same_gradients(config: ComputeConfig) -> bool:
    """Whether bergson can: it estimates no normalizers, and reads none of Orbax."""
    if config.normalizer != "none":
        return False
    if config.optimizer_state is not None:
        state = Path(config.optimizer_state)
        if not state.is_file() and not (state / "optimizer.pt").is_file():
            return False
    return True


def _run_flags(config: ComputeConfig, model_max_length: int | None) -> Flags:
    """Flags about the model and the loss, only those that bergson's own defaults do not cover."""
    tokens = min(config.token_batch_size, model_max_length or config.token_batch_size)
    return _different(
        [
            ("revision", config.revision, None),
            ("tokenizer", config.tokenizer, None),
            ("precision", config.precision, "fp32"),
            ("loss_fn", config.loss_fn, "ce"),
            ("loss_reduction", config.loss_reduction, "sum"),
            ("label_smoothing", config.label_smoothing, 0.0),
            ("include_bias", config.include_bias, False),
            ("filter_modules", config.filter_modules, None),
            ("moe_experts", config.moe_experts, None),
            ("fsdp", config.fsdp, False),
            ("token_batch_size", tokens, 2048),
        ]
    )


def _data_flags(config: ComputeConfig, dataset: str) -> Flags:
    """The same about the data set."""
    return {"dataset": dataset} | _different(
        [
            ("split", config.split, "train"),
            ("subset", config.subset, None),
            ("prompt_column", config.prompt_column, "text"),
            ("completion_column", config.completion_column, ""),
            ("conversation_column", config.conversation_column, ""),
            ("truncation", config.truncation, False),
            ("chunk_length", config.chunk_length, 0),
        ]
    )


def _different(candidates: Iterable[tuple[str, object, object]]) -> Flags:
    """Flags from (name in bergson, value, bergson's default)."""
    return {name: _word(value) for name, value, default in candidates if value != default}


def _word(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _words(flags: Mapping[str, str]) -> list[str]:
    """Each flag with its value, or its list of them."""
    lists = ("split_attention_modules",)
    return [
        f"--{name} {value if name in lists else shlex.quote(value)}"
        for name, value in flags.items()
    ]


def _continued(head: str, words: Sequence[str]) -> str:
    """A shell command over several lines, each short enough for `render`'s indent."""
    lines = [head]
    for word in words:
        if len(lines[-1]) + len(word) + 1 > WIDTH - 6:
            lines.append("    " + word)
        else:
            lines[-1] += " " + word
    return " \\\n".join(lines)
