"""Documents as flat arrays of tokens: in pieces while they are read, then joined.

Host only. Tokens are kept in arrays, never as Python integers, which take ten times the memory.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from jhessians.errors import DatasetError

IGNORED = -100
"""The label of a token that the loss leaves out."""


class Piece(NamedTuple):
    """Some consecutive documents, one after the other in flat arrays.

    `labels` is None where every token is a target. Ids are int64 here and become int32 only after
    a check, so that a wrong one can't become a right one by losing its upper bits.
    """

    tokens: Int64[np.ndarray, " token"]
    labels: Int64[np.ndarray, " token"] | None
    lengths: Int64[np.ndarray, " document"]


@dataclass(frozen=True, eq=False)
class Documents:
    """All documents of a run, one after the other.

    Documents of fewer than two tokens are included. They have no next token to predict, so no pass
    computes anything from them, but they count in the number of documents that statistics are
    divided by.

    Attributes:
        tokens: Ids, each in [0, vocabulary).
        labels: For each token the id that should be predicted at its place, as in Hugging Face
            (not shifted; -100 where there is no loss). None if that is every token itself.
        offsets: Document i is `tokens[offsets[i] : offsets[i + 1]]`.
    """

    tokens: Int32[np.ndarray, " token"]
    labels: Int32[np.ndarray, " token"] | None
    offsets: Int64[np.ndarray, " bound"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int64[np.ndarray, " document"]:
        """Tokens of each document."""
        return np.diff(self.offsets)

    @property
    def positions(self) -> int:
        """Positions that carry a gradient: all but each document's last."""
        return int(np.maximum(self.lengths - 1, 0).sum())

    @property
    def sha256(self) -> str:
        """Of all tokens and lengths, in hexadecimal digits: the same only for the same texts."""
        digest = hashlib.sha256(np.ascontiguousarray(self.offsets).data)
        digest.update(np.ascontiguousarray(self.tokens).data)
        return digest.hexdigest()

    def document(
        self, index: int | np.integer
    ) -> tuple[Int32[np.ndarray, " token"], Int32[np.ndarray, " token"]]:
        """Tokens and labels of one document, as views.

        Returns:
            Tokens [token] and labels [token]; without labels of its own, the tokens twice.

        Raises:
            IndexError: If there is no such document.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        place = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        tokens = self.tokens[place]
        return tokens, tokens if self.labels is None else self.labels[place]


def put_together(pieces: Iterator[Piece], max_tokens: int | None) -> Documents:
    """Join the pieces, up to `max_tokens`.

    Args:
        pieces: In the data set's order; read only as far as needed.
        max_tokens: If given, keep the leading documents whose tokens together stay within it, and
            repeat them if they are fewer.

    Returns:
        All documents in one array of tokens, in order.

    Raises:
        DatasetError: If not even the first document is within `max_tokens`, or no piece comes.
    """
    kept: list[Piece] = []
    total = 0
    is_full = False
    for piece in pieces:
        if max_tokens is not None:
            within = total + np.cumsum(piece.lengths) <= max_tokens
            count = len(within) if within.all() else int(np.argmin(within))
            is_full = count < len(within)
            if is_full and count == 0 and not kept:
                raise DatasetError(
                    f"`max_tokens` {max_tokens} is less than the first document's "
                    f"{piece.lengths[0]} tokens: raise it"
                )
            piece = _leading(piece, count)
        total += len(piece.tokens)
        kept.append(
            Piece(
                piece.tokens.astype(np.int32),
                None if piece.labels is None else piece.labels.astype(np.int32),
                piece.lengths,
            )
        )
        if is_full:
            break
    if not kept:  # only chunks can be absent: a split without rows is refused when it is opened
        raise DatasetError(
            "the data set has fewer tokens than one chunk: give a smaller `chunk_length`"
        )
    whole = Piece(
        np.concatenate([piece.tokens for piece in kept]),
        None
        if kept[0].labels is None
        else np.concatenate([piece.labels for piece in kept if piece.labels is not None]),
        np.concatenate([piece.lengths for piece in kept]),
    )
    if max_tokens is not None and not is_full and 0 < total < max_tokens:
        whole = _repeated(whole, max_tokens)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(whole.lengths)])
    return Documents(whole.tokens, whole.labels, offsets)


def _leading(piece: Piece, count: int) -> Piece:
    """The first `count` documents of a piece."""
    end = int(piece.lengths[:count].sum())
    labels = None if piece.labels is None else piece.labels[:end]
    return Piece(piece.tokens[:end], labels, piece.lengths[:count])


def _repeated(piece: Piece, max_tokens: int) -> Piece:
    """All documents as often as they fit into `max_tokens`, then as many leading ones as fit."""
    rounds, left = divmod(max_tokens, len(piece.tokens))
    last = _leading(piece, int(np.searchsorted(np.cumsum(piece.lengths), left, side="right")))
    tokens, labels, lengths = (
        None if part is None or tail is None else np.concatenate([np.tile(part, rounds), tail])
        for part, tail in zip(piece, last, strict=True)
    )
    assert tokens is not None and lengths is not None
    return Piece(tokens, labels, lengths)
