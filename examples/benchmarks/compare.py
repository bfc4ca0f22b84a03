"""Whole EKFAC fits side by side: jhessians, torch bergson and, if asked, kronfluence.

    python examples/benchmarks/compare.py --shape medium
    python examples/benchmarks/compare.py --shape small medium large --with kronfluence

Every tool runs as a process of its own on the same checkpoint and tokens, in turn (A B A B ...),
in float32 with the data's own labels. Compared are medians of wall time (imports and compilation
included) and of peak memory (the host's; a GPU's is not measured); the factors must agree. Close
everything else first: on a busy machine the numbers mean nothing, and the load before each run is
noted.

The tools other than jhessians need torch and live in a virtual environment of their own, made at
the first run. matplotlib draws the picture if it is installed. The results go to
examples/benchmarks/results/.
"""

import argparse
import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import measure
import models
import peers
import report
from measure import CORRECTION, COVARIANCES, EIGEN, Run, RunFailed, Tool
from models import Shape

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()

# Name → shape, tokens, tokens per chunk. `tiny` only shows that everything works.
PRESETS = {
    "tiny": (Shape(64, 2, 192, 256), 4096, 64),
    "small": (Shape(256, 6, 688, 2048), 65536, 256),
    "medium": (Shape(512, 8, 1408, 8192), 32768, 256),
    "large": (Shape(768, 6, 2048, 8192), 16384, 256),
}

AGREEMENT = 5e-5
"""Largest relative difference allowed: two float32 fits differ by up to 1e-5 in Λ."""

UNSAVED = "unsaved"

BERGSON_FACTORS = {
    "A": "activation_sharded",
    "S": "gradient_sharded",
    "sum of Λ": "eigenvalue_correction_sharded",
}


def add_common(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark against the peers."""
    add = parser.add_argument
    # fmt: off
    add("--shape", nargs="+", default=["medium"], metavar="SHAPE",
        help=f"of {', '.join(PRESETS)}, or width,layers,inner width,vocabulary")
    add("--chunk", type=int, help="tokens per document; default the preset's, 256 without one")
    add("--repeats", type=int, default=3, help="runs of each tool")
    for name in ("jhessians", "bergson", "kronfluence"):
        add(f"--{name}-batch", type=int, default=2048, metavar="TOKENS",
            help=f"tokens per step of {name}")
    add("--peers-env", type=Path, default=CACHE / "jhessians-benchmarks" / "peers", metavar="DIR",
        help="virtual environment of the peers, made if missing")
    add("--torch", default="torch==2.13.0", metavar="WORDS",
        help="what pip is told to install as torch, further options of pip included")
    add("--skip-install", action="store_true", help="fail instead if the peers are missing")
    add("--work", type=Path, metavar="DIR",
        help="keep checkpoints and factors here; default a temporary folder")
    add("--results", type=Path, default=HERE / "results", metavar="DIR", help="folder to write")
    # fmt: on


def parse(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    """Parse options that `add_common` added, and others; a wrong one ends in a line."""
    options = parser.parse_args(words)
    for text in options.shape:
        if text not in PRESETS:
            try:
                Shape.parse(text)
            except ValueError as error:
                parser.error(str(error))
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    return options


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_common(parser)
    add = parser.add_argument
    # fmt: off
    add("--tokens", type=int, help="in all; default the preset's, 32768 without one")
    add("--with", dest="extra", nargs="+", default=[], metavar="TOOL",
        choices=["kronfluence", UNSAVED],
        help=f"compare with kronfluence, too, or with {UNSAVED}, ours without saved states")
    # fmt: on
    return parse(parser, words)


def jhessians_environment() -> dict[str, str]:
    """So that a process finds this checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path}


def contestants(options: argparse.Namespace, model: Path, data: Path | None = None) -> list[Tool]:
    """Whole fits: jhessians first, then the peers, on the model's own tokens or on `data`."""
    tokens = str(data or model / models.TOKENS)
    python = peers.python_of(options.peers_env)
    shared = ["--model", str(model), "--dataset", tokens, "--use_dataset_labels", "--truncation"]
    kfac = "Computing Approximating Hessians with kfac"
    tools = [
        Tool(
            "jhessians",
            [sys.executable, "-m", "jhessians", "compute", "{out}", *shared,
             "--token_batch_size", str(options.jhessians_batch)],
            jhessians_environment(),
            {
                stage: (rf"^{title}: .*\.\.\.$", rf"^{title}: .* in \d")
                for stage, title in (
                    (COVARIANCES, "Covariances"),
                    (EIGEN, "Eigendecompositions"),
                    (CORRECTION, "Eigenvalue correction"),
                )
            },
            BERGSON_FACTORS,
        ),
        Tool(
            "bergson",
            [python, "-m", "bergson", "hessian", "{out}", "--method", "kfac", "--ev_correction",
             *shared, "--token_batch_size", str(options.bergson_batch)],
            {},
            {
                COVARIANCES: (rf"^{kfac}:", r"Total processed"),
                EIGEN: (r"Computing eigenvectors", r"Saved uncorrected eigenvalues"),
                CORRECTION: (rf"^{kfac} \(eigenvalue correction\):", r"Total processed"),
            },
            BERGSON_FACTORS,
        ),
    ]  # fmt: skip
    if UNSAVED in options.extra:
        ours = tools[0]
        never = [*ours.command, "--checkpoint_minutes", "0"]
        tools.append(dataclasses.replace(ours, name=UNSAVED, command=never))
    if "kronfluence" in options.extra:
        folder = "fit/factors_ekfac"
        script = str(HERE / "peers.py")
        batch = str(options.kronfluence_batch)
        tools.append(
            Tool(
                "kronfluence",
                [python, script, "kronfluence", str(model), tokens, "{out}", batch],
                {},
                {stage: (f"^begin {stage}$", f"^end {stage}$") for stage in measure.STAGES},
                {
                    "A": f"{folder}/activation_covariance.safetensors",
                    "S": f"{folder}/gradient_covariance.safetensors",
                    "sum of Λ": f"{folder}/lambda_matrix.safetensors",
                },
                prefix="model.",
                sums_documents=True,
            )
        )
    return tools


