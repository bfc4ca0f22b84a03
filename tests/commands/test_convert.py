"""`jhessians convert`: there and back, the factors of either, and one line for what is wrong."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from converters import load, save_flax
from converters.loading import parameters
from jhessians.cli.main import main
from jhessians.commands.convert import ConvertConfig
from jhessians.config.option import options_of
from tests import small
from tests.oracles import bergson, checkpoints

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """In bfloat16, sharded, with a tokenizer and documents."""
    folder = tmp_path_factory.mktemp("convert") / "llama"
    checkpoints.build("llama", folder, seed=1, dtype=torch.bfloat16, shards=2, **SIZES)
    checkpoints.corpus(folder, 6, lengths=(20, 9, 2, 1, 16, 24))
    return folder


@pytest.fixture(scope="module")
def flax(hugging_face):
    folder = hugging_face.with_name("flax")
    assert main(["convert", str(hugging_face), str(folder), "--quiet"]) == 0
    return folder


def tensors(folder):
    files = sorted(folder.glob("*.safetensors"))
    found = {name: value for file in files for name, value in load_file(file).items()}
    return {name: (value.dtype, value.shape, value.tobytes()) for name, value in found.items()}


def bits(folder):
    return {
        path: np.asarray(p[...]).tobytes()
        for path, p in parameters(load(folder, dtype="stored").model).items()
    }


def the_error(capfd):
    captured = capfd.readouterr()
    lines = [line for line in captured.err.splitlines() if not re.match(r"(Model|Writing)\b", line)]
    assert captured.out == "" and len(lines) == 1, captured.err
    assert lines[0].startswith("jhessians: error: ") and "unexpected " not in lines[0].split(":")[2]
    return lines[0]


def test_there_and_back(hugging_face, flax, tmp_path, capfd):
    assert sorted(path.name for path in flax.iterdir()) == [
        "config.json", "docs.jsonl", "flax_checkpoint.json", "generation_config.json",
        "manifest.json", "parameters", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    back = tmp_path / "back"
    assert main(["convert", str(flax), str(back)]) == 0
    count = sum(p.size for p in parameters(load(flax).model).values())
    assert capfd.readouterr().out == (
        f"{back}: Hugging Face checkpoint, llama, {count:,} parameters in bfloat16\n"
    )
    assert tensors(back) == tensors(hugging_face)
    theirs, ours = (AutoModelForCausalLM.from_pretrained(x) for x in (hugging_face, back))
    assert ours.dtype == torch.bfloat16 and ours.config.to_dict() == theirs.config.to_dict() | {
        "_name_or_path": str(back)
    }
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    words = [AutoTokenizer.from_pretrained(x).get_vocab() for x in (hugging_face, back)]
    assert words[0] == words[1]


def test_the_same_factors_from_either(hugging_face, flax, tmp_path, capfd):
    runs = {}
    for name, model in (("theirs", hugging_face), ("ours", flax)):
        flags = {"model": model, "dataset": hugging_face / "docs.jsonl", "world_size": 2}
        command = ["compute", str(tmp_path / name), *(f"--{k}={v}" for k, v in flags.items())]
        assert main([*command, "--fsdp", "--layout=bergson", "--num_shards=1"]) == 0
        printed = capfd.readouterr()
        assert "  model    float32, stored in bfloat16\n" in printed.out
        assert "stored in" not in printed.err  # once is enough
        runs[name] = bergson.read(tmp_path / name)
    assert runs["ours"].keys() == runs["theirs"].keys()
    for folder in runs["theirs"].keys() - {"total_processed"}:
        for module, value in runs["theirs"][folder].items():
            assert runs["ours"][folder][module].tobytes() == value.tobytes(), (folder, module)


@pytest.mark.parametrize("to", ["hf", "flax"])
def test_rewriting_in_the_same_format(hugging_face, flax, tmp_path, to):
    """In place of an earlier one, and in another number format; never in place of the source."""
    source, place = {"hf": hugging_face, "flax": flax}[to], tmp_path / "place"
    words = ["convert", str(source), str(place), f"--to={to}", "--quiet"]
    assert main(words) == 0
    assert main(words) == 1
    assert main([*words, "--overwrite", "--dtype=fp32"]) == 0
    assert main(["convert", str(place), str(place), "--quiet", "--overwrite"]) == 1
    model, before = load(place).model, load(hugging_face, dtype="float32").model
    for path, parameter in parameters(model).items():
        assert parameter.dtype == np.float32
        np.testing.assert_array_equal(parameter[...], parameters(before)[path][...])
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_float64(hugging_face, tmp_path):
    folder = tmp_path / "flax"
    assert main(["convert", str(hugging_face), str(folder), "--dtype", "fp64", "--quiet"]) == 0
    assert json.loads((folder / "flax_checkpoint.json").read_text())["dtype"] == "float64"
    assert main(["convert", str(folder), str(tmp_path / "back"), "--dtype=bf16", "--quiet"]) == 0
    assert tensors(tmp_path / "back") == tensors(hugging_face)


def test_help_explains_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["convert", "--help"]) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 80
    flat = " ".join(text.split())
    assert "usage: jhessians convert MODEL OUT" in flat
    for each in options_of(ConvertConfig):
        entry = flat.split(f" --{each.name} ", 1)[1]
        assert f"[default: {each.default_in_words}]" in entry, each.name


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from jhessians.cli.main import main; assert main(['convert', '--help']) == 0; "
        "assert not {'jax', 'flax', 'transformers', 'orbax', 'converters'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "MODEL is missing; give it, such as jhessians convert"),
        (["MODEL"], 2, "OUT is missing"),
        (["MODEL", ""], 2, "OUT is empty"),
        (["MODEL", "OUT", "more"], 2, "unrecognized arguments: more"),
        (["MODEL", "OUT", "--to", "torch"], 2, "--to 'torch' is not one of flax, hf"),
        (["MODEL", "OUT", "--dtype", "int8"], 2, "--dtype 'int8' is not one of fp32"),
        (["MODEL", "OUT", "--overwrit"], 2, "did you mean --overwrite"),
        (["./nowhere", "OUT"], 1, "./nowhere isn't a folder"),
        (["HERE", "OUT"], 1, "has no config.json"),
        (["MODEL", "HERE"], 1, "exists already"),
        (["MODEL", "FILE/x"], 1, "a part of the path is a file"),
        (["WEIGHTLESS", "OUT"], 1, "has no weights"),
        (["CUT", "OUT"], 1, "is not what convert wrote: parameters/"),
        (["HALF", "OUT"], 1, "half written"),
        (["FLAX", "OUT", "--dtype=fp16"], 1, "embedding holds NaN or infinity as float16"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_is_wrong_takes_one_line(hugging_face, flax, tmp_path, capfd, arguments, code, words):
    work = tmp_path / "work"
    work.mkdir()
    (work / "file").write_text("")
    places = {
        "MODEL": hugging_face, "HERE": work, "FILE/x": work / "file" / "x", "OUT": work / "out",
    }  # fmt: skip
    if (name := arguments[0] if arguments else "") in ("WEIGHTLESS", "CUT", "HALF", "FLAX"):
        places[name] = shutil.copytree(hugging_face if name == "WEIGHTLESS" else flax,
                                       tmp_path / "spoilt")  # fmt: skip
    if name == "WEIGHTLESS":
        (places[name] / "model.safetensors.index.json").unlink()
    elif name == "CUT":
        for file in places[name].glob("parameters/**/d/*"):
            if file.is_file():
                file.write_bytes(file.read_bytes()[:100])
    elif name == "HALF":
        shutil.rmtree(places[name] / "parameters")
    elif name == "FLAX":
        wide = load(flax, dtype="float32")
        wide.model.embedding[...] = wide.model.embedding[...].at[3, 4].set(1e30)
        shutil.rmtree(places[name])
        save_flax(wide, places[name])
    assert main(["convert", *(str(places.get(word, word)) for word in arguments)]) == code
    assert words in the_error(capfd)
    assert [path.name for path in work.iterdir()] == ["file"]


def test_a_full_disk(hugging_face, tmp_path):
    """A limit on the size of files, which TensorStore meets as it would a full disk."""
    command = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1)); "
        "from jhessians.__main__ import run; run()"
    )
    for to in ("flax", "hf"):
        done = subprocess.run(
            [sys.executable, "-c", command, "convert", hugging_face, tmp_path / "out",
             "--to", to, "--quiet"],
            capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ""},
        )  # fmt: skip
        assert done.returncode == 1 and done.stdout == ""
        assert re.fullmatch(
            r"jhessians: error: cannot write .*out.*: a file grew beyond the limit.*\n", done.stderr
        ), done.stderr
        assert list(tmp_path.iterdir()) == []


def test_two_hosts_convert_what_one_does(hugging_face, flax, tmp_path):
    """Each writes its devices' parts of the parameters; back, the first writes everything."""

    def on_two_hosts(*command):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        hosts = [
            subprocess.Popen(
                [sys.executable, "-m", "jhessians", "convert", *command],
                env={
                    **os.environ,
                    "XLA_FLAGS": small.xla_flags(2),
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": "2",
                    "JAX_PROCESS_ID": str(index),
                },
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for index in range(2)
        ]  # fmt: skip
        try:
            texts = [host.communicate(timeout=120) for host in hosts]
        finally:
            for host in hosts:
                host.kill()
        assert [host.returncode for host in hosts] == [0, 0], texts
        assert "parameters in" in texts[0][0] and "parameters in" not in texts[1][0]

    on_two_hosts(str(hugging_face), str(tmp_path / "flax"))
    parts = {path.name for path in (tmp_path / "flax" / "parameters").glob("ocdbt.process_*")}
    assert parts == {"ocdbt.process_0", "ocdbt.process_1"}
    assert bits(tmp_path / "flax") == bits(flax)
    on_two_hosts(str(tmp_path / "flax"), str(tmp_path / "back"))
    assert tensors(tmp_path / "back") == tensors(hugging_face)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "flax"]
