"""A small tokenizer, files of rows, and what the tests of this folder ask of documents."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jhessians.data import DataOptions, load_documents
from jhessians.errors import DatasetError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
STRIPPING = CHATML.replace("m['content']", "m['content'] | trim")
WORDS = "the cat sat on a mat while two dogs ran over green hills and never came back again é ü 😀"


def byte_pair_tokenizer(template=None, **special):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([WORDS] * 5, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, **({"bos_token": "<s>", "eos_token": "</s>"} | special)
    )
    fast.chat_template = template
    return fast


def write_rows(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(dataset, tokenizer, *, max_length=512, vocab_size=400, **options):
    return load_documents(
        DataOptions(str(dataset), **options),
        tokenizer,
        max_length=max_length,
        vocab_size=vocab_size,
    )


def tokens_of(documents):
    return [documents.document(i)[0].tolist() for i in range(len(documents))]


def labels_of(documents):
    return [documents.document(i)[1].tolist() for i in range(len(documents))]


def random_texts(count, seed=0):
    rng = np.random.default_rng(seed)
    words = WORDS.split()
    return [" ".join(rng.choice(words, rng.integers(1, 30))) for _ in range(count)]


def refused(match, call, kind=DatasetError):
    with pytest.raises(kind, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def targets(documents, tokenizer):
    return [
        tokenizer.decode([label for label in labels if label != -100])
        for labels in labels_of(documents)
    ]


def bergson_rows(rows, tokenizer, max_length=None, **columns):
    from bergson.config import DataConfig
    from bergson.data import tokenize

    table = datasets.Dataset.from_list(rows)
    config = DataConfig(truncation=max_length is not None, **columns)
    return tokenize(table[:], args=config, tokenizer=tokenizer, max_length=max_length)
