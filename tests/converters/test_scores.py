"""Scores of every family against torch bergson's, both through the Hessian that we fitted."""

import numpy as np
import pytest

from converters import supported
from jhessians.cli.main import main
from jhessians.interop.score_store import ScoreStore
from tests.commands.test_score import error
from tests.converters.test_factors import CHANGES, EXPERTS, LEFT_OUT, LENGTHS, WITHOUT_BERGSON
from tests.oracles import bergson_scores, checkpoints, dense_scores
from tests.tolerances import SCORES

NUMBERS = ["--truncation", "--token_batch_size", "128", "--precision", "fp64", "--world_size", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("family", supported())
def test_scores_equal_bergsons(family, checkpoint, altered, tmp_path, record_property):
    folder = altered(checkpoint(family, **CHANGES.get(family, {})))
    data = checkpoints.corpus(folder, 12, lengths=LENGTHS)
    queries = checkpoints.corpus(folder, 3, seed=7, lengths=(8, 30, 17), name="query.jsonl")
    globs = {"moe_experts": EXPERTS.get(family), "filter_modules": LEFT_OUT.get(family)}
    shared = [word for name, value in globs.items() if value for word in (f"--{name}", value)]
    given = ["--model", str(folder), "--dataset", str(data), *NUMBERS, *shared]
    hessian = ["--hessian", "none", *given]
    if family in WITHOUT_BERGSON:
        documents, asked = (
            dense_scores.gradients(folder, checkpoints.encode(folder, each, max_length=128))
            for each in (data, queries)
        )
        expected = dense_scores.scores(documents, asked, None)
    else:
        run = tmp_path / "run"
        flags = ["--use_dataset_labels", "--ev_correction", "--hessian_dtype", "fp64", "--quiet"]
        assert main(["compute", str(run), *given, *flags]) == 0
        hessian = ["--hessian", str(run), "--damping_factor", "0.1", "--world_size", "1"]
        expected = bergson_scores.scores(folder, data, queries, run, extra=shared)
    words = ["--query", str(queries), "--query_truncation", *hessian, "--quiet"]
    assert main(["score", str(tmp_path / "scores"), *words]) == 0
    worst = error(ScoreStore(tmp_path / "scores").read_all(), expected)
    record_property("scores", float(worst))
    assert np.isfinite(worst) and worst < SCORES
