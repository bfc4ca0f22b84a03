"""Bad checkpoints: one line each, which names what is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters import load
from converters.verify import main
from jhessians.errors import CheckpointError, NumericsError, UserError


@pytest.fixture
def refused():
    """`refused(folder, *words)`: loading fails with one line that has all the words."""

    def check(folder, *words, kind: type[UserError] = CheckpointError, **options):
        with pytest.raises(kind) as caught:
            load(folder, **options)
        message = str(caught.value)
        assert "\n" not in message and type(caught.value) is kind
        for word in words:
            assert word in message, message

    return check


@pytest.fixture
def tensors(checkpoint, altered):
    """`tensors(change)`: a Llama whose named tensors `change` has edited in place."""

    def get(change, family="llama", **options) -> Path:
        folder = altered(checkpoint(family, **options))
        values = load_file(folder / "model.safetensors")
        change(values)
        save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return get


NORM = "model.layers.1.input_layernorm.weight"


def test_missing_tensors(tensors, refused):
    def change(values):
        for name in [name for name in values if "layers.0" in name]:
            del values[name]

    refused(
        tensors(change), "missing: model.layers.0.input_layernorm.weight, ", " and 6 more", "llama"
    )


def test_missing_head(tensors, refused):
    refused(tensors(lambda v: v.pop("lm_head.weight")), "missing: lm_head.weight;")


def test_unexpected_tensors(tensors, refused):
    def change(values):
        values["model.layers.2.input_layernorm.weight"] = np.ones(48, np.float32)
        values["score.weight"] = np.ones((2, 48), np.float32)

    refused(tensors(change), "unexpected: model.layers.2.input_layernorm.weight, score.weight;")


def test_a_bias_that_the_config_knows_nothing_of(tensors, refused):
    name = "model.layers.0.self_attn.q_proj.bias"
    change = lambda values: values.update({name: np.ones(48, np.float32)})  # noqa: E731
    refused(tensors(change), f"unexpected: {name};")


def test_misshapen_tensors(tensors, refused):
    name = "model.layers.1.mlp.up_proj.weight"

    def change(values):
        values[name] = np.ascontiguousarray(values[name].T)
        del values[NORM]

    refused(tensors(change), f"{name} is [48, 104] where config.json makes it [104, 48]", NORM)


def test_duplicate_tensors(tensors, refused, checkpoint, altered):
    change = lambda v: v.update({"norm.weight": v["model.norm.weight"].copy()})  # noqa: E731
    refused(tensors(change), "there under two names: ", "norm.weight")
    folder = altered(checkpoint("llama", shards=2))
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    name, values = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: values}, second)
    refused(folder, f"{name} is in {first.name} and again in {second.name}")


def test_a_name_twice_in_one_file(checkpoint, altered, refused):
    folder = altered(checkpoint("llama"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"layers.0.mlp.up_proj", b"layers.1.mlp.up_proj", 1))
    refused(folder, "model.layers.1.mlp.up_proj.weight twice")


def test_integers_are_not_weights(tensors, refused):
    change = lambda values: values.update({NORM: np.ones(48, np.int8)})  # noqa: E731
    refused(tensors(change), f"{NORM} is stored as int8")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(value, tensors, refused):
    refused(tensors(lambda v: v[NORM].__setitem__(3, value)), NORM, "NaN", kind=NumericsError)


def test_weights_beyond_the_asked_for_type(tensors, refused):
    folder = tensors(lambda values: values["model.embed_tokens.weight"].__setitem__((0, 0), 1e9))
    refused(folder, "embed_tokens", "float16", kind=NumericsError, dtype="float16")


def test_tied_head_that_differs(tensors, refused):
    def change(values):
        values["lm_head.weight"] = values["model.embed_tokens.weight"] + 1

    refused(tensors(change, tie_word_embeddings=True), "lm_head.weight", "differs", "tie_word")


def test_tied_head_and_old_buffers_are_let_pass(tensors):
    def llama(values):
        values["lm_head.weight"] = values["model.embed_tokens.weight"].copy()
        values["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)

    def gpt2(values):
        values["h.1.attn.masked_bias"] = np.float32([-1e4])
        for name in list(values):
            values[name.removeprefix("transformer.")] = values.pop(name)
        values["h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.bool_)

    load(tensors(llama, tie_word_embeddings=True))
    load(tensors(gpt2, family="gpt2"))


@pytest.mark.parametrize("options", [{}, {"shards": 2}, {"bin": True}], ids=str)
@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
def test_truncated_files(options, keep, checkpoint, altered, refused):
    folder = altered(checkpoint("llama", **options))
    file = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])[-1]
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refused(folder, file.name)


def test_missing_shard(checkpoint, altered, refused):
    for options in ({}, {"bin": True}):
        folder = altered(checkpoint("llama", shards=2, **options))
        file = sorted(folder.glob("*-00002-of-*"))[0]
        file.unlink()
        refused(folder, "half downloaded", file.name)


def test_index_that_names_other_tensors(checkpoint, altered, refused):
    folder = altered(checkpoint("llama", shards=2))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = index["weight_map"][NORM]
    index["weight_map"]["model.lost.weight"] = file
    path.write_text(json.dumps(index))
    refused(folder, f"model.lost.weight is in {file}")
    index["weight_map"] = {NORM: "../elsewhere.safetensors"}
    path.write_text(json.dumps(index))
    refused(folder, "'../elsewhere.safetensors'")
    path.write_text("{}")
    refused(folder, "no weight_map")


def test_pointers_and_rubbish(checkpoint, altered, refused):
    folder = altered(checkpoint("gpt2"))
    weights, config = folder / "model.safetensors", folder / "config.json"
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    for text, words in {pointer: "git lfs pull", "<html>Not Found</html>": "truncated"}.items():
        weights.write_text(text)
        refused(folder, words, weights.name)
    weights.unlink()
    refused(folder, "no weights", "pytorch_model.bin")
    for text, words in {pointer: "git lfs pull", "[1]": "no table", "{": "JSON"}.items():
        config.write_text(text)
        refused(folder, words, config.name)
    config.unlink()
    refused(folder, "no config.json")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "adapter")


def test_no_such_folder_or_model(tmp_path, refused):
    refused(tmp_path / "nothing", "isn't a folder")
    refused("./nothing", "isn't a folder")
    refused("nobody/nothing", "nobody/nothing", "give a local folder")  # the tests are offline


CONFIGS = {
    "unknown model": ({"model_type": "bert"}, ['"bert"', "gpt2, gpt_neo, gpt_neox, gpt_oss, gptj"]),
    "no model": ({"model_type": None}, ["null", "gpt2, gpt_neo, gpt_neox, gpt_oss, gptj"]),
    "several modalities": ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
        ["multimodal model (gemma3)", "'gemma3_text'"]),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, ["quantised", "gptq"]),
    "activation": ({"hidden_act": "mish"}, ["'mish'", "silu"]),
    "window": ({"sliding_window": 8}, ["sliding_window to 8"]),
    "softcap": ({"final_logit_softcapping": 30.0}, ["final_logit_softcapping"]),
    "experts": ({"num_local_experts": 8}, ["num_local_experts"]),
    "factors of rope": ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0,
        "short_factor": [1.0] * 6, "long_factor": [1.0] * 5}}, ["5 values of long_factor", "6"]),
    "bidirectional": ({"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
    "unheard-of rope": ({"rope_parameters": {"rope_type": "spiral"}}, ["'spiral'", "llama3"]),
    "setting of rope": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0,
        "beta_fast": 3.0}}, ["beta_fast", "linear"]),
    "rope factor": ({"rope_parameters": {"rope_type": "linear", "factor": -1}}, ["factor", "-1"]),
    "no rope factor": ({"rope_parameters": {"rope_type": "linear"}}, ["factor"]),
    "part of a head": ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        ["0.5 of 12 features"]),
    "heads": ({"num_attention_heads": 5}, ["isn't a valid llama config", "hidden size"]),
    "groups": ({"num_key_value_heads": 3}, ["num_key_value_heads", "3"]),
    "type of a setting": ({"hidden_size": "wide"}, ["isn't a valid llama config", "hidden_size"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_we_do_not_implement(case, checkpoint, altered, refused):
    settings, words = CONFIGS[case]
    refused(altered(checkpoint("llama"), **settings), *words)


OTHERS = {
    "a layer's type": ("qwen2", {"layer_types": ["full_attention", "linear_attention"]},
        ["linear_attention", "sliding_attention"]),
    "number of types": ("qwen2", {"layer_types": ["full_attention"]}, ["layer_types", "2"]),
    "window of a layer": ("qwen3", {"layer_types": ["sliding_attention"] * 2}, ["sliding_window"]),
    "cap of attention": ("gemma3_text", {"attn_logit_softcapping": 5.0}, ["attn_logit_soft"]),
    "falcon's norms": ("falcon", {"num_ln_in_parallel_attn": 2}, ["num_ln_in_parallel_attn 2"]),
    "bloom's residual": ("bloom", {"apply_residual_connection_post_layernorm": True},
        ["apply_residual"]),
    "gptj's rotation": ("gptj", {"rotary_dim": 0}, ["rotary_dim 0 of 8"]),
    "layers without experts": ("qwen3_moe", {"decoder_sparse_step": 2},
        ["decoder_sparse_step to 2"]),
    "a layer without experts": ("qwen2_moe", {"mlp_only_layers": [0]}, ["mlp_only_layers to [0]"]),
    "more experts than there are": ("mixtral", {"num_experts_per_tok": 5}, ["5 of 4 experts"]),
    "no expert": ("olmoe", {"num_experts_per_tok": 0}, ["0 of 8 experts", "1 to 8"]),
    "quantised experts": ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.mlp.router"]}}, ["quantised", "mxfp4"]),
    "experts' activation": ("granitemoe", {"hidden_act": "mish"}, ["'mish'"]),
    "smollm3's rope": ("smollm3", {"no_rope_layers": [1]}, ["no_rope_layers", "2"]),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_settings_of_other_families_that_we_do_not_implement(case, checkpoint, altered, refused):
    family, settings, words = OTHERS[case]
    refused(altered(checkpoint(family), **settings), *words)


def test_cross_attention(checkpoint, altered, refused):
    refused(altered(checkpoint("gpt2"), add_cross_attention=True), "add_cross_attention", "gpt2")


def test_verify_says_what_it_saw(checkpoint, tensors, capsys):
    assert main([str(checkpoint("gpt2"))]) == 0
    assert "every tensor survives the round trip" in capsys.readouterr().out
    assert main([str(tensors(lambda values: values.pop(NORM)))]) == 1
    assert capsys.readouterr().err.startswith("error: ")
