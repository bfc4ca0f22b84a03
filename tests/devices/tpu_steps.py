"""Compile steps for TPUs that aren't there, and print what the compiler says of them as JSON.

It runs in a process of its own: libtpu reads the environment, and is kept from the other tests.
"""

import json
import re
import sys
import time
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jhessians
from jhessians.models import vocabulary
from jhessians.models.config import (
    AttentionConfig,
    DecoderConfig,
    ExpertsConfig,
    MLPConfig,
    NormConfig,
    RopeConfig,
)

WIDTH, VOCABULARY, LENGTH, EXPERTS = 384, 32768, 128, 64
INPUTS, OUTPUTS = 1365, 700  # a chip's rows are whole tiles nowhere
WIDE, NARROW = 4095, 16  # for many chips
LINEARS = {"linear": (INPUTS, OUTPUTS), "wide": (WIDE, NARROW)}


class One(nnx.Module):
    """A single linear."""

    def __init__(self, inputs, outputs, rngs):
        self.linear = jhessians.Linear(inputs, outputs, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)


def decoder(experts: bool) -> jhessians.Decoder:
    """A decoder whose embedding and head outweigh all else; or whose experts do."""
    attention = AttentionConfig(
        heads=3, key_value_heads=3, head_size=128, fused="groups", bias=False, output_bias=False,
        ropes=(RopeConfig(128),),
    )  # fmt: skip
    config = DecoderConfig(
        family="llama", vocabulary_size=512 if experts else VOCABULARY, layers=1, positions=LENGTH,
        norm=NormConfig("rms", 1e-5), hidden_size=WIDTH, attention=attention,
        mlp=MLPConfig(WIDTH, "silu", "plain"),
        experts=ExpertsConfig(EXPERTS, 2, MLPConfig(WIDTH, "silu", "fused")) if experts else None,
    )  # fmt: skip
    return jhessians.Decoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))


def compiled(topology: str, kind: str, *, axes: str | None, corrected: bool):
    """The step of a pass, and its mesh."""
    mesh = jhessians.make_mesh(axes=axes, devices=jhessians.topology_devices(topology))
    n, shape = mesh.size, jax.ShapeDtypeStruct
    if kind in LINEARS:
        inputs, outputs = LINEARS[kind]
        model = nnx.eval_shape(lambda: One(inputs, outputs, nnx.Rngs(0)))
        batch, loss = shape((n, LENGTH, inputs), jnp.bfloat16), lambda m, x: (m(x) ** 2).sum()
    else:
        model = nnx.eval_shape(lambda: decoder(kind == "experts"))
        token, mask = shape((n, LENGTH), np.int32), shape((n, LENGTH), bool)
        batch = jhessians.Batch(token, token, mask, shape((n,), np.int32))
        loss = jhessians.NextTokenLoss("sampled")
    jhessians.mark_sharded(model, mesh)
    chosen = lambda name: kind in LINEARS or "attention.output" in name  # noqa: E731
    sites = jhessians.find_sites(loss, model, batch, select=chosen)
    problem = jhessians.Problem(loss, model, sites, mesh=mesh, activations="recompute")
    fold, operands = jhessians.Covariance(), None
    if corrected:
        fold = jhessians.EigenvalueCorrection(jnp.float32)
        operands = jhessians.eigenvector_shapes(problem, jnp.float32)
    return jhessians.Pass(fold, problem).lower(batch, operands=operands).compile(), mesh


def collectives(text: str) -> dict[str, list[int]]:
    """Elements of the largest array that each collective operation of compiled HLO returns."""
    sizes = defaultdict(list)
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all"
    for result, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        shapes = re.findall(r"\w+\[([\d,]*)\]", result)
        sizes[kind].append(max(int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes))
    return sizes


def main() -> None:
    vocabulary.SLICE_LOGITS = VOCABULARY * LENGTH // 8
    steps = {}
    for word in sys.argv[1:]:
        started = time.monotonic()
        topology, *more = word.split("/")
        if not more:
            mesh = jhessians.make_mesh(devices=jhessians.topology_devices(topology))
            steps[word] = {"axes": list(mesh.devices.shape)}
            continue
        kind = more.pop(0)
        axes = next((each.removeprefix("axes=") for each in more if "axes" in each), None)
        step, mesh = compiled(topology, kind, axes=axes, corrected="corrected" in more)
        print(word, f"{time.monotonic() - started:.1f} s", file=sys.stderr)
        steps[word] = {
            "axes": list(mesh.devices.shape),
            "collectives": collectives(step.as_text()),
            "peak": step.memory_analysis().peak_memory_in_bytes,
        }
    print(json.dumps(steps))


if __name__ == "__main__":
    main()
