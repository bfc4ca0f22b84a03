"""Data sets to tokens: every source, ready-made tokens, chunks, limits and errors."""

import json
import logging

import datasets
import numpy as np
import pytest
from tokenizers import processors

from jhessians.data import DataOptions
from jhessians.errors import ConfigError, DatasetError
from tests.data.support import (
    bergson_rows,
    byte_pair_tokenizer,
    labels_of,
    load,
    random_texts,
    refused,
    tokens_of,
    write_rows,
)

# Plain text


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "txt"])
def test_every_kind_of_file_gives_the_same_documents(ending, tmp_path, tokenizer):
    texts = ["the cat sat", "two dogs ran over", "green"]
    rows = datasets.Dataset.from_dict({"text": texts, "id": [1, 2, 3]})
    path = tmp_path / f"docs.{ending}"
    match ending:
        case "jsonl":
            write_rows(path, rows)
        case "json":
            path.write_text(json.dumps(list(rows)))
        case "csv":
            path.write_text("text,id\n" + "".join(f"{text},1\n" for text in texts))
        case "parquet":
            rows.to_parquet(str(path))
        case "txt":
            path.write_text("\n".join(texts) + "\n")
    documents = load(path, tokenizer)
    assert tokens_of(documents) == tokenizer(texts)["input_ids"]
    assert documents.labels is None
    assert documents.tokens.dtype == np.int32 and documents.offsets.dtype == np.int64
    assert documents.positions == sum(len(ids) - 1 for ids in tokens_of(documents))
    assert len(documents) == 3
    with pytest.raises(IndexError):
        documents.document(3)


def test_more_rows_than_one_batch_keep_their_order(tmp_path, tokenizer):
    texts = random_texts(2300)
    documents = load(write_rows(tmp_path / "d.jsonl", [{"text": t} for t in texts]), tokenizer)
    assert tokens_of(documents) == tokenizer(texts)["input_ids"]


def test_empty_and_one_token_documents_count(tmp_path):
    plain = byte_pair_tokenizer()
    plain._tokenizer.post_processor = processors.ByteLevel()
    rows = [{"text": ""}, {"text": "the cat"}, {"text": "a"}]
    documents = load(write_rows(tmp_path / "d.jsonl", rows), plain)
    assert documents.lengths.tolist() == [0, len(plain("the cat")["input_ids"]), 1]
    assert len(documents) == 3
    assert documents.positions == documents.lengths[1] - 1


@pytest.mark.parametrize("split", ["train", "train[:2]", "train[50%:]", "train[:1]+test[-1:]"])
def test_split_syntax_of_saved_folders(split, tmp_path, tokenizer):
    saved = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_dict({"text": random_texts(10, 1)}),
            "test": datasets.Dataset.from_dict({"text": random_texts(4, 2)}),
        }
    )
    saved.save_to_disk(str(tmp_path / "saved"))
    train, test = saved["train"]["text"], saved["test"]["text"]
    expected = {
        "train": train[:],
        "train[:2]": train[:2],
        "train[50%:]": train[5:],
        "train[:1]+test[-1:]": [*train[:1], *test[-1:]],
    }[split]
    documents = load(tmp_path / "saved", tokenizer, split=split)
    assert tokens_of(documents) == tokenizer(expected)["input_ids"]


def test_split_of_a_file_and_of_a_single_saved_data_set(tmp_path, tokenizer):
    texts = random_texts(10)
    file = write_rows(tmp_path / "d.jsonl", [{"text": t} for t in texts])
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "single"))
    expected = tokenizer(texts[2:4])["input_ids"]
    assert tokens_of(load(file, tokenizer, split="train[20%:40%]")) == expected
    assert tokens_of(load(tmp_path / "single", tokenizer, split="any[2:4]")) == expected
    refused("'train'", lambda: load(file, tokenizer, split="test"))
    refused(r"train\[:100\]", lambda: load(file, tokenizer, split="train[:abc"))
    refused("no rows", lambda: load(file, tokenizer, split="train[:0]"))


def test_folder_of_data_files(tmp_path, tokenizer):
    write_rows(tmp_path / "train.jsonl", [{"text": "the cat"}])
    write_rows(tmp_path / "test.jsonl", [{"text": "two dogs"}])
    assert (
        tokens_of(load(tmp_path, tokenizer, split="test")) == tokenizer(["two dogs"])["input_ids"]
    )
    refused("'train', 'test'", lambda: load(tmp_path, tokenizer, split="validation"))


@pytest.mark.parametrize("max_length", [None, 12])
def test_plain_text_equals_bergson(max_length, tmp_path, tokenizer):
    rows = [{"text": text} for text in random_texts(30)]
    theirs = bergson_rows(rows, tokenizer, max_length)
    ours = load(
        write_rows(tmp_path / "d.jsonl", rows),
        tokenizer,
        max_length=max_length or 512,
        truncation=max_length is not None,
    )
    assert tokens_of(ours) == theirs["input_ids"]


