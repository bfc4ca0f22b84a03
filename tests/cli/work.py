"""A good run's ingredients, to spoil at will."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from jhessians.report.summary import Summary

SUMMARY = Summary(
    run_path="runs/x",
    method="ekfac",
    modules=28,
    documents=10,
    skipped_documents=0,
    positions=90,
    devices="1 x cpu",
    timings={"Covariances": 1.0},
    trees=(),
    disk_bytes=0,
)
FIRST_LINEAR = "h.0.attn.c_attn"
FIRST_NORM = "transformer.h.0.ln_1.weight"
KERNEL = f"transformer.{FIRST_LINEAR}.weight"


@dataclass
class Work:
    """One test's own copy of a good run's ingredients, to spoil at will."""

    folder: Path
    flags: list[str] = field(default_factory=list)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def data(self) -> Path:
        return self.folder / "docs.jsonl"

    @property
    def run(self) -> Path:
        return self.folder / "out" / "run"

    def arguments(self) -> list[str]:
        given = {"model": self.model, "dataset": self.data, "world_size": 1}
        return ["compute", str(self.run), *(f"--{k}={v}" for k, v in given.items()), *self.flags]

    def write(self, *rows: dict) -> None:
        """Replace the data set."""
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def settings(self, **values) -> None:
        """Change config.json."""
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def weights(self, change: Callable[[dict[str, np.ndarray]], None]) -> None:
        """Change the weights."""
        path = self.model / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    def scale_first_input(self, factor: float) -> None:
        """Make what the first linear reads larger, and what it computes from it the same."""

        def change(tensors):
            for name in (FIRST_NORM, FIRST_NORM.replace("weight", "bias")):
                tensors[name] *= np.float32(factor)
            tensors[KERNEL] /= np.float32(factor)

        self.weights(change)

    def left_behind(self) -> list[str]:
        """What a failed run must not leave: anything beside or under the final name."""
        return sorted(os.listdir(self.run.parent)) if self.run.parent.exists() else []


def the_line(text: str) -> str:
    """The one line of `text`, if it is an error and nothing else."""
    (line,) = text.splitlines()
    assert line.startswith("jhessians: error: "), line
    assert "Traceback" not in line and "unexpected " not in line.split(":")[2]
    return line


def failing(error):
    def body(config):
        raise error

    return body


def only_error(capsys):
    """The single line on standard error, after checking that it is one."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("jhessians: error: ")
    return lines[0]
