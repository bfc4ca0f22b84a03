"""How good each attribution is: one table, of a bank's model, documents and queries.

    python examples/benchmarks/attribution.py [--peers-env ENV] [--results DIR]

For the model of a bank (`jhessians evaluate bank`; by default the demo's twin, whose bank ships
with jhessians) every method of jhessians scores all documents for some of the queries, and so does
torch bergson if there is an environment with it. Each row has the linear datamodeling score (LDS)
and the R-precision against the demo's known sources, with 95 % bootstrap intervals over queries,
and the seconds of fitting and scoring. The metagradient, which is exact, stands for the ceiling; it
takes longest, so that it has every sixth query, and the table has a column for those alone, as
has bergson's refinement.

Everything has the same damping factor, and the Fisher is of sampled labels.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import peers
import report

from jhessians import demo
from jhessians.cli.main import main as jhessians
from jhessians.commands.evaluate.reading import read_scores
from jhessians.evaluation.bank import MODEL, Bank
from jhessians.evaluation.measures import (
    Interval,
    linear_datamodeling_scores,
    mean_interval,
    retrieval,
)

HERE = Path(__file__).resolve().parent
STEPS, DOCUMENTS = 10, 256
FEW = 6
"""Every how many queries have a score in the rows that take longest."""
REFINEMENT = ("--refine", "cg", "--refine_steps", str(STEPS), "--refine_documents", str(DOCUMENTS))
COSINE = ("--unit_normalize",)
QUERY_COLUMNS = ("--query_prompt_column", "prompt", "--query_completion_column", "completion")


@dataclass(frozen=True)
class Row:
    """One attribution, measured.

    Attributes:
        name: Of the method.
        lds: Over the queries; None if there are scores for every sixth one alone.
        lds_of_few: Over every sixth query.
        precision: R-precision, over the queries that have scores.
        seconds: Of fitting and scoring, compilation included.
    """

    name: str
    lds: Interval | None
    lds_of_few: Interval
    precision: Interval
    seconds: float


class Table:
    """Makes the rows, one after the other.

    Args:
        options: The command line's.
        work: An empty folder.
    """

    def __init__(self, options: argparse.Namespace, work: Path):
        self.options, self.work = options, work
        self.bank = Bank.load(options.bank)
        self.model = options.bank / MODEL
        last = len(self.bank.whole) - 1
        self.chosen = np.linspace(0, last, options.queries).round().astype(int)
        self.losses = self.bank.losses[:, self.chosen]
        lines = Path(demo.QUESTIONS).read_text(encoding="utf-8").splitlines()
        lines = [lines[query] for query in self.chosen]
        self.questions = work / "questions.jsonl"
        self.questions.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self.relevant = [json.loads(line)["supporting"] for line in lines]
        self.rows: list[Row] = []
        self.per_query: dict[str, np.ndarray] = {}
        self.few: dict[str, np.ndarray] = {}

    def add(self, name: str, make: Callable[[], np.ndarray], seconds: float = 0.0) -> None:
        """A row: `make` gives the scores, after something that took `seconds`."""
        started = time.perf_counter()
        scores = make()
        seconds += time.perf_counter() - started
        found = linear_datamodeling_scores(scores, self.bank.subsets, self.losses)
        precision = retrieval(scores, self.relevant)["R-precision"]
        self.per_query[name] = found
        self._append(Row(name, mean_interval(found), mean_interval(found[::FEW]),
                         mean_interval(precision), seconds))  # fmt: skip

    def add_few(self, name: str, scores: np.ndarray, seconds: float) -> None:
        """A row of every sixth query."""
        losses = self.losses[:, ::FEW]
        found = linear_datamodeling_scores(scores, self.bank.subsets, losses)
        self.few[name] = found
        precision = retrieval(scores, self.relevant[::FEW])["R-precision"]
        self._append(Row(name, None, mean_interval(found), mean_interval(precision), seconds))

    def _append(self, row: Row) -> None:
        self.rows.append(row)
        lds = row.lds or row.lds_of_few
        print(f"{row.name:<36} LDS {lds.render()}  {row.seconds:6.1f} s", flush=True)

    def ours(self, name: str, *words: str) -> np.ndarray:
        """Scores of a command line of ours."""
        out = self.work / name
        code = jhessians([words[0], *words[1:2], str(out), *words[2:], "--quiet"]
                         if words[0] == "evaluate" else
                         [words[0], str(out), *words[1:], "--quiet"])  # fmt: skip
        if code:
            raise SystemExit(f"attribution.py: {' '.join(words)} ended with {code}")
        return read_scores(out)

    def score(self, name: str, hessian: str, more: Sequence[str] = ()) -> np.ndarray:
        """Scores through a Hessian's inverse."""
        inputs = ("--model", str(self.model), "--dataset", str(demo.DATASET))
        damping = ("--damping_factor", str(self.options.damping)) if hessian != "none" else ()
        return self.ours(
            name, "score", "--hessian", hessian, *inputs, *damping,
            "--query", str(self.questions), *QUERY_COLUMNS, *more,
        )  # fmt: skip

    def fit(self, name: str, method: str, *more: str) -> tuple[str, float]:
        """Where a Hessian of ours is, and the seconds that it took."""
        started = time.perf_counter()
        run = self.work / f"fit-{name}"
        code = jhessians([
            "compute", str(run), "--method", method, "--model", str(self.model),
            "--dataset", str(demo.DATASET), "--layout", "bergson", *more, "--quiet",
        ])  # fmt: skip
        if code:
            raise SystemExit(f"attribution.py: the fit of {name} ended with {code}")
        return str(run), time.perf_counter() - started

    def of_jhessians(self) -> None:
        """Baselines, and every method, plain, corrected and refined."""
        self.add("dot product", partial(self.score, "dot", "none"))
        self.add("cosine", partial(self.score, "cosine", "none", COSINE))
        like = ("evaluate", "baseline", "--like", str(self.work / "dot"))
        self.add("random", partial(self.ours, "random", *like, "--baseline", "random"))
        self.add("BM25", partial(self.ours, "bm25", *like))
        run, seconds = self.fit("autocorrelation", "autocorrelation", "--projection_dim", "16")
        self.add("autocorrelation (TrackStar)", partial(self.score, "trackstar", run, COSINE),
                 seconds)  # fmt: skip
        for method, name in (("tkfac", "TKFAC"), ("shampoo", "Shampoo"), ("kfac", "KFAC")):
            run, seconds = self.fit(method, method, "--ev_correction", "true")
            score = partial(self.score, hessian=run)
            self.add(name, partial(score, method, more=("--ev_correction", "false")), seconds)
            if corrected := {"KFAC": "EKFAC", "Shampoo": "EK-Shampoo"}.get(name):
                self.add(corrected, partial(score, f"e{method}"), seconds)
        self.add("EKFAC, cosine", partial(score, "cosine-ekfac", more=COSINE), seconds)
        self.add("EKFAC + CG", partial(score, "cg", more=REFINEMENT), seconds)

    def of_bergson(self) -> None:
        """bergson's EKFAC with factors of its own; refined, which takes one query after the other,
        for every sixth query."""
        started = time.perf_counter()
        scores = self.bergson("bergson", self.questions)
        self.add("bergson: EKFAC", lambda: scores, time.perf_counter() - started)
        few = self.work / "few.jsonl"
        lines = self.questions.read_text(encoding="utf-8").splitlines(keepends=True)
        few.write_text("".join(lines[::FEW]), encoding="utf-8")
        more = ("--num_steps", str(STEPS), "--solver", "cg", "--astra.batch_size", str(DOCUMENTS),
                "--micro_batch_size", "64")  # fmt: skip
        started = time.perf_counter()
        scores = self.bergson("bergson-cg", few, *more)
        self.add_few("bergson: EKFAC + CG", scores, time.perf_counter() - started)

    def bergson(self, name: str, questions: Path, *more: str) -> np.ndarray:
        """Scores of `bergson ekfac`, from the fit on.

        It takes no batch of more tokens than the model has positions. With rotary embeddings that
        is a number in a file, and with batches of 128 tokens its fit takes 8 minutes.
        """
        model, run = self.work / "model", self.work / name
        if not model.exists():
            shutil.copytree(self.model, model)
            for file, key in (("config.json", "max_position_embeddings"),
                              ("tokenizer_config.json", "model_max_length")):  # fmt: skip
                content = json.loads((model / file).read_text(encoding="utf-8")) | {key: 2048}
                (model / file).write_text(json.dumps(content), encoding="utf-8")
        command = [
            *(peers.python_of(self.options.peers_env), str(HERE / "peers.py"), "bergson"),
            *("ekfac", str(run)),
            *("--model", str(model), "--method", "kfac", "--hessian_cfg.ev_correction", "true"),
            *("--data.dataset", str(demo.DATASET), "--data.truncation", "true"),
            *("--query.dataset", str(questions), "--query.truncation", "true"),
            *("--query.prompt_column", "prompt", "--query.completion_column", "completion"),
            *("--token_batch_size", "2048", "--index_cfg.precision", "fp32"),
            *("--hessian_pipeline_cfg.inversion_cfg.damping_factor", str(self.options.damping)),
            *more,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"attribution.py: bergson failed\n{done.stderr[-2000:]}")
        return read_scores(run / "scores")

    def of_metagradient(self) -> None:
        """The exact derivative, for every sixth query."""
        started = time.perf_counter()
        out = self.work / "metagradient.npy"
        command = [
            *(sys.executable, str(HERE.parent / "metagradient.py"), "--bank"),
            *(str(self.options.bank), "--out", str(out)),
            *("--queries", *map(str, self.chosen[::FEW])),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        scores, seconds = np.load(out), time.perf_counter() - started
        self.add_few("metagradient (exact)", scores, seconds)


def differences(table: Table) -> dict[str, Interval]:
    """LDS of pairs whose order is expected, as a paired difference."""
    pairs = [("EKFAC + CG", "EKFAC"), ("EKFAC", "KFAC"), ("KFAC", "dot product"),
             ("EKFAC, cosine", "autocorrelation (TrackStar)"), ("EK-Shampoo", "EKFAC"),
             ("EKFAC", "bergson: EKFAC"), ("EKFAC + CG", "bergson: EKFAC + CG"),
             ("metagradient (exact)", "EKFAC + CG")]  # fmt: skip
    found = {}
    for pair in pairs:
        # Of every sixth query, if there are no more of one of them.
        whole = all(name in table.per_query for name in pair)
        values = [
            table.per_query[name]
            if whole
            else table.few.get(name, table.per_query.get(name, [])[::FEW])
            for name in pair
        ]
        if all(len(each) for each in values):
            first, second = values
            found[" - ".join(pair)] = mean_interval(first - second)
    return found


def markdown(table: Table, record: dict) -> str:
    """The whole result as a page."""

    def shown(interval: Interval | None) -> str:
        if interval is None:
            return ""
        return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"

    models, documents = table.bank.subsets.shape
    rows = [
        [row.name, shown(row.lds), shown(row.lds_of_few), shown(row.precision),
         f"{row.seconds:.1f}"]
        for row in table.rows
    ]  # fmt: skip
    header = ["scores", "LDS", f"LDS, {len(table.chosen[::FEW])} queries", "R-precision", "seconds"]
    return "\n".join([
        "# How good each attribution is",
        "",
        f"- machine: {record['machine']}",
        f"- versions: {', '.join(f'{name} {v}' for name, v in record['versions'].items())}",
        f"- command: `{record['command']}`",
        "",
        f"{documents:,} documents, {len(table.chosen):,} queries, {models:,} models, each "
        f"trained on {int(table.bank.subsets[0].sum()):,} of the documents; damping factor "
        f"{record['damping']:g}. Means over queries with 95 % bootstrap intervals over queries; "
        "seconds of fitting and scoring, compilation included.",
        "",
        report.table(header, rows),
        "",
        "Differences of LDS, query by query:",
        "",
        report.table(["pair", "difference"],
                     [[name, shown(each)] for name, each in differences(table).items()]),
        "",
    ])  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Make the table and return the exit code."""
    words = sys.argv[1:] if words is None else list(words)
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--bank", type=Path, default=demo.BANK, help="of the demo's documents and questions")
    add("--damping", type=float, default=0.1, help="damping factor of every inverse")
    add("--queries", type=int, default=48, help="spread evenly over the demo's questions")
    add("--without-metagradient", action="store_true", help="leave the longest row out")
    add("--peers-env", type=Path, help="environment with torch bergson; without it no such rows")
    add("--results", type=Path, default=HERE / "results", help="folder to write")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as work:
        table = Table(options, Path(work))
        table.of_jhessians()
        if not options.without_metagradient:
            table.of_metagradient()
        if options.peers_env:
            table.of_bergson()
    versions = peers.versions(sys.executable, ["jax", "flax", "optax", "numpy"])
    if options.peers_env:
        python = peers.python_of(options.peers_env)
        versions |= peers.versions(python, ["torch", "transformers", "bergson"])
    record = {
        "machine": report.describe_machine(), "versions": versions, "damping": options.damping,
        "command": shlex.join(["python", "examples/benchmarks/attribution.py", *words]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": [asdict(row) for row in table.rows],
        "differences": {name: each._asdict() for name, each in differences(table).items()},
        "queries": table.chosen.tolist(),
        "lds": {name: each.round(4).tolist() for name, each in table.per_query.items()},
    }  # fmt: skip
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "attribution.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.results / "attribution.md").write_text(markdown(table, record))
    print("\n" + markdown(table, record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
