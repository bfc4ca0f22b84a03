"""`jhessians plan`: of shapes alone, what the run then does; and bad input."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout

import pytest
from safetensors.numpy import load_file

from jhessians.cli.main import main
from tests.oracles import checkpoints

SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8,
         "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32000}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint without weights."""
    folder = tmp_path_factory.mktemp("plan") / "llama"
    folder.mkdir()
    settings = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(settings | SIZES))
    return folder


def plan(model, *words):
    with redirect_stdout(io.StringIO()) as out:
        assert main(["plan", str(model), *map(str, words)]) == 0
    return out.getvalue()


SHORT = ("--document_length", 128, "--token_batch_size", 512)


def numbers(model, tmp_path, *words):
    path = tmp_path / "plan.json"
    plan(model, "--json", path, "--overwrite", *words)
    return json.loads(path.read_text())


def refusal(capsys, *words):
    assert main(["plan", *map(str, words)]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_without_weights_devices_or_data(model, tmp_path):
    tpus = ("--topology", "v5e:4x4", "--precision", "bf16", "--fsdp", *SHORT)
    few = numbers(model, tmp_path, *tpus)
    assert few["fits"] and few["machines"]["axes"] == {"devices0": 4, "devices1": 4}
    covariances, between, correction = few["stages"]
    assert covariances["bound"] and between["bound"] == "eigendecomposition"
    # Factors and weights are spread; what a layer needs is not.
    alone = numbers(model, tmp_path, "--devices", "1xH100", "--precision", "bf16", *SHORT)
    for of_few, of_one in zip(few["stages"], alone["stages"], strict=True):
        assert of_few["parts"]["statistics"] < of_one["parts"]["statistics"] / 12
        assert of_few["parts"]["model"] < of_one["parts"]["model"] / 12
        assert of_few["flop"] == pytest.approx(of_one["flop"], rel=0.2)
    assert covariances["sent"] > 0 and alone["stages"][0]["sent"] == 0
    text = plan(model, *tpus)
    assert "Fits: at most" in text and "16 x TPU v5e" in text and "Time: about" in text


def test_more_devices_send_no_more(model, tmp_path):
    """A step's traffic on each device stays flat, however many there are (weak scaling)."""
    sent = [
        numbers(model, tmp_path, "--topology", topology, "--fsdp", *SHORT)["stages"][0]["sent"]
        * size / 1e6
        for topology, size in (("v5e:2x2", 4), ("v5e:4x4", 16))
    ]  # fmt: skip
    assert 1 <= sent[1] / sent[0] < 1.4  # towards 1 / (1 - 1/4)


def test_what_does_not_fit_is_told_what_would(model, tmp_path):
    words = ("--devices", "2xL4", "--activations", "store", *SHORT, "--token_batch_size", 4096)
    whole = numbers(model, tmp_path, *words)
    small = f"{whole['peak'] * 0.7 / 1e9:.3f}GB"
    text = plan(model, *words, "--memory", small)
    assert "Does not fit" in text and "--token_batch_size" in text
    words = ("--memory", "0.35GB", "--document_length", 64, "--token_batch_size", 64)
    text = plan(model, *words)
    assert "--module_partitions" in text
    count = text.split("--module_partitions ")[1].split()[0]
    assert "Fits" in plan(model, *words, "--module_partitions", count)
    assert "Take more devices" in plan(model, "--memory", "0.1GB", *SHORT)
    groups = numbers(model, tmp_path, *words, "--module_partitions", "auto")
    assert groups["partitions"] == int(count) and groups["fits"]


def test_a_plan_and_its_run(tmp_path):
    """Steps, disk and documents are those that the run then has."""
    folder = checkpoints.build("llama", tmp_path / "llama", seed=1)
    data = checkpoints.corpus(folder, 40, lengths=(24, 9, 30, 17))
    words = ["--dataset", data, "--token_batch_size", 64, "--include_bias"]
    said = numbers(folder, tmp_path, "--memory", "1GB", *words)
    run = tmp_path / "run"
    command = ["compute", run, "--model", folder, "--world_size", 1, "--layout", "bergson", *words]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        assert main(list(map(str, command))) == 0
    size = sum(
        tensor.nbytes
        for file in run.rglob("*.safetensors")
        for tensor in load_file(file).values()
    )  # fmt: skip
    assert said["disk"] == size > 0
    assert said["tokens"] == 20 * (24 + 9 + 30 + 17) // 2


@pytest.mark.parametrize("method", ["kfac", "shampoo", "autocorrelation"])
def test_every_kind_of_method(model, tmp_path, method):
    more = ["--projection_dim", 8, "--normalizer", "adam"] if method == "autocorrelation" else []
    found = numbers(model, tmp_path, "--method", method, "--devices", "4xA100", *more, *SHORT)
    names = [stage["name"] for stage in found["stages"]]
    assert names == {
        "autocorrelation": ["Normalizers", "Grams", "Eigendecompositions"],
    }.get(method, ["Covariances", "Eigendecompositions"])
    assert all(stage["device_bytes"] > 0 and stage["time"] > 0 for stage in found["stages"])
    between = found["stages"][-1]["parts"]["statistics"]
    if method == "autocorrelation":  # Grams of 8² x 8², of 7 linears in 8 layers
        assert between == 8 * 7 * 64**2 * 4 // 4
    else:  # eigenvectors, on 4 devices; where inputs are shared, those of one A for all
        gradients = (512, 256, 256, 512, 1024, 1024, 512)
        inputs = (512, 512, 512, 512, 512, 512, 1024)
        inputs = inputs if method == "shampoo" else (512, 512, 512, 1024)
        vectors = 8 * sum(d * d for d in (*gradients, *inputs)) * 4 / 4
        assert vectors <= between < 1.2 * vectors


def test_bad_input(model, tmp_path, capsys):
    assert "none that is known" in refusal(capsys, model, "--topology", "v9:4x4")
    assert "exclude each other" in refusal(
        capsys, model, "--topology", "v5e:4x4", "--devices", "8xH100"
    )
    assert "--topology" in refusal(capsys, model, "--compile")
    assert "multiply to 16" in refusal(capsys, model, "--topology", "v5e:4x4", "--mesh", "4x2")
    assert "config.json" in refusal(capsys, tmp_path)
    assert "MODEL" in refusal(capsys)
    assert "--document_length" in refusal(
        capsys, model, "--document_length", 64, "--dataset", "x.jsonl"
    )
    long = refusal(capsys, model, "--document_length", 4096)
    assert "4096 tokens" in long and "larger batch" in long
    assert "existing folder" in refusal(capsys, model, "--json", tmp_path / "no" / "plan.json")
