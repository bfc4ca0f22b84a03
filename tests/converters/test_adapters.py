"""LoRA adapters beside peft: logits, factors of their own linears beside bergson's, refusals."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import converters.hub
from converters import load, load_tokenizer, save, supported
from converters.loading import parameters
from converters.verify import verify
from jhessians.capture.sites import find_sites
from jhessians.cli.main import main
from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.compute.pipeline import compute
from jhessians.devices.mesh import make_mesh
from jhessians.errors import CheckpointError, ConfigError
from jhessians.models.layers import Linear
from jhessians.models.lora import LoRA, freeze
from tests.converters.comparison import documents, error, our_logits, their_logits
from tests.oracles import adapters, bergson, checkpoints
from tests.test_bergson import COVARIANCES, factor_errors
from tests.tolerances import FACTORS, FLOAT64_FACTORS, INVARIANCE, LOGITS, SCORE_CORRELATION, TWIN

LENGTHS = (2, 40, 9, 25, 3, 60)
LLAMA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}
GPT2 = {"r": 4, "lora_alpha": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
# Wide enough for `fsdp` to divide A and B among eight devices.
WIDE = {**LLAMA, "r": 16, "lora_alpha": 24}
SOME_LAYERS = {**WIDE, "layers_to_transform": [0, 2]}

CASES = {
    "llama": ("llama", {}, LLAMA),
    "patterns": (
        "llama",
        {},
        {**LLAMA, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"mlp\.\w+": 11, "v_proj": 1}},
    ),
    "regex": ("llama", {}, {"r": 3, "target_modules": r".*\.(up|gate)_proj", "beside": True}),
    "some layers": ("llama", {"num_hidden_layers": 3, "hidden_size": 64}, SOME_LAYERS),
    "gpt2": ("gpt2", {}, {**GPT2, "use_rslora": True}),
    "fused": ("phi3", {}, {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.5}),
}  # fmt: skip


# One runs always; and bergson doesn't look for base models beside adapters.
SKIPPED = {"some layers", "regex"}


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """`adapter(family, changes, settings)`: base folder and adapter folder, built once."""
    built: dict[str, tuple[Path, Path]] = {}

    def get(family="llama", changes=None, settings=LLAMA) -> tuple[Path, Path]:
        key = f"{family} {changes} {settings}"
        if key not in built:
            base = checkpoint(family, **(changes or {}))
            folder = tmp_path_factory.mktemp("adapter")
            built[key] = base, adapters.build(base, folder, seed=2, **settings)
        return built[key]

    return get


@pytest.fixture
def edited(adapter, tmp_path):
    """`edited(change=…, **settings)`: a copy with other settings and other tensors."""

    def get(change=None, **settings) -> Path:
        copy = tmp_path / f"edited{sum(1 for _ in tmp_path.iterdir())}"
        shutil.copytree(adapter()[1], copy)
        path = copy / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        if change is not None:
            tensors = load_file(copy / "adapter_model.safetensors")
            change(tensors)
            save_file(tensors, copy / "adapter_model.safetensors")
        return copy

    return get


def loras(model) -> list[LoRA]:
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, LoRA)]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "fused" else []) for n in CASES]
)
def test_logits_equal_pefts(name, adapter, record_property):
    base, folder = adapter(*CASES[name])
    batch = documents()
    expected = adapters.logits(base, folder, batch)
    model = load(folder).model
    found = error(our_logits(model, batch), expected)
    record_property("logits", found)
    assert found < LOGITS
    assert error(their_logits(base, batch), expected) > TWIN
    if name in ("llama", "gpt2"):  # the wrong twin forgets the scale
        for lora in loras(model):
            lora.scale = 1.0
        assert error(our_logits(model, batch), expected) > TWIN


@pytest.mark.slow
@pytest.mark.parametrize("family", supported())
def test_every_family(family, adapter):
    """All linears, or of a mixture of experts, whose routers and experts aren't such, some."""
    mixture = {"num_experts", "num_local_experts"} & checkpoints.ARCHITECTURES[family](320).keys()
    targets = ["q_proj", "v_proj"] if mixture else "all-linear"
    base, folder = adapter(family, {}, {"r": 4, "lora_alpha": 3, "target_modules": targets})
    batch = documents()
    expected = adapters.logits(base, folder, batch)
    assert error(our_logits(load(folder).model, batch), expected) < LOGITS
    assert error(their_logits(base, batch), expected) > TWIN


