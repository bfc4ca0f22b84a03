"""The one process per test session that runs bergson for `tests.oracles.bergson`.

Starts `bergson_driver` at the first job, sends it jobs one at a time, and turns what goes wrong
there into exceptions here. Without bergson or torch that is an exception too, never a skip.
"""

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 600


class BergsonUnavailable(RuntimeError):
    """bergson or torch cannot be imported, so nothing can be compared."""


class BergsonFailed(RuntimeError):
    """bergson itself raised; the message carries the end of its log."""


@functools.cache
def session_folder() -> Path:
    """A folder for this test session's runs, removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="bergson-oracle-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class Driver:
    """The serving process and its one-line-per-job protocol."""

    def __init__(self) -> None:
        missing = [name for name in ("torch", "bergson") if importlib.util.find_spec(name) is None]
        if missing:
            raise BergsonUnavailable(
                f"the oracle needs {' and '.join(missing)}; install torch (CPU) and "
                "bergson==2.5.1 --no-deps with the test requirements"
            )
        folder = session_folder()
        self.log = folder / "driver.log"
        self.jobs = 0
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(folder / "hf"),
            "HF_DATASETS_CACHE": str(folder / "hf" / "datasets"),
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
        }
        # bergson sets its ranks' threads itself, but only where this is absent.
        environment.pop("OMP_NUM_THREADS", None)
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from tests.oracles.bergson_driver import main; main()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                cwd=folder,
                text=True,
            )
        atexit.register(self.close)
        self._answer(self.log)

    def close(self) -> None:
        """End the process, in order: it leaves when its input closes."""
        if self.process.poll() is None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()

    def _answer(self, log: Path) -> None:
        ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT_SECONDS)
        line = self.process.stdout.readline() if ready else ""
        answer = json.loads(line) if line else {"error": "no answer: it hangs or it died"}
        if "error" in answer:
            tails = [
                f"--- end of {path.name}\n{path.read_text(errors='replace')[-2000:]}"
                for path in dict.fromkeys([log, self.log])
                if path.exists()
            ]
            raise BergsonFailed("\n".join([answer["error"], *tails]))

    def run(self, kind: str, **job: Any) -> str:
        """Run one job to its end and return what bergson printed."""
        self.jobs += 1
        log = session_folder() / f"job-{self.jobs}.log"
        self.process.stdin.write(json.dumps({"kind": kind, "log": str(log), **job}) + "\n")
        self.process.stdin.flush()
        self._answer(log)
        return log.read_text(errors="replace")


@functools.cache
def driver() -> Driver:
    """This session's driver, started at the first call."""
    return Driver()
