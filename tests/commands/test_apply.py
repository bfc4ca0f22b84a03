"""`apply` against bergson's own appliers in float32, numpy in float64, and what it refuses."""

import shutil

import numpy as np
import pytest
import torch
import yaml
from bergson.config import InversionConfig
from bergson.data import load_gradients
from bergson.gradients import AdamNormalizer as TheirAdam
from bergson.gradients import GradientProcessor as TheirProcessor
from bergson.hessians.apply_hessian import EkfacApplicator, EkfacConfig
from bergson.hessians.preconditioner import (
    DensePreconditioner,
    FactoredPreconditioner,
    JointDensePreconditioner,
)
from safetensors.numpy import load_file, save_file

from jhessians.cli.main import main
from jhessians.commands.apply import pipeline
from jhessians.config import inversion as table
from jhessians.interop.gradient_store import GradientStore, GradientWriter
from jhessians.linalg.inverse import INVERSIONS
from tests.interop.synthetic import SIZES, export, make_factors
from tests.small import relative_error

FLOAT32 = 1e-5  # products of float32 over hundreds of terms, by two libraries
FLOAT64 = 1e-12
WHOLE = {name: o * i for name, (o, i) in SIZES.items()}
DENSE = {"h.0.attn.head_0": 4, "h.0.attn.head_1": 4, "h.0.mlp": 9}
ROWS = 5


def store(folder, sizes, *, dtype=np.float32, counts=None, processor=None):
    """A store of random gradients, with bergson's processor beside it if there is one."""
    folder.mkdir(parents=True)
    width = sum(sizes.values())
    values = np.random.default_rng(3).standard_normal((ROWS, width)).astype(dtype)
    with GradientWriter(folder, sizes, np.dtype(dtype), ROWS, counts=counts) as writer:
        writer.write(0, values)
    if processor is not None:
        TheirProcessor(**processor).save(folder)
    return folder


def dense(folder, sizes=DENSE, *, rank=None, **settings):
    """An autocorrelation Hessian of bergson's."""
    random = np.random.default_rng(5)
    hessians = {}
    for name, d in sizes.items():
        rows = random.standard_normal((rank or 3 * d, d))
        hessians[name] = torch.from_numpy(rows.T @ rows / len(rows)).float()
    eigen = {name: torch.linalg.eigh(x) for name, x in hessians.items()}
    TheirProcessor(
        hessians=hessians,
        hessians_eigen={name: (e.eigenvalues, e.eigenvectors) for name, e in eigen.items()},
        **settings,
    ).save(folder)
    return folder


@pytest.fixture(scope="module")
def factored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hessians")
    factors = make_factors()
    export(folder / "one", factors, shards=1)
    export(folder / "three", factors, shards=3)
    return folder


@pytest.fixture
def gradients(tmp_path):
    return store(tmp_path / "gradients", WHOLE)


def run(out, hessian, gradients, **options):
    words = {"hessian": hessian, "gradients": gradients} | options
    return main(["apply", str(out), *(f"--{name}={value}" for name, value in words.items())])


def only_error(capsys):
    captured = capsys.readouterr()
    lines = [x for x in captured.err.splitlines() if x.startswith("jhessians: error")]
    assert captured.out == "" and len(lines) == 1
    return lines[0]


CASES = [(each, correct) for each in INVERSIONS for correct in (False, True)]
CASES.remove(("factored_tikhonov", True))


def test_the_options_know_all_inversions():
    assert table.INVERSIONS == INVERSIONS


