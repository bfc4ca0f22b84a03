"""Second moments of gradients, and how they scale a gradient before it is projected.

G: [out, in], a document's (or a token's) weight gradient; its bias gradient is [out]. With the
bias counted, G has one more column, last. Every field and every result may have leading axes,
such as the layers of a stack. Divisors are computed in float32 or wider, and the scaled gradient
keeps its own number format, as in torch bergson.

A normalizer divides by root mean squares:

    Adam        G / (√v + 1e-8)                        bias: Gb / (√b + 1e-8)
    Adafactor   G · √mean(r + ε) / √((r + ε)(c + ε))   bias: Gb / √(b + 1e-8),   ε = 1e-30

Adam's divisor is dense, so G must be formed before it is divided. Adafactor's is an outer
product: `g_factor` on the gradients at the output and `a_factor` on the inputs do the same. The
bias gradient gets neither of the two, only its own `bias_factor`.

Where the moments come from: `jhessians.folds.second_moment` estimates them from documents,
`jhessians.interop.optimizer_state` reads those of a trained optimizer.

Fields are arrays, or what a JAX transformation puts in the place of arrays: shapes, shardings.

References:
    Kingma & Ba 2015, arXiv:1412.6980. Shazeer & Stern 2018, arXiv:1804.04235 (with ε added first,
    as in tensor2tensor).
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jhessians.errors import ConfigError
from jhessians.typing import Array, DTypeLike, Float

ADAM_EPSILON = 1e-8
ADAFACTOR_EPSILON = 1e-30
ADAFACTOR_BIAS_EPSILON = 1e-8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdamNormalizer:
    """One second moment per weight.

    Attributes:
        weight_avg_sq: v, [out, in].
        bias_avg_sq: b, [out]; None if biases are not scaled, and then they can't be counted.
    """

    weight_avg_sq: Any
    bias_avg_sq: Any = None

    def weight_denominator(self) -> Float[Array, "*layers o i"]:
        """√v + ε, which G is divided by."""
        return jnp.sqrt(_wide(self.weight_avg_sq)) + ADAM_EPSILON

    def bias_denominator(self) -> Float[Array, "*layers o"]:
        """√b + ε, which the bias gradient is divided by.

        Returns:
            One divisor for each output.

        Raises:
            ConfigError: If there is no second moment of the bias.
        """
        return jnp.sqrt(_wide(_required(self.bias_avg_sq))) + ADAM_EPSILON

    def denominator(self, *, include_bias: bool) -> Float[Array, "*layers o j"]:
        """What a whole gradient is divided by.

        Args:
            include_bias: Whether the gradient has the bias as its last column.

        Returns:
            √v + ε, and if the bias is included √b + ε as the last column.

        Raises:
            ConfigError: If the bias is included and there is no second moment of it.
        """
        weight = self.weight_denominator()
        if not include_bias:
            return weight
        return jnp.concatenate([weight, self.bias_denominator()[..., None]], axis=-1)

    def normalize(
        self, gradient: Float[Array, "*rows o j"], *, include_bias: bool = False
    ) -> Float[Array, "*rows o j"]:
        """Divide whole gradients by their root mean squares.

        Args:
            gradient: With any leading axes, and with the bias as the last column if that counts.
            include_bias: Whether there is such a column.

        Returns:
            The scaled gradients, in the form and the number format of `gradient`.

        Raises:
            ConfigError: If the bias is included and there is no second moment of it.
        """
        denominator = _aligned(self.denominator(include_bias=include_bias), gradient)
        wide = _at_least_float32(gradient.dtype, denominator.dtype)
        return (gradient.astype(wide) / denominator.astype(wide)).astype(gradient.dtype)

    def rows(self, start: int, stop: int) -> "AdamNormalizer":
        """The normalizer of some of the outputs, such as an attention head's.

        Args:
            start: The first of these outputs.
            stop: The one after the last.

        Returns:
            A normalizer of gradients [stop - start, in].
        """
        return replace(
            self,
            weight_avg_sq=self.weight_avg_sq[..., start:stop, :],
            bias_avg_sq=None if self.bias_avg_sq is None else self.bias_avg_sq[..., start:stop],
        )

    def to_adafactor(self) -> "AdafactorNormalizer":
        """The closest normalizer of rank one, in generalised Kullback-Leibler divergence."""
        v = _wide(self.weight_avg_sq)
        return AdafactorNormalizer(v.mean(axis=-1), v.mean(axis=-2), self.bias_avg_sq)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdafactorNormalizer:
    """Second moments of rank one: means over columns and over rows, v ≈ r cᵀ / mean(r).

    Attributes:
        row: r, [out]: the mean of v over the inputs.
        col: c, [in]: the mean of v over the outputs.
        bias_avg_sq: b, [out]; None if biases are not scaled, and then they can't be counted.
    """

    row: Any
    col: Any
    bias_avg_sq: Any = None

    def g_factor(self) -> Float[Array, "*layers o"]:
        """√mean(r + ε) / √(r + ε): multiply the gradient at the output by it."""
        r = _wide(self.row) + ADAFACTOR_EPSILON
        return jnp.sqrt(r.mean(axis=-1, keepdims=True)) * jax.lax.rsqrt(r)

    def a_factor(self) -> Float[Array, "*layers i"]:
        """1 / √(c + ε): multiply the input by it, before a column of ones is added."""
        return jax.lax.rsqrt(_wide(self.col) + ADAFACTOR_EPSILON)

    def bias_factor(self) -> Float[Array, "*layers o"]:
        """1 / √(b + ε): multiply the bias gradient by it, formed from the *unscaled* g.

        Returns:
            One factor for each output.

        Raises:
            ConfigError: If there is no second moment of the bias.
        """
        return jax.lax.rsqrt(_wide(_required(self.bias_avg_sq)) + ADAFACTOR_BIAS_EPSILON)

    def normalize(
        self, gradient: Float[Array, "*rows o j"], *, include_bias: bool = False
    ) -> Float[Array, "*rows o j"]:
        """Scale whole gradients by row and by column, which equals scaling g and a beforehand.

        Args:
            gradient: With any leading axes, and with the bias as the last column if that counts.
            include_bias: Whether there is such a column.

        Returns:
            The scaled gradients, in the form and the number format of `gradient`.

        Raises:
            ConfigError: If the bias is included and there is no second moment of it.
        """
        factor = self.g_factor()[..., :, None], self.a_factor()[..., None, :]
        weight = gradient[..., :-1] if include_bias else gradient
        for each in factor:
            weight = weight * _aligned(each, weight).astype(weight.dtype)
        if not include_bias:
            return weight
        scale = _aligned(self.bias_factor()[..., None], gradient).astype(gradient.dtype)
        return jnp.concatenate([weight, gradient[..., -1:] * scale], axis=-1)

    def rows(self, start: int, stop: int) -> "AdafactorNormalizer":
        """The normalizer of some of the outputs, such as an attention head's.

        Its mean of r is that of these outputs alone, as in bergson.

        Args:
            start: The first of these outputs.
            stop: The one after the last.

        Returns:
            A normalizer of gradients [stop - start, in].
        """
        return replace(
            self,
            row=self.row[..., start:stop],
            bias_avg_sq=None if self.bias_avg_sq is None else self.bias_avg_sq[..., start:stop],
        )

    def to_adam(self) -> AdamNormalizer:
        """The dense normalizer with these second moments, to which no ε has been added."""
        r, c = _wide(self.row), _wide(self.col)
        v = r[..., :, None] * c[..., None, :] / r.mean(axis=-1)[..., None, None]
        return AdamNormalizer(v, self.bias_avg_sq)


Normalizer = AdamNormalizer | AdafactorNormalizer


def _wide(x: Float[Array | np.ndarray, "..."]) -> Float[Array, "..."]:
    """`x` as a jax array in float32 or wider."""
    return jnp.asarray(x, _at_least_float32(x.dtype))


def _at_least_float32(*dtypes: jnp.dtype) -> DTypeLike:
    return np.dtype("float64" if any(dtype == jnp.float64 for dtype in dtypes) else "float32")


def _aligned(x: Float[Array, "..."], like: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` with as many axes as `like`; nothing here relies on rank promotion."""
    return x.reshape((1,) * (like.ndim - x.ndim) + x.shape)


def _required(
    bias_avg_sq: Float[Array | np.ndarray, "..."] | None,
) -> Float[Array | np.ndarray, "..."]:
    if bias_avg_sq is None:
        raise ConfigError(
            "the normalizer has no second moment of the bias, yet the bias is to be counted; "
            "read or estimate the normalizers with include_bias, or leave it out"
        )
    return bias_avg_sq
