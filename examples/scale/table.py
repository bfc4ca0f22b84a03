"""Large models on slices of TPUs, planned: does the fit fit, how long does it take, what is sent?

    python examples/scale/table.py              # estimates, a minute
    python examples/scale/table.py --compile    # XLA's compiler for TPUs, too; an hour on 2 cores

writes results.md and results.json beside this file. Nothing is downloaded: `models/` holds the
sizes of the published configs (huggingface.co: meta-llama/Meta-Llama-3-8B and -70B,
openai/gpt-oss-20b, Qwen/Qwen3-30B-A3B).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
EXPERTS_OF_TWO_LAYERS = ("--moe_experts", "model.layers.[01].mlp.experts")
COMMON = ("--precision", "bf16", "--fsdp", "--activations", "recompute",
          "--document_length", "512", "--token_batch_size", "2048")  # fmt: skip
FITS = [
    ("llama-3-8b", "v5e:4x4"),
    ("llama-3-8b", "v5e:8x8"),
    ("llama-3-8b", "v5p:2x2x2"),
    ("llama-3-70b", "v5p:4x4x4"),
    ("llama-3-70b", "v5p:4x4x8"),
    ("gpt-oss-20b", "v5e:4x4"),
    ("qwen3-30b-a3b", "v5e:4x4"),
    ("qwen3-30b-a3b", "v5e:4x4", *EXPERTS_OF_TWO_LAYERS),
]
SLICES = ["v5p:2x1x1", "v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4",
          "v5p:4x4x8", "v5p:4x8x8", "v5p:8x8x8"]  # fmt: skip


def plan(model: str, topology: str, *more: str) -> dict:
    """What `jhessians plan` says."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "jhessians", "plan", str(HERE / "models" / model),
                   "--topology", topology, *COMMON, *more, "--json", str(path)]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(path.read_text()) | {"model": model}


def row(model: str, topology: str, more: tuple[str, ...], found: dict) -> list[str]:
    """One line of the table."""
    peaks = []
    for stage in found["stages"]:
        compiled = stage["compiled"]
        peaks.append(f"{stage['device_bytes'] / 2**30:.1f}"
                     + (f" ({compiled / 2**30:.1f})" if compiled else ""))  # fmt: skip
    times = [f"{stage['time'] / 60:.0f} min, {stage['bound']}" for stage in found["stages"]]
    name = model + (", experts of two layers" if more else "")
    share = f"{found['peak'] / found['budget']:.0%}"
    return [name, topology, *peaks, ("fits, " if found["fits"] else "does not fit, ") + share,
            *times, f"{found['seconds'] / 3600:.1f} h",
            f"{found['disk'] / 1e9:,.0f} GB"]  # fmt: skip


def scaling(found: dict) -> list[str]:
    """A line of weak scaling: as many tokens a device, more and more devices."""
    covariances = found["stages"][0]
    sent = covariances["sent"] / found["steps"] / found["token_batch_size"]
    return [str(found["machines"]["devices"]), f"{covariances['device_bytes'] / 2**30:.1f}",
            f"{sent / 2**20:.1f}"]  # fmt: skip


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Write both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true")
    compile = ("--compile",) if parser.parse_args().compile else ()
    fits = [(*fit, plan(*fit, *compile)) for fit in FITS]
    slices = [plan("llama-3-8b", topology) for topology in SLICES]
    rows = [row(model, topology, more, found) for model, topology, *more, found in fits]
    text = f"""# Large models on slices of TPUs, planned

`python examples/scale/table.py{" --compile" if compile else ""}`: EKFAC of 10 million tokens in
documents of 512, bfloat16 weights, `--fsdp`, activations recomputed, 4 x 512 tokens a device and
step. GiB of a device: the estimate{", and in brackets XLA's own account" if compile else ""}. Times
take products at half of the makers' peaks.

{
        table(
            [
                "model",
                "slice",
                "covariances, GiB",
                "between",
                "correction",
                "of the memory",
                "covariances",
                "eigendecompositions",
                "correction",
                "in all",
                "disk",
            ],
            rows,
        )
    }

## Weak scaling

Llama-3-8B's covariances on ever larger slices of v5p, as many tokens on each device.

{table(["devices", "GiB of a device", "MiB sent, a device and token"], list(map(scaling, slices)))}
"""
    (HERE / "results.md").write_text(text, encoding="utf-8")
    document = {"fits": [each[-1] for each in fits], "weak_scaling": slices}
    (HERE / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
