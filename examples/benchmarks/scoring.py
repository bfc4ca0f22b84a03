"""Influence scores side by side: jhessians, torch bergson and kronfluence, each with its fit there.

    python examples/benchmarks/scoring.py --shape small medium large

For each shape a model is fitted once, then `jhessians score`, `bergson ekfac` (which finds our
factors, builds the queries' gradients, applies the inverse and scores) and kronfluence's
`compute_pairwise_scores` (with factors of its own) run in turn (A B C A B C ...), whole commands as
processes of their own, in float32. Tasks are numbers of queries, `tokens` (a score for each token,
one query) and `self` (each document's score for itself, which bergson has no command for).

A query is a gradient as large as the model. As many of them are held at once as --memory allows, by
every tool, and all pass over the documents again for the rest. A task for which bergson needs more
disk than there is goes without it.

Compared are medians of wall time (imports and compilation included) and of peak memory; scores must
agree. Close everything else first: the load before each run is noted. The results go to
examples/benchmarks/results/.
"""

import argparse
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import compare
import measure
import models
import peers
import report
import scoring_agreement
import scoring_report
import scoring_tools
from measure import Run, RunFailed
from models import Shape
from scoring_report import Comparison, Record
from scoring_tools import SPECIAL, Fitted, Scorer, gradient_bytes, queries_of

AGREEMENT = 2e-4
"""Largest difference over a query's largest score that is allowed. Two float32 fits differ by 1e-5
in Λ, and their scores by about as much."""

RANKS = 0.999
"""Least Spearman correlation of a query's scores that is allowed."""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    compare.add_common(parser)
    add = parser.add_argument
    # fmt: off
    add("--tokens", type=int, default=16384, help="to score, in all")
    add("--tasks", nargs="+", default=["1", "16", "256", *SPECIAL], metavar="TASK",
        help=f"numbers of queries, each a document, and {' and '.join(SPECIAL)}")
    add("--with", dest="peers", nargs="+", default=["bergson", "kronfluence"], metavar="TOOL",
        choices=["bergson", "kronfluence"], help="peers to compare with")
    add("--memory", type=float, default=6.0, metavar="GB",
        help="for the gradients of the queries that a tool holds at once")
    # fmt: on
    options = compare.parse(parser, words)
    for task in options.tasks:
        if task not in SPECIAL and not (task.isdecimal() and int(task)):
            parser.error(f"--tasks: {task!r} is no number of queries, nor {' or '.join(SPECIAL)}")
    if not 2 <= (options.chunk or 2) <= options.tokens:
        parser.error("--chunk must be at least 2, and at most --tokens")
    # What fits: bergson takes jhessians' factors.
    options.extra = [peer for peer in options.peers if peer != "bergson"]
    return options


def split(model: Path, work: Path, queries: int) -> tuple[Path, list[str]]:
    """A data set of all documents but the last ones, and the lines of those, which ask."""
    lines = (model / models.TOKENS).read_text().splitlines(keepends=True)
    documents = work / f"{model.name}-documents.jsonl"
    documents.write_text("".join(lines[: len(lines) - queries]))
    return documents, lines[len(lines) - queries :]


def fit(options: argparse.Namespace, work: Path, model: Path, documents: Path) -> Fitted:
    """Fit with jhessians, and with kronfluence if it takes part."""
    fits = {}
    for tool in compare.contestants(options, model, documents):
        if tool.name == "bergson":
            continue
        fits[tool.name] = work / f"{model.name}-fit-{tool.name}"
        shutil.rmtree(fits[tool.name], ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=work) as cache:
            run = measure.measure(tool, fits[tool.name], Path(cache))
        print(f"{model.name}: {tool.name} fitted in {run.seconds:.1f} s", flush=True)
    return Fitted(model, documents, fits)


def run_in_turn(scorers: list[Scorer], outs: dict[str, Path], repeats: int) -> Iterator[Run]:
    """Every tool once, again and again; the last run's scores stay."""
    for repeat in range(repeats):
        for each in scorers:
            out = outs[each.tool.name]
            shutil.rmtree(out, ignore_errors=True)
            each.prepare(out)
            with tempfile.TemporaryDirectory(dir=out.parent) as cache:
                run = measure.measure(each.tool, out, Path(cache))
            print(
                f"{repeat + 1} of {repeats}: {run.tool} {run.seconds:.1f} s, "
                f"{run.peak_bytes / 1e9:.2f} GB (load before: {run.load_before:.1f})",
                flush=True,
            )
            yield run