def test_torchs_own_format(adapter, tmp_path):
    import torch

    base, folder = adapter()
    copy = tmp_path / "bin"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "adapter_model.safetensors")
    torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, copy / "adapter_model.bin")
    (copy / "adapter_model.safetensors").unlink()
    ours, other = (parameters(load(f).model) for f in (copy, folder))
    assert ours.keys() == other.keys()
    assert all(np.array_equal(ours[path][...], other[path][...]) for path in ours)


def test_bfloat16_and_meshes(adapter):
    base, folder = adapter("llama", {"hidden_size": 64}, WIDE)
    narrow = load(folder, dtype="bfloat16").model
    assert all(p.dtype == jax.numpy.bfloat16 for p in parameters(narrow).values())
    batch = documents()
    # Eight bits, block after block; nothing else may be lost.
    assert error(our_logits(narrow, batch), adapters.logits(base, folder, batch)) < 0.1
    whole = load(folder).model
    sharded = load(folder, mesh=make_mesh(8), fsdp=True).model
    kernel = sharded.layers.blocks.attention.query.adapter.lora_A.kernel[...]
    assert not kernel.sharding.is_fully_replicated
    for path, variable in parameters(whole).items():
        np.testing.assert_array_equal(parameters(sharded)[path][...], variable[...], path)


def fitted(folder: Path, data: Path, run: Path, **options):
    """What a fit writes; labels are the data set's."""
    settings = {"use_dataset_labels": True, "token_batch_size": 128, "truncation": True}
    given = {"world_size": 1, **settings, **options}
    config = ComputeConfig(str(run), model=str(folder), dataset=str(data), **given)
    compute(config)
    return bergson.read(run)


def with_documents(folder: Path, family: str, count: int = 12) -> Path:
    """A data set beside an adapter, which gets a tokenizer: bergson takes no other."""
    checkpoints.tokenizer(folder, add_bos=family == "llama")
    return checkpoints.corpus(folder, count, lengths=LENGTHS)


@pytest.mark.parametrize(
    "name",
    ["some layers", *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n not in SKIPPED)],
)
def test_factors_equal_bergsons(name, adapter, tmp_path, record_property):
    family, *_ = CASES[name]
    base, folder = adapter(*CASES[name])
    data = with_documents(folder, family)
    devices = {"world_size": 8, "fsdp": True} if name == "some layers" else {}
    found = fitted(folder, data, tmp_path / "run", include_bias=True, **devices)
    expected = bergson.read(bergson.fit(folder, data, include_bias=True))
    modules = set(expected["activation_sharded"])
    assert modules == set(found["activation_sharded"])
    assert all(module.endswith((".lora_A.default", ".lora_B.default")) for module in modules)
    if name == "some layers":
        assert {module.split(".")[3] for module in modules} == {"0", "2"}
        assert "model.model.layers.2.mlp.down_proj.lora_B.default" in modules
    assert found["total_processed"] == expected["total_processed"]
    for kind, worst in factor_errors(found, expected).items():
        record_property(kind, worst)
        assert worst < FACTORS, kind
    for kind, vectors in {k: v for k, v in found.items() if k.startswith("eigen_")}.items():
        for module, q in vectors.items():
            rotated = q.T @ expected[kind.removeprefix("eigen_")][module] @ q
            off = np.abs(rotated - np.diag(np.diag(rotated))).max()
            assert off < FACTORS * np.abs(rotated).max(), (kind, module)


