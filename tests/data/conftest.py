"""The tokenizers that the tests of this folder share."""

import datasets
import pytest

from tests.data.support import CHATML, byte_pair_tokenizer


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing of a test lands in the user's Hugging Face cache."""
    patch = pytest.MonkeyPatch()
    cache = tmp_path_factory.mktemp("hf_cache")
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE without a chat template; `<s>` before each text."""
    return byte_pair_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer():
    return byte_pair_tokenizer(CHATML)
