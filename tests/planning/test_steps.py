"""What a step is said to take, against XLA's own account of it, and against whole runs."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

import converters.registry as registry
from jhessians.capture.problem import Problem
from jhessians.capture.sites import find_sites
from jhessians.commands.plan.fit import batch_shapes
from jhessians.fitting.eigenbases import eigenvector_shapes
from jhessians.fitting.passes import Pass
from jhessians.folds.correction import EigenvalueCorrection
from jhessians.folds.covariance import Covariance
from jhessians.models.loss import NextTokenLoss
from jhessians.planning.steps import step_of
from tests.small import xla_flags

WITHIN = 0.1

SHAPES = {
    "llama": ("LlamaConfig", dict(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=32000), 4, 512),
    "gpt2": ("GPT2Config", dict(
        n_embd=512, n_layer=12, n_head=8, vocab_size=16000, n_positions=512), 8, 256),
    "gpt_neox": ("GPTNeoXConfig", dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        vocab_size=50304, max_position_embeddings=1024), 2, 1024),
    "qwen2": ("Qwen2Config", dict(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=4, vocab_size=30000, tie_word_embeddings=True), 8, 128),
    "mixtral": ("MixtralConfig", dict(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=16000, num_local_experts=8, num_experts_per_tok=2),
        4, 256),
}  # fmt: skip
QUICK = ("gpt2-recompute", "gpt2-store")
CASES = [
    pytest.param(name, kind, id=f"{name}-{kind}",
                 marks=[] if f"{name}-{kind}" in QUICK else pytest.mark.slow)
    for name in SHAPES for kind in ("recompute", "store")
]  # fmt: skip


def problem_of(name):
    kind, sizes, rows, length = SHAPES[name]
    settings = getattr(transformers, kind)(**sizes, bos_token_id=0, eos_token_id=0)
    model = nnx.eval_shape(lambda: registry.create(settings, rngs=nnx.Rngs(0)))
    batch, loss = batch_shapes(rows, length), NextTokenLoss()
    return Problem(loss, model, find_sites(loss, model, batch)), batch


@pytest.mark.parametrize("name, activations", CASES)
def test_the_compilers_account(name, activations, record_property):
    problem, batch = problem_of(name)
    problem = replace(problem, activations=activations)
    vectors = eigenvector_shapes(problem, jnp.float32)
    for fold, operands in ((Covariance(), {}), (EigenvalueCorrection(jnp.float32), vectors)):
        said = step_of(fold, problem, batch, operands=operands)
        work = Pass(fold, problem)
        sums, zeros = jax.eval_shape(work.initialize), jax.tree.map(_zeros, batch)
        found = work.lower(zeros, sums, operands).compile().memory_analysis()
        whole = found.argument_size_in_bytes + found.temp_size_in_bytes
        record_property(type(fold).__name__, said.peak / whole)
        assert abs(said.peak / whole - 1) < WITHIN, (said.peak, whole)
        assert said.weights + said.statistics == pytest.approx(
            found.argument_size_in_bytes, rel=0.01
        )


def _zeros(x):
    return np.zeros(x.shape, x.dtype)


MEASURE = """
import gc, json, sys, time
from dataclasses import replace
import jax, jax.numpy as jnp
import numpy as np
from flax import nnx
from jhessians.devices.memory import return_freed_memory
from jhessians.fitting.passes import Pass
from jhessians.folds.covariance import Covariance
from tests.planning.test_steps import problem_of
from tests.small import fill

def status(what):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(x for x in lines if x.startswith(what)).split()[1])

problem, shapes = problem_of(sys.argv[1])
problem = replace(problem, activations=sys.argv[2])
numbers = np.random.default_rng(0)
rows, length = shapes.tokens.shape
tokens = numbers.integers(3, 1000, (rows, length)).astype(np.int32)
mask = np.ones((rows, length), bool)
mask[:, -1] = False
batch = shapes._replace(tokens=tokens, labels=tokens, position_mask=mask,
                        document=np.arange(rows, dtype=np.int32))
problem = replace(problem, model=fill(lambda: problem.model))
work = Pass(Covariance(), problem)
jax.block_until_ready(work.run([batch]))  # compiles
gc.collect()
time.sleep(0.5)  # XLA's threads give their memory back
return_freed_memory()
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
work.run([batch] * 3)
print(json.dumps(status("VmHWM") - before))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_a_measured_run(name, record_property):
    """What a process that has weights grows by, to the fullest moment of a pass."""
    environment = {**os.environ, "XLA_FLAGS": xla_flags(1), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, name, "recompute"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    problem, batch = problem_of(name)
    said = step_of(Covariance(), replace(problem, activations="recompute"), batch)
    measured = said.weights + json.loads(done.stdout)
    record_property("estimate / measured", said.peak / measured)
    assert abs(said.peak / measured - 1) < WITHIN
