"""The arithmetic that queries and scores need; counted as in `jhessians.fitting.arithmetic`."""

from collections.abc import Iterable

from jhessians.fitting.arithmetic import Lengths, Linear, Readers, correction, second_moments


def queries(
    linears: Iterable[Linear],
    lengths: Lengths,
    *,
    draws: int = 1,
    curvature: bool = True,
    readers: Readers | None = None,
) -> float:
    """Every document's gradient, and what the inverse Hessian makes of it, without the passes.

    Args:
        linears: Those recorded.
        lengths: Of the documents.
        draws: Of labels, each with gradients of its own.
        curvature: Whether there is a Hessian.
        readers: Which linears read some of the tokens only.

    Returns:
        FLOP of the gradients; with a Hessian, into the eigenbasis and out of it.
    """
    linears = list(linears)
    if not curvature:
        return second_moments(linears, lengths, draws=draws, readers=readers)
    back = sum(len(each.module_names()) * 2 * each.inputs * each.out_features
               * (each.inputs + each.out_features) for each in linears)  # fmt: skip
    into = correction(linears, lengths, draws=draws, readers=readers)
    return into + draws * back * sum(lengths.values())


def scores(
    linears: Iterable[Linear],
    lengths: Lengths,
    *,
    queries: int,
    rank: int | None = None,
    tokens: bool = False,
    draws: int = 1,
    readers: Readers | None = None,
) -> float:
    """Inner products of every document's gradient with queries, without the passes.

    Args:
        linears: Those recorded.
        lengths: Of the documents.
        queries: How many; 0 for none.
        rank: Of the queries; None if they are whole.
        tokens: Whether each token has scores of its own.
        draws: Of labels, each with gradients of its own.
        readers: Which linears read some of the tokens only.

    Returns:
        FLOP of the cheaper way: through the document's gradient, or from token to token.
    """
    total = 0.0
    for each in linears if queries else ():
        i, o, modules = each.inputs, each.out_features, len(each.module_names())
        for length, count in lengths.items():
            rows = length * (readers or {}).get(each.name, 1)
            of_rank = i * o if rank is None else rank * (i + o)
            from_token_to_token = 2 * rows * queries * of_rank
            one = i * o if rank is None else rank * (i * o + min(i, o))
            gradients = 2 * rows * i * o + 2 * queries * one
            ways = [from_token_to_token] if tokens else [from_token_to_token, gradients]
            total += modules * count * draws * min(ways)
    return total
