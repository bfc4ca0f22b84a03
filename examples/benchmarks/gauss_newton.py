"""Products of the Gauss-Newton Hessian with many vectors, ours and bergson's.

    python examples/benchmarks/gauss_newton.py MODEL … [--vectors 16] [--documents 16] [--repeats 3]
        [--results DIR]

MODEL is a folder that `models.py` made, with its tokens. It runs in an environment that has both
tools. bergson multiplies one vector at a time, ours all of them. Times are medians of runs in turn,
without compilation; in the table, read the ratio, which is the median over neighbouring runs.
`--results` writes `gauss-newton.md` and `gauss-newton.json`.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import bergson.hessians.astra as astra
import jax
import models
import numpy as np
import peers
import report
from bergson.config import IndexConfig
from bergson.utils.utils import numpy_to_tensor
from datasets import Dataset
from transformers import AutoModelForCausalLM

import converters
import jhessians
from jhessians.influence.gauss_newton import GaussNewtonPass

NAME = "gauss-newton"
PACKAGES = ["jax", "jaxlib", "flax", "numpy", "torch", "transformers", "bergson"]


@dataclass(frozen=True)
class Comparison:
    """Both tools on one model.

    Attributes:
        shape: Of the model.
        vectors: How many are multiplied.
        documents: Whose Hessian it is.
        tokens: Of each document.
        seconds: Tool → a time for each run, in turn.
        loads: The machine's load average before each run.
        difference: The largest between products, over a module's largest.
        bound: The ratio of the two ways' multiplications.
    """

    shape: str
    vectors: int
    documents: int
    tokens: int
    seconds: dict[str, list[float]]
    loads: list[float]
    difference: float
    bound: float

    @property
    def ratio(self) -> float:
        """bergson's time over ours."""
        pairs = zip(self.seconds["bergson"], self.seconds["jhessians"], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    @property
    def row(self) -> list[str]:
        """Of the table."""
        medians = [statistics.median(self.seconds[name]) for name in ("jhessians", "bergson")]
        return [
            self.shape, str(self.vectors), f"{self.documents} of {self.tokens}",
            *(f"{seconds:.2f}" for seconds in medians), f"**{self.ratio:.2f}**",
            f"{self.bound:.2f}", f"{self.difference:.1e}",
        ]  # fmt: skip


HEADER = ["model", "vectors", "documents", "jhessians, s", "bergson, s", "ratio", "bound",
          "difference"]  # fmt: skip


def main() -> None:
    """Measure, compare, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="+")
    parser.add_argument("--vectors", type=int, default=16)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    found = [compare(model, options) for model in options.model]
    table = report.table(HEADER, [each.row for each in found])
    print(table)
    if options.results is not None:
        write(found, table, options)


def compare(folder: Path, options: argparse.Namespace) -> Comparison:
    """Multiply with both tools in turn, compilation and first runs apart."""
    lines = (folder / models.TOKENS).read_text().splitlines()[: options.documents]
    rows = [json.loads(line)["input_ids"] for line in lines]
    shape = shape_of(folder)
    ways = tools(folder, rows, options.vectors)
    results = {name: way() for name, way in ways.items()}
    difference = max(
        float(np.abs(x - np.stack(results["bergson"][name])).max() / np.abs(x).max())
        for name, x in results["jhessians"].items()
    )
    del results
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    loads = []
    for _ in range(options.repeats):
        for name, way in ways.items():
            loads.append(os.getloadavg()[0])
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return Comparison(
        str(shape), options.vectors, len(rows), len(rows[0]), seconds, loads, difference,
        bound(shape, options.vectors),
    )  # fmt: skip


def tools(
    folder: Path, rows: list[list[int]], count: int
) -> dict[str, Callable[[], dict[str, np.ndarray | list[np.ndarray]]]]:
    """Either tool's way to multiply the same vectors with the Hessian of the same documents."""
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    documents = jhessians.Documents(np.concatenate(rows).astype(np.int32), None, offsets)
    plan = jhessians.plan_batches(documents.lengths, token_batch_size=2048)
    batches = list(jhessians.iterate_batches(documents, plan))
    loss, model = jhessians.NextTokenLoss("dataset"), converters.load(folder).model
    sites = jhessians.find_sites(loss, model, batches[0])
    ours = GaussNewtonPass(jhessians.Problem(loss, model, sites))

    random = np.random.default_rng(0)
    vectors = {
        name: random.standard_normal((count, site.out_features, site.inputs), np.float32)
        for site in sites.values()
        for name in site.module_names()
    }
    theirs = astra.GaussNewtonProduct(
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval(),
        Dataset.from_dict({"input_ids": rows}),
        IndexConfig(run_path="unused", model=str(folder), loss_reduction="sum"),
        list(vectors),
    )

    def multiply() -> dict[str, np.ndarray]:
        return jax.tree.map(np.asarray, ours.run(batches, vectors))

    def multiply_one_by_one() -> dict[str, list[np.ndarray]]:
        found: dict[str, list[np.ndarray]] = {name: [] for name in vectors}
        for number in range(count):
            flat = {name: numpy_to_tensor(x[number].ravel()) for name, x in vectors.items()}
            for name, product in theirs(flat, list(range(len(rows)))).items():
                whole = product.detach().numpy().reshape(vectors[name].shape[1:])
                found[name].append(whole * len(rows))  # theirs is a mean
        return found

    return {"jhessians": multiply, "bergson": multiply_one_by_one}


def shape_of(folder: Path) -> models.Shape:
    """Of the model in a folder."""
    config = json.loads((folder / "config.json").read_text())
    return models.Shape(
        config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"],
        config["vocab_size"],
    )  # fmt: skip


def bound(shape: models.Shape, vectors: int) -> float:
    """How much faster ours would be if both multiplied matrices at one speed.

    Of a linear in a block, each vector takes four products: two for the change of its output, one
    back to its input and one for the gradient. The model's own forward pass is bergson's once for
    each vector, and ours twice for all (`VECTORS_AT_ONCE` of them).
    """
    blocks, all_weights = sum(
        each.in_features * each.out_features * each.layers for each in shape.linears
    ), shape.weights  # fmt: skip
    of_vector = 4 * blocks + 2 * (all_weights - blocks)
    return vectors * (of_vector + all_weights) / (vectors * of_vector + 2 * all_weights)


def write(found: list[Comparison], table: str, options: argparse.Namespace) -> None:
    """The page and its numbers; files of an earlier run are replaced."""
    options.results.mkdir(parents=True, exist_ok=True)
    words = [f"--{name} {getattr(options, name)}" for name in ("vectors", "documents", "repeats")]
    command = " ".join(["python examples/benchmarks/gauss_newton.py DIR …", *words])
    machine, versions = report.describe_machine(), peers.versions(sys.executable, PACKAGES)
    loads = [load for each in found for load in each.loads]
    page = PAGE.format(
        machine=machine,
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        command=command, low=min(loads), high=max(loads), repeats=options.repeats, table=table,
    )  # fmt: skip
    (options.results / f"{NAME}.md").write_text(page)
    numbers = {
        "machine": machine, "versions": versions, "command": command,
        "comparisons": [asdict(each) for each in found],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    (options.results / f"{NAME}.json").write_text(json.dumps(numbers, indent=1) + "\n")


PAGE = """\
# Products of the Gauss-Newton Hessian with many vectors, side by side

- machine: {machine}
- versions: {versions}
- command: `{command}`
- load average before a run: {low:.1f} to {high:.1f} (the runs themselves leave some)

Seconds are medians of {repeats} runs in turn, in float32, without imports and compilation. The
ratio is bergson's time over jhessians', the median over neighbouring runs; the bound is what it
would be if both multiplied matrices at one speed, from the multiplications that either way needs.
Difference is the largest one between products over a module's largest. A model is (width, layers,
inner, vocabulary).

{table}
"""


if __name__ == "__main__":
    main()