@pytest.mark.parametrize(("inversion", "correct"), CASES)
def test_factors_as_bergsons_applicator(factored, gradients, tmp_path, inversion, correct):
    damping = 0.3
    config = EkfacConfig(
        hessian_method_path=str(factored / "one"), gradient_path=str(gradients),
        run_path=str(tmp_path / "theirs"), ev_correction=correct,
    )  # fmt: skip
    inverse = InversionConfig(inversion=inversion, damping_factor=damping)
    EkfacApplicator(config, inverse).compute_ivhp_sharded()
    options = {"inversion": inversion, "damping_factor": damping, "quiet": True}
    flags = options | {"ev_correction": str(correct).lower()}
    assert run(tmp_path / "ours", factored / "three", gradients, **flags) == 0
    expected, found = (GradientStore(tmp_path / side) for side in ("theirs", "ours"))
    assert found.dtype == np.float32 and set(found.sizes) == set(expected.sizes)
    for name in WHOLE:
        assert relative_error(found.module(name), expected.module(name)) < FLOAT32
    assert np.array_equal(load_gradients(tmp_path / "ours"), found.matrix)
    # The truth, in float64.
    assert run(tmp_path / "wide", factored / "one", gradients, precision="fp64", **flags) == 0
    wide, factors = GradientStore(tmp_path / "wide"), make_factors()
    for name, (o, i) in SIZES.items():
        kinds = {kind: each[name].astype(np.float64) for kind, each in factors.items()}
        truth = by_hand(kinds, inversion, damping, correct,
                        GradientStore(gradients).module(name).reshape(-1, o, i))  # fmt: skip
        assert relative_error(wide.module(name), truth.reshape(ROWS, -1)) < FLOAT64


def by_hand(kinds, inversion, damping, correct, gradients):
    """bergson's formulas in float64, from the factors of one module."""
    values = kinds["eigenvalue_correction" if correct else "eigenvalue"]
    q_s, q_a = kinds["gradient_eigenvectors"], kinds["activation_eigenvectors"]
    if inversion == "factored_tikhonov":
        of_s, of_a = kinds["gradient_eigenvalues"], kinds["activation_eigenvalues"]
        pi, root = np.sqrt(of_a.mean() / of_s.mean()), np.sqrt(damping * of_s.mean() * of_a.mean())
        multiplier = 1 / np.outer(of_s + root / pi, of_a + root * pi)
    else:
        multiplier = simple(values, inversion, damping)
    rotated = q_s.T @ gradients.astype(np.float64) @ q_a
    return q_s @ (rotated * multiplier) @ q_a.T


def simple(values, inversion, damping):
    least = damping * values.mean()
    if inversion == "absolute_damped_inverse":
        return 1 / (values + damping)
    if inversion == "tikhonov_filtered":
        return values / (values**2 + least**2)
    if inversion == "pseudoinverse":
        return np.where(values > least, 1 / np.maximum(values, least), 0)
    return 1 / (values + least)  # a dense matrix has no factors to split its damping


def test_shards_are_read_as_bergsons_reader_does(factored, gradients, tmp_path):
    # Another default than bergson's, which is 0.1.
    given = {"damping_factor": 0.1, "quiet": True}
    assert run(tmp_path / "ours", factored / "three", gradients, **given) == 0
    reader = FactoredPreconditioner.from_path(factored / "three", ev_correction=True)
    matrix = GradientStore(gradients)
    expected = reader.apply(
        {name: torch.from_numpy(np.array(matrix.module(name))) for name in WHOLE}
    )
    for name, values in expected.items():
        found = GradientStore(tmp_path / "ours").module(name)
        assert relative_error(found, values.numpy()) < FLOAT32


@pytest.mark.parametrize("inversion", INVERSIONS)
@pytest.mark.parametrize("joint", [False, True])
def test_dense_hessians_as_bergsons(tmp_path, inversion, joint):
    sizes = {"gradients": 7} if joint else DENSE
    settings = {"projection_dim": 7, "projection_target": "global"} if joint else {}
    gradients = store(tmp_path / "gradients", sizes, processor=settings)
    hessian = dense(tmp_path / "hessian", {"joint": 7} if joint else DENSE, **settings)
    flags = {"inversion": inversion, "damping_factor": 0.2, "quiet": True}
    assert run(tmp_path / "ours", hessian, gradients, **flags) == 0
    found, given = GradientStore(tmp_path / "ours"), GradientStore(gradients)
    processor = TheirProcessor.load(hessian)
    kind = JointDensePreconditioner if joint else DensePreconditioner
    theirs = kind.from_processor(
        processor, inversion_cfg=InversionConfig(inversion=inversion, damping_factor=0.2)
    ).apply({name: torch.from_numpy(np.array(given.module(name))) for name in sizes})
    assert run(tmp_path / "wide", hessian, gradients, precision="fp64", **flags) == 0
    for name in sizes:
        assert relative_error(found.module(name), theirs[name].numpy()) < FLOAT32
        matrix = processor.hessians["joint" if joint else name].double().numpy()
        values, vectors = np.linalg.eigh(matrix)
        inverse = (vectors * simple(np.maximum(values, 0), inversion, 0.2)) @ vectors.T
        truth = given.module(name).astype(np.float64) @ inverse
        assert relative_error(GradientStore(tmp_path / "wide").module(name), truth) < FLOAT64
    saved = TheirProcessor.load(tmp_path / "ours")
    assert saved.projection_dim == settings.get("projection_dim")


