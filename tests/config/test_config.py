"""Options: values, clashes, the round trip through config.yaml, and bergson's reading of it."""

import dataclasses
import json

import pytest
import yaml

from jhessians.cli.main import parse
from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.table import COMMANDS
from jhessians.config.option import options_of
from jhessians.config.provenance import CONFIG_FILE
from jhessians.errors import ConfigError
from jhessians.interop.export import write_config
from jhessians.methods.table import METHODS

DENSE = {"method": "autocorrelation"}
REAL = {"model": "org/model", "dataset": "docs.jsonl"}

# Every option at a value other than its default.
CHANGED = ComputeConfig(
    run_path="runs/x",
    **REAL,
    revision="step1000",
    tokenizer="org/tokenizer",
    split="test[:10]",
    subset="en",
    prompt_column="question",
    completion_column="answer",
    conversation_column="",
    truncation=True,
    max_tokens=4096,
    precision="bf16",
    hessian_dtype="fp64",
    seed=7,
    method="tkfac",
    ev_correction=True,
    normalize_trace=True,
    fisher_type="dataset",
    use_dataset_labels=True,
    loss_fn="log_odds",
    label_smoothing=0.1,
    loss_reduction="mean",
    include_bias=True,
    modules=("layers.*.mlp.*", "*.q_proj"),
    filter_modules="*.gate_proj,*.k_proj",
    moe_experts="model.layers.*.mlp.experts",
    token_batch_size=512,
    activations="recompute",
    module_partitions=2,
    offload="weights",
    world_size=4,
    mesh="data=2,fsdp=2",
    fsdp=True,
    num_shards=3,
    layout="bergson",
    overwrite=True,
    profile=True,
    resume=True,
    checkpoint_minutes=2.5,
    grace_seconds=5.0,
    timeout_minutes=7.0,
    join_minutes=2.0,
    profile_trace="runs/trace",
    quiet=True,
    debug=True,
)

# The same for the options that belong to the dense method.
CHANGED_DENSE = ComputeConfig(
    run_path="runs/x",
    **REAL,
    method="autocorrelation",
    projection_dim=8,
    projection_type="normal",
    projection_scale="row_norm",
    projection_target="global",
    projection_seed=3,
    attribute_tokens=True,
    split_attention_modules=("layers.0.attention.query_key_value",),
    num_heads=4,
    head_size=12,
    optimizer_state="runs/trained",
)


def written(tmp_path, config, **more):
    arguments = {"model": "org/model", "dataset": "docs.jsonl", "shards": 3} | more
    write_config(tmp_path, config.document(**arguments), {}, layout="bergson")
    return tmp_path / CONFIG_FILE


def test_changed_config_changes_everything_it_can():
    default = ComputeConfig(run_path="runs/x")
    same = {
        each.name
        for each in options_of(ComputeConfig)
        if getattr(CHANGED, each.name) == getattr(default, each.name)
        and getattr(CHANGED_DENSE, each.name) == getattr(default, each.name)
    }
    # These exclude options that are set above, or have but one value.
    assert same == {"conversation_column", "chunk_length", "mc_samples", "reshape_to_square",
                    "normalizer", "head_dim", "matmul_precision"}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        ComputeConfig(run_path="runs/demo"),
        CHANGED,
        CHANGED_DENSE,
        ComputeConfig(run_path="r", **REAL, conversation_column="chat", prompt_column=""),
        ComputeConfig(run_path="r", **REAL, chunk_length=64),
        ComputeConfig(run_path="r", matmul_precision="bf16_x3"),
    ],
)
def test_yaml_round_trip(tmp_path, config):
    config.validate()
    path = written(tmp_path, config)
    assert ComputeConfig.from_yaml(path) == config
    assert ComputeConfig.from_yaml(tmp_path) == config


