"""A part of the weights is known by its numbers, shape and format, wherever it lies."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from converters.parts import _known


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_a_part_is_known_by(monkeypatch, platform, dtype):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    part = np.random.default_rng(0).normal(size=(6, 4)).astype(dtype)
    known = _known(part)
    assert _known(jnp.asarray(part)) == known
    assert _known(np.asfortranarray(part)) == known
    assert _known(part.reshape(4, 6)) != known
    assert _known(part.T) != known
    assert _known(part[::-1]) != known
    for place in ((0, 0), (5, 3)):
        other = part.copy()
        other.view(np.uint8).reshape(6, 4, -1)[place][0] ^= 1
        assert _known(other) != known
    assert _known(part[0, 0]) != _known(part[0, 1])
