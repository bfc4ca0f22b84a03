"""What each `--matmul_precision` errs by, and how fast it is: products, and whole fits.

    python examples/benchmarks/precision.py

The errors are emulated, on any machine: operands are split into their short parts or rounded to
one, as a matrix unit does, and the parts are multiplied and summed in float32. (On a CPU, XLA takes
the names of some of these precisions and multiplies in float32: it can't show a mistake.) What the
present device really does follows, error and speed, for every precision that it has.

A whole fit is that of a small random Llama: forward and backward pass, Grams and correction all in
one precision, against float64, Λ in the eigenvectors of float64. `--model DIR` keeps the model and
its tokens, and `--peer OUT` adds what bergson fitted on them in float32:

    bergson hessian OUT --method kfac --model DIR --dataset DIR/tokens.jsonl --truncation \\
        --use_dataset_labels
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import models
import numpy as np
import report
from emulation import EMULATED, emulate_on_cpu, emulated_product
from measure import Tool, read_factor

import converters
import jhessians
from jhessians.data.batching import iterate_batches, plan_batches
from jhessians.data.sources import DataOptions, load_documents
from jhessians.devices import precision
from jhessians.devices.precision import HIGHEST, MATMUL_PRECISIONS
from jhessians.fitting.eigenbases import covariance_matrices

HERE = Path(__file__).resolve().parent
SHAPE, TOKENS, CHUNK = models.Shape(256, 6, 688, 2048), 4096, 256


def largest(found: np.ndarray, exact: np.ndarray) -> float:
    """The largest absolute difference over the largest absolute value."""
    return float(np.abs(np.float64(found) - exact).max() / np.abs(exact).max())


def operands() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Typical products xᵀy: name, x and y, float32, whose columns differ in scale and mean."""
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        scales = np.exp(random.standard_normal(columns))
        means = random.standard_normal(columns)
        return (random.standard_normal((rows, columns)) * scales + means).astype(np.float32)

    x, y = matrix(256, 512), matrix(256, 1408)
    yield "gradient of 256 positions [512, 1408]", x, y
    q = np.linalg.qr(random.standard_normal((512, 512)))[0].astype(np.float32)
    yield "256 positions times eigenvectors [512, 512]", matrix(512, 256), q
    for positions in (2048, 32768):
        x = matrix(positions, 512)
        yield f"Gram of {positions:,} positions [512, 512]", x, x


def product_rows() -> Iterator[list[str]]:
    """Errors of single products: of the parts alone, and with sums in float32."""
    for name, x, y in operands():
        exact = np.float64(x).T @ np.float64(y)
        row = [name, f"{largest(x.T @ y, exact):.1e}"]
        for each in EMULATED:
            of = {
                dtype: emulated_product(
                    jnp.asarray(x), jnp.asarray(y), each,
                    lambda x, y, dtype=dtype: jnp.asarray(np.asarray(x, dtype).T
                                                          @ np.asarray(y, dtype)),
                )
                for dtype in (np.float64, np.float32)
            }  # fmt: skip
            errors = (largest(of[dtype], exact) for dtype in (np.float64, np.float32))
            row.append(" / ".join(f"{error:.0e}" for error in errors))
        yield row


class Fit:
    """Fits of one model on one data set, in any precision."""

    def __init__(self, folder: Path):
        options = DataOptions(dataset=str(folder / models.TOKENS))
        tokenizer = converters.load_tokenizer(str(folder), None)
        self.documents = load_documents(
            options, tokenizer, max_length=CHUNK, vocab_size=SHAPE.vocabulary
        )
        plan = plan_batches(self.documents.lengths, token_batch_size=2048)
        self.batches = list(iterate_batches(self.documents, plan))
        self.loss = jhessians.NextTokenLoss("dataset")
        self.folder = folder

    def problem(self, dtype: type, name: str) -> jhessians.Problem:
        model = converters.load(str(self.folder), dtype=dtype).model
        sites = jhessians.find_sites(self.loss, model, self.batches[0])
        return jhessians.Problem(self.loss, model, sites, matmul_precision=name)

    def covariances(self, dtype: type, name: str) -> dict[str, dict[str, np.ndarray]]:
        """Factor → module → its sum."""
        problem = self.problem(dtype, name)
        sums = jhessians.run_pass(jhessians.Covariance(dtype), problem, self.batches, dtype=dtype)
        found: dict[str, dict[str, np.ndarray]] = {"A": {}, "S": {}}
        for each in covariance_matrices(problem.sites):
            module = each.site.module_names()[each.slot or 0]
            found["A" if each.side == "activation" else "S"][module] = each.read(sums)
        return found

    def eigenvectors(self, exact: dict[str, dict[str, np.ndarray]]) -> dict[str, dict]:
        """Operands of the correction, from the factors in float64."""
        found: dict[str, dict] = {}
        for each in covariance_matrices(self.problem(np.float64, HIGHEST).sites):
            module = each.site.module_names()[each.slot or 0]
            matrix = exact["A" if each.side == "activation" else "S"][module]
            of_site = found.setdefault(each.site.name, {}).setdefault(each.side, [])
            of_site.append(np.linalg.eigh(matrix)[1])
        return {name: {k: np.stack(x) for k, x in kinds.items()} for name, kinds in found.items()}

    def correction(self, dtype: type, name: str, vectors) -> dict[str, np.ndarray]:
        """Site → Λ."""
        problem = self.problem(dtype, name)
        here = jax.tree.map(lambda x: jnp.asarray(x, dtype), vectors)
        fold = jhessians.EigenvalueCorrection(dtype)
        sums = jhessians.run_pass(fold, problem, self.batches, dtype=dtype, operands=here)
        return {name: np.asarray(x) for name, x in sums.items()}


