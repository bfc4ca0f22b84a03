"""What the registry shows of itself, and the scripts about families in `examples/`."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from converters import load, registry, save
from converters.table import markdown
from tests import tolerances
from tests.converters.comparison import documents, error, our_logits
from tests.oracles import checkpoints

ROOT = Path(__file__).resolve().parents[2]


def test_the_readmes_table_is_the_registrys():
    assert markdown() in (ROOT / "README.md").read_text(), "run python -m converters.table"


def test_every_family_says_what_it_is():
    assert all(family.title and family.checked for family in registry.families())


@pytest.fixture
def own(monkeypatch, capsys):
    """The example's globals and what it printed."""
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    path = ROOT / "examples" / "own_family.py"
    assert len(path.read_text().splitlines()) < 60
    return runpy.run_path(str(path), run_name="__main__"), capsys.readouterr().out


def test_own_family_is_llama_with_other_names(own, tmp_path):
    """InternLM2 beside a Llama whose three projections were joined as InternLM2 joins them."""
    script, printed = own
    assert printed == "layers.{layer}.attention.wqkv (1, 9, 64)\n"
    sizes = dict(vocab_size=320, hidden_size=32, intermediate_size=80, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5)  # fmt: skip
    torch_model = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters={"rope_theta": 1e6}))
    checkpoints.randomize(torch_model, seed=1)
    torch_model.save_pretrained(tmp_path / "llama")
    llama = load(tmp_path / "llama").model

    config = script["Config"](**sizes, rope_theta=1e6, max_position_embeddings=128,
                              hidden_act="silu", tie_word_embeddings=False)  # fmt: skip
    ours = script["create"](config, rngs=script["nnx"].Rngs(0))
    for name in ("embedding", "head"):
        getattr(ours, name)[...] = getattr(llama, name)[...]
    theirs, mine = llama.layers.blocks, ours.layers.blocks
    parts = (getattr(theirs.attention, x).kernel[...] for x in ("query", "key", "value"))
    groups = [np.asarray(part).reshape(2, 32, 2, -1, 8) for part in parts]
    joined = np.concatenate(groups, axis=3).reshape(2, 32, -1)
    mine.attention.query_key_value.kernel[...] = joined
    mine.attention.output.kernel[...] = theirs.attention.output.kernel[...]
    for name in ("gate", "up", "down"):
        getattr(mine.mlp, name).kernel[...] = getattr(theirs.mlp, name).kernel[...]
    for name in ("attention_norm", "mlp_norm"):
        getattr(mine, name).scale[...] = getattr(theirs, name).scale[...]
    ours.final_norm.scale[...] = llama.final_norm.scale[...]

    save(ours, tmp_path / "internlm2")
    save(load(tmp_path / "internlm2"), tmp_path / "again")
    again = load(tmp_path / "again").model
    batch = documents()
    assert error(our_logits(again, batch), our_logits(llama, batch)) < tolerances.LOGITS


def test_forward_answers_the_demos_first_question(capsys):
    runpy.run_path(str(ROOT / "examples" / "forward.py"))["main"]()
    *_, answer = capsys.readouterr().out.splitlines()
    assert "Fenando Jelarbeck was born in Veltastrand" in answer