# Tokens that exist already


def test_ready_made_tokens_and_labels(tmp_path, tokenizer):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 9]}, {"input_ids": [], "labels": []}]
    documents = load(write_rows(tmp_path / "d.jsonl", rows), tokenizer)
    assert tokens_of(documents) == [[5, 6, 7], []]
    assert labels_of(documents) == [[-100, 6, 9], []]
    cut = load(tmp_path / "d.jsonl", tokenizer, truncation=True, max_length=2)
    assert tokens_of(cut) == [[5, 6], []] and labels_of(cut) == [[-100, 6], []]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{"input_ids": [1, 2]}, {"input_ids": [1, 400]}], "row 1: token id 400 .* 400"),
        ([{"input_ids": []}, {"input_ids": [1, -1]}], "row 1: token id -1"),
        ([{"input_ids": [1, 2], "labels": [1]}], "row 0 has 2 input_ids but 1 labels"),
        ([{"input_ids": [1, 2], "labels": [1, -7]}], "row 0: label -7"),
        ([{"input_ids": [1, 2], "labels": [1, -100]}], "no document .* label"),
        ([{"input_ids": [1, 2]}, {"input_ids": None}], "row 1.*null"),
        ([{"input_ids": [1, 2]}, {"input_ids": [3, None]}], "row 1.*null"),
        ([{"input_ids": ["a"]}], "lists of integers"),
        ([{"input_ids": [2**40]}], "row 0: token id"),
        ([{"input_ids": [1]}, {"input_ids": []}], "fewer than 2 tokens"),
    ],
)
def test_wrong_ready_made_tokens(rows, match, tmp_path, tokenizer):
    file = write_rows(tmp_path / "d.jsonl", rows)
    refused(match, lambda: load(file, tokenizer))


def test_ready_made_rows_through_slices_and_batches(tmp_path, tokenizer):
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 400, rng.integers(2, 9)).tolist() for _ in range(2100)]
    datasets.Dataset.from_dict({"input_ids": ids}).save_to_disk(str(tmp_path / "saved"))
    documents = load(tmp_path / "saved", tokenizer, split="train[5:1500]+train[:5]")
    assert tokens_of(documents) == ids[5:1500] + ids[:5]


# Chunks and limits


@pytest.mark.parametrize("chunk_length", [2, 7, 64])
def test_chunks(chunk_length, tmp_path, tokenizer):
    texts = [*random_texts(1500), "", "  \n", *random_texts(700, 8)]
    file = write_rows(tmp_path / "d.jsonl", [{"text": text} for text in texts])
    documents = load(file, tokenizer, chunk_length=chunk_length)
    stream = []
    for text in texts:
        if text.strip():
            stream += tokenizer(text, add_special_tokens=False)["input_ids"]
            stream.append(tokenizer.eos_token_id)
    count = len(stream) // chunk_length
    assert documents.lengths.tolist() == [chunk_length] * count
    assert documents.tokens.tolist() == stream[: count * chunk_length]


def test_chunks_equal_bergson(tmp_path, tokenizer, monkeypatch):
    from bergson.data import tokenize_and_chunk

    # bergson asks for one worker process even for fifty rows; a fork beside JAX may hang.
    map_rows = datasets.Dataset.map
    monkeypatch.setattr(
        datasets.Dataset, "map", lambda self, *a, num_proc=None, **k: map_rows(self, *a, **k)
    )
    texts = [*random_texts(50), " "]
    table = datasets.Dataset.from_dict({"text": texts})
    theirs = tokenize_and_chunk(table, tokenizer, 16, num_proc=1)["input_ids"][:]
    file = write_rows(tmp_path / "d.jsonl", [{"text": text} for text in texts])
    assert tokens_of(load(file, tokenizer, chunk_length=16)) == theirs


def test_chunk_errors(tmp_path, tokenizer):
    file = write_rows(tmp_path / "d.jsonl", [{"text": "the cat"}])
    refused("600 exceeds 512", lambda: load(file, tokenizer, chunk_length=600), ConfigError)
    refused("fewer tokens than one chunk", lambda: load(file, tokenizer, chunk_length=100))
    endless = byte_pair_tokenizer(eos_token=None)
    refused("end-of-sequence", lambda: load(file, endless, chunk_length=4))
    refused("end-of-sequence", lambda: load(file, tokenizer, chunk_length=4, vocab_size=1))


@pytest.mark.parametrize("max_tokens", [10, 57, 137, 400, 1000])
def test_max_tokens_equals_bergson(max_tokens, tmp_path, tokenizer):
    from types import SimpleNamespace

    from bergson.utils.worker_utils import filter_by_max_tokens

    texts = ["the cat", *random_texts(10)]
    ids = tokenizer(texts)["input_ids"]
    table = datasets.Dataset.from_dict({"input_ids": ids, "length": [len(i) for i in ids]})
    theirs = filter_by_max_tokens(table, SimpleNamespace(max_tokens=max_tokens))["input_ids"][:]
    file = write_rows(tmp_path / "d.jsonl", [{"text": text} for text in texts])
    ours = tokens_of(load(file, tokenizer, max_tokens=max_tokens))
    assert ours == theirs
    assert sum(map(len, ours)) <= max_tokens


