"""Which einsums are linear layers, against numpy's einsum."""

import jax.numpy as jnp
import numpy as np
import pytest

from jhessians.capture.products import Product
from tests.small import relative_error
from tests.tolerances import INVARIANCE


@pytest.mark.parametrize(
    "equation, x_axes, kernel_axes, plain",
    [
        ("nta,hab->nthb", 3, 3, True),
        ("...ab,abc->...c", 4, 3, True),
        ("nta,hab->nbth", 3, 3, True),
        ("nab,ba->n", 3, 2, True),
        ("nta,a...->nt...", 3, 2, False),
        ("naa,ab->nb", 3, 2, False),
        ("nta,ab->ntab", 3, 2, False),
        ("nta,abc->ntb", 3, 3, False),
    ],
)
def test_einsums_that_are_linear_layers(equation, x_axes, kernel_axes, plain):
    random = np.random.default_rng(0)
    product = Product.of_einsum(equation, x_axes)
    sizes = dict(zip(product.x, (2, 3, 4, 5), strict=False))
    x = random.standard_normal([sizes[each] for each in product.x]).astype(np.float32)
    if not plain:
        assert product.obstacle(x.shape, [2] * kernel_axes)
        return
    kernel = random.standard_normal([sizes.get(each, 7) for each in product.kernel])
    kernel = kernel.astype(np.float32)
    y = np.einsum(equation, x, kernel)
    assert product.obstacle(x.shape, kernel.shape) is None
    a, flat = product.flat_input(jnp.asarray(x)), product.flat_output(jnp.asarray(y))
    order = product.inputs + product.outputs
    matrix = kernel.transpose([product.kernel.index(each) for each in order])
    assert relative_error(a @ matrix.reshape(a.shape[-1], -1), flat) < INVARIANCE
    assert (product.restored_output(flat, jnp.asarray(y)) == y).all()
