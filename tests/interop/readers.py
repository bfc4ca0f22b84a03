"""Every reader of files, with a small folder that it reads: to be damaged by tests."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.hub import find
from converters.reader import open_checkpoint
from converters.registry import read_config
from jhessians.commands.score.hessian import options_of_run
from jhessians.commands.top import TopConfig, top
from jhessians.commands.verify import VerifyConfig, verify
from jhessians.config.provenance import read_options
from jhessians.folds.normalizers import AdafactorNormalizer, AdamNormalizer
from jhessians.interop import torchfile
from jhessians.interop.gradient_store import GradientStore, GradientWriter
from jhessians.interop.load import FactorStore
from jhessians.interop.low_rank_store import LowRankStore, write_low_rank
from jhessians.interop.optimizer_state import Parameter, read_torch_optimizer
from jhessians.interop.processor import GradientProcessor
from jhessians.interop.processor_files import open_hessians
from jhessians.interop.rundir import RunDirectory
from jhessians.interop.safetensors_file import write_safetensors
from jhessians.interop.score_store import ScoreStore, ScoreWriter
from tests.interop.synthetic import export, make_factors

SMALL = {"h.0.up": (3, 5), "h.0.down": (4, 3)}
PARAMETERS = (
    Parameter("h.0.up.weight", (3, 5), "h.0.up"),
    Parameter("h.0.up.bias", (3,), "h.0.up"),
    Parameter("h.0.down.weight", (4, 3), "h.0.down", transposed=True),
)
OPTIONS = {"jhessians": {"compute": {"run_path": "runs/x", "method": "ekfac", "seed": 7}}}
CONFIG = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 11, "n_embd": 4,
    "n_layer": 1, "n_head": 2, "n_positions": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A reader and what it reads.

    Attributes:
        write: Fills an existing, empty folder.
        read: Reads all of it.
    """

    write: Callable[[Path], Any]
    read: Callable[[Path], Any]


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).random(shape).astype(np.float32)


def write_factors(folder: Path, **how: Any) -> None:
    export(folder, make_factors(sizes=SMALL), shards=2, **how)


def read_factors(folder: Path) -> None:
    store = FactorStore(folder)
    assert store.total_processed and store.modules
    for kind in store.kinds:
        for module in store.shapes(kind):
            store.read(kind, module)


def write_processor(folder: Path) -> None:
    normalizers = {"h.0.up": AdamNormalizer(draw(3, 5), draw(3)),
                   "h.0.down": AdafactorNormalizer(draw(4), draw(3))}  # fmt: skip
    hessians = {"h.0.up": draw(4, 4), "h.0.down": draw(2, 2)}
    eigen = {"h.0.up": (draw(4), draw(4, 4)), "h.0.down": (draw(2), draw(2, 2))}
    GradientProcessor(normalizers, hessians, eigen, projection_dim=2).save(folder)


def read_processor(folder: Path) -> None:
    GradientProcessor.load(folder)
    for table in open_hessians(folder):
        for value in table.values():
            for each in value if isinstance(value, tuple) else (value,):
                each.read()


def write_gradients(folder: Path) -> None:
    counts = np.array([2, 0, 3])
    with GradientWriter(folder, {"a": 2, "b": 3}, np.dtype("f4"), 5, counts=counts) as writer:
        writer.write(0, draw(5, 5))


def read_gradients(folder: Path) -> None:
    store = GradientStore(folder)
    for module in store.sizes:
        np.sum(np.asarray(store.module(module), np.float32))


def write_outer_products(folder: Path) -> None:
    with write_low_rank(folder, SMALL, 2, np.dtype("f4"), 3) as file:
        file.write(0, 0, draw(3, file.width))


def read_outer_products(folder: Path) -> None:
    store = LowRankStore(folder)
    for module in store.shapes:
        store.factors(module)


def write_scores(folder: Path) -> None:
    ScoreWriter(
        folder, documents=3, queries=2, offsets=np.array([0, 2, 2, 5]),
        candidates=np.array([1, 4, 6]),
    ).write(np.arange(5), draw(5, 2))  # fmt: skip


def read_scores(folder: Path) -> None:
    store = ScoreStore(folder)
    store.read_all()
    store.read(0)
    assert store.complete in (True, False)


def write_lists(folder: Path) -> None:
    place = {"query": 0, "rank": 1, "document": 3, "score": 0.5, "text": "words"}
    lines = [place, place | {"rank": -1, "document": 4}]
    (folder / "columns.jsonl").write_text(json.dumps({"query": 0, "text": "what?"}) + "\n")
    (folder / "top.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def weights() -> dict[str, np.ndarray]:
    return {"wte.weight": draw(11, 4), "ln_f.weight": draw(4)}


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    write_safetensors(path, {n: (x.shape, x.dtype) for n, x in tensors.items()}, tensors.values())


def write_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_tensors(folder / "model.safetensors", weights())


def write_sharded_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    index = {}
    for number, (name, value) in enumerate(weights().items()):
        index[name] = f"model-{number}.safetensors"
        write_tensors(folder / index[name], {name: value})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def write_torch_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torchfile.save(weights(), folder / "pytorch_model.bin")


def read_model(folder: Path) -> None:
    find(folder).obtain_weights()
    read_config(folder)
    for tensor in open_checkpoint(folder).tensors.values():
        tensor.read()


def write_optimizer(folder: Path) -> None:
    state = {n: {"step": np.float32(3), "exp_avg_sq": draw(*each.shape)}
             for n, each in enumerate(PARAMETERS)}  # fmt: skip
    group = {"lr": 0.1, "betas": (0.9, 0.999), "params": list(range(len(PARAMETERS)))}
    torchfile.save({"state": state, "param_groups": [group]}, folder / "optimizer.pt")


READERS = {
    "factors": Reader(lambda folder: write_factors(folder, layout="bergson"), read_factors),
    "older factors": Reader(
        lambda folder: write_factors(folder, layout="influence_results"), read_factors
    ),
    "processor": Reader(write_processor, read_processor),
    "gradients": Reader(write_gradients, read_gradients),
    "outer products": Reader(write_outer_products, read_outer_products),
    "scores": Reader(write_scores, read_scores),
    "lists": Reader(write_lists, lambda folder: top(TopConfig(scores=str(folder), n=1))),
    "options": Reader(
        lambda folder: (folder / "config.yaml").write_text(json.dumps(OPTIONS, indent=1)),
        lambda folder: (options_of_run(folder), read_options(folder)),
    ),
    "older options": Reader(
        lambda folder: (folder / "config.json").write_text(json.dumps(OPTIONS)),
        lambda folder: (options_of_run(folder), read_options(folder)),
    ),
    "model": Reader(write_model, read_model),
    "sharded model": Reader(write_sharded_model, read_model),
    "torch model": Reader(write_torch_model, read_model),
    "optimizer": Reader(
        write_optimizer,
        lambda folder: read_torch_optimizer(folder, PARAMETERS, include_bias=True),
    ),
    "any result": Reader(
        write_lists, lambda folder: verify(VerifyConfig(run=str(folder), deep=True))
    ),
}


def finish(reader: Reader, folder: Path) -> None:
    """Write a reader's folder as a run does: with a manifest."""
    with RunDirectory(folder, command="test") as part:
        reader.write(part)