def test_slices_change_nothing_and_tokens_keep_their_offsets(tmp_path, monkeypatch):
    counts = np.array([2, 0, 3])
    gradients = store(tmp_path / "gradients", DENSE, counts=counts)
    hessian = dense(tmp_path / "hessian")
    assert run(tmp_path / "whole", hessian, gradients, quiet=True) == 0
    monkeypatch.setattr(pipeline, "SHARE", 1e-15)  # a row at a time
    assert run(tmp_path / "sliced", hessian, gradients, quiet=True) == 0
    whole, sliced = (GradientStore(tmp_path / side) for side in ("whole", "sliced"))
    assert relative_error(sliced.matrix, whole.matrix) < 1e-6
    assert np.array_equal(np.diff(sliced.offsets), counts)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_number_formats_are_read(factored, tmp_path, dtype):
    gradients = store(tmp_path / "gradients", WHOLE, dtype=np.dtype(dtype))
    assert run(tmp_path / "ours", factored / "one", gradients, quiet=True) == 0
    narrow = GradientStore(gradients).matrix.astype(np.float32)
    plain = tmp_path / "plain"
    plain.mkdir()
    with GradientWriter(plain, WHOLE, np.dtype(np.float32), ROWS) as writer:
        writer.write(0, narrow)
    assert run(tmp_path / "again", factored / "one", plain, quiet=True) == 0
    stores = [GradientStore(tmp_path / side).matrix for side in ("ours", "again")]
    assert np.array_equal(*stores)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "corrected eigenvalues)"),
        ({"ev_correction": "false"}, "uncorrected eigenvalues)"),
        ({"inversion": "factored_tikhonov"}, "uncorrected eigenvalues)"),
    ],
)
def test_the_summary_says_which_eigenvalues(factored, gradients, tmp_path, capsys, options, words):
    assert run(tmp_path / "ours", factored / "one", gradients, **options) == 0
    out = capsys.readouterr().out
    assert f", {words}" in out and "5 rows of 3 modules" in out
    assert yaml.safe_load((tmp_path / "ours" / "config.yaml").read_text())["steps"] == []


def spoilt_factors(source, target, folder, change):
    """A run of one shard with one tensor changed."""
    shutil.copytree(source, target)
    file = target / folder / "shard_0.safetensors"
    tensors = {name: x.copy() for name, x in load_file(file).items()}
    change(tensors)
    file.unlink()  # it may be a hard link
    save_file(tensors, file)
    return target


def singular(tensors):
    tensors["tiny"][0] = 0


def zero(tensors):
    tensors["tiny"][:] = 0


def test_a_singular_hessian_wants_damping(factored, gradients, tmp_path, capsys):
    folder = "eigenvalue_correction_sharded"
    hessian = spoilt_factors(factored / "one", tmp_path / "singular", folder, singular)
    assert run(tmp_path / "out" / "a", hessian, gradients, damping_factor=0) == 1
    line = only_error(capsys)
    assert "of tiny is singular" in line and "--damping_factor is 0; give one such as 0.01" in line
    assert not list((tmp_path / "out").iterdir())
    for options in ({"damping_factor": 0.1}, {"damping_factor": 0, "inversion": "pseudoinverse"}):
        assert run(tmp_path / "b", hessian, gradients, overwrite=True, quiet=True, **options) == 0
    hessian = spoilt_factors(factored / "one", tmp_path / "zero", folder, zero)
    capsys.readouterr()
    assert run(tmp_path / "c", hessian, gradients) == 1
    assert "of tiny is zero" in only_error(capsys)
    low = dense(tmp_path / "low", {name: WHOLE[name] for name in ["tiny"]}, rank=2)
    one = store(tmp_path / "one", {"tiny": 15})
    assert run(tmp_path / "d", low, one, damping_factor=0) == 1
    assert "of tiny is singular" in only_error(capsys)


