"""Options of what a run works on: the model and the data set; no JAX is imported."""

from __future__ import annotations

from dataclasses import dataclass

from jhessians.config.option import option
from jhessians.errors import ConfigError

SOURCES = "what to run on"
DATA = "data"


@dataclass(frozen=True)
class InputOptions:
    """The checkpoint, the data set, and how its rows become documents."""

    run_path: str

    model: str | None = option(
        None,
        "Hugging Face Hub name or local folder of the checkpoint, a folder that jhessians convert "
        "wrote, or a LoRA adapter, whose own linears are then recorded.",
        group=SOURCES,
        metavar="NAME",
        default_text="the embedded demo",
        bergson="index_cfg.model",
    )
    revision: str | None = option(
        None,
        "Branch, tag or commit of the model on the Hub.",
        group=SOURCES,
        metavar="REV",
        default_text="the main branch",
        bergson="index_cfg.revision",
    )
    tokenizer: str | None = option(
        None,
        "Hub name or local folder of the tokenizer.",
        group=SOURCES,
        metavar="NAME",
        default_text="the model's own",
        bergson="index_cfg.tokenizer",
    )
    dataset: str | None = option(
        None,
        "Hub name, a .json, .jsonl, .csv, .parquet or .txt file, or a save_to_disk folder.",
        group=SOURCES,
        metavar="NAME",
        default_text="the embedded demo",
        bergson="index_cfg.data.dataset",
    )

    split: str = option(
        "train",
        "Split of the data set; slices such as train[:100] work.",
        group=DATA,
        metavar="SPLIT",
        bergson="index_cfg.data.split",
    )
    subset: str | None = option(
        None,
        "Configuration of a data set that has several.",
        group=DATA,
        metavar="NAME",
        default_text="none",
        bergson="index_cfg.data.subset",
    )
    prompt_column: str = option(
        "text",
        "Column with the text, or with the prompt where there is a completion.",
        group=DATA,
        metavar="COLUMN",
        bergson="index_cfg.data.prompt_column",
    )
    completion_column: str = option(
        "",
        "Column with the completion; the loss is then taken on the completion only.",
        group=DATA,
        metavar="COLUMN",
        default_text="none",
        bergson="index_cfg.data.completion_column",
    )
    conversation_column: str = option(
        "",
        "Column with lists of chat messages; the loss is then taken on the assistant's turns only.",
        group=DATA,
        metavar="COLUMN",
        default_text="none",
        bergson="index_cfg.data.conversation_column",
    )
    truncation: bool = option(
        False,
        "Cut documents that are longer than the model or the token budget allows, instead of "
        "refusing them.",
        group=DATA,
        bergson="index_cfg.data.truncation",
    )
    chunk_length: int = option(
        0,
        "Join the documents and cut them into chunks of this many tokens.",
        group=DATA,
        metavar="TOKENS",
        unit="tokens",
        minimum=0,
        default_text="0 tokens, documents stay whole",
        bergson="index_cfg.data.chunk_length",
    )
    max_tokens: int | None = option(
        None,
        "Process this many tokens: the data set's beginning, or repetitions of a smaller one.",
        group=DATA,
        value_type="integer",
        metavar="TOKENS",
        unit="tokens",
        minimum=2,
        maximum=2**63 - 1,
        default_text="each document once",
        bergson="index_cfg.max_tokens",
    )

    @property
    def is_demo(self) -> bool:
        """Whether the run takes the embedded checkpoint and data set."""
        return self.model is None and self.dataset is None

    def check_together(self) -> None:
        """Refuse inputs that contradict each other.

        Raises:
            ConfigError: The first clash found.
        """
        if not self.run_path.strip():
            raise ConfigError("RUN_PATH is empty; give the folder to write, such as runs/demo")
        if self.is_demo:
            for name in ("revision", "tokenizer", "subset"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"--{name} says nothing about the embedded demo; "
                        "give --model and --dataset with it, or leave it out"
                    )
        elif self.model is None or self.dataset is None:
            given, missing = ("model", "dataset") if self.model else ("dataset", "model")
            raise ConfigError(
                f"--{given} is given without --{missing}; "
                "give both, or neither for the embedded demo"
            )
        if self.completion_column and self.conversation_column:
            raise ConfigError(
                "--completion_column and --conversation_column exclude each other; give one"
            )
        if not self.prompt_column and not self.conversation_column:
            raise ConfigError("--prompt_column is empty; name the column that holds the text")
        self._check_chunks()

    def _check_chunks(self) -> None:
        if self.chunk_length == 0:
            return
        if self.chunk_length == 1:
            raise ConfigError("--chunk_length 1 leaves no token to predict; give 2 or more")
        if self.truncation:
            raise ConfigError("--chunk_length and --truncation exclude each other; give one")
        if self.completion_column or self.conversation_column:
            column = "completion_column" if self.completion_column else "conversation_column"
            raise ConfigError(
                f"--chunk_length joins plain text and cannot follow --{column}; leave one out"
            )
