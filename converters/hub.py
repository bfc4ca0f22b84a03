"""A model's files: a local folder, or a snapshot on the Hugging Face Hub.

Of a snapshot we take the files that we need, one after the other. An adapter's lie beside those of
its base model.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converters.reader import WEIGHT_FILES, read_json, shard_index
from jhessians.errors import CheckpointError
from jhessians.files import require_ordinary

ADAPTER_CONFIG = "adapter_config.json"
"""What tells a folder of peft's from one of transformers'."""

TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".spm", ".bpe", ".tiktoken", ".vocab")
"""What transformers may open with a tokenizer, whatever its class."""


@dataclass(frozen=True)
class Source:
    """Where a model's files come from.

    Attributes:
        folder: Where those that we have lie.
        repository: The Hub's name for it; None for a folder of the user's own.
        revision: The snapshot's commit, so that all files are of one.
        files: What the repository has; nothing if it can't be reached.
        adapter: Where the files of the adapter come from that the model is to have, if any.
    """

    folder: Path
    repository: str | None = None
    revision: str | None = None
    files: frozenset[str] = frozenset()
    adapter: "Source | None" = None

    def obtain(self, file: str) -> bool:
        """Whether the model has this file, which then lies in `folder`."""
        if os.path.exists(self.folder / file):  # no error for names that can't be
            return True
        if self.repository is None or file not in self.files:
            return False
        _download(self.repository, self.revision, file)
        return True

    def obtain_weights(self) -> None:
        """Download the weights, unless they are there."""
        for name in WEIGHT_FILES:
            if self.obtain(name):
                if name.endswith(".index.json"):
                    for shard in sorted(set(shard_index(self.folder / name).values())):
                        self.obtain(shard)
                return

    def obtain_tokenizer(self) -> bool:
        """Download the tokenizer, and tell whether there is one."""
        return any([self.obtain(name) for name in TOKENIZER_FILES])


def find(name_or_folder: str | Path, revision: str | None = None) -> Source:
    """A model's source, with its config.json; for an adapter that of its base model.

    Args:
        name_or_folder: A folder, or a name on the Hub such as `EleutherAI/pythia-160m`.
        revision: The Hub's branch, tag or commit; default the main branch. An adapter says itself
            which one of its base model it needs.

    Returns:
        A folder with the config, into which weights and tokenizer are downloaded when needed.

    Raises:
        CheckpointError: If there is no such folder, or the Hub has no such model or can't be
            reached; a folder is asked for a revision; or an adapter's base model is missing.
    """
    source = _find(name_or_folder, revision)
    if not source.obtain(ADAPTER_CONFIG):
        return source
    path = source.folder / ADAPTER_CONFIG
    settings = read_json(path)
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{path} names no base model; expected its folder or its name on the Hub as "
            "base_model_name_or_path; add it"
        )
    beside = source.folder / base
    try:
        if not Path(base).is_dir() and beside.is_dir():
            return replace(_find(beside, None), adapter=source)
        revision = None if Path(base).is_dir() else settings.get("revision")
        return replace(_find(base, revision), adapter=source)
    except CheckpointError as error:
        raise CheckpointError(
            f"the adapter {name_or_folder} needs its base model: {error}; or correct "
            f"base_model_name_or_path in {path}"
        ) from None


def _find(name_or_folder: str | Path, revision: str | None) -> Source:
    """The source of a folder or repository, whatever it holds."""
    name = str(name_or_folder)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"`revision` {revision!r} is given, but {name} is a folder, which has none; "
                "leave it out, or give a name on the Hub"
            )
        return Source(folder)
    if isinstance(name_or_folder, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name} isn't a folder; expected one, or a name on the Hub")
    try:
        config = _download(name, revision, "config.json")
    except CheckpointError as error:
        try:
            config = _download(name, revision, ADAPTER_CONFIG)
        except CheckpointError:
            raise error from None
    return Source(config.parent, name, config.parent.name, _list(name, config.parent.name))


def load_tokenizer(name_or_folder: str | Path, revision: str | None = None) -> Any:
    """The tokenizer of a model, by transformers; None if the model has none.

    Returns:
        A tokenizer of transformers, a fast one where the model has one; None if it has none.

    Raises:
        CheckpointError: As for `find`, or if transformers can't make sense of it.
    """
    return tokenizer_of(find(name_or_folder, revision))


def tokenizer_of(source: Source) -> Any:
    """The tokenizer among a model's files, an adapter's before its base's; None if there is none.

    Returns:
        A tokenizer of transformers, a fast one where there is one; or None.

    Raises:
        CheckpointError: If transformers can't make sense of it.
    """
    if source.adapter is not None and source.adapter.obtain_tokenizer():
        source = source.adapter
    elif not source.obtain_tokenizer():
        return None
    from transformers import AutoTokenizer

    where = source.repository or source.folder
    try:
        for path in source.folder.iterdir():
            if path.suffix in TOKENIZER_SUFFIXES and path.exists():
                require_ordinary(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source.folder), local_files_only=True)
    except Exception as error:  # transformers raises whatever a broken file leads to
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the tokenizer of {where} can't be loaded: {reason}") from None
    if tokenizer.vocab_size == 0:  # what transformers makes of settings without a vocabulary
        raise CheckpointError(
            f"the tokenizer of {where} has no vocabulary; add its tokenizer.json, or name another "
            "`tokenizer`"
        )
    return tokenizer


def _download(repository: str, revision: str | None, file: str) -> Path:
    """A file from the Hub or its cache."""
    from huggingface_hub import errors, hf_hub_download

    remedy = "give a local folder, or a name whose files are in the cache"
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except errors.LocalEntryNotFoundError:
        reason = "the Hub can't be reached and the cache doesn't have it"
    except errors.EntryNotFoundError:
        reason, remedy = "the model doesn't have it", "expected one in transformers' format"
    except errors.GatedRepoError:
        reason, remedy = "it is gated", "accept its terms and log in, or give a local folder"
    except errors.RepositoryNotFoundError:
        reason = "there is no such folder, nor such a model on the Hub"
    except errors.RevisionNotFoundError:
        reason, remedy = f"it has no revision {revision!r}", "give a branch, tag or commit it has"
    except Exception as error:  # whatever the connection, the Hub or the disk comes up with
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.filename:
            remedy = "set HF_HOME to a folder that can be written"
    raise CheckpointError(f"cannot get {file} of {repository}: {reason}; {remedy}")


def _list(repository: str, revision: str) -> frozenset[str]:
    """The names of a snapshot's files; none if the Hub can't be reached."""
    from huggingface_hub import HfApi

    try:
        return frozenset(HfApi().list_repo_files(repository, revision=revision))
    except Exception:  # without a connection the cache is all that there is
        return frozenset()