def compare_task(
    options: argparse.Namespace, name: str, shape: Shape, fitted: Fitted, task: str, asking: list
) -> Comparison:
    """Measure one task of one shape, whose queries are lines of `asking`."""
    count, size = queries_of(task), gradient_bytes(shape)
    work = fitted.documents.parent
    queries = work / f"{fitted.model.name}-queries.jsonl"
    queries.write_text("".join(asking[:count]))
    at_once = max(1, min(count, int(options.memory * 1e9 / size)))
    found = scoring_tools.scorers(options, fitted, task, queries, at_once)
    notes = []
    if at_once < count:
        notes.append(f"{at_once} queries at once, {-(-count // at_once)} passes over the documents")
    needed = 2 * size * count  # the queries' gradients, and what the inverse makes of them
    if "bergson" in options.peers and needed > shutil.disk_usage(work).free:
        found = [each for each in found if each.tool.name != "bergson"]
        notes.append(f"no bergson, which writes {needed / 1e9:.0f} GB of gradients to disk")
    outs = {each.tool.name: work / f"{fitted.model.name}-scores-{each.tool.name}"
            for each in found}  # fmt: skip
    print(f"{name}, {task}", flush=True)
    runs = list(run_in_turn(found, outs, options.repeats))
    ours, *theirs = (outs[each.tool.name] / each.scores for each in found)
    agreement = {}
    # Elsewhere, since this process would count in the peak memory of what it starts next.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as elsewhere:
        for each, place in zip(found[1:], theirs, strict=True):
            answer = elsewhere.submit(scoring_agreement.agreement, ours, place)
            agreement[each.tool.name] = answer.result()
    for out in outs.values():
        shutil.rmtree(out)
    return Comparison(name, task, runs, agreement, notes)


def measure_all(options: argparse.Namespace, work: Path) -> tuple[dict[str, str], list[Comparison]]:
    """All tasks of all shapes, and what the shapes are."""
    comparisons, shapes = [], {}
    asked = max([1, *map(queries_of, options.tasks)])
    for name in options.shape:
        shape, _, chunk = compare.PRESETS.get(name) or (Shape.parse(name), 0, 256)
        chunk = options.chunk or chunk
        tokens = options.tokens // chunk * chunk
        shapes[name] = f"({shape}), {tokens:,} tokens in chunks of {chunk}"
        model = compare.build_model(work, shape, tokens + asked * chunk, chunk)
        documents, asking = split(model, work, asked)
        fitted = fit(options, work, model, documents)
        for task in options.tasks:
            comparisons.append(compare_task(options, name, shape, fitted, task, asking))
    return shapes, comparisons


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit code."""
    words = sys.argv[1:] if words is None else list(words)
    options = arguments(words)
    try:
        peers.install(
            options.peers_env, options.peers, shlex.split(options.torch),
            allowed=not options.skip_install,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as temporary:
            work = (options.work or Path(temporary)).resolve()
            work.mkdir(parents=True, exist_ok=True)
            shapes, comparisons = measure_all(options, work)
    except (RunFailed, peers.PeersMissing) as error:
        print(f"scoring.py: {error}", file=sys.stderr)
        return 1
    python = peers.python_of(options.peers_env)
    versions = peers.versions(sys.executable, ["jax", "jaxlib", "flax", "numpy"])
    versions |= peers.versions(python, ["torch", "transformers", *options.peers])
    record = Record(
        report.describe_machine(), versions, compare.command_line(words, "scoring.py"), shapes,
        options.memory, comparisons,
    )  # fmt: skip
    print("\n" + scoring_report.markdown(record))
    print(scoring_report.write(record, options.results))
    found = [each for c in comparisons for each in c.agreement.values()]
    difference = max((each.difference for each in found), default=0.0)
    ranks = min((each.ranks for each in found), default=1.0)
    if not (difference <= AGREEMENT and ranks >= RANKS):
        print(
            f"scoring.py: the tools' scores differ by {difference:.1e} of a query's largest (at "
            f"most {AGREEMENT}), their ranks correlate by {ranks:.6f} (at least {RANKS})",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
