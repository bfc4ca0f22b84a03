"""What `score` does: queries through the inverse Hessian, a pass over the data, and its results."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import yaml
from jax.sharding import Mesh

from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.compute.pipeline import compute
from jhessians.commands.hosts import join_hosts, require_same_files, require_shared
from jhessians.commands.output import output_folder
from jhessians.commands.resuming import contents_of, resuming, version_of
from jhessians.commands.score.config import NONE, ScoreConfig
from jhessians.commands.score.listing import (
    HARMFUL,
    HELPFUL,
    QUERIES_SHOWN,
    ranking_lines,
    residual_lines,
)
from jhessians.commands.score.passes import parts, score_all
from jhessians.commands.score.results import Results, write_columns
from jhessians.commands.score.work import Work, prepare
from jhessians.config.option import name_flags, options_of
from jhessians.config.provenance import CONFIG_FILE, config_document
from jhessians.config.units import count_in_words, seconds_in_words
from jhessians.devices.fingerprint import fingerprint
from jhessians.devices.hosts import together
from jhessians.devices.mesh import make_mesh
from jhessians.devices.precision import require_supported
from jhessians.evaluation.measures import retrieval
from jhessians.interop.score_store import ScoreStore
from jhessians.report.progress import Progress
from jhessians.report.recorder import recording

HESSIAN = "hessian"
"""Where in the results the demo's own Hessian is, if no other was given."""


def score(config: ScoreConfig) -> str | None:
    """Score the training data and write the results under the run path.

    Every process of a run on several hosts calls this; the first one writes.

    Args:
        config: Validated.

    Returns:
        What the terminal shows; None on hosts that have nothing to say.

    Raises:
        UserError: If the input is wrong in any of the ways that `jhessians.errors` knows.
    """
    first = join_hosts(config, "score")
    mesh = make_mesh(config.world_size, axes=config.mesh)
    names = {each.name for each in options_of(type(config))}
    with ExitStack() as stack:
        with together():
            directory = output_folder(config, "run_path", "score", writer=first)
            part = stack.enter_context(directory)
            recorder = stack.enter_context(
                recording(part, profile=config.profile, trace=config.profile_trace)
            )
        progress = Progress(
            quiet=config.quiet or not first, around=recorder.around,
            reword=partial(name_flags, names=names),
        )  # fmt: skip
        state = stack.enter_context(resuming(config, directory, mesh, progress))
        given, config = config, state.taken_up(config)
        run = config.run
        require_supported(run.matmul_precision, jax.local_devices()[0])
        if config.hessian is None:
            require_shared(part)
        hessian = _fitted_demo(config, part) if config.hessian is None else config.hessian
        read = None if config.hessian == NONE else hessian
        require_same_files(Hessians=read, candidates=config.candidates)
        work = prepare(config, run, hessian, mesh, progress, devices=state.devices)
        with progress.stage("Fingerprints"), together():
            state.begin(_settled(config, work), _contents(config, work), config.replayed)
        results = None
        if first:
            with progress.stage("Output"):
                results = _results(config, work, part)
                _write_config(part, given, mesh)
        with together():
            pass
        flop = score_all(config, work, results, progress, state.checkpoints.series("scores"))
        state.checkpoints.settle()
        with together():
            profile = None
            if config.profile:
                profile = recorder.finish(
                    flop, work.batches, mesh,
                    numbers=run.precision, matmul_precision=run.matmul_precision,
                )  # fmt: skip
        text = _render(config, work, results, progress) if results is not None else None
        if text is not None and profile is not None:
            text = "\n".join([text, "", *profile.lines()])
        with together():
            stack.close()
    return text


def _fitted_demo(config: ScoreConfig, part: Path) -> str:
    """Fit the demo's Hessian into the results, unless it is there, and return where it is."""
    if (part / HESSIAN).is_dir():
        return str(part / HESSIAN)
    fit = ComputeConfig(
        run_path=str(Path(config.run_path) / HESSIAN), method="ekfac", layout="bergson",
        world_size=config.world_size, mesh=config.mesh, fsdp=bool(config.fsdp),
        quiet=config.quiet, debug=config.debug, overwrite=True, checkpoint_minutes=0,
    )  # fmt: skip
    compute(fit, into=part / HESSIAN)
    return str(part / HESSIAN)


def _results(config: ScoreConfig, work: Work, part: Path) -> Results:
    results = Results(
        part, work.inputs.batches.documents, work.columns,
        tokens=config.attribute_tokens, parts=parts(config, work)[0], top=config.top,
        candidates=work.candidates,
    )  # fmt: skip
    write_columns(part, work.columns, [work.query_text(column) for column in work.columns])
    return results


def _settled(config: ScoreConfig, work: Work) -> ScoreConfig:
    """The options with what was left to the memory."""
    settled: dict[str, Any] = {"activations": work.metric.problem.activations}
    return replace(config, query_batch_size=work.group_size, **settled)


def _contents(config: ScoreConfig, work: Work) -> dict[str, str]:
    """What is read, by hashes."""
    contents = contents_of(
        work.inputs.batches.documents.fingerprint(), fingerprint(work.metric.problem.model)
    )
    if work.queries is not None:
        contents["the queries"] = work.queries.fingerprint()
    for name, path in (("the Hessian", config.hessian), ("the candidates", config.candidates)):
        if path is not None and path != NONE:
            contents[name] = version_of(Path(path))
    return contents


def _write_config(part: Path, config: ScoreConfig, mesh: Mesh) -> None:
    """The configuration that replays the run, and what bergson reads of it: the scores' sign."""
    step = {"score": {"score_cfg": {"higher_is_better": True},
                      "index_cfg": {"run_path": config.run_path}}}  # fmt: skip
    document = config_document(
        "score", config.resolved_dict(), step, devices=[str(d) for d in mesh.devices.flat]
    )
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    (part / CONFIG_FILE).write_text(text, encoding="utf-8")


def _render(config: ScoreConfig, work: Work, results: Results, progress: Progress) -> str:
    """What the terminal shows at the end."""
    documents = count_in_words(len(work.batches.documents), "document")
    columns = count_in_words(len(work.columns), "column" if config.query_tokens else "query")
    columns = columns.replace("querys", "queries")
    total = seconds_in_words(sum(progress.timings.values()))
    lines = [f"Scores of {documents} for {columns} are in {config.run_path} ({total})"]
    lines += [f"  {name:<24}{seconds_in_words(seconds):>12}"
              for name, seconds in progress.timings.items()]  # fmt: skip
    for warning in progress.warnings:
        lines.append(f"  warning: {warning}")
    if work.refiner is not None:
        lines += ["", *residual_lines(results.refinement())]
    for query, column in enumerate(work.columns[:QUERIES_SHOWN]):
        best = results.ranking.best(query)[:HELPFUL]
        worst = [] if config.self else results.ranking.worst(query)[:HARMFUL]
        lines += ["", *ranking_lines(work.query_text(column), best, worst, work.text_of)]
    if work.supporting is not None and config.top is None and config.candidates is None:
        scores = ScoreStore(results.folder).read_all()
        found = retrieval(scores, work.supporting)
        words = ", ".join(f"{name} {values.mean():.3f}" for name, values in found.items())
        lines += ["", f"  Against the demo's known sources: {words}"]
    return "\n".join(lines)
