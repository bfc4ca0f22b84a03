"""EKFAC factors of every family against torch bergson's in float64, experts included.

Documents are longer than every window. Two families whose attention and norms are the farthest
from Llama's always run, and one with experts; the rest are slow together.
"""

import numpy as np
import pytest

from converters import decoder_config, supported
from converters.registry import read_config
from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.compute.pipeline import compute
from tests.oracles import bergson, capture, checkpoints, kfac_numpy
from tests.test_bergson import factor_errors
from tests.tolerances import FACTORS

# bergson 2.5.1 can't run these: Falcon adds into an output that bergson has hooked, OPT's MLP drops
# the document axis. Plain hooks and numpy take its place.
WITHOUT_BERGSON = {"falcon", "opt"}
# OLMo clips a hooked output in place as well; and bergson wants the context to hold a batch.
CHANGES = {
    "olmo": {"clip_qkv": None},
    "olmoe": {"clip_qkv": None},
    "gemma3_text": {"max_position_embeddings": 128},
}
# What `--moe_experts` takes in, of families that have experts.
EXPERTS = {
    **dict.fromkeys(("gpt_oss", "mixtral", "olmoe", "qwen2_moe"), "model.layers.*.mlp.experts"),
    "granitemoe": "*.block_sparse_moe.experts",
    "qwen3_moe": "model.layers.0.mlp.experts, *.1.mlp.expert?",
}
# bergson refuses the gate of the shared expert, which gets no document axis.
LEFT_OUT = {"qwen2_moe": "*shared_expert*"}
# Windows, four norms, soft caps, tied; normed queries and keys; experts with windows.
ALWAYS = {"gemma2", "mixtral", "qwen3"}
LENGTHS = (2, 40, 9, 25, 3, 60)


def by_bergson(folder, data, shared, **options):
    """bergson's factors, told what both sides name alike."""
    extra = [word for name, value in shared.items() for word in (f"--{name}", value)]
    return bergson.read(bergson.fit(folder, data, extra=extra, **options))


def by_hooks(folder, data):
    tokens = checkpoints.encode(folder, data, max_length=128)
    documents = capture.captured(folder, tokens)
    total = sum(len(document) - 1 for document in tokens)
    return {**kfac_numpy.factored_hessian(documents, len(tokens)), "total_processed": total}


def ours(run, folder, data, **options):
    given = {"token_batch_size": 128, "world_size": 1} | options
    config = ComputeConfig(
        str(run), model=str(folder), dataset=str(data),
        use_dataset_labels=True, truncation=True, **given,
    )  # fmt: skip
    return compute(config)


def compare(found, expected, record_property=lambda *_: None):
    assert found["total_processed"] == expected["total_processed"]
    for kind, worst in factor_errors(found, expected).items():
        record_property(kind, worst)
        assert worst < FACTORS, kind


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in ALWAYS else pytest.mark.slow) for f in supported()],
)
def test_factors_equal_bergsons(family, checkpoint, altered, tmp_path, record_property):
    folder = altered(checkpoint(family, **CHANGES.get(family, {})))
    data = checkpoints.corpus(folder, 12, lengths=LENGTHS)
    globs = {"moe_experts": EXPERTS.get(family), "filter_modules": LEFT_OUT.get(family)}
    shared = {name: value for name, value in globs.items() if value}
    ours(tmp_path / "run", folder, data, **shared)
    by_plain_hooks = family in WITHOUT_BERGSON
    expected = by_hooks(folder, data) if by_plain_hooks else by_bergson(folder, data, shared)
    compare(bergson.read(tmp_path / "run"), expected, record_property)


def test_every_family_with_experts_is_fitted_with_them(checkpoint):
    families = {f for f in supported() if decoder_config(read_config(checkpoint(f))).experts}
    assert families == set(EXPERTS)


@pytest.mark.slow
def test_the_column_of_ones_of_biased_experts(checkpoint, altered, tmp_path, record_property):
    folder = altered(checkpoint("gpt_oss"))
    data = checkpoints.corpus(folder, 12, lengths=LENGTHS)
    shared = {"moe_experts": EXPERTS["gpt_oss"]}
    ours(tmp_path / "run", folder, data, include_bias=True, **shared)
    found = bergson.read(tmp_path / "run")
    name = "layers.2.mlp.experts.expert_5.gate_up_proj"
    assert found["activation_sharded"][name].shape == (33, 33)
    compare(found, by_bergson(folder, data, shared, include_bias=True), record_property)


def test_experts_that_nobody_chose(checkpoint, altered, tmp_path, record_property):
    """Zeros in all of their factors, and a warning that says how many there are."""
    sizes = {"num_experts": 64, "num_hidden_layers": 1, "num_experts_per_tok": 1}
    folder = altered(checkpoint("qwen3_moe", **sizes))
    data = checkpoints.corpus(folder, 4, lengths=(9, 2, 14, 5))
    shared = {"moe_experts": EXPERTS["qwen3_moe"].partition(",")[0]}
    summary = ours(tmp_path / "run", folder, data, **shared)
    found, expected = bergson.read(tmp_path / "run"), by_bergson(folder, data, shared)
    assert found["total_processed"] == expected["total_processed"] == 26
    unreached = {name for name, a in expected["activation_sharded"].items() if not a.any()}
    assert 2 * 38 <= len(unreached) < 2 * 64
    (line,) = summary.warnings
    assert line.startswith(f"{len(unreached)} of 128 expert linears got no position: their factors")
    assert "--filter_modules" in line and "\n" not in line
    folders = ["activation_sharded", "gradient_sharded", "eigenvalue_sharded",
               "eigenvalue_correction_sharded", "factor_eig_a", "factor_eig_g"]  # fmt: skip
    for each in folders:
        assert found[each].keys() == expected[each].keys()
        for name in unreached:
            assert not found[each][name].any() and not expected[each][name].any(), (each, name)
    # Any orthogonal basis will do.
    for each in ("eigen_activation_sharded", "eigen_gradient_sharded"):
        for name in unreached:
            q = found[each][name]
            np.testing.assert_allclose(q.T @ q, np.eye(len(q)), atol=FACTORS)

    def reached(side):
        kept = {
            kind: {name: v for name, v in modules.items() if name not in unreached}
            for kind, modules in side.items()
            if isinstance(modules, dict)
        }
        return side | kept

    compare(reached(found), reached(expected), record_property)


@pytest.mark.slow
def test_a_shared_expert_and_its_gate(checkpoint, altered, tmp_path, record_property):
    """By plain hooks, since bergson can't."""
    folder = altered(checkpoint("qwen2_moe"))
    data = checkpoints.corpus(folder, 12, lengths=LENGTHS)
    ours(tmp_path / "run", folder, data)
    found = bergson.read(tmp_path / "run")
    expected = by_hooks(folder, data)
    assert found["gradient_sharded"]["layers.1.mlp.shared_expert_gate"].shape == (1, 1)
    compare(found, expected, record_property)