def test_max_tokens_with_labels_chunks_and_a_long_first_document(tmp_path, tokenizer):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    file = write_rows(tmp_path / "d.jsonl", rows)
    documents = load(file, tokenizer, max_tokens=8)
    assert labels_of(documents) == [[-100, 6, 7]] * 2
    refused("first document's 3 tokens", lambda: load(file, tokenizer, max_tokens=2))
    text = write_rows(tmp_path / "t.jsonl", [{"text": text} for text in random_texts(50)])
    assert load(text, tokenizer, chunk_length=8, max_tokens=70).lengths.tolist() == [8] * 8


def test_long_documents(tmp_path, tokenizer):
    rows = [{"text": "a"}, {"text": "the cat " * 30}]
    file = write_rows(tmp_path / "d.jsonl", rows)
    length = len(tokenizer(rows[1]["text"])["input_ids"])
    message = refused(f"row 1 has {length} tokens", lambda: load(file, tokenizer, max_length=20))
    assert "20" in message and "`truncation`" in message and "`token_batch_size`" in message
    assert load(file, tokenizer, max_length=20, truncation=True).lengths.tolist() == [2, 20]


# Errors and noise


@pytest.mark.parametrize(
    "options",
    [
        {"dataset": ""},
        {"split": " "},
        {"prompt_column": ""},
        {"chunk_length": -1},
        {"chunk_length": 1},
        {"chunk_length": 8, "truncation": True},
        {"chunk_length": 8, "completion_column": "answer"},
        {"completion_column": "answer", "conversation_column": "talk"},
        {"max_tokens": 0},
        {"max_tokens": -5},
    ],
)
def test_options_that_make_no_sense(options):
    refused("`[a-z_]+`", lambda: DataOptions(**({"dataset": "d.jsonl"} | options)), ConfigError)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", None, "no data found"),
        ("sub/folder/missing", None, "no such file or folder"),
        ("a.jsonl", '{"text": 3', "can't be read.*JSON"),
        ("a.jsonl", "", "empty"),
        ("a.csv", 'text\n"open', "can't be read"),
        ("a.csv", "", "empty"),
        ("a.csv", "text\n", "no rows|empty"),
        ("a.txt", "", "empty"),
        ("a.parquet", "nonsense", "can't be read.*[Pp]arquet"),
        ("a.docx", "x", "ending in '.docx'"),
        (
            "a.jsonl",
            '{"txt": "x", "id": 1}\n',
            "column 'text'.*'txt', 'id'.*`prompt_column` txt",
        ),
        ("a.jsonl", '{"text": "x"}\n{"text": null}\n', "row 1, column 'text'.*null"),
        ("a.jsonl", '{"text": 3}\n', "row 0.*int 3"),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}\n', "row 1.*int 3"),
    ],
)
def test_unreadable_data(name, content, match, tmp_path, tokenizer):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    refused(match, lambda: load(path, tokenizer))


def test_missing_completion_column(tmp_path, tokenizer):
    file = write_rows(tmp_path / "d.jsonl", [{"text": "a", "completions": "b"}])
    message = refused("'completion'", lambda: load(file, tokenizer, completion_column="completion"))
    assert "`completion_column` completions" in message


def test_vocabulary_smaller_than_the_tokenizers(tmp_path, tokenizer):
    file = write_rows(tmp_path / "d.jsonl", [{"text": "</s>"}, {"text": "the cat"}])
    refused(
        "row 1: token id .* vocabulary of 4 tokens", lambda: load(file, tokenizer, vocab_size=4)
    )


def test_hub_that_is_out_of_reach_suggests_a_local_path(tokenizer):
    refused("Hub.*local path", lambda: load("nobody/nothing", tokenizer))


def test_subset_of_a_file(tmp_path, tokenizer):
    file = write_rows(tmp_path / "d.jsonl", [{"text": "the cat"}])
    refused("`subset`", lambda: load(file, tokenizer, subset="en"), ConfigError)


def test_nothing_is_printed_and_settings_are_put_back(tmp_path, capfd, caplog):
    limited = byte_pair_tokenizer()
    limited.model_max_length = 4  # transformers would warn of longer texts
    level = logging.getLogger("datasets").level
    load(write_rows(tmp_path / "d.jsonl", [{"text": "the cat sat on a mat"}]), limited)
    with pytest.raises(DatasetError):
        load(write_rows(tmp_path / "e.jsonl", [{"text": "x"}]) + "l", limited)
    with pytest.raises(DatasetError):
        (tmp_path / "f.json").write_text("{")
        load(tmp_path / "f.json", limited)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == "" and not caplog.records
    assert logging.getLogger("datasets").level == level
    assert not datasets.are_progress_bars_disabled()
