"""Every registered family against transformers: logits, wrong twins, bfloat16, the way back."""

import dataclasses

import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from converters import load, registry, save, supported
from jhessians.capture.linears import tapped_modules
from tests import tolerances
from tests.converters import cases
from tests.converters.comparison import documents, error, our_logits, their_logits

ALL = supported()
CASES = {**{family: (family, {}) for family in ALL}, **cases.VARIANTS}
EACH_CASE = [
    pytest.param(case, marks=pytest.mark.slow if case in cases.SLOW else []) for case in CASES
]
TWINS = [(family, i) for family, twins in cases.TWINS.items() for i in range(len(twins))]


@pytest.fixture(scope="module")
def truth(checkpoint):
    """transformers' logits of a case, computed once."""
    cache = {}

    def get(case):
        if case not in cache:
            family, settings = CASES[case]
            kind = "sdpa" if case in cases.SDPA else "eager"
            folder = checkpoint(family, **settings)
            cache[case] = their_logits(folder, documents(), attention=kind)
        return cache[case]

    return get


@pytest.mark.parametrize("case", EACH_CASE)
def test_logits_equal_transformers(case, checkpoint, truth, record_property):
    """In one batch with right padding, where transformers gets each document alone."""
    family, settings = CASES[case]
    ours = our_logits(load(checkpoint(family, **settings)).model, documents())
    worst = error(ours, truth(case))
    record_property("error", worst)
    assert worst < tolerances.LOGITS


@pytest.mark.parametrize("family, index", TWINS)
def test_a_wrong_twin_fails(family, index, checkpoint, altered, truth, monkeypatch):
    folder, twin = checkpoint(family), cases.TWINS[family][index]
    if isinstance(twin, dict):
        folder = altered(folder, **twin)
    else:
        right = registry._FAMILIES[family]
        wrong = dataclasses.replace(right, config=lambda config: twin(right.config(config)))
        monkeypatch.setitem(registry._FAMILIES, family, wrong)
    assert error(our_logits(load(folder).model, documents()), truth(family)) > tolerances.TWIN


def test_every_family_has_a_twin():
    assert set(cases.TWINS) == set(ALL)


def linears(model):
    """Name and kernel of every linear of ours."""
    stacked = dict(tapped_modules(model.layers.blocks)).values()
    outside = [m for _, m in tapped_modules(model) if m is not model.layers]
    for module in stacked:
        for layer in range(model.config.layers):
            kernel = module.kernel[...][layer]
            if kernel.ndim == 2:
                yield module.name.format(layer=layer), kernel
            else:
                for expert, one in enumerate(kernel):
                    yield module.name.format(layer=layer, expert=expert), one
    yield from ((module.name, module.kernel[...]) for module in outside)


def expert_names(model):
    """What torch bergson calls the linears of transformers' fused experts."""
    for name, module in model.base_model.named_modules():
        if name.endswith(".experts"):
            for expert in range(module.num_experts):
                yield from (f"{name}.expert_{expert}.{p}_proj" for p in ("gate_up", "down"))


def stored(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("case", EACH_CASE)
def test_bfloat16_names_and_the_way_back(case, checkpoint, tmp_path):
    family, settings = CASES[case]
    folder = checkpoint(family, dtype=torch.bfloat16, **settings)
    loaded = load(folder, dtype="stored")
    model = loaded.model
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    names = [
        name
        for name, module in theirs.base_model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    ]
    names += expert_names(theirs)
    assert sorted(name for name, _ in linears(model)) == sorted(names)

    assert {
        variable.dtype.name for variable in nnx.state(model, nnx.Param).flat_state().leaves
    } == {"bfloat16"}
    save(loaded, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "reference")
    expected, got = stored(tmp_path / "reference"), stored(tmp_path / "ours")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype and got[name].tobytes() == value.tobytes(), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), theirs.parameters()))  # noqa: B905


# One of each way to round: late and early products with the scale, biases, soft caps, alibi.
BFLOAT16 = {"bloom", "cohere", "gemma2", "olmo2", "qwen2"}


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in BFLOAT16 else pytest.mark.slow) for f in ALL],
)
def test_bfloat16_agrees_to_its_rounding(family, checkpoint, record_property):
    folder = checkpoint(family, dtype=torch.bfloat16)
    batch = documents()[:1]  # torch's bfloat16 is slow on CPU
    ours, theirs = (
        our_logits(load(folder, dtype="stored").model, batch),
        their_logits(folder, batch, "bfloat16"),
    )
    exact = their_logits(folder, batch)
    record_property("errors", f"{error(ours, exact):.4f} {error(theirs, exact):.4f}")
    # Both round at every step, so neither may be much farther from the truth than the other.
    assert error(ours, exact) < 2 * error(theirs, exact) < 0.2
