"""Small random checkpoints, tokenizers and corpora, written to disk as their users would have them.

Weights are scaled by fan-in, never by transformers' 0.02: with tiny weights every block is close
to the identity and a wrong rotary base or a missing norm offset barely moves a logit.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from tests.oracles.architectures import ARCHITECTURES
from tests.oracles.families import (
    MAX_POSITIONS,
    PREFIXED_FAMILIES,
    ZERO_CENTRED_NORMS,
)

# A tokenizer needs something to learn merges from; the text itself is of no importance.
_TEXT = """
The curvature of a loss surface tells how far a step may go before the slope has changed. A matrix
of second derivatives is too large to write down for a model of any size, and so it is replaced by
something smaller: for every layer two covariances, one of what goes in and one of the gradient at
what comes out. Their product stands for the whole. Where the sun set behind the hills, three goats
and an old dog walked home along the river; 17 boats lay there in 2023, each with a number painted
on its bow. "Nobody counts them any more," said the ferryman, "but they are still here." Water,
wood, iron, salt. Why would a measurement need a second opinion? Because the first one may be wrong
in the same way as the thing that it measures, and then the two of them agree about nothing at all.
"""


def tokenizer(
    folder: str | Path, *, add_bos: bool = False, model_max_length: int = MAX_POSITIONS
) -> PreTrainedTokenizerFast:
    """Write a byte-level BPE tokenizer of 320 tokens into `folder`; no network is used.

    Args:
        folder: Created if missing; receives `tokenizer.json` and `tokenizer_config.json`.
        add_bos: Whether encoding a document prepends `<s>`, as Llama's tokenizer does.
        model_max_length: Recorded limit in tokens, which bergson truncates at.

    Returns:
        The tokenizer, with `<pad>` 0, `<s>` 1 and `</s>` 2.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    backend.train_from_iterator(
        _TEXT.split("\n"),
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", special.index("<s>"))]
        )
    written = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=model_max_length,
    )
    written.save_pretrained(folder)
    return written


def _generator(seed: int, name: str) -> torch.Generator:
    # One stream per parameter, so that an override of one shape leaves the others as they were.
    return torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))


@torch.no_grad()
def randomize(model: PreTrainedModel, *, seed: int) -> None:
    """Fill every parameter of `model` so that each of them moves the logits.

    Linear weights have standard deviation 1/sqrt(fan-in), norm weights are 1 + 0.2 n, every bias
    is 0.3 n and embeddings are n, for n standard normal, one random stream per parameter name.

    Raises:
        ValueError: A parameter belongs to no known kind.
    """
    head = getattr(model.get_output_embeddings(), "weight", None)
    filled = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in filled:
                continue
            filled.add(parameter)
            full_name = f"{path}.{name}" if path else name
            noise = torch.randn(parameter.shape, generator=_generator(seed, full_name))
            if name.endswith("bias"):
                value = 0.3 * noise
            elif "Norm" in type(module).__name__:
                centre = 0.0 if type(module).__name__ in ZERO_CENTRED_NORMS else 1.0
                value = centre + 0.2 * noise
            elif isinstance(module, torch.nn.Embedding) and parameter is head:
                # Tied to the head: between an embedding's 1 and a linear's 1/sqrt(hidden), so
                # that neither the tokens vanish beside the positions nor the softmax saturates.
                value = noise / parameter.shape[1] ** 0.25
            elif isinstance(module, torch.nn.Embedding):
                value = noise
            elif isinstance(module, Conv1D):
                value = noise / parameter.shape[0] ** 0.5
            elif isinstance(module, torch.nn.Linear) or "Router" in type(module).__name__:
                value = noise / parameter.shape[1] ** 0.5
            elif "Experts" in type(module).__name__:
                transposed = getattr(module, "is_transposed", False)
                value = noise / parameter.shape[1 if transposed else 2] ** 0.5
            elif name == "sinks":
                value = noise
            else:
                raise ValueError(
                    f"no rule for {full_name} {tuple(parameter.shape)} of "
                    f"{type(module).__name__}; add one to tests/oracles/checkpoints.py"
                )
            parameter.copy_(value)


