"""Words of the layers: only the command line and what stands right below it name flags."""

import ast
import re
from pathlib import Path

import pytest

import converters
import jhessians

FLAG = re.compile(r"--[a-z]")
LIBRARY = ("fitting", "interop", "models", "data", "folds", "capture", "devices", "linalg")
# A command of its own, `python -m converters.verify`.
COMMANDS = {"verify.py"}


def strings(source: str) -> list[str]:
    """Every string of a module: messages, docstrings and the fixed parts of f-strings."""
    constants = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return [node.value for node in constants if isinstance(node.value, str)]


def folder_of(name: str) -> Path:
    package = converters if name == "converters" else jhessians
    root = Path(str(package.__file__)).parent
    return root if name == "converters" else root / name


@pytest.mark.parametrize("name", [*LIBRARY, "converters"])
def test_the_library_names_no_flags(name):
    files = [path for path in folder_of(name).rglob("*.py") if path.name not in COMMANDS]
    assert files
    found = {
        path.name: text for path in files for text in strings(path.read_text()) if FLAG.search(text)
    }
    assert not found, "write option names in backquotes; the command line turns them into flags"


def test_the_scan_sees_messages_docstrings_and_f_strings():
    for text in ['f"{x}: use --overwrite"', 'def f():\n    """As --layout."""', '"-" "-fsdp"']:
        assert any(FLAG.search(each) for each in strings(text)), text
