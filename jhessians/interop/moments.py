"""The check that every second moment passes when it is read from a file."""

import numpy as np
from jaxtyping import Float

from jhessians.errors import NumericsError


def checked_moment(moment: np.ndarray, name: str) -> Float[np.ndarray, "..."]:
    """A second moment in float32 or wider.

    Returns:
        The same numbers; the same array if it was wide enough.

    Raises:
        NumericsError: If it isn't finite, or negative.
    """
    wide = moment.astype(np.promote_types(moment.dtype, np.float32), copy=False)
    if not (np.isfinite(wide) & (wide >= 0)).all():
        raise NumericsError(f"{name} isn't finite or is negative; expected mean squares")
    return wide