def build(
    family: str,
    folder: str | Path,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    bin: bool = False,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint with its tokenizer, as `save_pretrained` lays it out.

    Args:
        family: A key of `architectures.ARCHITECTURES`, transformers' `model_type`.
        folder: Created if missing.
        seed: Of the weights; each parameter has a stream of its own.
        dtype: Of the stored tensors.
        shards: Above 1, about so many files and an `*.index.json`; never fewer than 2.
        bin: Store torch's `pytorch_model*.bin` instead of safetensors.
        **overrides: Config arguments that replace the family's.

    Returns:
        The folder.

    Raises:
        KeyError: `family` is unknown.
    """
    folder = Path(folder)
    # A model holds no more positions than its config says, whatever that config calls them.
    positions = overrides.get("max_position_embeddings", overrides.get("n_positions"))
    words = tokenizer(
        folder,
        add_bos=family in PREFIXED_FAMILIES,
        model_max_length=positions or MAX_POSITIONS,
    )
    arguments = {
        **ARCHITECTURES[family](len(words)),
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        **overrides,
    }
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**arguments))
    randomize(model, seed=seed)
    model = model.to(dtype).eval()

    state = model.state_dict()
    limit: int | str = "50GB"
    if shards > 1:
        sizes = [tensor.numel() * tensor.element_size() for tensor in state.values()]
        limit = max(sum(sizes) // shards, max(sizes))
    if not bin:
        model.save_pretrained(folder, max_shard_size=limit)
        return folder

    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    plan = split_torch_state_dict_into_shards(
        state, filename_pattern="pytorch_model{suffix}.bin", max_shard_size=limit
    )
    for filename, names in plan.filename_to_tensors.items():
        # A clone, or torch would store the whole storage behind a tied or sliced tensor.
        torch.save({name: state[name].clone() for name in names}, folder / filename)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2))
    return folder


DEFAULT_LENGTHS: tuple[int, ...] = (1, 2, 3, 60, 9, 25, 5, 41, 14, 90)


def corpus(
    folder: str | Path,
    n: int,
    *,
    seed: int = 0,
    lengths: Sequence[int] = DEFAULT_LENGTHS,
    name: str = "docs.jsonl",
) -> Path:
    """Write `n` documents `{"text": …}` whose token counts are exactly `lengths`, cycled.

    Args:
        folder: Holds the tokenizer the lengths are counted with; receives the file.
        n: Number of documents.
        seed: Of the choice of words.
        lengths: Tokens per document, special tokens included, each at least 1.
        name: File name inside `folder`.

    Returns:
        Path of the file.

    Raises:
        ValueError: A length is too short for the tokenizer's own special tokens.
    """
    folder = Path(folder)
    words = AutoTokenizer.from_pretrained(folder)
    vocabulary = sorted(set(_TEXT.split()))
    rng = np.random.default_rng(seed)

    def count(text: str) -> int:
        return len(words(text)["input_ids"])

    with open(folder / name, "w") as file:
        for index in range(n):
            target = int(lengths[index % len(lengths)])
            text = ""
            while True:
                longer = f"{text} {rng.choice(vocabulary)}"
                if count(longer) > target:
                    break
                text = longer
            # Bytes that no merge of the tokenizer's joins: each adds exactly one token.
            while count(text) < target:
                text += chr(rng.integers(1, 9))
            if count(text) != target:
                raise ValueError(f"cannot write {target} tokens: no text has {count(text)} or less")
            file.write(json.dumps({"text": text}) + "\n")
    return folder / name


def encode(folder: str | Path, dataset: str | Path, *, max_length: int) -> list[list[int]]:
    """Token ids of every document of a jsonl file, truncated as bergson truncates.

    Args:
        folder: Holds the tokenizer.
        dataset: Lines with `text`, or with `input_ids`, which are taken as they are.
        max_length: Tokens kept of each text.
    """
    words = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in Path(dataset).read_text().splitlines()]
    return [
        row["input_ids"]
        if "input_ids" in row
        else words(row["text"], truncation=True, max_length=max_length)["input_ids"]
        for row in rows
    ]


def write_tokens(
    path: str | Path,
    token_lists: Sequence[Sequence[int]],
    label_lists: Sequence[Sequence[int]] | None = None,
) -> Path:
    """Write a tokenized jsonl data set: `input_ids`, and `labels` (-100 for none) where given."""
    rows = [{"input_ids": list(map(int, tokens))} for tokens in token_lists]
    if label_lists is not None:
        for row, labels in zip(rows, label_lists, strict=True):
            row["labels"] = list(map(int, labels))
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(path)
