"""How a lack of memory shows, and the limit that a shell sets."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

from jhessians.errors import ConfigError

LEAST_ADDRESSES = 3_000_000_000
"""On two cores the smallest run takes 2.5 GB, the demo 3.1."""


def require_addresses() -> None:
    """Refuse a limit under which the compiler aborts, as it does when an allocation fails.

    Raises:
        ConfigError: If `ulimit -v` is that low.
    """
    limit = address_limit()
    if limit is not None and limit < LEAST_ADDRESSES:
        raise ConfigError(
            f"ulimit -v allows {limit / 1e9:.1f} GB of addresses, too few for JAX's compiler; "
            f"allow {LEAST_ADDRESSES / 1e9:.0f} GB or more"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed, on the host or on a device."""
    words = ("can't start new thread", "std::bad_alloc")
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and any(each in str(error) for each in words))
        or (is_from_jax(error) and "RESOURCE_EXHAUSTED" in str(error))
    )


def may_lack_memory(error: BaseException) -> bool:
    """Whether it is what libraries come up with that get no memory to load code or run threads."""
    unnumbered = isinstance(error, OSError) and error.errno is None
    return isinstance(error, ImportError | RuntimeError | SystemError) or unnumbered


def reached_limit() -> int | None:
    """The `address_limit`, if this process has come close to it."""
    limit, status = address_limit(), Path("/proc/self/status")
    if limit is None or not status.is_file():
        return None
    table = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return limit if int(table["VmPeak"].split()[0]) * 1024 > 0.9 * limit else None


def address_limit() -> int | None:
    """The bytes of addresses that a process may have (`ulimit -v`); None if they aren't limited."""
    if sys.platform == "win32":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def is_from_jax(error: BaseException) -> bool:
    """Whether it is an error of JAX's runtime."""
    # An error of JAX's cannot come up before JAX is imported, which --help never does.
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(error, jax.errors.JaxRuntimeError)
