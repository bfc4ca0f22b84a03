"""What single ideas are worth on this machine: `python examples/benchmarks/levers.py`.

Prints Markdown: ways to multiply x by its own transpose, ways to find eigenpairs. Times are medians
of interleaved runs; in a table, read the ratios.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import lax
from threadpoolctl import threadpool_limits

from jhessians.linalg.eigen import usable_cores
from jhessians.linalg.symmetric import packed_gram

ROWS = 2048
WIDTHS = (256, 512, 1408, 2048)
SPECTRUM = 1e6  # of a covariance: its largest eigenvalue over its smallest one


def interleaved(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each way; each runs once beforehand."""
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def grams(repeats: int) -> None:
    """Full, packed, by BLAS, and by JAX's primitive for symmetric products."""
    names = ["product", "packed block rows", "BLAS ssyrk", "symmetric_product"]
    print(f"\n### xᵀx of [{ROWS}, d] in float32, over the time of a full product\n")
    print("| d | product, ms | " + " | ".join(names[1:]) + " |")
    print("|---" * (len(names) + 1) + "|")
    for d in WIDTHS:
        x = jax.random.normal(jax.random.key(0), (ROWS, d))
        host = np.asfortranarray(x)
        full = jax.jit(lambda x: x.T @ x)
        packed = jax.jit(packed_gram)
        symmetric = jax.jit(
            lambda x: lax.linalg.symmetric_product(
                x.T, jnp.zeros((x.shape[1],) * 2, x.dtype), symmetrize_output=False
            )
        )
        took = interleaved(
            {
                "product": lambda f=full, x=x: jax.block_until_ready(f(x)),
                "packed block rows": lambda f=packed, x=x: jax.block_until_ready(f(x)),
                "BLAS ssyrk": lambda x=host: scipy.linalg.blas.ssyrk(1.0, x, trans=1),
                "symmetric_product": lambda f=symmetric, x=x: jax.block_until_ready(f(x)),
            },
            repeats,
        )
        whole = took["product"]
        cells = " | ".join(f"{took[name] / whole:.2f}" for name in names[1:])
        print(f"| {d} | {1e3 * whole:.1f} | {cells} |")


def eigenpairs(repeats: int) -> None:
    """LAPACK's drivers in float64, one matrix per core or all cores on one.

    JAX's evd is LAPACK's as well; its QDWH runs on a TPU alone, which has no float64 units.
    """
    cores = usable_cores()
    names = [
        "evd, all cores on each",
        "scipy's evd",
        "scipy's evr",
        "JAX's evd",
        "float32 evd",
    ]
    print(f"\n### Eigenpairs of {cores} matrices, over the time of numpy's evd, a core for each\n")
    print("| d | evd, s | " + " | ".join(names) + " | negative values in float32 |")
    print("|---" * (len(names) + 3) + "|")
    for d in WIDTHS[1:]:
        covariance = _covariance(d)
        narrow = covariance.astype(np.float32)
        ways = {
            "evd": _each_on_a_core(np.linalg.eigh, covariance),
            "evd, all cores on each": _all_cores(np.linalg.eigh, covariance),
            "scipy's evd": _each_on_a_core(partial(scipy.linalg.eigh, driver="evd"), covariance),
            "scipy's evr": _each_on_a_core(partial(scipy.linalg.eigh, driver="evr"), covariance),
            "JAX's evd": _each_on_a_core(_by_jax, covariance),
            "float32 evd": _each_on_a_core(np.linalg.eigh, narrow),
        }
        took = interleaved(ways, repeats)
        negative = int((np.linalg.eigh(narrow)[0] < 0).sum())
        cells = " | ".join(f"{took[name] / took['evd']:.2f}" for name in names)
        print(f"| {d} | {took['evd']:.2f} | {cells} | {negative} |")


def _each_on_a_core(eigh: Callable, matrix: np.ndarray) -> Callable[[], None]:
    def run() -> None:
        cores = usable_cores()
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(cores) as pool:
            list(pool.map(eigh, [matrix] * cores))

    return run


def _all_cores(eigh: Callable, matrix: np.ndarray) -> Callable[[], None]:
    def run() -> None:
        with threadpool_limits(usable_cores(), user_api="blas"):
            for _ in range(usable_cores()):
                eigh(matrix)

    return run


def _by_jax(matrix: np.ndarray) -> object:
    with jax.enable_x64(True):
        return jax.block_until_ready(lax.linalg.eigh(jnp.asarray(matrix)))


def _covariance(d: int) -> np.ndarray:
    """A matrix with a covariance's falling spectrum."""
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.standard_normal((d, d)))[0]
    return (basis * np.geomspace(1, 1 / SPECTRUM**2, d)) @ basis.T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each way")
    repeats = parser.parse_args().repeats
    device = jax.devices()[0]
    print(f"{device.device_kind}, {usable_cores()} cores, jax {jax.__version__}, ", end="")
    print(f"numpy {np.__version__}, scipy {scipy.__version__}; ", end="")
    print(f"medians of {repeats} interleaved runs")
    grams(repeats)
    eigenpairs(repeats)


if __name__ == "__main__":
    main()
