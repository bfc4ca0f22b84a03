"""What models say: greedy tokens beside transformers', cached logits beside whole forward passes.

Prompts of unequal length in one batch, longer than every window, with answers that lead beyond an
original context of 32.
"""

import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax import lax
from transformers import AutoModelForCausalLM

from converters import generate, load, supported
from jhessians.devices.mesh import make_mesh
from jhessians.models.decoding import prefill, step
from jhessians.models.rope import depends_on_length
from tests import tolerances
from tests.converters import cases
from tests.converters.comparison import documents, error
from tests.oracles import adapters, checkpoints

PROMPTS = (5, 20, 12)
NEW = 30

CASES = {
    **{family: (family, {}) for family in supported()},
    **cases.VARIANTS,
    "llama, dynamic rope": ("llama", {**cases.SHORT, **cases.rope("dynamic", factor=2.0)}),
}
# Between them: every way to know positions, windows, soft caps, sinks, norms of queries, residuals
# side by side, norms after the branches, experts with and without a shared one, heads of all kinds.
ALWAYS = {
    "bloom", "cohere2", "gemma2", "gpt2", "gpt_oss", "gptj", "llama, dynamic rope", "olmo2",
    "opt 350m", "phi3, longrope", "qwen2_moe", "smollm3",
}  # fmt: skip
# What greedy tokens alone, which a small error needn't change, might let through.
LOGITS_ALWAYS = {"bloom", "gemma2", "gpt_oss", "gptj"}


# A whole pass turns all positions by the whole length, a step by the length so far: their tokens
# are compared with whole passes of each length.
BY_LENGTH = {case for case in CASES if "dynamic" in case or "longrope" in case}


def each_case(always, cases=CASES):
    return [pytest.param(case, marks=[] if case in always else pytest.mark.slow) for case in cases]


def prompts(lengths=PROMPTS) -> list[list[int]]:
    random = np.random.default_rng(3)
    return [random.integers(0, 320, n).tolist() for n in lengths]


def stretched(model):
    """The model with room for the answers, where a short context is what a case is about."""
    model.config = replace(model.config, positions=max(model.config.positions, 128))
    return model


@torch.no_grad()
def their_choices(model, prompt, answer, *, one_by_one=False) -> np.ndarray:
    """The likeliest token after each beginning of an answer, by whole passes of transformers'.

    An answer that agrees with them is the greedy one: its first token is, and each further one
    then follows the same text. One pass shows all beginnings, unless angles depend on the length.
    """
    text, first = torch.tensor([[*prompt, *map(int, answer)]]), len(prompt)
    if not one_by_one:
        return model(text).logits[0, first - 1 : -1].argmax(-1).numpy()
    # A copy, for rotations remember the longest text that they have seen.
    model, ends = copy.deepcopy(model), range(first, text.shape[1])
    return np.array([int(model(text[:, :end]).logits[0, -1].argmax()) for end in ends])


@pytest.mark.parametrize("case", each_case(ALWAYS))
def test_greedy_tokens_are_transformers(case, checkpoint):
    family, settings = CASES[case]
    folder = checkpoint(family, **settings)
    model = stretched(load(folder).model)
    found = generate(model, prompts(), max_new_tokens=NEW)
    assert found.shape == (len(PROMPTS), NEW) and found.dtype == np.int32
    attention = "sdpa" if case in cases.SDPA else "eager"
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    alone = depends_on_length(model.config.attention.ropes)
    for prompt, answer in zip(prompts(), found, strict=True):
        expected = their_choices(theirs, prompt, answer, one_by_one=alone)
        np.testing.assert_array_equal(answer, expected)


