"""Axis names used in every annotation of this package.

    document   n   documents of one batch on one device
    position   s   token positions of a padded document
    in         i   a linear's input features (one more where the bias counts: I' = I + 1)
    out        o   a linear's output features
    layer      l   copies of a block that one scan runs
    vocabulary v   the token ids

Suffixes of local names follow: `a_nsi` is a linear's input, `g_nso` the loss gradient at its
output.
"""

from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int32, PyTree, Shaped, UInt32

__all__ = ["Array", "Bool", "DTypeLike", "Float", "Int", "Int32", "PyTree", "Shaped", "UInt32"]
