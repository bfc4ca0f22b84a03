"""Llama-shaped random checkpoints, random tokens, and the arithmetic that EKFAC needs on them.

Run as a program by compare.py, in a process of its own: what a process holds when it starts another
one counts in the other one's peak memory, so the comparing process must stay small.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[2]))  # for a checkout that isn't installed

from jhessians.fitting import arithmetic  # noqa: E402

HEAD_SIZE = 64
WEIGHTS = "model.safetensors"
TOKENS = "tokens.jsonl"


@dataclass(frozen=True)
class Shape:
    """A decoder's dimensions: width, layers, the MLP's inner width, vocabulary."""

    width: int
    layers: int
    inner: int
    vocabulary: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """`512,8,1408,8192` as a shape.

        Raises:
            ValueError: If it isn't four positive integers, or the width holds no whole heads.
        """
        words = text.split(",")
        numbers = [int(word) if word.isdecimal() else 0 for word in words]
        if len(numbers) != 4 or min(numbers) < 1 or numbers[0] % HEAD_SIZE:
            raise ValueError(
                f"{text!r} is no shape; give width,layers,inner width,vocabulary, "
                f"the width a multiple of {HEAD_SIZE}"
            )
        return cls(*numbers)

    def __str__(self) -> str:
        return f"{self.width},{self.layers},{self.inner},{self.vocabulary}"

    @property
    def linears(self) -> list["Linears"]:
        """All blocks' linears, by name."""
        d, f = self.width, self.inner
        return [
            Linears(name, i, o, owner, self.layers)
            for name, i, o, owner in (
                ("q", d, d, "q"), ("k", d, d, "q"), ("v", d, d, "q"), ("o", d, d, "o"),
                ("gate", d, f, "gate"), ("up", d, f, "gate"), ("down", f, d, "down"),
            )
        ]  # fmt: skip

    @property
    def weights(self) -> float:
        """Entries of all blocks' matrices and the head's."""
        return arithmetic.multiplied_weights(self.linears, head=self.width * self.vocabulary)


class Linears(NamedTuple):
    """One linear of every block, as `jhessians.fitting.arithmetic` counts them."""

    name: str
    in_features: int
    out_features: int
    input_site: str
    layers: int

    @property
    def inputs(self) -> int:
        return self.in_features

    def module_names(self) -> list[str]:
        return [f"{self.name}.{layer}" for layer in range(self.layers)]


@dataclass(frozen=True)
class Arithmetic:
    """FLOP per token of the two passes over the data. Attention's own products are left out."""

    covariance: float
    correction: float


def needed(shape: Shape, chunk: int) -> Arithmetic:
    """What no implementation in plain arithmetic does without (`jhessians.fitting.arithmetic`).

    Args:
        shape: Of the model.
        chunk: Tokens of a document.
    """
    document = {chunk: 1}
    both = arithmetic.passes(shape.weights, document)
    return Arithmetic(
        (both + arithmetic.covariances(shape.linears, document)) / chunk,
        (both + arithmetic.correction(shape.linears, document)) / chunk,
    )


def bergson_does(shape: Shape, chunk: int) -> Arithmetic:
    """Full products, one A and one rotation of the vectors for every linear."""
    del chunk
    per_token = {1: 1}
    both = arithmetic.passes(shape.weights, per_token)
    grams = 2 * arithmetic.covariances(shape.linears, per_token, shares_inputs=False)
    # A rotation of the vectors costs what the full product of the same matrix does.
    return Arithmetic(both + grams, both + 2 * _block_weights(shape) + grams)


def kronfluence_does(shape: Shape, chunk: int) -> Arithmetic:
    """As bergson's covariances, but each document's gradient is rotated as a matrix."""
    rotations = sum(
        2 * each.in_features * each.out_features * (each.in_features + each.out_features)
        for each in shape.linears
    )
    both = arithmetic.passes(shape.weights, {1: 1})
    return Arithmetic(
        bergson_does(shape, chunk).covariance,
        both + 2 * _block_weights(shape) + shape.layers * rotations / chunk,
    )


def _block_weights(shape: Shape) -> float:
    return arithmetic.multiplied_weights(shape.linears, head=0)


def build(folder: Path, shape: Shape, *, tokens: int, chunk: int, seed: int = 0) -> None:
    """Write a checkpoint with fan-in scaled weights, a tokenizer, and tokens in whole chunks.

    Args:
        folder: Made if missing; a folder of the same name is taken as it is.
        shape: Of the model.
        tokens: Rounded down to whole chunks.
        chunk: Tokens of each document.
        seed: Of weights and tokens.
    """
    import numpy as np
    from safetensors.numpy import save_file

    if (folder / TOKENS).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    d, f, vocabulary = shape.width, shape.inner, shape.vocabulary

    def matrix(rows: int, columns: int, scale: float) -> np.ndarray:
        return random.standard_normal((rows, columns), np.float32) * np.float32(scale)

    tensors = {
        "model.embed_tokens.weight": matrix(vocabulary, d, 1.0),
        "model.norm.weight": np.ones(d, np.float32),
        "lm_head.weight": matrix(vocabulary, d, d**-0.5),
    }
    for layer in range(shape.layers):
        block = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}.{name}.weight"] = np.ones(d, np.float32)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{block}.self_attn.{name}.weight"] = matrix(d, d, d**-0.5)
        for name in ("gate_proj", "up_proj"):
            tensors[f"{block}.mlp.{name}.weight"] = matrix(f, d, d**-0.5)
        tensors[f"{block}.mlp.down_proj.weight"] = matrix(d, f, f**-0.5)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for name, content in _tables(shape).items():
        (folder / name).write_text(json.dumps(content, indent=1))

    # Frequencies fall with the rank, as words' do.
    weights = 1.0 / np.arange(10, vocabulary + 10)
    rows = random.choice(vocabulary, (tokens // chunk, chunk), p=weights / weights.sum())
    # Last: it tells that the folder is whole.
    partial = folder / f"{TOKENS}.part"
    partial.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in rows))
    partial.rename(folder / TOKENS)


def _tables(shape: Shape) -> dict[str, dict]:
    """config.json, and a tokenizer of whole words that nobody uses, but both tools load."""
    heads = shape.width // HEAD_SIZE
    positions = 8192
    special = {"bos_token": "w1", "eos_token": "w2", "pad_token": "w0"}
    return {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "float32",
            "hidden_act": "silu",
            "hidden_size": shape.width,
            "intermediate_size": shape.inner,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": HEAD_SIZE,
            "vocab_size": shape.vocabulary,
            "max_position_embeddings": positions,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": None,
            "decoder": None,
            "model": {
                "type": "WordLevel",
                "vocab": {f"w{number}": number for number in range(shape.vocabulary)},
                "unk_token": "w0",
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": positions,
            **special,
        },
    }


if __name__ == "__main__":
    build(
        Path(sys.argv[1]),
        Shape.parse(sys.argv[2]),
        tokens=int(sys.argv[3]),
        chunk=int(sys.argv[4]),
    )
