"""Check a checkpoint: `python -m converters.verify MODEL`.

It loads; its logits are finite; and every tensor that we would write back is, bit for bit, the one
in the file.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from converters import adapters, hub, matching, registry, rules
from converters.flax_checkpoint import is_flax
from converters.loading import STORED, load, parameters
from converters.reader import open_checkpoint
from converters.saving import to_theirs
from jhessians.errors import CheckpointError, NumericsError, UserError, printable


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        model_type: The family.
        tensors: How many the checkpoint has.
        parameters: How many numbers they hold.
        dtype: Of the module's parameters.
        largest_logit: Largest magnitude that the forward pass gave.
    """

    model_type: str
    tensors: int
    parameters: int
    dtype: str
    largest_logit: float


def verify(name_or_folder: str | Path, *, revision: str | None = None, tokens: int = 16) -> Report:
    """Load a checkpoint and check what came of it.

    Args:
        name_or_folder: As for `converters.load`.
        revision: The Hub's branch, tag or commit.
        tokens: Length of the document on which the logits are looked at.

    Returns:
        Family, number of tensors and parameters, dtype, and the largest logit.

    Raises:
        CheckpointError: If it can't be loaded, or a tensor doesn't survive the round trip.
        NumericsError: If a weight or a logit is NaN or infinite.
    """
    source = hub.find(name_or_folder, revision)
    if is_flax(source.folder):
        raise CheckpointError(
            f"{source.folder} is a Flax checkpoint, while verify compares with Hugging Face's "
            f"files; give it what `jhessians convert {source.folder} FOLDER` writes"
        )
    model, config, _ = load(name_or_folder, dtype=STORED, revision=revision)
    adapters.refuse(model, "which verify can't write back")
    family = registry.family_of(config)
    arrays = {path: variable.get_value() for path, variable in parameters(model).items()}
    wanted = rules.homes(family, {path: array.shape for path, array in arrays.items()})
    stored = matching.match(family, wanted, open_checkpoint(source.folder))
    for name, home in wanted.items():
        values = stored[name].read()
        again = np.ascontiguousarray(to_theirs(home, arrays).astype(values.dtype))
        if again.tobytes() != values.tobytes():
            raise CheckpointError(
                f"{name} of {source.folder} comes back changed; expected the same bits; "
                f"the rule of {home.parameter} in {family.model_type}'s table isn't reversible"
            )
    documents = jnp.arange(tokens, dtype=jnp.int32)[None] % model.config.vocabulary_size
    logits = np.asarray(nnx.jit(lambda m, x: m(x))(model, documents), np.float32)
    if not np.isfinite(logits).all():
        raise NumericsError(f"the logits of {name_or_folder} aren't finite; check the checkpoint")
    count = sum(array.size for array in jax.tree.leaves(arrays))
    dtype = arrays["embedding"].dtype.name
    return Report(family.model_type, len(wanted), count, dtype, float(np.abs(logits).max()))


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 if all is well."""
    parser = argparse.ArgumentParser(prog="python -m converters.verify", description=__doc__)
    parser.add_argument("model", help="a folder, or a name on the Hub")
    parser.add_argument("--revision", help="the Hub's branch, tag or commit")
    options = parser.parse_args(arguments)
    try:
        report = verify(options.model, revision=options.revision)
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    print(
        f"{options.model}: {report.model_type}, {report.tensors} tensors, {report.parameters:,} "
        f"parameters in {report.dtype}; every tensor survives the round trip; logits are finite, "
        f"up to {report.largest_logit:.3g}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