def test_gradients_must_be_finite(factored, tmp_path, capsys):
    folder = store(tmp_path / "gradients", WHOLE)
    matrix = np.memmap(
        folder / "gradients.bin", np.float32, "r+", shape=(ROWS, sum(WHOLE.values()))
    )
    matrix[3, WHOLE["layers.1.down"] + 5] = np.nan
    matrix.flush()
    assert run(tmp_path / "out" / "ours", factored / "one", folder) == 1
    assert "row 3 of layers.0.up holds NaN or infinity" in only_error(capsys)
    assert not list((tmp_path / "out").iterdir())


def test_the_two_must_belong_together(factored, gradients, tmp_path, capsys):
    whole, hessian = gradients, factored / "one"
    projected = store(tmp_path / "projected", WHOLE, processor={"projection_dim": 4})
    fewer = store(tmp_path / "fewer", {"tiny": 15})
    other = store(tmp_path / "other", WHOLE | {"extra": 2})
    wider = store(tmp_path / "wider", WHOLE | {"tiny": 18})
    bare = store(tmp_path / "bare", WHOLE, processor={})
    of_projected = dense(tmp_path / "dense", projection_dim=2)
    joint = dense(tmp_path / "joint", {"joint": 7}, projection_dim=7, projection_target="global")
    low_rank = tmp_path / "low-rank"
    low_rank.mkdir()
    (low_rank / "low_rank.json").write_text("{}")
    uncorrected = tmp_path / "uncorrected"
    shutil.copytree(hessian, uncorrected)
    shutil.rmtree(uncorrected / "eigenvalue_correction_sharded")
    shutil.rmtree(uncorrected / "influence_results" / "eigenvalue_correction_sharded")
    for given, options, words in [
        ((hessian, projected), {}, "has projected gradients (projection_dim 4)"),
        ((of_projected, bare), {}, "were projected differently: projection_dim 2 against None"),
        ((joint, whole), {}, "the joint Hessian in"),
        ((hessian, fewer), {}, "a Hessian of layers.1.down (and 1 more) is in"),
        ((hessian, other), {}, "gradients of extra are in"),
        ((hessian, wider), {}, "the gradient of tiny has 18 numbers"),
        ((hessian, low_rank), {}, "holds gradients as a few outer products"),
        ((hessian, tmp_path), {}, "has no info.json"),
        ((tmp_path, whole), {}, "holds no Hessian"),
        ((tmp_path / "none", whole), {}, "none is no folder"),
        ((hessian / "influence_results", whole), {}, "eigenvalues have another unit"),
        ((uncorrected, whole), {"ev_correction": "true"}, "has no corrected eigenvalues"),
        ((of_projected, whole), {"ev_correction": "true"}, "which has no corrected eigenvalues"),
    ]:
        assert run(tmp_path / "out" / "x", *given, **options) == 1, words
        assert words in only_error(capsys)
        assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out"], "--hessian is missing; give the folder"),
        (["out", "--hessian", "a"], "--gradients is missing"),
        ([], "OUT is missing"),
        (["o", "--hessian=a", "--gradients=b", "--inversion=damped"], "is not one of damped_inv"),
        (["o", "--hessian=a", "--gradients=b", "--damping_factor=-1"], "must be at least 0"),
        (["o", "--hessian=a", "--gradients=b", "--inversion=factored_tikhonov",
          "--ev_correction"], "leave one of them out"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_line(capsys, words, message):
    assert main(["apply", *words]) == 2
    assert message in only_error(capsys)


def test_an_existing_folder_stays(factored, gradients, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert run(tmp_path / "out", factored / "one", gradients) == 1
    assert "pass --overwrite to replace it" in only_error(capsys)


def test_normalizers_on_one_side_are_told(tmp_path, capsys):
    gradients = store(tmp_path / "gradients", {"a": 6}, processor={})
    normalizers = {"a": TheirAdam(torch.ones(2, 3))}
    hessian = dense(tmp_path / "hessian", {"a": 6}, normalizers=normalizers)
    assert run(tmp_path / "out", hessian, gradients) == 0
    assert "hessian was made with normalizers" in capsys.readouterr().err
