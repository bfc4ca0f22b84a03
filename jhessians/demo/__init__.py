"""The embedded demo: a small checkpoint, its training documents, and questions with known sources.

README.md beside this file says what is in them; `examples/train_demo.py` made them all.
"""

from importlib.resources import files
from pathlib import Path

_FOLDER = Path(str(files(__name__)))

MODEL = _FOLDER / "model"
"""A Llama-type checkpoint with its tokenizer, in Hugging Face's format."""

DATASET = _FOLDER / "facts.jsonl"
"""The documents that it was trained on, in the column `text`, and which fact each states."""

QUESTIONS = _FOLDER / "questions.jsonl"
"""Prompts, completions, and the rows of `DATASET` that support each answer."""

TWIN = _FOLDER / "twin"
"""config.json of a smaller model, for which `BANK` was made."""

BANK = _FOLDER / "bank"
"""A bank of `jhessians evaluate bank`, of `TWIN` on the same documents and questions."""

__all__ = ["BANK", "DATASET", "MODEL", "QUESTIONS", "TWIN"]