def worst(found: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> float:
    """The largest error over all modules."""
    return max(largest(x, exact[name]) for name, x in found.items())


def fit_rows(folder: Path, peer: Path | None) -> Iterator[list[str]]:
    """Errors of A, S, Λ and the sum of Λ after a whole fit."""
    fit = Fit(folder)
    exact = fit.covariances(np.float64, HIGHEST)
    vectors = fit.eigenvectors(exact)
    lambdas = fit.correction(np.float64, HIGHEST, vectors)
    totals = {name: x.sum((-1, -2)) for name, x in lambdas.items()}
    for name in MATMUL_PRECISIONS:
        found = fit.covariances(np.float32, name)
        squares = fit.correction(np.float32, name, vectors)
        sums = {name: np.float64(x).sum((-1, -2)) for name, x in squares.items()}
        errors = [worst(found["A"], exact["A"]), worst(found["S"], exact["S"]),
                  worst(squares, lambdas), worst(sums, totals)]  # fmt: skip
        yield [name, *(f"{error:.1e}" for error in errors)]
    if peer:
        tool = Tool("peer", [], {}, {}, {"A": "activation_sharded", "S": "gradient_sharded"})
        theirs = {factor: read_factor(tool, peer, factor) for factor in tool.factors}
        errors = [
            worst({name: theirs[factor][name] for name in exact[factor]}, exact[factor])
            for factor in ("A", "S")
        ]
        yield ["bergson in float32", *(f"{error:.1e}" for error in errors), "", ""]


def device_rows(device: jax.Device, size: int) -> Iterator[list[str]]:
    """What the device really does: error of a product, and operations per second."""
    random = np.random.default_rng(0)
    x, y = random.standard_normal((2, size, size)).astype(np.float32)
    exact = np.float64(x) @ np.float64(y)
    x, y = jax.device_put((x, y), device)
    for name, each in MATMUL_PRECISIONS.items():
        try:
            precision.require_supported(name, device)
        except jhessians.errors.ConfigError:
            yield [name, "", "not on this device"]
            continue
        with jax.default_matmul_precision(each.jax):
            multiply = jax.jit(lambda x, y: x @ y)
            found = np.asarray(multiply(x, y))
            seconds = []
            for _ in range(8):
                start = time.perf_counter()
                multiply(x, y).block_until_ready()
                seconds.append(time.perf_counter() - start)
        yield [name, f"{largest(found, exact):.1e}", f"{2 * size**3 / min(seconds) / 1e9:,.0f}"]


def table(header: Sequence[str], rows: Iterator[list[str]]) -> str:
    """A Markdown table; rows are shown as they are found."""
    lines = [list(header), ["---"] + ["---:"] * (len(header) - 1)]
    for row in rows:
        print("  ".join(row), flush=True)
        lines.append(row)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Print all tables and write them to a page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", type=int, default=2048, help="of the device's products")
    parser.add_argument("--model", type=Path, metavar="DIR", help="keep the random model here")
    parser.add_argument("--peer", type=Path, metavar="OUT", help="bergson's fit of --model")
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)  # errors are measured against float64
    load, device = os.getloadavg()[0], jax.devices()[0]
    device_table = table(["precision", "error", "GFLOP/s"], device_rows(device, options.size))
    cpu = jax.devices("cpu")[0]
    emulate_on_cpu()
    with jax.default_device(cpu), tempfile.TemporaryDirectory() as temporary:
        products = table(["product", "float32", *EMULATED], product_rows())
        folder = options.model or Path(temporary) / "model"
        models.build(folder, SHAPE, tokens=TOKENS, chunk=CHUNK)
        header = ["precision", "A", "S", "Λ", "sum of Λ"]
        fits = table(header, fit_rows(folder, options.peer))
    words = ["--model DIR", "--peer OUT"] if options.peer else []
    command = " ".join(["python examples/benchmarks/precision.py", *words])
    page = PAGE.format(
        machine=report.describe_machine(), device=f"{device.device_kind} ({device.platform})",
        versions=", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "numpy")),
        load=load, command=command, size=options.size, device_table=device_table,
        products=products, fits=fits,
        note=CPU_NOTE if device.platform == "cpu" else "", shape=SHAPE, tokens=TOKENS, chunk=CHUNK,
    )  # fmt: skip
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"precision-{device.platform}.md").write_text(page)


PAGE = """\
# Precision of matrix products

- machine: {machine}
- device: {device}; other processes that wanted to run when this began: {load:.1f}
- versions: {versions}
- command: `{command}`

Errors are the largest absolute difference to float64 over the largest absolute value.

## This device

A product of two float32 matrices, {size} x {size}, best of 8:

{device_table}
{note}
## Emulated: single products

Of the parts alone (their products summed in float64) / with sums in float32, as numpy sums them.

{products}

## Emulated: whole fits

A random Llama (width, layers, inner, vocabulary) = ({shape}), {tokens:,} tokens in chunks of
{chunk}, the largest error over all modules; `highest` is float32.

{fits}
"""

CPU_NOTE = """
A CPU multiplies float32 numbers in float32 only: no GPU or TPU was at hand, so nothing on this page
tells how fast the others are.
"""


if __name__ == "__main__":
    main()
