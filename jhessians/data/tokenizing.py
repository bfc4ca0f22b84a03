"""Tokens and labels of a data set's rows, a thousand rows at a time.

Host only; no process is forked, so `TOKENIZERS_PARALLELISM` needs no setting.

Labels are Hugging Face's: `labels[t]` is token t itself where it is a target, and -100 where it
is not. Plain text has no labels, since every token of it is a target. With a completion or a
conversation column, only the assistant's words are targets (`answers.py`).

For a tokenizer *without a chat template*, prompt and completion are written one after the other,
and so are the contents of a conversation's messages, with a newline between them and without their
roles. The tokenizer adds its special tokens around the whole.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from jhessians.data.answers import Tokenizer, check_messages, join, label_spans, render
from jhessians.data.documents import IGNORED, Piece
from jhessians.data.rows import one_line
from jhessians.errors import DatasetError

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_AT_ONCE = 1000


def _flatten(sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    flat = np.fromiter(chain.from_iterable(sequences), np.int64, int(lengths.sum()))
    return flat, lengths


def _batches(rows: "Dataset", columns: list[str]) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """(number of the first row, columns) of each batch of rows."""
    rows = rows.select_columns(columns)  # so that no other column is decoded
    for first in range(0, len(rows), ROWS_AT_ONCE):
        yield first, rows[first : first + ROWS_AT_ONCE]


def _texts(cells: list[Any], column: str, first_row: int) -> list[str]:
    for number, cell in enumerate(cells, first_row):
        if not isinstance(cell, str):
            found = "nothing (null)" if cell is None else f"{type(cell).__name__} {cell!r:.50}"
            raise DatasetError(
                f"row {number}, column {column!r}: expected text, found {found}; "
                "mend or remove the row"
            )
    return cells


def _encode(tokenizer: Tokenizer, texts: list[str], first_row: int, **options: Any) -> Any:
    """`tokenizer(texts)`, with whatever exception it raises as an error of one line."""
    try:
        return tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, **options)
    except Exception as error:  # the tokenizers library raises plain `Exception`
        raise DatasetError(
            f"the tokenizer failed on rows {first_row} to {first_row + len(texts) - 1}: "
            f"{one_line(error)}"
        ) from error


def _truncation(max_length: int | None) -> dict[str, Any]:
    # The tokenizer does the cutting: it keeps a special token that closes the document.
    return {"truncation": max_length is not None, "max_length": max_length}


def ready_made_pieces(rows: "Dataset", *, max_length: int | None = None) -> Iterator[Piece]:
    """Documents of a data set that holds `input_ids`, and perhaps `labels`, already.

    Args:
        rows: The data set.
        max_length: Longer documents are cut at it; None leaves them.

    Yields:
        Tokens, labels and lengths of some rows at a time.

    Raises:
        DatasetError: If a cell is no list of integers, or a row's labels and tokens differ in
            number.
    """
    names = ["input_ids", *(["labels"] if "labels" in rows.column_names else [])]
    table_rows = rows.select_columns(names).with_format("arrow")
    for first in range(0, len(rows), ROWS_AT_ONCE):
        table = table_rows[first : first + ROWS_AT_ONCE]
        columns = [_integer_lists(table.column(name), name, first) for name in names]
        tokens, lengths = columns[0]
        labels, label_lengths = columns[-1]
        if (wrong := np.flatnonzero(lengths != label_lengths)).size:
            row = wrong[0]
            raise DatasetError(
                f"row {first + row} has {lengths[row]} input_ids but {label_lengths[row]} labels; "
                "there must be one label for each token (-100 for no loss)"
            )
        if max_length is not None:
            ends = np.cumsum(lengths)
            position = np.arange(len(tokens)) - np.repeat(ends - lengths, lengths)
            tokens, labels = tokens[position < max_length], labels[position < max_length]
            lengths = np.minimum(lengths, max_length)
        yield Piece(tokens, labels if len(names) == 2 else None, lengths)


def _integer_lists(column: Any, name: str, first_row: int) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists as (flat values, lengths), without a Python object per token."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not (is_list or pa.types.is_fixed_size_list(kind)) or not (
        pa.types.is_integer(kind.value_type) or pa.types.is_null(kind.value_type)
    ):
        raise DatasetError(f"column {name!r} must hold lists of integers, but holds {kind}")
    lengths = pc.list_value_length(column)
    values = pc.list_flatten(column)
    if column.null_count:
        row = first_row + column.is_null().to_pylist().index(True)
        raise DatasetError(f"row {row}, column {name!r}: expected integers, found nothing (null)")
    if values.null_count:
        ends = np.cumsum(lengths.to_numpy())
        missing = values.is_null().to_pylist().index(True)
        row = first_row + int(np.searchsorted(ends, missing, side="right"))
        raise DatasetError(f"row {row}, column {name!r}: the list holds a null")
    return values.cast(pa.int64()).to_numpy(), lengths.to_numpy().astype(np.int64)


def plain_pieces(
    rows: "Dataset", column: str, tokenizer: Tokenizer, *, max_length: int | None = None
) -> Iterator[Piece]:
    """Each row's text with the tokenizer's default special tokens; every token is a target.

    Args:
        rows: The data set.
        column: Holds the texts.
        tokenizer: Of the model.
        max_length: Longer documents are truncated to it; None leaves them.

    Yields:
        Tokens and lengths of some rows at a time.

    Raises:
        DatasetError: If a cell is no text.
    """
    for first, batch in _batches(rows, [column]):
        texts = _texts(batch[column], column, first)
        encoded = _encode(tokenizer, texts, first, **_truncation(max_length))
        tokens, lengths = _flatten(encoded["input_ids"])
        yield Piece(tokens, None, lengths)


def bare_pieces(rows: "Dataset", column: str, tokenizer: Tokenizer) -> Iterator[Piece]:
    """Each row's text without special tokens, for chunking; a blank text has no tokens.

    Yields:
        Tokens and lengths of some rows at a time.

    Raises:
        DatasetError: If a cell is no text.
    """
    for first, batch in _batches(rows, [column]):
        texts = _texts(batch[column], column, first)
        written = np.array([bool(text.strip()) for text in texts])
        lengths = np.zeros(len(texts), np.int64)
        tokens = np.zeros(0, np.int64)
        if written.any():
            kept = [text for text in texts if text.strip()]
            encoded = _encode(tokenizer, kept, first, add_special_tokens=False, **_truncation(None))
            tokens, lengths[written] = _flatten(encoded["input_ids"])
        yield Piece(tokens, None, lengths)


def answer_pieces(
    rows: "Dataset",
    tokenizer: Tokenizer,
    *,
    prompt_column: str = "",
    completion_column: str = "",
    conversation_column: str = "",
    max_length: int | None = None,
) -> Iterator[Piece]:
    """Prompts with completions, or conversations; only the assistant's words are targets.

    Args:
        rows: The data set.
        tokenizer: Of the model; a fast one, which knows each token's characters.
        prompt_column: Holds what comes before the answer.
        completion_column: Holds the answer.
        conversation_column: Column of lists of messages `{"role": …, "content": …}`; used
            instead of the two others if it is given.
        max_length: Longer documents are truncated to it; None leaves them.

    Yields:
        Tokens, labels and lengths of some rows at a time.

    Raises:
        DatasetError: If the tokenizer is a slow one, a cell is not what it should be, the chat
            template refuses a conversation, or an answer is not in what it wrote.
    """
    if not tokenizer.is_fast:
        raise DatasetError(
            "completions and conversations need a fast tokenizer (one with a tokenizer.json), "
            "which knows the characters of each token; this one is slow"
        )
    has_template = bool(tokenizer.chat_template)
    names = [conversation_column] if conversation_column else [prompt_column, completion_column]
    for first, batch in _batches(rows, names):
        if conversation_column:
            conversations = batch[conversation_column]
        else:
            conversations = [
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                for prompt, answer in zip(
                    *(_texts(batch[name], name, first) for name in names), strict=True
                )
            ]
        texts, spans = [], []
        for number, conversation in enumerate(conversations, first):
            where = f"row {number}"
            check_messages(conversation, f"{where}, column {names[-1]!r}", has_template)
            if has_template:
                text, answers = render(tokenizer, conversation, where)
            else:
                text, answers = join(conversation, "\n" if conversation_column else "")
            texts.append(text)
            spans.append(answers)
        encoded = _encode(
            tokenizer,
            texts,
            first,
            add_special_tokens=not has_template,  # a template has written them already
            return_offsets_mapping=True,
            **_truncation(max_length),
        )
        tokens, lengths = _flatten(encoded["input_ids"])
        labels = np.full_like(tokens, IGNORED)
        starts = np.cumsum(lengths) - lengths
        for start, length, offsets, answers in zip(
            starts, lengths, encoded["offset_mapping"], spans, strict=True
        ):
            document = slice(start, start + length)
            labels[document] = label_spans(tokens[document], offsets, answers)
        yield Piece(tokens, labels, lengths)


def chunked_pieces(pieces: Iterator[Piece], *, length: int, eos: int) -> Iterator[Piece]:
    """All documents, each closed by `eos`, as one stream cut every `length` tokens.

    Documents without tokens are left out. What doesn't fill a chunk goes on into the next
    piece; only the very last remainder is dropped.

    Yields:
        As many whole chunks as a piece and what was left over make up.
    """
    rest = np.zeros(0, np.int64)
    for piece in pieces:
        ends = np.cumsum(piece.lengths)[piece.lengths > 0]
        stream = np.concatenate([rest, np.insert(piece.tokens, ends, eos)])
        chunks = len(stream) // length
        rest = stream[chunks * length :]
        if chunks:
            yield Piece(stream[: chunks * length], None, np.full(chunks, length, np.int64))
