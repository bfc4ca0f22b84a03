"""Eight virtual CPU devices, strict promotion, and runtime checks of every shape annotation."""

import atexit
import gc
import importlib.util
import mmap
import os
import shutil
import tempfile
from pathlib import Path


def xla_knows(flag: str) -> bool:
    """Whether the installed XLA has a flag: it ends a process that gives it another."""
    for folder in importlib.util.find_spec("jaxlib").submodule_search_locations:
        for path in Path(folder).glob("libjax_common.*"):
            with path.open("rb") as file:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
                    return library.find(flag.encode()) >= 0
    return False


# XLA's older code for fused operations computes the same and compiles faster: tests take a fifth
# less time. What is given in XLA_FLAGS comes later and wins: with =true, tests take the newer one.
QUICK = "xla_cpu_use_fusion_emitters"
flags = os.environ.get("XLA_FLAGS", "")
if QUICK not in flags and xla_knows(QUICK):
    flags = f"--{QUICK}=false {flags}"
os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Compilations take most of the time, and many tests need the same ones. All processes of a
    # session share them, and they leave no trace.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jhessians-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook  # noqa: E402

from tests.checking import HOOKED  # noqa: E402

# Tracing makes many objects that live on: a tenth of the time would go into looking for cycles.
gc.set_threshold(20_000, 20, 50)

hook = install_import_hook(HOOKED, "tests.checking.checked")

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