def test_float64_by_the_command_line(adapter, tmp_path, record_property):
    """On the family that computes nothing in float32."""
    _, folder = adapter(*CASES["gpt2"])
    data = with_documents(folder, "gpt2")
    flags = ["--use_dataset_labels=true", "--truncation=true", "--token_batch_size=128",
             "--precision=fp64", "--hessian_dtype=fp64", "--world_size=1"]  # fmt: skip
    run = str(tmp_path / "run")
    given = [f"--model={folder}", f"--dataset={data}", "--quiet", *flags]
    assert main(["compute", run, *given]) == 0
    worst = factor_errors(bergson.read(run), bergson.read(bergson.fit(folder, data)))
    for kind in (*COVARIANCES, "eigenvalue_correction_sharded"):
        record_property(kind, worst[kind])
        assert worst[kind] < FLOAT64_FACTORS, kind


@pytest.mark.slow
def test_bergson_scores_with_our_factors(adapter, tmp_path):
    _, folder = adapter(*CASES["some layers"])
    data = with_documents(folder, "llama")
    queries = checkpoints.corpus(folder, 3, seed=7, lengths=(8, 30), name="query.jsonl")
    fitted(folder, data, tmp_path / "given" / "hessian" / "kfac")
    # `ekfac_scores` makes sure that bergson skips its own fit.
    given, own = (
        bergson.ekfac_scores(tmp_path / name, folder, data, queries) for name in ("given", "own")
    )
    assert np.corrcoef(given.ravel(), own.ravel())[0, 1] > SCORE_CORRELATION


@pytest.mark.slow
def test_eight_devices_change_nothing(adapter, tmp_path):
    _, folder = adapter("llama", {"hidden_size": 64}, WIDE)
    data = with_documents(folder, "llama", 8)
    one = fitted(folder, data, tmp_path / "one", method="kfac")
    eight = fitted(folder, data, tmp_path / "eight", method="kfac", world_size=8, fsdp=True)
    for kind in COVARIANCES:
        for module, value in one[kind].items():
            assert error([eight[kind][module]], [value]) < INVARIANCE, (kind, module)


@pytest.mark.slow
def test_modules_can_be_chosen_and_dense_methods_work(adapter, tmp_path):
    _, folder = adapter(settings={**LLAMA, "r": 6})
    data = with_documents(folder, "llama", 4)
    options = {"method": "autocorrelation", "modules": ("*.lora_A.default",), "projection_dim": 4}
    config = ComputeConfig(
        str(tmp_path / "run"), model=str(folder), dataset=str(data), world_size=1, **options
    )
    assert compute(config).modules == 6


def test_optimizer_states_are_refused(adapter, tmp_path):
    _, folder = adapter(settings={**LLAMA, "r": 6})
    data = with_documents(folder, "llama", 4)
    with pytest.raises(ConfigError, match="--normalizer adam"):
        fitted(folder, data, tmp_path / "x", method="autocorrelation", optimizer_state="o.pt")


def test_the_bases_tokenizer_serves(adapter, tmp_path):
    base, folder = adapter(settings={**LLAMA, "r": 5})
    assert load(folder).tokenizer("a b") == load_tokenizer(base)("a b")
    copy = tmp_path / "own"
    shutil.copytree(folder, copy)
    checkpoints.tokenizer(copy, model_max_length=77)
    assert load_tokenizer(copy).model_max_length == 77


def test_adapters_on_the_hub(adapter, monkeypatch):
    """A repository without a config.json, whose base model is another one."""
    base, folder = adapter()
    files = {"someone/adapter": folder, "someone/base": base}

    def download(repository, revision, file):
        path = files[repository] / file
        if not path.is_file():
            raise CheckpointError(f"no {file}")
        return path

    monkeypatch.setattr(converters.hub, "_download", download)
    listed = lambda name, _: frozenset(p.name for p in files[name].iterdir())  # noqa: E731
    monkeypatch.setattr(converters.hub, "_list", listed)
    settings = json.loads((folder / "adapter_config.json").read_text())
    given = {**settings, "base_model_name_or_path": "someone/base"}
    monkeypatch.setattr(converters.hub, "read_json", lambda path: given)
    source = converters.hub.find("someone/adapter")
    assert (source.repository, source.adapter.repository) == ("someone/base", "someone/adapter")
    assert len(loras(load("someone/adapter").model)) == 3
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        files["someone/nothing"] = folder.parent
        converters.hub.find("someone/nothing")


