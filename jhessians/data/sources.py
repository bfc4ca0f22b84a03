"""Read a data set into documents of tokens and labels.

`DataOptions` says what to read, each field with the meaning that it has in bergson 2.5.1, and
`load_documents` returns it as `Documents`. The steps are in other files: `rows.py` opens the data
set, `tokenizing.py` and `answers.py` make tokens and labels, `documents.py` joins the pieces. This
file chooses among them and checks what they return.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jhessians.data.answers import Tokenizer
from jhessians.data.documents import IGNORED, Documents, Piece, put_together
from jhessians.data.rows import not_utf8, open_rows, quiet, require_column
from jhessians.data.tokenizing import (
    answer_pieces,
    bare_pieces,
    chunked_pieces,
    plain_pieces,
    ready_made_pieces,
)
from jhessians.errors import ConfigError, DatasetError

__all__ = ["DataOptions", "Documents", "load_documents"]


@dataclass(frozen=True)
class DataOptions:
    """What to read, and how to cut it into documents.

    Attributes:
        dataset: A .json, .jsonl, .csv, .parquet or .txt file (one document per line), a folder
            written by `save_to_disk`, or a name on the Hugging Face Hub. One that has a column
            `input_ids`, and perhaps `labels`, is tokenised already, and these are used.
        split: A split, slices of splits, or a sum: `train[:10%]+test`.
        subset: The Hub's configuration name.
        prompt_column: Column of plain text, or of prompts if there is a completion column.
        completion_column: Column of completions; only they are targets.
        conversation_column: Column of lists of messages `{"role": …, "content": …}`; only the
            assistant's are targets.
        truncation: Cut documents that are too long, instead of refusing them.
        chunk_length: If positive, tokens per chunk: the prompt column's texts are put one after
            the other, each closed by the end-of-sequence token, and cut into chunks of
            this length. A chunk is a document.
        max_tokens: If given, use the leading documents whose tokens together stay within it;
            a smaller data set is repeated up to it.

    Raises:
        ConfigError: If a value, or a combination, makes no sense.
    """

    dataset: str
    split: str = "train"
    subset: str | None = None
    prompt_column: str = "text"
    completion_column: str = ""
    conversation_column: str = ""
    truncation: bool = False
    chunk_length: int = 0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("dataset", "split", "prompt_column"):
            if not getattr(self, name).strip():
                raise ConfigError(f"`{name}` is empty: give a name")
        if self.completion_column and self.conversation_column:
            raise ConfigError(
                "`completion_column` and `conversation_column` exclude each other: "
                "a row is a prompt with a completion, or a conversation"
            )
        if self.chunk_length < 0 or self.chunk_length == 1:
            raise ConfigError(
                f"`chunk_length` is {self.chunk_length}: give 0 (no chunks) or at least 2 tokens"
            )
        if self.chunk_length and self.truncation:
            raise ConfigError(
                "`chunk_length` and `truncation` exclude each other: chunks have one length"
            )
        if self.chunk_length and (self.completion_column or self.conversation_column):
            raise ConfigError(
                "`chunk_length` takes plain text only: leave `completion_column` and "
                "`conversation_column` out, or `chunk_length`"
            )
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ConfigError(f"`max_tokens` is {self.max_tokens}: give at least 2")


def load_documents(
    options: DataOptions, tokenizer: Tokenizer, *, max_length: int, vocab_size: int
) -> Documents:
    """Read, tokenise, check and limit a data set.

    Args:
        options: What to read.
        tokenizer: A Hugging Face tokenizer; a fast one for completions and conversations.
        max_length: Tokens of the longest document allowed: the smaller one of the model's
            positions and the tokens of a batch.
        vocab_size: Rows of the model's embedding.

    Returns:
        Documents of at most `max_length` tokens, of which one at least has something to predict.

    Raises:
        ConfigError: If chunks would be longer than `max_length`, or the subset has no meaning.
        DatasetError: If the data can't be read, don't fit the model or the options, or hold
            nothing to compute on.
    """
    if options.chunk_length > max_length:
        raise ConfigError(
            f"`chunk_length` {options.chunk_length} exceeds {max_length}, the smaller one of the "
            "model's positions and `token_batch_size`: give shorter chunks"
        )
    try:
        with quiet():
            documents = put_together(
                _pieces(options, tokenizer, max_length, vocab_size), options.max_tokens
            )
    except UnicodeDecodeError as error:  # of JSON, found when a row is looked at
        raise not_utf8(options.dataset) from error
    _require_something_to_learn(documents, options)
    return documents


def _pieces(
    options: DataOptions, tokenizer: Tokenizer, max_length: int, vocab_size: int
) -> Iterator[Piece]:
    """The documents that the options ask for, with every token and length checked."""
    rows = open_rows(options.dataset, split=options.split, subset=options.subset)
    if options.chunk_length:
        require_column(rows, options.prompt_column, "prompt_column")
        eos = tokenizer.eos_token_id
        if eos is None:
            raise DatasetError(
                "`chunk_length` closes each document with the end-of-sequence token, but the "
                "tokenizer has none: set its eos_token, or leave `chunk_length` out"
            )
        if not 0 <= eos < vocab_size:
            raise DatasetError(
                f"the tokenizer's end-of-sequence token is {eos}, but the model's vocabulary has "
                f"{vocab_size} tokens: give the model's own tokenizer"
            )
        pieces = bare_pieces(rows, options.prompt_column, tokenizer)
        pieces = _within_vocabulary(pieces, vocab_size)
        yield from chunked_pieces(pieces, length=options.chunk_length, eos=eos)
        return
    cut = max_length if options.truncation else None
    if "input_ids" in rows.column_names:
        pieces = ready_made_pieces(rows, max_length=cut)
    elif options.conversation_column:
        require_column(rows, options.conversation_column, "conversation_column")
        pieces = answer_pieces(
            rows, tokenizer, conversation_column=options.conversation_column, max_length=cut
        )
    else:
        require_column(rows, options.prompt_column, "prompt_column")
        if options.completion_column:
            require_column(rows, options.completion_column, "completion_column")
            pieces = answer_pieces(
                rows,
                tokenizer,
                prompt_column=options.prompt_column,
                completion_column=options.completion_column,
                max_length=cut,
            )
        else:
            pieces = plain_pieces(rows, options.prompt_column, tokenizer, max_length=cut)
    yield from _within_length(_within_vocabulary(pieces, vocab_size), max_length)


def _within_vocabulary(pieces: Iterator[Piece], vocab_size: int) -> Iterator[Piece]:
    """Pass pieces on if all ids, and all labels but -100, are in [0, vocab_size)."""
    first_row = 0
    for piece in pieces:
        wrong = (piece.tokens < 0) | (piece.tokens >= vocab_size)
        what, values = "token id", piece.tokens
        if piece.labels is not None and not wrong.any():
            what, values = "label", piece.labels
            wrong = ((values < 0) & (values != IGNORED)) | (values >= vocab_size)
        if wrong.any():
            place = int(np.argmax(wrong))
            row = int(np.searchsorted(np.cumsum(piece.lengths), place, side="right"))
            raise DatasetError(
                f"row {first_row + row}: {what} {values[place]} is outside the model's "
                f"vocabulary of {vocab_size} tokens: give the model's own tokenizer"
            )
        first_row += len(piece.lengths)
        yield piece


def _within_length(pieces: Iterator[Piece], max_length: int) -> Iterator[Piece]:
    """Pass pieces on if no document is longer than `max_length`."""
    first_row = 0
    for piece in pieces:
        if (too_long := np.flatnonzero(piece.lengths > max_length)).size:
            row = int(too_long[0])
            raise DatasetError(
                f"row {first_row + row} has {piece.lengths[row]} tokens, but {max_length} is the "
                "longest allowed (the smaller one of the model's positions and "
                "`token_batch_size`): use `truncation`, or a larger `token_batch_size` if the "
                "model has the positions"
            )
        first_row += len(piece.lengths)
        yield piece


def _require_something_to_learn(documents: Documents, options: DataOptions) -> None:
    if documents.positions == 0:
        raise DatasetError(
            f"all {len(documents)} documents of {options.dataset!r} have fewer than 2 tokens: "
            "there is no next token to predict"
        )
    if documents.labels is None:
        return
    is_target = documents.labels != IGNORED
    # A document's first token has nothing before it to be predicted from.
    is_target[documents.offsets[:-1][documents.lengths > 0]] = False
    if not is_target.any():
        raise DatasetError(
            f"no document of {options.dataset!r} has a token with a label: the completions are "
            "empty, cut off by `truncation`, or there is no message of the role 'assistant'"
        )
