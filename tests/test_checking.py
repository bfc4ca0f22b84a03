"""Every annotation with a shape is checked while the tests run."""

import ast
import importlib
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from jhessians.linalg.symmetric import packed_gram
from tests.checking import CHECKED, PACKAGES, ROOT, SHAPED, UNCHECKED


def shaped_functions(path: Path) -> set[str]:
    """Names of a file's module-level functions with a shape in their annotations."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            hints = [*(each.annotation for each in arguments), node.returns]
            if any(hint is not None and SHAPED.search(ast.unparse(hint)) for hint in hints):
                found.add(node.name)
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_function_with_a_shape_is_checked(package):
    missing = []
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        functions = shaped_functions(path)
        if functions and name not in UNCHECKED:
            importlib.import_module(name)
            missing += [f"{name}.{each}" for each in functions if (name, each) not in CHECKED]
    assert not missing


def test_a_wrong_shape_is_an_error():
    with pytest.raises(TypeCheckError):
        packed_gram(np.ones(3, np.float32))
