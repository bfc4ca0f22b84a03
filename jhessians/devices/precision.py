"""How float32 numbers are multiplied: in full, rounded, or split into short parts.

Matrix units multiply short numbers fast: bfloat16 has 8 significant bits, TF32 11, float32 24. A
float32 number is the sum of three bfloat16 parts, or nearly that of two TF32 parts; a product of
float32 matrices is then a sum of products of parts, without the smallest ones. All sums are in
float32. `examples/benchmarks/precision.py` measures the error of each way.

Names follow `jax.lax.DotAlgorithmPreset`, by which XLA is told.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from jhessians.errors import ConfigError

HIGHEST = "highest"


@dataclass(frozen=True)
class MatmulPrecision:
    """One way to multiply matrices.

    Attributes:
        name: What `multiplying` is given.
        jax: Its name in `jax.default_matmul_precision`.
        products: How many products of short numbers replace one of float32; 0 if none do.
        platforms: Where XLA multiplies this way. On a CPU it accepts bf16, bf16_x3 and bf16_x6 as
            well, but multiplies in float32 all the same.
    """

    name: str
    jax: str
    products: int
    platforms: tuple[str, ...]


# In the order of their accuracy; what TPUs take is what libtpu 0.0.52 compiles for a v5e.
MATMUL_PRECISIONS = {
    each.name: each
    for each in (
        MatmulPrecision(HIGHEST, "highest", 0, ("cpu", "gpu", "tpu")),
        MatmulPrecision("bf16_x6", "BF16_BF16_F32_X6", 6, ("gpu", "tpu")),
        MatmulPrecision("tf32_x3", "TF32_TF32_F32_X3", 3, ("gpu",)),
        MatmulPrecision("bf16_x3", "BF16_BF16_F32_X3", 3, ("gpu", "tpu")),
        MatmulPrecision("tf32", "TF32_TF32_F32", 1, ("gpu",)),
        MatmulPrecision("bf16", "BF16_BF16_F32", 1, ("gpu", "tpu")),
    )
}


@contextmanager
def multiplying(name: str, mesh: Any = None) -> Iterator[None]:
    """Let the products that are traced inside be made in this precision.

    Args:
        name: A key of `MATMUL_PRECISIONS`.
        mesh: The devices that will multiply; default JAX's first one.

    Raises:
        ConfigError: If there is no such precision, or not on these devices.
    """
    import jax

    if not isinstance(mesh, jax.sharding.AbstractMesh):  # which has no devices to be asked
        devices = jax.devices() if mesh is None else list(mesh.devices.flat)
        # A device of another host can't be asked what it supports.
        ours = [each for each in devices if each.process_index == jax.process_index()]
        require_supported(name, (ours or devices)[0])
    with jax.default_matmul_precision(MATMUL_PRECISIONS[name].jax):
        yield


def require_supported(name: str, device: Any) -> None:
    """Refuse what a device would multiply in another precision than asked for, or not at all.

    Raises:
        ConfigError: With one line that says what the device's platform has.
    """
    if name not in MATMUL_PRECISIONS:
        raise ConfigError(
            f"there is no matmul precision {name!r}; give one of {', '.join(MATMUL_PRECISIONS)}"
        )
    precision, platform = MATMUL_PRECISIONS[name], _platform(device)
    if precision.name != HIGHEST:
        has = [each.name for each in MATMUL_PRECISIONS.values() if platform in each.platforms]
        if name not in has:
            raise ConfigError(
                f"matmul precision {name} is not for a {platform.upper()}, which has "
                f"{', '.join(has)}; give {'one of them' if len(has) > 1 else 'that'}"
            )
        if not _compiles(precision.jax, device):
            raise ConfigError(
                f"this {platform.upper()}, {device.device_kind}, does not multiply in {name}; "
                f"give {HIGHEST}"
            )


def _platform(device: Any) -> str:
    """cpu, tpu, or gpu of any maker."""
    return "gpu" if device.platform in ("cuda", "rocm") else device.platform


@cache
def _compiles(precision: str, device: Any) -> bool:
    """Whether XLA compiles a product; an older GPU has no TF32, for example."""
    import jax
    import jax.numpy as jnp

    x = jax.ShapeDtypeStruct(
        (128, 128), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device)
    )
    try:
        with jax.default_matmul_precision(precision):
            jax.jit(lambda x: x @ x).lower(x).compile()
    except (ValueError, jax.errors.JaxRuntimeError):
        return False
    return True