class Narrow(nnx.Module):
    """Two linears, of which the second one has an adapter."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up, self.down = Linear(4, 6, rngs=rngs), Linear(6, 3, rngs=rngs)
        freeze(self)
        self.down.adapter = LoRA(6, 3, 2, scale=2.0, dtype=np.float32, rngs=rngs)

    def __call__(self, x):
        return self.down(self.up(x))


def test_an_adapter_in_a_model_of_ones_own():
    model, x = Narrow(), jax.numpy.ones((2, 5, 4))
    sites = find_sites(lambda m, batch: m(batch).sum(), model, x)
    assert list(sites) == ["down.adapter.lora_A", "down.adapter.lora_B"]
    lora = model.down.adapter
    update = 2 * lora.lora_A.kernel[...] @ lora.lora_B.kernel[...]
    expected = x @ model.up.kernel[...] @ (model.down.kernel[...] + update)
    np.testing.assert_allclose(model(x), expected, rtol=1e-5)


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "LOHA"}, {"use_dora": True}, {"lora_bias": True}, {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "pissa_niter_4"},
        {"trainable_token_indices": [3]}, {"target_parameters": ["experts.w"]},
        {"a_setting_to_come": 1}, {"r": 0}, {"lora_alpha": None}, {"base_model_name_or_path": ""},
        {"rank_pattern": {"q_proj": 0}}, {"alpha_pattern": {"(": 3}}, {"target_modules": "*"},
        {"rank_pattern": [1]}, {"target_modules": 3},
    ],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_settings_that_change_more_are_refused(settings, edited):
    refused(edited(**settings), *settings)


def test_other_adapters_are_refused(edited, checkpoint, tmp_path):
    query = "base_model.model.model.layers.0.self_attn.q_proj"
    spoilt = {
        "embeddings": lambda t: t.update(
            {"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 320), "f4")}
        ),
        "lm_head": lambda t: t.update(
            {f"base_model.model.lm_head.lora_{p}.weight": np.ones((4, 4), "f4") for p in "AB"}
        ),
        "q_proj.lora_B": lambda t: t.pop(f"{query}.lora_B.weight"),
        "layers.0.self_attn.q_proj": lambda t: [t.pop(f"{query}.lora_{p}.weight") for p in "AB"],
        "layers.7": lambda t: t.update(
            {f"{query.replace('.0.', '.7.')}.lora_{p}.weight": np.ones((4, 4), "f4") for p in "AB"}
        ),
        "of int32": lambda t: t.update(
            {f"{query}.lora_A.weight": t[f"{query}.lora_A.weight"].astype("i4")}
        ),
        "any lora_A": lambda t: t.clear(),
    }
    for word, change in spoilt.items():
        refused(edited(change, **({"target_modules": []} if "any" in word else {})), word)
    refused(edited(r=8), "is [4, ", "expected [8, ", "belong together")
    refused(edited(alpha_pattern={r"layers\.0\..*": 3}), "the same in every layer", "layers.1")
    wide = checkpoint("llama", hidden_size=64)
    refused(edited(base_model_name_or_path=str(wide)), "belong together")
    missing = edited(base_model_name_or_path="../nowhere")
    refused(missing, "../nowhere isn't a folder", "base_model_name_or_path")
    refused(edited(base_model_name_or_path=str(missing)), "no config.json")
    bare = edited()
    (bare / "adapter_model.safetensors").unlink()
    refused(bare, "adapter_model.safetensors or adapter_model.bin")


def test_what_an_adapter_cannot_do(adapter, tmp_path):
    _, folder = adapter()
    loaded = load(folder)
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        save(loaded, tmp_path / "out")
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        verify(folder)
    assert not (tmp_path / "out").exists()
