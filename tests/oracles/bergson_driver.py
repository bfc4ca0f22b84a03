"""The process that runs torch bergson for `tests.oracles.bergson`, importing it only once.

Starting `bergson` costs seconds of imports, a fit on a toy model a fraction of one. So this reads
jobs as JSON lines from its first standard input, answers each with one JSON line, and runs
bergson's own command line inside. Everything bergson prints goes to the job's log.

Two things are altered. Ranks start from a fork server that holds the imports instead of from new
interpreters. And in a Hessian fit `--max_batch_size` caps the batches and `--attribute_tokens`
reaches the collectors: options that bergson 2.5.1 accepts there and does not pass on.
"""

import functools
import json
import multiprocessing
import os
import sys
import traceback
import types
from pathlib import Path
from typing import Any

# Toy matrices: a second thread gains nothing, and where cores are shared the two of them spin
# waiting for each other, which made fits four times slower.
THREADS = 1
_PRELOAD = [
    "torch",
    "bergson.hessians.hessian_approximations",
    "bergson.hessians.apply_hessian",
    "bergson.build",
    "bergson.score.score",
]


def start_ranks_from_fork_server() -> None:
    """Let bergson's launcher fork ranks from a process that has imported but never computed."""
    import bergson.distributed
    import torch

    multiprocessing.set_forkserver_preload(_PRELOAD)
    bergson.distributed.mp = types.SimpleNamespace(
        set_sharing_strategy=torch.multiprocessing.set_sharing_strategy,
        get_context=lambda _method: multiprocessing.get_context("forkserver"),
    )


def obedient_hessian_worker(
    rank: int, local_rank: int, world_size: int, index_cfg: Any, *args: Any
) -> None:
    """bergson's `hessian_worker`, minding `max_batch_size` and `attribute_tokens` as well."""
    from bergson.data import allocate_batches
    from bergson.hessians import hessian_approximations as module

    worker = getattr(module, "careless_hessian_worker", module.hessian_worker)
    names = ("AutocorrelationCollector", "JointAutocorrelationCollector")
    collectors = {name: getattr(module, name) for name in names}
    module.allocate_batches = functools.partial(
        allocate_batches, max_batch_size=index_cfg.max_batch_size
    )
    for name, collector in collectors.items():
        attributes = {"attribute_tokens": index_cfg.attribute_tokens}
        setattr(module, name, functools.partial(collector, **attributes))
    try:
        worker(rank, local_rank, world_size, index_cfg, *args)
    finally:
        module.allocate_batches = allocate_batches
        for name, collector in collectors.items():
            setattr(module, name, collector)


def run_command(job: dict[str, Any]) -> None:
    """Run `bergson <argv>` in this process; `seed` fixes the labels it may sample."""
    import torch
    from bergson.__main__ import main
    from bergson.hessians import hessian_approximations as module

    torch.manual_seed(job["seed"])
    original = module.hessian_worker
    if {"--max_batch_size", "--attribute_tokens"} & set(job["argv"]):
        module.careless_hessian_worker = original
        module.hessian_worker = obedient_hessian_worker
    if "--solver" in job["argv"]:
        copy_refined_rows()
    sys.argv = ["bergson", *job["argv"]]
    try:
        main()
    finally:
        module.hessian_worker = original


def copy_refined_rows() -> None:
    """Give `astra` copies of stored rows.

    bergson 2.5.1 adds to them in place; on CPU and in float32 they are a file that is mapped for
    reading, and the process dies.
    """
    from bergson.hessians.astra import Astra

    read = Astra._read_row
    if read.__name__ == "_read_row":
        Astra._read_row = lambda *args: {name: x.clone() for name, x in read(*args).items()}


def apply_preconditioner(job: dict[str, Any], rank: int | None = None) -> None:
    """Apply bergson's factored preconditioner to stored gradients and store the result.

    `rank` None reads all shards (`from_path`), otherwise that rank's (`from_shards`).
    """
    from bergson.config import InversionConfig
    from bergson.hessians.preconditioner import FactoredPreconditioner
    from safetensors.torch import load_file, save_file

    inversion = InversionConfig(inversion=job["inversion"], damping_factor=job["damping_factor"])
    options = {"inversion_cfg": inversion, "ev_correction": job["ev_correction"]}
    if rank is None:
        preconditioner = FactoredPreconditioner.from_path(job["hessian"], **options)
    else:
        preconditioner = FactoredPreconditioner.from_shards(
            job["hessian"], rank=rank, device="cpu", **options
        )
    gradients = load_file(job["gradients"])
    applied = preconditioner.apply({k: v.flatten(1).clone() for k, v in gradients.items()})
    result = {k: v.reshape(gradients[k].shape).contiguous() for k, v in applied.items()}
    save_file(result, f"{job['result']}-{rank or 0}.safetensors")


def apply_on_rank(rank: int, processes: int, job: dict[str, Any]) -> None:
    """One rank of a gloo group that applies its own shards."""
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=Path(f"{job['result']}-rendezvous").as_uri(),
        rank=rank,
        world_size=processes,
    )
    try:
        apply_preconditioner(job, rank)
    finally:
        torch.distributed.destroy_process_group()


def apply_on_ranks(job: dict[str, Any]) -> None:
    """Apply with one process per shard.

    Raises:
        RuntimeError: A rank failed.
    """
    context = multiprocessing.get_context("forkserver")
    count = job["processes"]
    ranks = [
        context.Process(target=apply_on_rank, args=(rank, count, job)) for rank in range(count)
    ]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(timeout=300)
        codes = [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
    if any(codes):
        raise RuntimeError(f"ranks ended with {codes}")


def read_scores(job: dict[str, Any]) -> None:
    """Store a score directory's matrix [documents, queries]; nan where nothing was written."""
    import numpy as np
    from bergson.data import load_scores

    scores = load_scores(Path(job["scores"]))
    matrix = np.array(scores[:], dtype=np.float64)
    for query in range(scores.num_scores):
        matrix[~scores.mmap[f"written_{query}"], query] = np.nan
    np.save(job["result"], matrix)


JOBS = {
    "command": run_command,
    "apply": apply_preconditioner,
    "apply_on_ranks": apply_on_ranks,
    "scores": read_scores,
}


def main() -> None:
    """Answer jobs until standard input closes."""
    answers = os.fdopen(os.dup(1), "w")
    # From here on the two descriptors belong to bergson's output; ranks inherit them as well.
    os.dup2(2, 1)
    general = os.dup(2)
    try:
        import torch

        torch.set_num_threads(THREADS)
        start_ranks_from_fork_server()
    except Exception:
        answers.write(json.dumps({"error": traceback.format_exc()}) + "\n")
        answers.flush()
        return
    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()

    for line in sys.stdin:
        job = json.loads(line)
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        answer: dict[str, Any] = {}
        try:
            JOBS[job["kind"]](job)
        except (Exception, SystemExit):
            answer["error"] = traceback.format_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(general, 1)
            os.dup2(general, 2)
            os.close(log)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
