"""`--profile`: arithmetic counted by hand, stages measured, one table, one file, and a trace."""

import gzip
import json
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jhessians
from jhessians.capture.site import Site
from jhessians.capture.sites import unshared
from jhessians.cli.main import main
from jhessians.commands.compute.config import ComputeConfig
from jhessians.data.batches import Batches
from jhessians.data.batching import plan_batches
from jhessians.errors import ConfigError, OutputError
from jhessians.fitting import arithmetic
from jhessians.methods.method import NoOptions
from jhessians.methods.table import METHODS
from jhessians.models.config import ExpertsConfig, MLPConfig
from jhessians.report import recorder as profiling
from jhessians.report.profile import Profile, StageProfile
from jhessians.report.progress import Progress
from tests import small

I, O, P = 3, 5, 2  # noqa: E741


def site(name="a", i=I, o=O, **more):
    return Site(name, i, o, use_bias=False, **({"input_site": name} | more))


def test_passes():
    weights = arithmetic.multiplied_weights([site(), site("b", 2, 7)], head=100)
    assert weights == 3 * 5 + 2 * 7 + 100
    assert arithmetic.passes(weights, {4: 2, 6: 1}) == 4 * weights * 14
    assert arithmetic.passes(weights, {4: 1}, draws=3) == (2 + 3 * 2) * weights * 4


def test_covariances_share_inputs_unless_they_are_weighted():
    pair = {"a": site(), "b": site("b", o=7, input_site="a")}
    assert arithmetic.covariances(pair.values(), {4: 1}) == 4 * (9 + 25 + 49)
    assert arithmetic.covariances(pair.values(), {4: 1}, draws=2) == 4 * (9 + 2 * 25 + 2 * 49)
    alone = unshared(pair).values()
    assert arithmetic.covariances(alone, {4: 1}) == 4 * (9 + 25 + 9 + 49)
    twice = arithmetic.covariances(alone, {4: 1}, draws=2, shares_inputs=False)
    assert twice == 2 * 4 * (9 + 25 + 9 + 49)


def test_a_bias_is_one_more_input_of_the_statistics_only():
    biased = [site(ones=True)]
    assert arithmetic.covariances(biased, {1: 1}) == 16 + 25
    assert arithmetic.multiplied_weights(biased, head=0) == 15


def test_documents_are_rotated_the_cheaper_way():
    short, long = 2, 100
    gradient = 2 * I * O
    by_vectors = short * (2 * I * I + 2 * O * O)
    assert arithmetic.correction([site()], {short: 1}) == short * gradient + by_vectors
    by_matrix = 2 * O * I * I + 2 * I * O * O
    assert arithmetic.correction([site()], {long: 1}) == long * gradient + by_matrix
    both = arithmetic.correction([site()], {short: 3, long: 2})
    apart = [arithmetic.correction([site()], {length: 1}) for length in (short, long)]
    assert both == 3 * apart[0] + 2 * apart[1]


def test_shampoo_takes_the_cheaper_way():
    assert arithmetic.shampoo([site()], {100: 1}) == 100 * 2 * I * O + I * O * (I + O)
    wide = site(i=1000, o=1000)
    assert arithmetic.shampoo([wide], {2: 1}) == 2 * (3 * 2 * 2000 + 2 * 1000**2)


def test_autocorrelation():
    lengths, a = {4: 2}, [site(i=30, o=40)]
    assert arithmetic.autocorrelation(a, lengths) == 8 * 2 * 1200 + 2 * 1200**2
    assert arithmetic.autocorrelation(a, lengths, tokens=True) == 8 * 1200 + 8 * 1200**2
    projected = arithmetic.autocorrelation(a, lengths, projection_dim=P)
    assert projected == 8 * (2 * P * 70 + 2 * P * P) + 2 * P**4
    joint = arithmetic.autocorrelation(a, lengths, projection_dim=P, joint=True)
    assert joint == 8 * 2 * 1200 + 2 * 2 * 1200 * P + 2 * P * P
    split = arithmetic.autocorrelation(a, lengths, heads={"a": 4})
    assert split == 8 * 2 * 1200 + 2 * 4 * 300**2
    assert arithmetic.second_moments(a, lengths) == 8 * 2 * 1200


def test_experts_read_some_tokens():
    share = {"a": 0.25}
    assert arithmetic.covariances([site()], {4: 1}, readers=share) == 4 * 34 / 4
    assert arithmetic.multiplied_weights([site()], head=5, readers=share) == 5 + 15 / 4
    # Of a document of 8 tokens it reads 2.
    for count in (arithmetic.correction, arithmetic.shampoo):
        assert count([site()], {8: 3}, readers=share) == count([site()], {2: 3})


