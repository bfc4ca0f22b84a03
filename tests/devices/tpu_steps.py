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
from jhessians.models.config import (
    AttentionConfig,
    DecoderConfig,
    ExpertsConfig,
    MLPConfig,
    NormConfig,
    RopeConfig,
)

WIDTH, VOCABULARY, LENGTH, EXPERTS = 384, 32768, 1024, 64


def decoder(experts: bool) -> jhessians.Decoder:
    """The shapes of a decoder whose embedding and head outweigh all else; or whose experts do."""
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
    return nnx.eval_shape(lambda: jhessians.Decoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))


def compiled(topology: str, *, axes: str | None, corrected: bool, experts: bool):
    """The step of a pass, and its problem."""
    devices = jhessians.topology_devices(topology)
    mesh = jhessians.make_mesh(axes=axes, devices=devices)
    model, n = decoder(experts), mesh.size
    jhessians.mark_sharded(model, mesh)
    token = jax.ShapeDtypeStruct((n, LENGTH), np.int32)
    mask, number = (jax.ShapeDtypeStruct(*x) for x in (((n, LENGTH), bool), ((n,), np.int32)))
    batch = jhessians.Batch(token, token, mask, number)
    loss = jhessians.NextTokenLoss("sampled")
    sites = jhessians.find_sites(
        loss, model, batch, select=lambda name: "experts" not in name or not experts
    )
    problem = jhessians.Problem(loss, model, sites, mesh=mesh, activations="recompute")
    if corrected:
        fold = jhessians.EigenvalueCorrection(jnp.float32)
        operands = jhessians.eigenvector_shapes(problem, jnp.float32)
        return jhessians.Pass(fold, problem).lower(batch, operands=operands).compile(), mesh
    return jhessians.Pass(jhessians.Covariance(), problem).lower(batch).compile(), mesh


def collectives(text: str) -> dict[str, list[int]]:
    """Elements of the largest array that each collective operation of compiled HLO returns."""
    sizes = defaultdict(list)
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all"
    for result, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        shapes = re.findall(r"\w+\[([\d,]*)\]", result)
        sizes[kind].append(max(int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes))
    return sizes


def main() -> None:
    steps = {}
    for word in sys.argv[1:]:
        topology, *more = word.split("/")
        started = time.monotonic()
        axes = next((each.removeprefix("axes=") for each in more if "axes" in each), None)
        step, mesh = compiled(
            topology, axes=axes, corrected="corrected" in more, experts="experts" in more
        )
        print(word, f"{time.monotonic() - started:.1f} s", file=sys.stderr)
        steps[word] = {
            "axes": list(mesh.devices.shape),
            "collectives": collectives(step.as_text()),
            "temporary": step.memory_analysis().temp_size_in_bytes,
        }
    print(json.dumps(steps))


if __name__ == "__main__":
    main()
