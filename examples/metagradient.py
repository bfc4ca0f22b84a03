"""Exact influence in a small model: `python examples/metagradient.py [--bank BANK] [--out FILE]`.

How would a query's loss after training change if a document weighed a little more in training? That
derivative is found by reverse differentiation through all steps of the training, optimizer
included (Ilyas & Engstrom 2025, arXiv:2504.16430), for the model of a bank of `jhessians evaluate
bank`; without --bank for the demo's twin. It is what approximations of influence approximate, and
what they can be measured with: its linear datamodeling score is printed, and the scores, minus the
derivatives, are written to --out.

Reverse differentiation needs every step's state. Only that of every √steps-th step is kept; between
two of them the steps are made again (checkpointing), so that 2 √steps states are in memory.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jhessians import (
    Bank,
    Batch,
    Training,
    compiled,
    demo,
    document_losses,
    linear_datamodeling_scores,
    mean_interval,
    open_experiment,
)

State = Any  # parameters and the optimizer's moments


def metagradients(
    training: Training,
    losses: Callable[[State], jax.Array],
    weights: jax.Array,
    said: Callable[[str], None] = lambda line: None,
) -> tuple[np.ndarray, np.ndarray]:
    """The derivatives of losses after training with respect to the documents' weights in it.

    Args:
        training: What is differentiated.
        losses: The final state → [query].
        weights: [document], at which the derivative is taken.
        said: Is told how far the work is.

    Returns:
        [query, document], and the losses themselves, [query].
    """
    step = jax.jit(training.step)

    @compiled
    def back(state: State, batch: Batch, cotangents: list) -> tuple[list, jax.Array]:
        numbers, rebuild = differentiable(state)

        def after(numbers: list, weights: jax.Array) -> list:
            return differentiable(training.step(rebuild(numbers), batch, weights))[0]

        _, pull = jax.vjp(after, numbers, weights)
        return jax.vmap(pull)(cotangents)

    @compiled
    def at_the_end(state: State) -> tuple[jax.Array, list]:
        numbers, rebuild = differentiable(state)
        values, pull = jax.vjp(lambda numbers: losses(rebuild(numbers)), numbers)
        return values, jax.vmap(pull)(jnp.eye(len(values), dtype=values.dtype))[0]

    batches = list(training.batches())
    size = math.isqrt(len(batches) - 1) + 1
    segments = [batches[start : start + size] for start in range(0, len(batches), size)]
    state, kept = training.start(), []
    for segment in segments:
        kept.append(state)
        for batch in segment:
            state = step(state, batch, weights)
    values, cotangents = at_the_end(state)
    total = jnp.zeros((len(values), len(weights)), weights.dtype)
    while segments:
        segment, states = segments.pop(), [kept.pop()]
        for batch in segment[:-1]:
            states.append(step(states[-1], batch, weights))
        for batch in reversed(segment):
            cotangents, of_weights = back(states.pop(), batch, cotangents)
            total = total + of_weights
        said(f"{len(segments)} of {-(-len(batches) // size)} parts to go")
    return np.asarray(total), np.asarray(values)


def differentiable(state: State) -> tuple[list, Callable[[list], State]]:
    """The state's floating-point arrays, and how to make a state of others like them.

    The optimizer counts its steps in integers, which have no derivatives.
    """
    leaves, structure = jax.tree.flatten(state)
    places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def rebuild(numbers: list) -> State:
        changed = dict(zip(places, numbers, strict=True))
        return structure.unflatten([changed.get(i, leaf) for i, leaf in enumerate(leaves)])

    return [leaves[i] for i in places], rebuild


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bank", type=Path, default=demo.BANK)
    parser.add_argument("--queries", type=int, nargs="+", metavar="N",
                        help="their numbers; without it 16, spread evenly over all")  # fmt: skip
    parser.add_argument("--out", type=Path, help="scores.npy, [document, query], to write")
    options = parser.parse_args(arguments)
    started = time.monotonic()

    bank, experiment = Bank.load(options.bank), open_experiment(options.bank)
    last = len(bank.whole) - 1
    chosen = np.array(options.queries or np.linspace(0, last, min(16, last + 1)).round(), int)
    if not 0 <= chosen.min() <= chosen.max() <= last:
        parser.error(f"--queries: {options.bank} has those from 0 to {last}")
    batches = list(experiment.queries)
    row_of = np.argsort(np.concatenate([batch.document for batch in batches]))[-last - 1 :]

    def losses(state: State) -> jax.Array:
        model = experiment.training.model(state.parameters)
        found = jnp.concatenate([document_losses(model, batch) for batch in batches])
        return found[row_of[chosen]]

    found, values = metagradients(
        experiment.training, losses, jnp.ones(bank.subsets.shape[1]),
        lambda line: print(line, flush=True),
    )  # fmt: skip
    print(f"loss of a query: {values.mean():.4f} nats; in the bank {bank.whole[chosen].mean():.4f}")
    scores = -found.T
    lds = linear_datamodeling_scores(scores, bank.subsets, bank.losses[:, chosen])
    print(f"LDS of {len(chosen)} queries {mean_interval(lds).render()}, "
          f"{time.monotonic() - started:.0f} s")  # fmt: skip
    if options.out is not None:
        np.save(options.out, scores)


if __name__ == "__main__":
    main()