def test_unwritten_options_keep_their_defaults():
    assert ComputeConfig.from_dict({"run_path": "r"}) == ComputeConfig(run_path="r")


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CHANGED.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("method", "flag", "corrected"),
    [("ekfac", None, True), ("ekfac", True, True), ("kfac", None, False), ("kfac", True, True)],
)
def test_method_and_correction(method, flag, corrected):
    config = ComputeConfig(run_path="r", method=method, ev_correction=flag)
    config.validate()
    assert config.corrects_eigenvalues is corrected
    assert config.chosen.bergson == "kfac"


def test_every_method_is_a_choice():
    (method,) = (each for each in options_of(ComputeConfig) if each.name == "method")
    assert method.choices == tuple(METHODS)
    assert method.default == "ekfac"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "m"}, "--model is given without --dataset"),
        ({"dataset": "d"}, "--dataset is given without --model"),
        ({"revision": "v1"}, "--revision says nothing about the embedded demo"),
        ({"tokenizer": "t"}, "--tokenizer says nothing"),
        ({"subset": "s"}, "--subset says nothing"),
        (REAL | {"completion_column": "a", "conversation_column": "b"}, "exclude each other"),
        (REAL | {"prompt_column": ""}, "--prompt_column is empty"),
        ({"chunk_length": 64, "truncation": True}, "exclude each other"),
        ({"chunk_length": 1}, "--chunk_length 1"),
        ({"chunk_length": 4096}, "exceeds --token_batch_size 2048"),
        (REAL | {"chunk_length": 64, "completion_column": "a"}, "--completion_column"),
        ({"ev_correction": False}, "use --method kfac"),
        ({"run_path": "  "}, "RUN_PATH is empty"),
        ({"projection_dim": 8}, "--projection_dim belongs to --method autocorrelation, not ekfac"),
        ({"method": "kfac", "attribute_tokens": True}, "--attribute_tokens belongs to"),
        ({"method": "shampoo", "split_attention_modules": ("*",)}, "belongs to"),
        ({"method": "tkfac", "normalizer": "adam"}, "--normalizer belongs to"),
        (DENSE | {"ev_correction": True}, "--ev_correction corrects Kronecker factors"),
        (DENSE | {"num_shards": 2}, "--num_shards splits Kronecker factors"),
        (DENSE | {"normalize_trace": True}, "belongs to --method tkfac"),
        (DENSE | {"projection_target": "global"}, "says nothing without a projection"),
        (DENSE | {"projection_type": "normal"}, "--projection_type says nothing"),
        (DENSE | {"projection_seed": 1}, "--projection_seed says nothing"),
        (DENSE | {"reshape_to_square": True}, "--reshape_to_square says nothing"),
        (
            DENSE | {"projection_dim": 8, "projection_target": "global", "reshape_to_square": True},
            "--reshape_to_square reshapes a module's gradient",
        ),
        (DENSE | {"split_attention_modules": ("*",), "num_heads": 2}, "needs --head_size"),
        (DENSE | {"split_attention_modules": ("*",), "head_size": 2}, "needs --num_heads"),
        (DENSE | {"num_heads": 2}, "--num_heads says nothing without --split_attention_modules"),
        (
            DENSE
            | {"split_attention_modules": ("*",), "num_heads": 2, "head_size": 8, "head_dim": 0},
            "--head_dim 0 is no axis of features",
        ),
        (DENSE | {"normalizer": "adam", "optimizer_state": "x"}, "give one"),
        (DENSE | {"mc_samples": 2}, "--mc_samples 2 draws labels"),
        ({"mesh": "4y2"}, "--mesh is '4y2'; expected sizes such as 4x2, or names and sizes such"),
        ({"mesh": "data=4,model=2"}, "--mesh is 'data=4,model=2'; expected"),
        ({"mesh": "fsdp=4,fsdp=2", "fsdp": True}, "names fsdp twice; give its sizes as fsdp=4x2"),
        ({"mesh": "data=2,fsdp=4"}, "--mesh data=2,fsdp=4 spreads the weights; add --fsdp"),
        ({"mesh": "data=8", "fsdp": True}, "--mesh data=8 copies them along all axes"),
        (
            DENSE | {"attribute_tokens": True, "moe_experts": "*.experts"},
            "an expert of --moe_experts reads only some; leave one of them out",
        ),
    ],
)
def test_clashes(options, words):
    config = ComputeConfig(**({"run_path": "r"} | options))
    with pytest.raises(ConfigError) as caught:
        config.validate()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "ekfak"}, "did you mean ekfac"),
        ({"precision": "float32"}, "fp32, bf16, fp16, fp64"),
        ({"token_batch_size": 0}, "at least 2, got 0"),
        ({"world_size": 0}, "at least 1"),
        ({"num_shards": -1}, "at least 1"),
        ({"max_tokens": 0}, "at least 2"),
        ({"chunk_length": -1}, "at least 0"),
        ({"seed": -1}, "at least 0"),
        ({"seed": 2**32}, "at most 4294967295"),
        ({"seed": True}, "whole number"),
        ({"seed": "1"}, "whole number"),
        ({"fsdp": "yes"}, "true or false"),
        ({"mesh": 8}, "takes text"),
        ({"split": None}, "needs a value"),
        ({"modules": [1]}, "list of names"),
    ],
)
def test_wrong_values(options, words):
    with pytest.raises(ConfigError, match=words):
        ComputeConfig(run_path="r", **options)


