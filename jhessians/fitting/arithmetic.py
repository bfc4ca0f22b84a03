"""The arithmetic that a fit needs, from the shapes of its linears: what no plain algorithm saves.

Half of each symmetric product, one A and one rotation for each distinct input, no gradient of a
weight where only A and S are wanted, and of two ways to one result the cheaper. Padding, what a
checkpoint computes twice, and attention's own products are left out. Counted in FLOP, of which a
multiplication and its addition are two; T is the length of a document.

Neither JAX nor numpy is imported: `examples/benchmarks` counts in a process that must stay small.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

Lengths = Mapping[int, int] | Counter[int]
"""Length of a document, in tokens → how many there are."""


@runtime_checkable
class Linear(Protocol):
    """What matters of a `jhessians.Site`: a linear, or several of one shape."""

    @property
    def name(self) -> str:
        """By which `Readers` and heads are given."""
        ...

    @property
    def in_features(self) -> int:
        """I, how many numbers it reads of a token."""
        ...

    @property
    def out_features(self) -> int:
        """O, how many it returns."""
        ...

    @property
    def inputs(self) -> int:
        """I', one more than I where the bias counts."""
        ...

    @property
    def input_site(self) -> str:
        """The same for all linears that read one array."""
        ...

    def module_names(self) -> list[str]:
        """The modules that it stands for, which all have its shape."""
        ...


Readers = Mapping[str, float]
"""Name of a linear → the share of the tokens that each of its modules reads, if not all do."""


@dataclass(frozen=True)
class Work:
    """What a fit goes through.

    Attributes:
        linears: Those recorded.
        lengths: Of the documents.
        draws: Sampled labels a position, each with gradients of its own.
        readers: Which linears read some of the tokens only.
    """

    linears: Sequence[Linear]
    lengths: Lengths
    draws: int = 1
    readers: Readers = field(default_factory=dict)

    def count(self, flop: Callable[..., float], **options: Any) -> float:
        """Count the arithmetic of a part of this work.

        Args:
            flop: One of the functions below that take linears and lengths.
            options: Its further arguments.

        Returns:
            FLOP.
        """
        if self.readers:
            options["readers"] = self.readers
        return flop(self.linears, self.lengths, draws=self.draws, **options)


def count_lengths(lengths: Iterable[int]) -> Counter[int]:
    """How many documents there are of each length.

    Args:
        lengths: Of each document, in tokens.

    Returns:
        Length → documents; without those under 2 tokens, which are in no batch.
    """
    return Counter(int(length) for length in lengths if length >= 2)


def multiplied_weights(
    linears: Iterable[Linear], head: int, readers: Readers | None = None
) -> float:
    """Entries of all matrices that a token is multiplied with.

    Args:
        linears: All of the model but the output head.
        head: Entries of the output head's matrix.
        readers: Which linears read some of the tokens only.

    Returns:
        Entries; a mean over tokens where not all meet the same matrices.
    """
    return head + sum(_modules(each, readers or {}) * each.in_features * each.out_features
                      for each in linears)  # fmt: skip


def passes(weights: float, lengths: Lengths, *, draws: int = 1) -> float:
    """A forward pass, and for each draw a backward pass to the inputs.

    Args:
        weights: Entries that a token is multiplied with, from `multiplied_weights`.
        lengths: Of the documents.
        draws: Of labels.

    Returns:
        FLOP: for each token and pass, 2 a weight.
    """
    return 2 * weights * (1 + draws) * _tokens(lengths)


def covariances(
    linears: Iterable[Linear],
    lengths: Lengths,
    *,
    draws: int = 1,
    shares_inputs: bool = True,
    readers: Readers | None = None,
) -> float:
    """A and S, without the passes.

    Args:
        linears: Those recorded.
        lengths: Of the documents.
        draws: Of labels, each with gradients of its own.
        shares_inputs: Whether linears that read one input have one A; if not, then because it
            depends on the gradients, too.
        readers: Which linears read some of the tokens only.

    Returns:
        FLOP.
    """
    total = 0.0
    for group in _by_input(linears) if shares_inputs else [[each] for each in linears]:
        first, modules = group[0], _modules(group[0], readers or {})
        total += modules * first.inputs**2 * (1 if shares_inputs else draws)
        total += modules * draws * sum(each.out_features**2 for each in group)
    return total * _tokens(lengths)


def reduced_covariances(
    linears: Iterable[Linear], lengths: Lengths, *, draws: int = 1, readers: Readers | None = None
) -> float:
    """A and S of documents' mean inputs and summed gradients, without the passes.

    Arguments are those of `covariances`.

    Returns:
        FLOP: sums over tokens, and products of one vector a document.
    """
    linears = list(linears)
    sums = sum(_modules(each, readers or {}) * (each.inputs + draws * each.out_features)
               for each in linears)  # fmt: skip
    products = covariances(linears, {1: sum(lengths.values())}, draws=draws, readers=readers)
    return products + sums * _tokens(lengths)


