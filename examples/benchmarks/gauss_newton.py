"""Products of the Gauss-Newton Hessian with many vectors, ours and bergson's.

    python examples/benchmarks/gauss_newton.py MODEL [--vectors 16] [--documents 16] [--repeats 3]

MODEL is a folder that `models.py` made, with its tokens. It runs in an environment that has both
tools. bergson multiplies one vector at a time, ours all of them. Times are medians of runs in turn,
without compilation; in the table, read the ratio.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import bergson.hessians.astra as astra
import jax
import models
import numpy as np
from bergson.config import IndexConfig
from bergson.utils.utils import numpy_to_tensor
from datasets import Dataset
from transformers import AutoModelForCausalLM

import converters
import jhessians
from jhessians.influence.gauss_newton import GaussNewtonPass


def main() -> None:
    """Measure, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--vectors", type=int, default=16)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    lines = (options.model / models.TOKENS).read_text().splitlines()[: options.documents]
    rows = [json.loads(line)["input_ids"] for line in lines]

    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    documents = jhessians.Documents(np.concatenate(rows).astype(np.int32), None, offsets)
    plan = jhessians.plan_batches(documents.lengths, token_batch_size=2048)
    batches = list(jhessians.iterate_batches(documents, plan))
    loss, model = jhessians.NextTokenLoss("dataset"), converters.load(options.model).model
    sites = jhessians.find_sites(loss, model, batches[0])
    ours = GaussNewtonPass(jhessians.Problem(loss, model, sites))

    random = np.random.default_rng(0)
    vectors = {
        name: random.standard_normal((options.vectors, site.out_features, site.inputs), np.float32)
        for site in sites.values()
        for name in site.module_names()
    }
    theirs = astra.GaussNewtonProduct(
        AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="eager").eval(),
        Dataset.from_dict({"input_ids": rows}),
        IndexConfig(run_path="unused", model=str(options.model), loss_reduction="sum"),
        list(vectors),
    )

    def multiply() -> dict[str, np.ndarray]:
        return jax.tree.map(np.asarray, ours.run(batches, vectors))

    def multiply_one_by_one() -> dict[str, list[np.ndarray]]:
        found: dict[str, list[np.ndarray]] = {name: [] for name in vectors}
        for number in range(options.vectors):
            flat = {name: numpy_to_tensor(x[number].ravel()) for name, x in vectors.items()}
            for name, product in theirs(flat, list(range(len(rows)))).items():
                found[name].append(product.detach().numpy() * len(rows))  # theirs is a mean
        return found

    ways = {"jhessians": multiply, "bergson": multiply_one_by_one}
    results = {name: way() for name, way in ways.items()}
    worst = max(
        np.abs(x.reshape(options.vectors, -1) - np.stack(results["bergson"][name])).max()
        / np.abs(x).max()
        for name, x in results["jhessians"].items()
    )
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    print(f"{options.vectors} vectors, {len(rows)} documents of {len(rows[0])} tokens; products "
          f"differ by up to {worst:.1e} of a module's largest\n")  # fmt: skip
    print("| tool | seconds | over jhessians |\n|---|---:|---:|")
    for name, each in medians.items():
        print(f"| {name} | {each:.2f} | {each / medians['jhessians']:.2f} |")


if __name__ == "__main__":
    main()