def test_modules_from_text_list_and_commas():
    for given in ("a.*,b", ["a.*", "b"], ("a.*,b",), "a.*, b"):
        assert ComputeConfig(run_path="r", modules=given).modules == ("a.*", "b")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "does not exist"),
        ("a: [", "is not YAML"),
        ("steps: []", "jhessians: compute:"),
        ("just text", "jhessians: compute:"),
        ("jhessians: {compute: {seed: 1}}", "has no run_path"),
        ("jhessians: {compute: {run_path: r, sed: 1}}", "did you mean seed"),
        ("jhessians: {compute: {run_path: r, seed: one}}", "whole number"),
    ],
)
def test_bad_yaml(tmp_path, text, words):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        ComputeConfig.from_yaml(path)


def test_document_says_where_it_ran(tmp_path):
    path = written(tmp_path, ComputeConfig(run_path="r"), devices=["cpu:0", "cpu:1"])
    document = yaml.safe_load(path.read_text())
    assert set(document) == {"steps", "jhessians", "metadata"}
    metadata = document["metadata"]
    assert metadata["devices"] == ["cpu:0", "cpu:1"]
    for name in ("jhessians_version", "created", "jax_version", "python_version"):
        assert metadata[name]


@pytest.mark.parametrize(
    ("shards", "processes", "nodes", "per_node"), [(8, 1, 1, 8), (8, 2, 2, 4), (3, 2, 1, 3)]
)
def test_bergson_has_one_process_per_shard(shards, processes, nodes, per_node):
    world = {"model": "m", "dataset": "d", "shards": shards, "processes": processes}
    (step,) = CHANGED.document(**world)["steps"]
    assert step["hessian"]["index_cfg"]["distributed"] == {
        "nnode": nodes,
        "nproc_per_node": per_node,
    }


def test_demo_is_replayed_as_demo_and_named_for_bergson(tmp_path):
    path = written(tmp_path, ComputeConfig(run_path="r"), model="/demo/model", dataset="/d.jsonl")
    assert ComputeConfig.from_yaml(path).is_demo
    index = yaml.safe_load(path.read_text())["steps"][0]["hessian"]["index_cfg"]
    assert (index["model"], index["data"]["dataset"]) == ("/demo/model", "/d.jsonl")


