"""`mix` against `bergson mix` itself, and the coefficient against its definition."""

import shutil

import numpy as np
import pytest
import torch
import yaml
from bergson.cli.commands import Mix
from bergson.gradients import AdamNormalizer as TheirAdam
from bergson.gradients import GradientProcessor as TheirProcessor
from bergson.utils.math import compute_lambda

from jhessians.cli.main import main
from jhessians.interop.processor import GradientProcessor
from jhessians.linalg.mixing import mixed, mixing
from tests.small import relative_error

SAME = 1e-6  # float32 results of the same two products and their sum
SIZES = {"h.0.attn": 9, "h.0.mlp": 16, "h.1.mlp": 4}
HESSIAN = {"steps": [{"hessian": {"hessian_cfg": {"method": "autocorrelation"}}}]}


def processor(folder, seed, *, rank=None, scale=1.0, **settings):
    """What `bergson hessian --method autocorrelation` leaves in a folder, random."""
    random = np.random.default_rng(seed)
    hessians = {}
    for name, d in SIZES.items():
        rows = scale * random.standard_normal((rank or 2 * d, d))
        hessians[name] = torch.from_numpy(rows.T @ rows / len(rows)).float()
    eigen = {name: torch.linalg.eigh(x.double()) for name, x in hessians.items()}
    TheirProcessor(
        normalizers={"h.0.attn": TheirAdam(torch.ones(3, 3) * seed)},
        hessians=hessians,
        hessians_eigen={
            n: (e.eigenvalues.float(), e.eigenvectors.float()) for n, e in eigen.items()
        },
        **({"projection_dim": 3} | settings),
    ).save(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(HESSIAN))
    return folder


@pytest.fixture
def folders(tmp_path):
    return processor(tmp_path / "query", 1, scale=3), processor(tmp_path / "index", 2)


def arguments(query, index, output, **flags):
    paths = {"query_path": query, "index_path": index, "output_path": output}
    return ["mix", *(f"--{name}={value}" for name, value in (paths | flags).items())]


def only_error(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize("components", [0, 1, 5, 29, 1000])
def test_the_same_as_bergsons(folders, tmp_path, capsys, components):
    query, index = folders
    command = Mix(
        query_path=str(query),
        index_path=str(index),
        output_path=str(tmp_path / "theirs"),
        target_downweight_components=components,
    )
    command.execute()
    flags = {"target_downweight_components": components}
    assert main(arguments(query, index, tmp_path / "ours", **flags)) == 0
    expected = TheirProcessor.load(tmp_path / "theirs")
    for found in (
        TheirProcessor.load(tmp_path / "ours"),
        GradientProcessor.load(tmp_path / "ours"),
    ):
        assert list(found.hessians) == list(expected.hessians)
        for name, hessian in expected.hessians.items():
            assert found.hessians[name].dtype in (torch.float32, np.float32)
            assert relative_error(found.hessians[name], hessian) < SAME
        assert found.hessians_eigen == expected.hessians_eigen == {}
        assert set(found.normalizers) == {"h.0.attn"}
        assert float(found.normalizers["h.0.attn"].weight_avg_sq[0, 0]) == 1  # the query's
    written, theirs = (
        yaml.safe_load((tmp_path / side / "config.yaml").read_text()) for side in ("ours", "theirs")
    )
    step = written["steps"][0]["mix"]
    theirs = theirs["steps"][0]["mix"]
    assert step | {"output_path": ""} == theirs | {"output_path": ""}
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].startswith("mixed 3 autocorrelation Hessians into ")
    coefficient = written["jhessians"]["mixing"]["coefficient"]
    assert f": {coefficient:.6g} of the query's" in captured.out


def test_flags_may_be_hyphenated(folders, tmp_path):
    query, index = folders
    flags = ["--query-path", query, "--index-path", index, "--output-path", tmp_path / "ours"]
    flags += ["--target-downweight-components", "3", "--quiet"]
    assert main(["mix", *map(str, flags)]) == 0
    assert (tmp_path / "ours" / "hessians.pth").exists()


def test_two_spectra_of_zeros_take_the_default_and_say_so(tmp_path, capsys):
    query = processor(tmp_path / "query", 1, rank=1)
    index = processor(tmp_path / "index", 2, rank=1)
    for folder in (query, index):  # exact zeros, where an eigensolver leaves rounding
        loaded = TheirProcessor.load(folder)
        loaded.hessians_eigen = {
            n: (v.clamp(min=1e-5).sub(1e-5), q) for n, (v, q) in loaded.hessians_eigen.items()
        }
        loaded.save(folder)
    eigen = [TheirProcessor.load(folder).hessians_eigen for folder in (query, index)]
    assert main(arguments(query, index, tmp_path / "ours", target_downweight_components=20)) == 0
    assert compute_lambda(*eigen, 20) == 0.99
    out = capsys.readouterr().out
    assert "0.99 of the query's" in out and "a smaller --target_downweight_components" in out


def test_eigenvalues_that_are_missing_are_computed(folders, tmp_path):
    query, index = folders
    assert main(arguments(query, index, tmp_path / "ours", target_downweight_components=7)) == 0
    for folder in folders:
        torch.save({}, folder / "hessians_eigen.pth")
    assert main(arguments(query, index, tmp_path / "again", target_downweight_components=7)) == 0
    ours, again = (GradientProcessor.load(tmp_path / x) for x in ("ours", "again"))
    for name, hessian in ours.hessians.items():
        assert relative_error(again.hessians[name], hessian) < SAME