def shampoo(
    linears: Iterable[Linear], lengths: Lengths, *, draws: int = 1, readers: Readers | None = None
) -> float:
    """G Gᵀ and GᵀG of each document, without the passes.

    Arguments are those of `covariances`.

    Returns:
        FLOP of the cheaper way: through the document's gradient, or through Grams of its positions.
    """
    total = 0.0
    for each in linears:
        i, o, modules = each.inputs, each.out_features, len(each.module_names())
        for length, count in lengths.items():
            rows = length * (readers or {}).get(each.name, 1)
            gradient = 2 * rows * i * o + i * o * (i + o)
            positions = rows * (3 * rows * (i + o) + i * i + o * o)
            total += modules * draws * count * min(gradient, positions)
    return total


def correction(
    linears: Iterable[Linear],
    lengths: Lengths,
    *,
    draws: int = 1,
    readers: Readers | None = None,
) -> float:
    """Every document's gradient in the eigenbasis, without the passes.

    Arguments are those of `covariances`.

    Returns:
        FLOP of the cheaper way on each side: rotating vectors, or the gradient as a matrix.
    """
    total = 0.0
    for group in _by_input(linears):
        i, outputs = group[0].inputs, [each.out_features for each in group]
        modules, share = len(group[0].module_names()), (readers or {}).get(group[0].name, 1)
        for length, count in lengths.items():
            rows = length * share
            gradients = draws * sum(2 * rows * i * o for o in outputs)
            of_a = min(2 * rows * i * i, draws * sum(2 * o * i * i for o in outputs))
            of_g = draws * sum(min(2 * rows * o * o, 2 * i * o * o) for o in outputs)
            total += modules * count * (gradients + of_a + of_g)
    return total


def autocorrelation(
    linears: Iterable[Linear],
    lengths: Lengths,
    *,
    projection_dim: int = 0,
    tokens: bool = False,
    joint: bool = False,
    heads: Mapping[str, int] | None = None,
    draws: int = 1,
) -> float:
    """Gradient rows and their Grams, without the passes and without making random matrices.

    Args:
        linears: Those recorded.
        lengths: Of the documents.
        projection_dim: p; 0 for whole gradients.
        tokens: Whether a row is a token's instead of a document's.
        joint: Whether the linears' projections are summed to one row of p numbers.
        heads: Name of a linear that is split → into how many heads.
        draws: Of labels.

    Returns:
        FLOP.
    """
    p, total = projection_dim, 0.0
    documents, positions = sum(lengths.values()), _tokens(lengths)
    rows = positions if tokens else documents
    for each in linears:
        i, o, modules = each.inputs, each.out_features, len(each.module_names())
        split = (heads or {}).get(each.name, 1)
        whole = i * o * (rows if tokens else 2 * positions)
        if not p:
            total += modules * (whole + rows * split * (i * o // split) ** 2)
        elif joint:
            total += modules * (whole + 2 * rows * i * o * p)
        else:
            outer = p * p * split * (rows if tokens else 2 * positions)
            vectors = 2 * positions * p * (i + o) + outer
            matrices = whole + 2 * rows * p * o * (i + p)
            total += modules * (min(vectors, matrices) + rows * split * p**4)
    return draws * (total + (rows * p * p if joint else 0))


def second_moments(
    linears: Iterable[Linear], lengths: Lengths, *, draws: int = 1, readers: Readers | None = None
) -> float:
    """Every document's gradient, whose squares are summed, without the passes.

    Args:
        linears: Those recorded.
        lengths: Of the documents.
        draws: Of labels, each with gradients of its own.
        readers: Which linears read some of the tokens only.

    Returns:
        FLOP.
    """
    weights = sum(_modules(each, readers or {}) * each.inputs * each.out_features
                  for each in linears)  # fmt: skip
    return 2 * draws * weights * _tokens(lengths)


def _tokens(lengths: Lengths) -> int:
    return sum(length * count for length, count in lengths.items())


def _modules(linear: Linear, readers: Readers) -> float:
    """How many modules a token meets."""
    return len(linear.module_names()) * readers.get(linear.name, 1.0)


def _by_input(linears: Iterable[Linear]) -> list[list[Linear]]:
    """The linears that read the same array, each group's first one first."""
    groups: dict[str, list[Linear]] = defaultdict(list)
    for each in linears:
        groups[each.input_site].append(each)
    return list(groups.values())
