"""Find the assistant's answers in the text of a conversation and among its tokens.

Host only. The targets of an answer begin at the token that holds its first character and end at the
last token that doesn't reach beyond its end. The end-of-turn token that a chat template writes
after an answer is no target. bergson 2.5.1 labels the same tokens, except where its search finds
the answer's text in a wrong place.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from jhessians.data.documents import IGNORED
from jhessians.data.rows import one_line
from jhessians.errors import DatasetError

# A private-use character stands for each answer when the template's own text is wanted.
_PLACEHOLDER = "\ue000"

Message = dict[str, Any]
Span = tuple[int, int]


@runtime_checkable
class Tokenizer(Protocol):
    """What we need of a Hugging Face tokenizer."""

    @property
    def is_fast(self) -> bool:
        """Whether it can tell which characters a token stands for."""
        ...

    @property
    def eos_token_id(self) -> Any:
        """Token at the end of a text; None if it has none."""
        ...

    @property
    def chat_template(self) -> Any:
        """How it writes conversations, in Jinja; None if it can't."""
        ...

    def __call__(self, text: Any, **options: Any) -> Any:
        """Tokens of a text, or of several."""
        ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """A conversation as one text."""
        ...


def check_messages(conversation: Any, where: str, has_template: bool) -> None:
    """Check that a cell holds a conversation whose answers can be found.

    Args:
        conversation: What the cell holds.
        where: Names the cell in an error.
        has_template: Whether a chat template will write the conversation.

    Raises:
        DatasetError: If it isn't a list of messages, or a content that is needed is no text.
    """
    if not isinstance(conversation, list) or not conversation:
        raise DatasetError(f"{where}: expected a list of messages, found {conversation!r:.50}")
    for message in conversation:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DatasetError(
                f"{where}: expected messages with 'role' and 'content', found {message!r:.80}"
            )
        # A template may accept contents other than text, but an answer must be found as text.
        needs_text = message["role"] == "assistant" or not has_template
        if needs_text and not isinstance(message.get("content"), str):
            raise DatasetError(
                f"{where}: the content of a message of {message['role']!r} must be text, "
                f"found {message.get('content')!r:.50}"
            )


def join(conversation: list[Message], separator: str) -> tuple[str, list[Span]]:
    """The contents joined by a separator, and the ranges of characters that are answers."""
    spans, position = [], 0
    for message in conversation:
        end = position + len(message["content"])
        if message["role"] == "assistant":
            spans.append((position, end))
        position = end + len(separator)
    return separator.join(message["content"] for message in conversation), spans


def render(tokenizer: Tokenizer, conversation: list[Message], where: str) -> tuple[str, list[Span]]:
    """What the chat template writes, and the ranges of its characters that are answers.

    Returns:
        The text of the whole conversation, and [start, stop) of each answer in it.

    Raises:
        DatasetError: If the template refuses the conversation, or alters an answer.
    """

    def template(messages: list[Message]) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    try:
        text = template(conversation)
    except Exception as error:  # a template may raise anything, its own errors included
        raise DatasetError(
            f"{where}: the tokenizer's chat template refuses it: {one_line(error)}"
        ) from error
    answers = [message["content"] for message in conversation if message["role"] == "assistant"]
    spans = _spans_by_placeholder(template, conversation, answers, text)
    if spans is None:
        spans = _spans_by_search(answers, text, where)
    return text, spans


def _spans_by_placeholder(
    template: Callable[[list[Message]], str],
    conversation: list[Message],
    answers: list[str],
    text: str,
) -> list[Span] | None:
    """Find the answers by letting the template write placeholders in their stead.

    What stands between the placeholders is the template's own text, which tells where each answer
    begins. A search alone would take the `s` of `</s>` for an answer "s", and a later user's "yes"
    for the assistant's.

    Returns:
        Ranges of characters; None if the template writes other text around placeholders.
    """
    marked = [
        message | {"content": _PLACEHOLDER} if message["role"] == "assistant" else message
        for message in conversation
    ]
    try:
        between = template(marked).split(_PLACEHOLDER)
    except Exception:  # this template looks into the answers: leave it to the search
        return None
    if len(between) != len(answers) + 1:
        return None
    spans, position = [], 0
    for before, answer in zip(between[:-1], answers, strict=True):
        start = position + len(before)
        position = start + len(answer)
        spans.append((start, position))
    rebuilt = "".join(chain.from_iterable(zip(between, [*answers, ""], strict=True)))
    return spans if rebuilt == text else None


def _spans_by_search(answers: list[str], text: str, where: str) -> list[Span]:
    """Search the answers' texts from the end backwards, each one before the one found last."""
    spans: list[Span] = []
    limit = len(text)
    for answer in reversed(answers):
        start = text.rfind(answer, 0, limit)
        if start < 0:
            raise DatasetError(
                f"{where}: the chat template altered the assistant's {answer!r:.60}, so that it "
                "can't be found in the text; remove white space around it, or change the template"
            )
        spans.insert(0, (start, start + len(answer)))
        limit = start
    return spans


def label_spans(
    tokens: Int64[np.ndarray, " token"], offsets: list[Span], spans: list[Span]
) -> Int64[np.ndarray, " token"]:
    """Labels of a document: its tokens within the answers, -100 elsewhere.

    Args:
        tokens: The document's.
        offsets: Each token's range of characters, as the tokenizer gives it.
        spans: The answers' ranges of characters.

    Returns:
        One label per token; a token that straddles the start of an answer belongs to it.
    """
    labels = np.full_like(tokens, IGNORED)
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    for start, end in spans:
        # An empty range of characters is a special token's, or one that holds none of the text.
        inside = np.flatnonzero((ends > start) & (ends <= end) & (starts < ends))
        if inside.size:
            answer = slice(inside[0], inside[-1] + 1)
            labels[answer] = tokens[answer]
    return labels
