"""How a fit's time and memory grow with tokens, and how soon a first fit is under way.

    python examples/benchmarks/scaling.py

Growth: whole EKFAC fits of one model on 1, 2, 4 and 8 times --tokens, in turn, each as a process of
its own. `--profile` tells what the passes took without the compiler's part, and the memory.
Start-up: the demo from the start of its process to its first steps, with an empty compilation cache
and with the one that this leaves. Close everything else first: the load before a run is noted.
The page goes to examples/benchmarks/results/.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import compare
import models
import peers
import report
from measure import Run, RunFailed, Tool, measure
from models import Shape
from scaling_report import CACHES, FIRST_STEPS, STARTED, Fit, Record, markdown, read_profile

TIMES = (1, 2, 4, 8)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `shape` is parsed, `tokens` whole chunks."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    # fmt: off
    add("--shape", default="small",
        help=f"of {', '.join(compare.PRESETS)}, or width,layers,inner width,vocabulary")
    add("--tokens", type=int, default=16384, help="of the smallest fit")
    add("--chunk", type=int, default=256, help="tokens per document")
    add("--batch", type=int, default=2048, metavar="TOKENS", help="tokens per step")
    add("--repeats", type=int, default=3, help="runs of each size and of each start")
    add("--work", type=Path, metavar="DIR",
        help="keep the checkpoint here; default a temporary folder")
    add("--results", type=Path, default=compare.HERE / "results", metavar="DIR",
        help="folder to write")
    # fmt: on
    options = parser.parse_args(words)
    try:
        preset = compare.PRESETS.get(options.shape)
        options.shape = preset[0] if preset else Shape.parse(options.shape)
    except ValueError as error:
        parser.error(str(error))
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    if not 2 <= options.chunk <= min(options.tokens, options.batch):
        parser.error("--chunk must be at least 2, and at most --tokens and --batch")
    options.tokens -= options.tokens % options.chunk
    return options


def command(*words: str, **environment: str) -> Tool:
    """`jhessians compute` with these options; its stage is what `STARTED` says."""
    run = [sys.executable, "-m", "jhessians", "compute", "{out}", *words]
    return Tool("jhessians", run, {**compare.jhessians_environment(), **environment}, STARTED, {})


def keep(folder: Path) -> dict[str, str]:
    """Environment in which compilations are kept in a folder, as in jhessians' own one."""
    return {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def say(line: str, run: Run) -> None:
    """What a run took, at once."""
    print(f"{line}, {run.seconds:.1f} s in all (load before: {run.load_before:.1f})", flush=True)


def grow(options: argparse.Namespace, work: Path) -> Iterator[Fit]:
    """All sizes in turn, again and again; the smaller data sets are the larger ones' beginnings."""
    sizes = [times * options.tokens for times in TIMES]
    chunk = options.chunk
    model = compare.build_model(work, options.shape, sizes[-1], chunk)
    documents = (model / models.TOKENS).read_text().splitlines(keepends=True)
    data = {size: work / f"tokens-{size}.jsonl" for size in sizes}
    for size, file in data.items():
        file.write_text("".join(documents[: size // chunk]))
    # Round 0 isn't counted: it leaves what it compiles, which is the same for every size.
    rounds = [(0, sizes[0]), *((i + 1, size) for i in range(options.repeats) for size in sizes)]
    with tempfile.TemporaryDirectory(dir=work) as kept:
        for number, size in rounds:
            tool = command(
                "--model", str(model), "--dataset", str(data[size]), "--use_dataset_labels",
                "--truncation", "--token_batch_size", str(options.batch), "--profile",
                **keep(Path(kept)),
            )  # fmt: skip
            with tempfile.TemporaryDirectory(dir=work) as folder:
                run = measure(tool, Path(folder) / "out", Path(folder) / "cache")
                profile = json.loads((Path(folder) / "out" / "profile.json").read_text())
            fit = read_profile(size, run, profile)
            took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in fit.passes.items())
            say(f"{number} of {options.repeats}: {size:,} tokens, {took}", run)
            if number:
                yield fit


def start(repeats: int, work: Path) -> dict[str, list[Run]]:
    """The demo with an empty compilation cache, then with what it left; all of it again."""
    runs: dict[str, list[Run]] = {name: [] for name in CACHES}
    for repeat in range(repeats):
        with tempfile.TemporaryDirectory(dir=work) as folder:
            tool = command(**keep(Path(folder) / "compilations"))
            for place, name in enumerate(CACHES):
                run = measure(tool, Path(folder) / f"out{place}", Path(folder) / "cache")
                if not run.stages[FIRST_STEPS]:
                    raise RunFailed("the demo printed no progress of its covariances")
                runs[name].append(run)
                took = f"first steps after {run.stages[FIRST_STEPS]:.1f} s"
                say(f"{repeat + 1} of {repeats}: demo, cache {name}, {took}", run)
    return runs


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit code."""
    words = sys.argv[1:] if words is None else list(words)
    options = arguments(words)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            work = (options.work or Path(temporary)).resolve()
            work.mkdir(parents=True, exist_ok=True)
            starts = start(options.repeats, work)
            fits = list(grow(options, work))
    except RunFailed as error:
        print(f"scaling.py: {error}", file=sys.stderr)
        return 1
    versions = peers.versions(sys.executable, ["jax", "jaxlib", "flax", "numpy", "scipy"])
    record = Record(
        report.describe_machine(), versions, compare.command_line(words, "scaling.py"),
        options.shape, options.chunk, options.batch, fits, starts,
    )  # fmt: skip
    page = markdown(record)
    options.results.mkdir(parents=True, exist_ok=True)
    numbers = asdict(record) | {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    (options.results / "scaling.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (options.results / "scaling.md").write_text(page)
    print(f"\n{page}\nwrote scaling.json and scaling.md to {options.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
