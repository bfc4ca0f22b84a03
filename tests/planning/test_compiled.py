"""A plan beside what XLA's compiler for TPUs says of the same steps."""

import json
import os
import subprocess
import sys

import pytest

from tests.devices.test_tpu import HAS_LIBTPU, REQUIRED

WITHIN = 0.15
SIZES = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32000,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU and not REQUIRED, reason="libtpu isn't installed")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5e:4x4"])
def test_the_compilers_account(tmp_path, topology, record_property):
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    command = [
        sys.executable, "-m", "jhessians", "plan", str(tmp_path), "--topology", topology,
        "--precision", "bf16", "--fsdp", "--document_length", "512", "--max_tokens", "100000",
        "--compile", "--json", str(tmp_path / "plan.json"),
    ]  # fmt: skip
    done = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "XLA's compiler, covariances" in done.stdout
    stages = json.loads((tmp_path / "plan.json").read_text())["stages"]
    compared = [each for each in stages if each["compiled"] is not None]
    assert [each["name"] for each in compared] == ["Covariances", "Eigenvalue correction"]
    for each in compared:
        ratio = each["device_bytes"] / each["compiled"]
        record_property(each["name"], ratio)
        assert abs(ratio - 1) < WITHIN, each
