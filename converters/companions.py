"""What lies beside a model's weights: config.json and the tokenizer's files."""

import copy
from pathlib import Path
from typing import Any

import numpy as np

from converters import registry


def write_companions(folder: Path, config: Any, dtype: np.dtype, tokenizer: Any = None) -> None:
    """Write them as transformers does.

    Args:
        folder: Exists.
        config: transformers' config; its architecture and dtype are replaced by the model's.
        dtype: Of the parameters.
        tokenizer: transformers' tokenizer, if there is one.

    Raises:
        CheckpointError: If no family is registered for the config.
        OSError: If the disk is full or not ours to write to.
    """
    config = copy.deepcopy(config)
    config.architectures = [registry.family_of(config).architecture]
    config.dtype = dtype.name
    config.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
