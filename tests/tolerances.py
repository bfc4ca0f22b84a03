"""The one table of tolerances, each with the reason that it has this size and no other.

All are relative: the largest absolute difference over the largest absolute value expected, except
`SCORE_CORRELATION`, which is a lower bound.
"""

from typing import Final

# Two float32 forward passes of one model differ by their order of summation: about 1e-7 per
# product, grown over the blocks. A wrong rotary base moves fan-in scaled logits by 1e-1 and more.
LOGITS: Final = 1e-5

# What a model that is wrong in one setting is off by, at least, so that `LOGITS` tells it apart.
TWIN: Final = 1e-3

# Our covariances and corrections are float32 sums of float32 products over thousands of positions;
# against bergson in float64 they err by 1e-7 to 1e-6. A lost position or a wrong mask costs 1e-3.
FACTORS: Final = 1e-5

# 1 / (eigenvalue + damping) multiplies an error in the smallest eigenvalues by up to
# 1 / damping_factor and bergson applies it in float32, whatever the factors' type.
DAMPED_INVERSE: Final = 1e-3

# Box-Muller in float32 by two libraries: log, sin and cos may round differently in the last bits.
NORMAL_ENTRIES: Final = 1e-6

# The same statistic with another batch, padding, mesh or number of shards: only the order of
# float32 additions may change.
INVARIANCE: Final = 1e-6

# Pearson correlation of influence scores computed from our factors and from bergson's own: scores
# sum thousands of products of which many cancel, so single ones may differ by more than factors.
SCORE_CORRELATION: Final = 0.9999

# Oracles agree among themselves in float64 up to rounding, about 1e-12; the room above it is for
# the float32 inside some families' norms, where rounding may fall on the other side.
ORACLE_AGREEMENT: Final = 1e-9

# With --precision fp64 and --hessian_dtype fp64 only the order of float64 additions is left, 1e-15
# each, on a model whose own code computes nothing in float32.
FLOAT64_FACTORS: Final = 1e-12

# bergson's scores of a float64 model: it sums an autocorrelation and inverts every Hessian in
# float32, and rounds each module's part of a score to float32, which makes 1e-7 to 1e-6. Another
# inversion or damping moves scores by 1e-3 and more.
BERGSON_SCORES: Final = 5e-6

# Our scores in float32 against float64 numpy with the same factors, of each table's largest: sums
# of products, and eigenvectors that are stored in float32. A wrong damping moves them by 1e-2.
SCORES: Final = 1e-5