def test_bergson_reads_our_config(tmp_path):
    from bergson.cli.commands import Hessian
    from bergson.config import HessianConfig, IndexConfig
    from bergson.config.config_io import load_subconfig, parse_steps, read_config

    written(tmp_path, CHANGED)
    hessian = load_subconfig(tmp_path, "hessian_cfg", HessianConfig)
    index = load_subconfig(tmp_path, "index_cfg", IndexConfig)
    assert hessian == HessianConfig(
        method="tkfac", ev_correction=True, hessian_dtype="fp64", use_dataset_labels=True,
        module_partitions=2,
    )  # fmt: skip
    expected = IndexConfig(
        run_path="runs/x",
        overwrite=True,
        model="org/model",
        precision="bf16",
        revision="step1000",
        fsdp=True,
        tokenizer="org/tokenizer",
        max_tokens=4096,
        debug=True,
        include_bias=True,
        token_batch_size=512,
        loss_reduction="mean",
        loss_fn="log_odds",
        label_smoothing=0.1,
        filter_modules="*.gate_proj,*.k_proj",
        moe_experts="model.layers.*.mlp.experts",
        modules=["layers.*.mlp.*", "*.q_proj"],
    )
    expected.distributed.nproc_per_node = 3
    data = {"dataset": "docs.jsonl", "split": "test[:10]", "subset": "en", "truncation": True}
    data |= {"prompt_column": "question", "completion_column": "answer"}
    for name, value in data.items():
        setattr(expected.data, name, value)
    assert index == expected

    # `bergson RUN/config.yaml` refuses what it does not know.
    ((name, command),) = parse_steps(read_config(tmp_path)["steps"], {"hessian": Hessian})
    assert name == "hessian" and command.index_cfg == expected


def test_bergson_reads_our_dense_config(tmp_path):
    from bergson.config import HessianConfig, IndexConfig
    from bergson.config.config import AttentionConfig
    from bergson.config.config_io import load_subconfig

    written(tmp_path, CHANGED_DENSE)
    assert load_subconfig(tmp_path, "hessian_cfg", HessianConfig) == HessianConfig(
        method="autocorrelation", ev_correction=False, use_dataset_labels=True
    )
    index = load_subconfig(tmp_path, "index_cfg", IndexConfig)
    expected = {
        "projection_dim": 8, "projection_type": "normal", "projection_scale": "row_norm",
        "projection_target": "global", "projection_seed": 3, "attribute_tokens": True,
        "split_attention_modules": ["layers.0.attention.query_key_value"],
        "attention": AttentionConfig(num_heads=4, head_size=12, head_dim=2),
        "optimizer_state": "runs/trained",
    }  # fmt: skip
    assert {name: getattr(index, name) for name in expected} == expected


def test_labels_are_the_data_sets_for_the_dense_method_unless_asked():
    dense = ComputeConfig(run_path="r", method="autocorrelation")
    assert dense.takes_dataset_labels and not ComputeConfig(run_path="r").takes_dataset_labels
    assert not ComputeConfig(
        run_path="r", method="autocorrelation", fisher_type="sampled"
    ).takes_dataset_labels


def test_bergson_reads_our_defaults_as_its_own(tmp_path):
    from bergson.config import IndexConfig
    from bergson.config.config_io import load_subconfig

    written(tmp_path, ComputeConfig(run_path="r", **REAL), shards=1)
    expected = IndexConfig(run_path="r", model="org/model")
    expected.data.dataset = "docs.jsonl"
    expected.distributed.nproc_per_node = 1
    assert load_subconfig(tmp_path, "index_cfg", IndexConfig) == expected


def test_a_run_of_the_older_tree_alone_replays_from_config_json(tmp_path):
    config = ComputeConfig(run_path="r", **REAL, layout="influence_results", seed=3)
    values = {**config.resolved_dict(), "metadata": {}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert ComputeConfig.from_yaml(tmp_path) == config
    assert ComputeConfig.from_yaml(tmp_path / "config.json") == config


@pytest.mark.parametrize("file", ["config.yaml", "config.json"])
def test_a_run_of_version_0_1_replays_with_the_layouts_former_name(file, tmp_path):
    config = ComputeConfig(run_path="r", **REAL, layout="influence_results", seed=3)
    options = config.resolved_dict() | {"layout": "seed"}
    document = {"jhessians": {"compute": options}} if file == "config.yaml" else options
    (tmp_path / file).write_text(json.dumps(document))
    assert ComputeConfig.from_yaml(tmp_path) == config
    # Only there: whoever writes a command line today reads today's help.
    with pytest.raises(ConfigError, match="--layout 'seed' is not one of both, bergson, influ"):
        parse(COMMANDS["compute"], ["r", "--layout", "seed"])