@pytest.mark.parametrize("family", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_their_generate_says_the_same(family, checkpoint):
    folder = checkpoint(family)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    theirs.generation_config.eos_token_id = None
    found = generate(load(folder).model, prompts(), max_new_tokens=NEW)
    for prompt, answer in zip(prompts(), found, strict=True):
        text = torch.tensor([prompt])
        expected = theirs.generate(text, do_sample=False, max_new_tokens=NEW, pad_token_id=0)
        np.testing.assert_array_equal(answer, expected[0, len(prompt) :].numpy())


def both_logits(model, beginnings=(3, 20, 12), shift=0):
    """Logits of random documents after each's beginning: token by token, and by a whole pass."""
    batch = documents()
    longest = max(map(len, batch))
    rows = [np.pad(d, (0, longest - len(d)), constant_values=5) for d in batch]
    tokens, starts = jnp.asarray(np.stack(rows)), jnp.asarray(beginnings, jnp.int32)
    lengths = jnp.asarray([len(d) for d in batch], jnp.int32)
    steps = max(len(d) - start for d, start in zip(batch, beginnings, strict=True))

    @jax.jit
    def run(state):
        copy = nnx.merge(graph, state)
        prompt = tokens[:, : max(beginnings)]
        hidden, cache = prefill(copy, prompt, starts, longest + steps + shift)

        def one(cache, number):
            at = starts + number
            here = jnp.minimum(at, longest - 1)[:, None]
            token = jnp.take_along_axis(tokens, here, axis=1)[:, 0]
            hidden, cache = step(copy, token, at + shift, cache)
            return cache, copy.logits(hidden)

        _, stepped = lax.scan(one, cache, jnp.arange(steps, dtype=jnp.int32))
        first = copy.logits(hidden)
        return jnp.concatenate([first[:, None], stepped.swapaxes(0, 1)], 1), copy(tokens, lengths)

    graph, state = nnx.split(model)
    stepped, whole = (np.asarray(x, np.float32) for x in run(state))
    return (
        [x[: len(d) - start + 1] for x, d, start in zip(stepped, batch, beginnings, strict=True)],
        [x[start - 1 : len(d)] for x, d, start in zip(whole, batch, beginnings, strict=True)],
    )


@pytest.mark.parametrize(
    "case", each_case(LOGITS_ALWAYS, [case for case in CASES if case not in BY_LENGTH])
)
def test_cached_logits_are_those_of_a_whole_pass(case, checkpoint):
    family, settings = CASES[case]
    model = stretched(load(checkpoint(family, **settings)).model)
    assert not depends_on_length(model.config.attention.ropes)
    assert error(*both_logits(model)) < tolerances.LOGITS


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_step_at_a_wrong_position_fails(family, checkpoint):
    stepped, whole = both_logits(load(checkpoint(family)).model, shift=1)
    assert error([x[1:] for x in stepped], [x[1:] for x in whole]) > tolerances.TWIN


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f == "llama" else pytest.mark.slow) for f in supported()]
)
def test_with_an_adapter(family, checkpoint, tmp_path):
    """peft's routers and experts are no linears: adapters of mixtures are on attention alone."""
    mixture = {"num_experts", "num_local_experts"} & checkpoints.ARCHITECTURES[family](320).keys()
    targets = ["q_proj", "v_proj"] if mixture else "all-linear"
    base = checkpoint(family)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": targets}
    folder = adapters.build(base, tmp_path, seed=2, **settings)
    found = generate(stretched(load(folder).model), prompts(), max_new_tokens=NEW)
    texts = [np.array([*p, *a]) for p, a in zip(prompts(), found, strict=True)]
    for logits, answer in zip(adapters.logits(base, folder, texts), found, strict=True):
        np.testing.assert_array_equal(answer, logits[-NEW - 1 : -1].argmax(-1))


@pytest.mark.slow
def test_mesh_and_shards(checkpoint, tmp_path):
    folder = checkpoints.build("llama", tmp_path, seed=1, hidden_size=64)
    alone = generate(load(folder).model, prompts(), max_new_tokens=NEW)
    spread = load(folder, mesh=make_mesh(8), fsdp=True).model
    np.testing.assert_array_equal(generate(spread, prompts(), max_new_tokens=NEW), alone)
