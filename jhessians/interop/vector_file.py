"""A vector of whole numbers as numpy's `save` writes it, which is all that stores keep in `.npy`.

numpy's own reader takes room for as many numbers as the header claims and evaluates the header as
Python; here both are compared with what is there.
"""

import re
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jhessians.files import open_input

_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<|][iu][1248])', 'fortran_order': (?:False|True), "
    rb"'shape': \((\d{1,18}),\), \} *\n",
    re.DOTALL,
)
_LONGEST_HEADER = 1024


def read_vector(path: Path) -> Int[np.ndarray, " value"]:
    """All numbers of a file.

    Returns:
        The vector, in the file's number format.

    Raises:
        OSError: If it can't be read, or is no ordinary file.
        ValueError: If it holds something else, or less or more than its header says.
    """
    with open_input(path) as file:
        header = _HEADER.match(file.read(_LONGEST_HEADER))
        if header is None:
            raise ValueError("it holds no vector of whole numbers in numpy's format")
        dtype, count = np.dtype(header[1].decode()), int(header[2])
        file.seek(0, 2)
        if file.tell() != header.end() + count * dtype.itemsize:
            raise ValueError(f"it has another size than that of {count:,} numbers")
        file.seek(header.end())
        return np.frombuffer(bytearray(file.read()), dtype)
