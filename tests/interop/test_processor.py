"""Gradient processors between us and bergson, both ways, of today's files and of older ones."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from bergson.gradients import AdafactorNormalizer as TheirAdafactor
from bergson.gradients import AdamNormalizer as TheirAdam
from bergson.gradients import GradientProcessor as TheirProcessor

import jhessians
from jhessians.errors import CheckpointError, NumericsError, OutputError
from jhessians.folds.normalizers import AdafactorNormalizer, AdamNormalizer
from jhessians.interop import torchfile
from jhessians.interop.processor import GradientProcessor

MODULES = {"h.0.attn.c_attn": 16, "h.0.mlp.c_fc": 9}
SETTINGS = {
    "projection_dim": 4,
    "reshape_to_square": True,
    "projection_type": "normal",
    "projection_target": "global",
    "projection_scale": "row_norm",
    "include_bias": True,
    "projection_seed": 7,
    "projection_version": 2,
}


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def hessians_of():
    return {name: (x := draw(d, d)) @ x.T for name, d in MODULES.items()}


def ours():
    hessians = hessians_of()
    return GradientProcessor(
        normalizers={
            "adam": AdamNormalizer(jnp.asarray(draw(3, 5) ** 2), draw(3) ** 2),
            "adam without bias": AdamNormalizer(draw(3, 5) ** 2),
            "adafactor": AdafactorNormalizer(draw(3) ** 2, draw(5) ** 2, draw(3) ** 2),
            "adafactor without bias": AdafactorNormalizer(draw(3) ** 2, draw(5) ** 2),
        },
        hessians=hessians,
        hessians_eigen={name: tuple(np.linalg.eigh(x)) for name, x in hessians.items()},
        **SETTINGS,
    )


def theirs():
    hessians = {name: torch.from_numpy(x) for name, x in hessians_of().items()}
    row, col, v = (torch.from_numpy(draw(*shape) ** 2) for shape in ((3,), (5,), (3, 5)))
    return TheirProcessor(
        normalizers={
            "adam": TheirAdam(v, row),
            "adam without bias": TheirAdam(v),
            "adafactor": TheirAdafactor(row, col, row),
            "adafactor without bias": TheirAdafactor(row, col),
        },
        hessians=hessians,
        hessians_eigen={name: tuple(torch.linalg.eigh(x)) for name, x in hessians.items()},
        **SETTINGS,
    )


def same(mine, other):
    """Whether two processors of whichever side hold the same, bit for bit."""
    for name in SETTINGS:
        assert getattr(mine, name) == getattr(other, name), name
    assert set(mine.normalizers) == set(other.normalizers)
    for name, normalizer in mine.normalizers.items():
        twin = other.normalizers[name]
        assert type(normalizer).__name__ == type(twin).__name__
        for field in ("weight_avg_sq", "row", "col", "bias_avg_sq"):
            x, y = getattr(normalizer, field, None), getattr(twin, field, None)
            assert (x is None) == (y is None), (name, field)
            if x is not None:
                equal(x, y)
    for table in ("hessians", "hessians_eigen"):
        assert list(getattr(mine, table)) == list(getattr(other, table))
    for name, hessian in mine.hessians.items():
        equal(hessian, other.hessians[name])
    for name, pair in mine.hessians_eigen.items():
        for x, y in zip(pair, other.hessians_eigen[name], strict=True):
            equal(x, y)


def equal(x, y):
    x, y = np.asarray(x), np.asarray(y)
    assert x.dtype == y.dtype == np.float32
    np.testing.assert_array_equal(x, y)


def test_bergson_loads_ours(tmp_path):
    ours().save(tmp_path / "new" / "folder")
    found = TheirProcessor.load(tmp_path / "new" / "folder")
    assert isinstance(found.hessians["h.0.mlp.c_fc"], torch.Tensor)
    assert isinstance(found.hessians_eigen["h.0.mlp.c_fc"], tuple)
    same(ours(), found)


def test_ours_loads_bergsons(tmp_path):
    theirs().save(tmp_path)
    same(GradientProcessor.load(tmp_path), theirs())
    same(GradientProcessor.load(str(tmp_path)), TheirProcessor.load(tmp_path))


def test_the_settings_are_written_as_bergson_writes_them(tmp_path):
    ours().save(tmp_path / "ours")
    theirs().save(tmp_path / "theirs")
    texts = [(tmp_path / side / "processor_config.yaml").read_text() for side in ("ours", "theirs")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("settings", [{}, {"projection_dim": 0, "projection_target": "global"}])
def test_defaults_are_bergsons(settings):
    same(GradientProcessor(**settings), TheirProcessor(**settings))


def test_skipping_hessians_needs_no_file_of_theirs(tmp_path):
    theirs().save(tmp_path)
    for name in ("hessians.pth", "hessians_eigen.pth"):
        (tmp_path / name).write_bytes(b"not read")
    found = GradientProcessor.load(tmp_path, skip_hessians=True)
    assert found.hessians == found.hessians_eigen == {}
    assert len(found.normalizers) == 4


def test_older_names_and_settings(tmp_path):
    theirs().save(tmp_path)
    (tmp_path / "hessians.pth").rename(tmp_path / "preconditioners.pth")
    (tmp_path / "hessians_eigen.pth").rename(tmp_path / "preconditioners_eigen.pth")
    (tmp_path / "processor_config.yaml").write_text("projection_dim: 4\n")
    expected = TheirProcessor.load(tmp_path)
    assert expected.projection_type == "normal" and expected.projection_version == 1
    same(GradientProcessor.load(tmp_path), expected)
    (tmp_path / "processor_config.yaml").unlink()
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"projection_dim": 4, "preconditioners": {}, "preconditioners_eigen": None})
    )
    same(GradientProcessor.load(tmp_path), expected)
    (tmp_path / "preconditioners_eigen.pth").unlink()  # the first versions wrote none
    assert GradientProcessor.load(tmp_path).hessians_eigen == {}


def test_the_older_name_of_second_moments(tmp_path):
    theirs().save(tmp_path)
    state = {"linear": {"__class__": "AdamNormalizer", "avg_sq": torch.ones(3, 5)}}
    torch.save(state, tmp_path / "normalizers.pth")
    found = GradientProcessor.load(tmp_path).normalizers["linear"]
    equal(found.weight_avg_sq, TheirProcessor.load(tmp_path).normalizers["linear"].weight_avg_sq)


def test_settings_that_keep_projections_from_being_comparable():
    one = GradientProcessor(projection_dim=4)
    assert one.projection_differences(GradientProcessor(projection_dim=4)) == []
    other = GradientProcessor(projection_dim=4, projection_seed=1, include_bias=True)
    assert one.projection_differences(other) == [
        "projection_seed None against 1",
        "include_bias False against True",
    ]
    for processors in ((one, other), (other, one)):
        mine, another = ([TheirProcessor(**p.settings) for p in processors][i] for i in (0, 1))
        with pytest.raises(ValueError, match="include_bias"):
            mine.check_projection_matches(another, "x")
    plain = GradientProcessor()
    assert plain.projection_differences(GradientProcessor(include_bias=True)) == []


def test_it_is_exported_at_the_top():
    assert jhessians.GradientProcessor is GradientProcessor


def settings_file(folder, **values):
    text = yaml.safe_dump(SETTINGS | values)
    (folder / "processor_config.yaml").write_text(text)


def torch_file(name, value):
    return lambda folder: torchfile.save(value, folder / name)


EIGEN = (draw(3), draw(3, 3))
BROKEN = {
    "no folder": (shutil.rmtree, r"processor_config\.yaml .*expected the folder of a gradient"),
    "no settings": (lambda f: (f / "processor_config.yaml").unlink(), "No such file"),
    "no table": (lambda f: (f / "processor_config.yaml").write_text("[1"), "isn't valid YAML"),
    "a list": (lambda f: (f / "processor_config.yaml").write_text("- 1"), "no table of settings"),
    "bytes": (lambda f: (f / "processor_config.yaml").write_bytes(b"\xff\xfe\x00"), "valid YAML"),
    "unknown": (lambda f: settings_file(f, projection_dims=4), "did you mean projection_dim"),
    "legacy": (lambda f: settings_file(f, preconditioner_x=4), "unknown setting 'precond"),
    "legacy hessians": (lambda f: settings_file(f, preconditioners={"a": 1}), "unknown setting"),
    "a negative": (lambda f: settings_file(f, projection_dim=-1), "expected a whole number"),
    "a bool": (lambda f: settings_file(f, projection_dim=True), "expected a whole number"),
    "a word": (lambda f: settings_file(f, include_bias="no"), "expected true or false"),
    "a kind": (lambda f: settings_file(f, projection_type=["a"]), "expected one of normal"),
    "no normalizers": (lambda f: (f / "normalizers.pth").unlink(), "does not exist"),
    "no hessians": (lambda f: (f / "hessians.pth").unlink(), "neither hessians.pth nor"),
    "no pairs": (lambda f: (f / "hessians_eigen.pth").unlink(), "neither hessians_eigen.pth nor"),
    "damage": (lambda f: (f / "hessians.pth").write_bytes(b"PK\3\4"), r"hessians\.pth"),
    "no dict": (torch_file("hessians.pth", [1]), "holds a list"),
    "numbers": (torch_file("hessians.pth", {"a": 1.0}), "isn't a module's name with an array"),
    "integers": (torch_file("hessians.pth", {"a": np.eye(3, dtype=int)}), "with an array"),
    "oblong": (torch_file("hessians.pth", {"a": draw(2, 3)}), "expected a square matrix"),
    "no pair": (torch_file("hessians_eigen.pth", {"a": draw(3)}), "with eigenvalues and eig"),
    "a pair too many": (torch_file("hessians_eigen.pth", {"a": EIGEN}), "which has no Hessian"),
    "a small pair": (torch_file("hessians_eigen.pth", {"h.0.mlp.c_fc": EIGEN}), r"expected \(9,\)"),
    "no class": (torch_file("normalizers.pth", {"a": {"row": draw(3)}}), "of class None"),
    "a class": (torch_file("normalizers.pth", {"a": {"__class__": "Sgd"}}), "class 'Sgd'; expect"),
    "no moment": (
        torch_file("normalizers.pth", {"a": {"__class__": "AdamNormalizer"}}),
        "has nothing; expected the arrays weight_avg_sq",
    ),
    "another moment": (
        torch_file("normalizers.pth", {"a": {"__class__": "AdamNormalizer", "row": draw(3)}}),
        "has row; expected the arrays weight_avg_sq",
    ),
    "a vector": (
        torch_file(
            "normalizers.pth", {"a": {"__class__": "AdamNormalizer", "weight_avg_sq": draw(3)}}
        ),
        "expected 2 axes",
    ),
    "a bias": (
        torch_file(
            "normalizers.pth",
            {
                "a": {
                    "__class__": "AdafactorNormalizer",
                    "row": draw(3),
                    "col": draw(4),
                    "bias_avg_sq": draw(4),
                }
            },
        ),
        r"bias_avg_sq of a has shape \(4,\); expected \(3,\)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_is_refused_in_one_line(case, tmp_path):
    ours().save(tmp_path / "processor")
    damage, message = BROKEN[case]
    damage(tmp_path / "processor")
    with pytest.raises(CheckpointError, match=message) as caught:
        GradientProcessor.load(tmp_path / "processor")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_what_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a part of the path is a file"):
        ours().save(tmp_path / "file" / "processor")
    wrong = ours()
    wrong.hessians = {"a": draw(2, 3)}
    with pytest.raises(ValueError, match="expected a square matrix"):
        wrong.save(tmp_path / "processor")
    assert not Path(tmp_path / "processor").exists()
    with pytest.raises(ValueError, match="projection_scale is 'jll'; expected one of jl"):
        GradientProcessor(projection_scale="jll")


@pytest.mark.parametrize("file", ["normalizers.pth", "hessians.pth", "hessians_eigen.pth"])
def test_numbers_that_are_not_finite_are_named(tmp_path, file):
    ours().save(tmp_path)
    table = torchfile.load(tmp_path / file)
    name, value = next(iter(table.items()))
    array = value["weight_avg_sq"] if file == "normalizers.pth" else value
    (array[1] if isinstance(array, tuple) else array)[1, 2] = np.nan
    torchfile.save(table, tmp_path / file)
    with pytest.raises(NumericsError, match=f"of {name} in .* holds NaN or infinity"):
        GradientProcessor.load(tmp_path)
    assert file == "normalizers.pth" or GradientProcessor.load(tmp_path, skip_hessians=True)