def test_the_coefficient_makes_the_spectra_cross():
    random = np.random.default_rng(0)
    query, index = random.standard_normal(50) * 9, random.standard_normal(50)
    for components in (1, 10, 25):
        found = mixing(query, index, components=components)
        sorted_query, sorted_index = np.sort(query)[::-1], np.sort(index)[::-1]
        k = components - 1
        crossing = found.coefficient * sorted_query[k], (1 - found.coefficient) * sorted_index[k]
        np.testing.assert_allclose(*crossing, rtol=1e-12)
    assert mixing(query, index, components=50).coefficient == 0.99  # negative counts as zero
    assert mixing(query, index, components=0).coefficient == 1
    assert mixing(query, -np.abs(index), components=1).coefficient == 0
    assert mixing(query, index, components=99) == mixing(query, index, components=50)
    for wrong in ((query, index, -1), (query[:0], index[:0], 1)):
        with pytest.raises(ValueError, match="expected"):
            mixing(wrong[0], wrong[1], components=wrong[2])


def test_a_mixture_is_linear_and_keeps_the_type():
    a, b = np.eye(3, dtype=np.float32), np.ones((3, 3), np.float64)
    found = mixed(a, b, 0.25)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, 0.25 * a + 0.75 * b)


def spoil(change):
    def spoiled(query, index):
        loaded = TheirProcessor.load(index)
        change(loaded)
        loaded.save(index)

    return spoiled


def set_infinite(loaded):
    loaded.hessians["h.0.mlp"][0, 0] = float("inf")


def drop_module(loaded):
    del loaded.hessians["h.0.mlp"], loaded.hessians_eigen["h.0.mlp"]


def shrink(loaded):
    loaded.hessians["h.0.mlp"] = torch.eye(2)
    loaded.hessians_eigen["h.0.mlp"] = (torch.ones(2), torch.eye(2))


REFUSALS = {
    "another seed": (
        spoil(lambda p: setattr(p, "projection_seed", 3)),
        "projected differently: projection_seed None against 3; make one",
    ),
    "another shape": (
        spoil(lambda p: setattr(p, "reshape_to_square", True)),
        "reshape_to_square False against True",
    ),
    "a module less": (spoil(drop_module), "query has a Hessian of h.0.mlp, "),
    "a smaller one": (spoil(shrink), "the Hessian of h.0.mlp has shape (16, 16) in "),
    "infinity": (spoil(set_infinite), "the mixed Hessian of h.0.mlp holds NaN or infinity"),
    "none": (lambda q, i: shutil.rmtree(i), "expected the folder of a gradient processor"),
    "a file": (lambda q, i: (shutil.rmtree(i), i.write_text("")), "cannot read"),
    "factors": (
        lambda q, i: (i / "activation_sharded").mkdir(),
        "index holds Kronecker factors (activation_sharded); expected an autocorrelation",
    ),
    "no hessians": (lambda q, i: (i / "hessians.pth").unlink(), "neither hessians.pth nor"),
    "empty": (
        lambda q, i: (
            [torch.save({}, f / "hessians.pth") for f in (q, i)]
            + [torch.save({}, f / "hessians_eigen.pth") for f in (q, i)]
        ),
        "query holds no Hessian; expected one for each module",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_mixed_is_refused_in_one_line(folders, tmp_path, capsys, case):
    damage, message = REFUSALS[case]
    damage(*folders)
    assert main(arguments(*folders, tmp_path / "ours")) == 1
    assert message in only_error(capsys)
    assert not list(tmp_path.glob("ours*"))


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"index_path": ""}, 2, "--index_path is missing; give the folder"),
        ({"target_downweight_components": -1}, 2, "must be at least 0, got -1"),
        ({"target_downweight_components": 1.5}, 2, "--target_downweight_components"),
        ({"target_downweight_component": 1}, 2, "did you mean --target_downweight_components"),
    ],
)
def test_wrong_options_are_refused(folders, tmp_path, capsys, change, code, message):
    assert main(arguments(*folders, tmp_path / "ours", **change)) == code
    assert message in only_error(capsys)


def test_an_output_that_exists_is_kept_unless_told(folders, tmp_path, capsys):
    output = tmp_path / "ours"
    output.mkdir()
    assert main(arguments(*folders, output)) == 1
    assert "exists already" in only_error(capsys)
    assert main([*arguments(*folders, output), "--overwrite"]) == 1
    assert "has no manifest.json" in only_error(capsys)
    output.rmdir()
    assert main(arguments(*folders, output)) == 0
    (output / "hessians.pth").unlink()
    capsys.readouterr()
    assert main(["mix", "stray"]) == 2
    assert "unrecognized arguments: stray" in only_error(capsys)
    assert main([*arguments(*folders, output), "--overwrite"]) == 0
    assert (output / "hessians.pth").exists()


def test_help(capsys):
    assert main(["mix", "--help"]) == 0
    text = capsys.readouterr().out
    for flag in ("query_path", "index_path", "output_path", "target_downweight_components"):
        assert f"  --{flag} " in text
    assert max(map(len, text.splitlines())) <= 100
    assert main(["--help"]) == 0
    assert "mix" in capsys.readouterr().out