def build_model(work: Path, shape: Shape, tokens: int, chunk: int) -> Path:
    """A checkpoint with its tokens in a folder below `work`, made in a process of its own."""
    model = work / f"model-{shape}-{tokens}-{chunk}".replace(",", "-")
    words = [str(model), str(shape), str(tokens), str(chunk)]
    subprocess.run([sys.executable, str(HERE / "models.py"), *words], check=True)
    return model


def machine_peak(python: str) -> dict[str, float]:
    """FLOP per second of float32 products, by library; a library that is missing is left out."""
    peaks = {}
    for library, interpreter in (
        ("numpy", sys.executable),
        ("jax", sys.executable),
        ("torch", python),
    ):
        answer = subprocess.run(
            [interpreter, str(HERE / "peers.py"), "peak", library], capture_output=True, text=True
        )
        if answer.returncode == 0:
            peaks[library] = float(answer.stdout.split()[-1])
    return peaks


def compare(options: argparse.Namespace, name: str, work: Path) -> report.Comparison:
    """Measure one shape."""
    shape, tokens, chunk = PRESETS.get(name) or (Shape.parse(name), 32768, 256)
    chunk = options.chunk or chunk
    tokens = (options.tokens or tokens) // chunk * chunk
    model = build_model(work, shape, tokens, chunk)
    tools = contestants(options, model)
    outs = {tool.name: work / f"{model.name}-{tool.name}" for tool in tools}
    # Before the runs, at the same temperature and clock.
    peaks = machine_peak(peers.python_of(options.peers_env))
    runs: list[Run] = []
    for repeat in range(options.repeats):
        for tool in tools:
            shutil.rmtree(outs[tool.name], ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=work) as cache:
                run = measure.measure(tool, outs[tool.name], Path(cache))
            runs.append(run)
            print(
                f"{name}, {repeat + 1} of {options.repeats}: {tool.name} {run.seconds:.1f} s, "
                f"{run.peak_bytes / 1e9:.2f} GB (load before: {run.load_before:.1f})",
                flush=True,
            )
    ours, *others = tools
    documents = tokens // chunk
    errors = {}
    # Elsewhere, since this process would count in the peak memory of what it starts next.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as elsewhere:
        for tool in others:
            folders = outs[ours.name], outs[tool.name]
            found = elsewhere.submit(measure.disagreement, (ours, tool), folders, documents)
            errors[tool.name] = found.result()
    return report.Comparison(name, shape, tokens, chunk, peaks, runs, errors)


def command_line(words: Sequence[str], script: str = "compare.py") -> str:
    """What was typed, without this machine's folders."""
    shown, hide = [], False
    for word in words:
        private = word.startswith(("--work", "--peers-env", "--results"))
        shown.append("DIR" if hide else word.split("=")[0] if private else shlex.quote(word))
        hide = private and "=" not in word
    return " ".join([f"python examples/benchmarks/{script}", *shown])


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit code."""
    words = sys.argv[1:] if words is None else list(words)
    options = arguments(words)
    wanted = ["bergson", *(name for name in options.extra if name != UNSAVED)]
    try:
        peers.install(
            options.peers_env, wanted, shlex.split(options.torch), allowed=not options.skip_install
        )
        with tempfile.TemporaryDirectory() as temporary:
            work = (options.work or Path(temporary)).resolve()
            work.mkdir(parents=True, exist_ok=True)
            comparisons = [compare(options, name, work) for name in options.shape]
    except (RunFailed, peers.PeersMissing) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 1
    python = peers.python_of(options.peers_env)
    versions = peers.versions(sys.executable, ["jax", "jaxlib", "flax", "numpy", "scipy"])
    versions |= peers.versions(python, ["torch", "transformers", *wanted])
    record = report.Record(report.describe_machine(), versions, command_line(words), comparisons)
    print("\n" + report.markdown(record))
    for line in report.write(record, options.results):
        print(line)
    worst = max(error for c in comparisons for each in c.errors.values() for error in each.values())
    if not worst <= AGREEMENT:
        print(f"compare.py: the tools disagree by {worst:.1e}, more than {AGREEMENT}",
              file=sys.stderr)  # fmt: skip
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