def test_what_a_mixture_of_experts_needs():
    mlp = MLPConfig(24, "silu", variant="fused", bias=False)
    model = small.decoder(experts=ExpertsConfig(4, 1, mlp))
    documents = small.documents([9, 5])
    batches = small.batches(documents)
    loss = jhessians.NextTokenLoss("dataset")
    problem = jhessians.Problem(loss, model, jhessians.find_sites(loss, model, batches[0]))
    data = Batches(documents, plan_batches(documents.lengths, token_batch_size=256))
    run = SimpleNamespace(problem=problem, batches=data, options=NoOptions())
    found = profiling.needed(run, METHODS["kfac"])["Covariances"]
    weights = 2 * (16 * 48 + 16 * 16 + 16 * 48 + 24 * 16) + 53 * 16  # one expert of four
    grams = 2 * (16**2 + 48**2 + 16**2 + 16**2 + 16**2 + 48**2 + 24**2 + 16**2)
    assert found == 14 * (4 * weights + grams)


def test_lengths_are_counted_without_those_that_are_skipped():
    assert arithmetic.count_lengths([5, 1, 3, 5, 0, 2]) == {5: 2, 3: 1, 2: 1}


def test_a_recorder_adds_up_what_stages_take(tmp_path):
    recorder = profiling.Recorder(tmp_path, {})
    jax.monitoring.register_event_duration_secs_listener(recorder.listen)
    progress = Progress(quiet=True, around=recorder.around)
    try:
        with progress.stage("One"):
            (tmp_path / "file").write_bytes(b"x" * 1000)
            jax.jit(lambda x: jnp.sin(x) + 3.25)(np.ones(7, np.float32)).block_until_ready()
        with progress.stage("Two"):
            (tmp_path / "link").hardlink_to(tmp_path / "file")
        with progress.stage("One"):
            (tmp_path / "more").write_bytes(b"x" * 10)
            time.sleep(0.02)
    finally:
        jax.monitoring.unregister_event_duration_listener(recorder.listen)
    one, two = recorder.stages["One"], recorder.stages["Two"]
    assert list(recorder.stages) == list(progress.timings) == ["Two", "One"]
    assert (one.written_bytes, two.written_bytes) == (1010, 0)
    assert 0 < one.compile_seconds < one.seconds and one.seconds > 0.02
    assert two.compile_seconds == 0
    assert one.memory_bytes > 10**7 and one.device_bytes is None  # a CPU has no memory of its own


def test_the_table_fits_80_columns():
    stages = [
        StageProfile("Model", 12345.6, 0.0, None, 0, 3 * 10**11),
        StageProfile("Eigenvalue correction", 50.0, 1.5, 4e15, 10**12, 10**9, 5 * 10**9),
    ]
    profile = Profile(stages, 1e14, "fp32", "highest", "8 x TPU v5e", 10**6, 0.05)
    lines = profile.lines()
    assert max(map(len, lines)) <= 80
    assert lines[3].split()[2:] == ["50.0", "1.5", "4,000", "80", "80%", "1.0", "TB",
                                    "1.0", "GB"]  # fmt: skip
    assert "100 TFLOP/s" in lines[4] and "5.0 GB" in lines[-1]
    document = profile.document()
    assert document["stages"][1]["share_of_peak"] == pytest.approx(0.8)
    assert document["stages"][0]["share_of_peak"] is None
    json.dumps(document)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A short run of the demo: its folder and its trace's."""
    folder = tmp_path_factory.mktemp("profiled")
    words = ["--method", "kfac", "--max_tokens", "600", "--modules", "*.0.*", "--world_size", "1"]
    trace = ["--profile", "--profile_trace", str(folder / "trace")]
    assert main(["compute", str(folder / "run"), "--quiet", *words, *trace]) == 0
    return folder


def test_a_run_is_profiled(profiled):
    found = json.loads((profiled / "run" / "profile.json").read_text())
    stages = {each["name"]: each for each in found["stages"]}
    names = ["Data", "Model", "Fingerprints", "Covariances", "Eigendecompositions", "Export"]
    assert list(stages) == names
    assert 0 < stages["Covariances"]["share_of_peak"] < 1
    assert stages["Covariances"]["compile_seconds"] > 0
    assert stages["Data"]["flop"] is stages["Export"]["flop"] is None
    assert stages["Export"]["written_bytes"] > 10**5
    assert found["peak"] > 1e8 and found["matmul_precision"] == "highest"


def test_a_trace_has_stages_and_batches(profiled):
    (file,) = (profiled / "trace").rglob("perfetto_trace.json.gz")
    names = {event.get("name") for event in json.load(gzip.open(file))["traceEvents"]}
    assert {"Covariances", "Export", "batch"} <= names
    (file,) = (profiled / "trace").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    assert any(plane.name == "/host:CPU" for plane in planes)


def test_nothing_is_recorded_unasked(tmp_path):
    with profiling.recording(tmp_path, profile=False, trace=None) as recorder:
        with recorder.around("A stage"):
            pass
        assert not recorder.stages


def test_a_trace_must_not_lie_in_what_is_renamed(tmp_path):
    config = ComputeConfig(run_path=str(tmp_path / "r"), profile_trace=str(tmp_path / "r" / "t"))
    with pytest.raises(ConfigError, match="lies in RUN_PATH, which appears only when"):
        config.validate()


def test_a_trace_that_cannot_be_written_is_an_error_before_hours_go_by(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="a part of the path is a file"):
        with profiling.recording(tmp_path, profile=True, trace=str(tmp_path / "file" / "t")):
            pass
