"""Completions and conversations: only the assistant's words are targets, as in bergson."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.data.support import (
    CHATML,
    STRIPPING,
    bergson_rows,
    byte_pair_tokenizer,
    labels_of,
    load,
    random_texts,
    refused,
    targets,
    tokens_of,
    write_rows,
)

PROMPTS = [
    {"prompt": f"{a} says: {b}", "completion": b}  # the completion occurs in the prompt as well
    for a, b in zip(random_texts(40, 3), random_texts(40, 4), strict=True)
]


def _conversations(count):
    rng = np.random.default_rng(5)
    texts = iter(random_texts(1000, 6))
    rows = []
    for number in range(count):
        turns = [{"role": "system", "content": next(texts)}] if rng.random() < 0.5 else []
        for _ in range(rng.integers(1, 4)):
            turns.append({"role": "user", "content": next(texts)})
            turns.append({"role": "assistant", "content": f"{next(texts)} {number}."})
        rows.append({"messages": turns})
    return rows


@pytest.mark.parametrize("max_length", [None, 130])
def test_completions_equal_bergson(max_length, tmp_path, chat_tokenizer):
    columns = {"prompt_column": "prompt", "completion_column": "completion"}
    theirs = bergson_rows(PROMPTS, chat_tokenizer, max_length, **columns)
    file = write_rows(tmp_path / "d.jsonl", PROMPTS)
    ours = load(
        file,
        chat_tokenizer,
        max_length=max_length or 512,
        truncation=max_length is not None,
        **columns,
    )
    assert tokens_of(ours) == theirs["input_ids"]
    assert labels_of(ours) == theirs["labels"]
    assert (ours.labels == -100).any() and (ours.labels >= 0).any()


@pytest.mark.parametrize("max_length", [None, 150])
def test_conversations_equal_bergson(max_length, tmp_path, chat_tokenizer):
    rows = _conversations(40)
    theirs = bergson_rows(rows, chat_tokenizer, max_length, conversation_column="messages")
    ours = load(
        write_rows(tmp_path / "d.jsonl", rows),
        chat_tokenizer,
        max_length=max_length or 512,
        truncation=max_length is not None,
        conversation_column="messages",
    )
    assert tokens_of(ours) == theirs["input_ids"]
    assert labels_of(ours) == theirs["labels"]


def test_template_writes_the_only_special_tokens(tmp_path, chat_tokenizer):
    file = write_rows(tmp_path / "d.jsonl", [{"text": "a", "answer": "the mat"}])
    documents = load(file, chat_tokenizer, completion_column="answer")
    assert chat_tokenizer.bos_token_id not in documents.tokens
    assert targets(documents, chat_tokenizer) == ["the mat"]


def test_answer_is_not_confused_with_the_template_or_another_turn(tmp_path, chat_tokenizer):
    turns = [("user", "?"), ("assistant", "d"), ("user", "why d"), ("assistant", "m")]
    rows = [{"talk": [{"role": role, "content": content} for role, content in turns]}]
    documents = load(
        write_rows(tmp_path / "d.jsonl", rows), chat_tokenizer, conversation_column="talk"
    )
    # `<|im_end|>` ends in "d", and the second user says "d" again: a search alone would err.
    tokens, labels = documents.document(0)
    places = np.flatnonzero(labels != -100)
    before = chat_tokenizer.convert_ids_to_tokens(tokens[places - 1].tolist())
    assert targets(documents, chat_tokenizer) == ["dm"]
    assert before == ["Ċ", "Ċ"]  # each right after its header's newline


def test_template_that_looks_into_the_answer_is_searched(tmp_path):
    # It writes more for a placeholder than for the answer, so that only the search is left.
    looking = byte_pair_tokenizer(
        CHATML + "{% if '9' not in messages[-1]['content'] %} cat{% endif %}"
    )
    file = write_rows(tmp_path / "d.jsonl", [{"text": "cat 9", "answer": "cat 9"}])
    documents = load(file, looking, completion_column="answer")
    tokens, labels = documents.document(0)
    assert targets(documents, looking) == ["cat 9"]
    assert labels[: len(tokens) // 2].max() == -100


def test_altered_answer_is_refused_naming_the_row(tmp_path):
    rows = [{"text": "a", "answer": "fine"}, {"text": "a", "answer": " two spaces "}]
    file = write_rows(tmp_path / "d.jsonl", rows)
    stripping = byte_pair_tokenizer(STRIPPING)
    message = refused("row 1", lambda: load(file, stripping, completion_column="answer"))
    assert "two spaces" in message


def test_template_that_refuses_a_conversation(tmp_path):
    picky = byte_pair_tokenizer("{{ raise_exception('roles must alternate') }}")
    file = write_rows(tmp_path / "d.jsonl", [{"text": "a", "answer": "b"}])
    refused("row 0.*alternate", lambda: load(file, picky, completion_column="answer"))


def test_without_a_template_completions_are_appended(tmp_path, tokenizer):
    rows = [{"text": "the cat sat", "answer": " on a mat"}, {"text": "a 😀", "answer": " é ü 😀"}]
    file = write_rows(tmp_path / "d.jsonl", rows)
    documents = load(file, tokenizer, completion_column="answer")
    whole = [row["text"] + row["answer"] for row in rows]
    assert tokens_of(documents) == tokenizer(whole)["input_ids"]  # `<s>` included
    assert targets(documents, tokenizer) == [row["answer"] for row in rows]


def test_without_a_template_messages_are_joined_by_newlines(tmp_path, tokenizer):
    turns = [("user", "the cat"), ("assistant", "sat"), ("user", "sat"), ("assistant", "on")]
    rows = [{"talk": [{"role": role, "content": content} for role, content in turns]}]
    file = write_rows(tmp_path / "d.jsonl", rows)
    documents = load(file, tokenizer, conversation_column="talk")
    assert tokens_of(documents) == tokenizer(["the cat\nsat\nsat\non"])["input_ids"]
    assert targets(documents, tokenizer) == ["saton"]


def test_labels_survive_a_tokenizer_that_drops_white_space(tmp_path):
    words = {word: i for i, word in enumerate(["[UNK]", "user", "the", "cat", "sat", "on"])}
    spaced = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    spaced.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=spaced, unk_token="[UNK]")
    file = write_rows(tmp_path / "d.jsonl", [{"text": "user the", "answer": " cat sat "}])
    documents = load(file, fast, completion_column="answer")
    assert labels_of(documents) == [[-100, -100, 3, 4]]


def test_token_that_reaches_beyond_the_answer_is_no_target(tmp_path):
    words = {word: i for i, word in enumerate(["[UNK]", "the", "cat", "cats", "sat", "end"])}
    whole = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="[UNK]")
    fast.chat_template = "{{ messages[0]['content'] }} {{ messages[1]['content'] }}s end"
    rows = [{"text": "the cat", "answer": "sat cat"}]
    columns = {"prompt_column": "text", "completion_column": "answer"}
    documents = load(write_rows(tmp_path / "d.jsonl", rows), fast, **columns)
    assert labels_of(documents) == [[-100, -100, 4, -100, -100]]
    assert labels_of(documents) == bergson_rows(rows, fast, **columns)["labels"]


def test_slow_tokenizer_is_refused_for_completions(tmp_path):
    class Slow:
        is_fast, eos_token_id, chat_template = False, 0, None

        def __call__(self, text, **options):
            return {"input_ids": [[1, 2] for _ in text]}

        def apply_chat_template(self, conversation, **options):
            return ""

    file = write_rows(tmp_path / "d.jsonl", [{"text": "a", "answer": "b"}])
    assert tokens_of(load(file, Slow())) == [[1, 2]]
    refused("fast tokenizer", lambda: load(file, Slow(), completion_column="answer"))


@pytest.mark.parametrize(
    ("talk", "match"),
    [
        ([], "list of messages"),
        ([{"from": "human", "value": "x"}], "'role' and 'content'"),
        ([{"role": "assistant", "content": None}], "must be text"),
        ([{"role": "user", "content": "x"}], "no document .* has a token with a label"),
    ],
)
def test_wrong_conversations(talk, match, tmp_path, chat_tokenizer):
    file = write_rows(tmp_path / "d.jsonl", [{"talk": talk}])
    refused(match, lambda: load(file, chat_tokenizer, conversation_column="talk"))
