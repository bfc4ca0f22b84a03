"""Every annotation with a shape is checked while the tests run."""

import ast
import importlib
from collections.abc import Iterator

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from jhessians.linalg.symmetric import packed_gram
from tests.checking import CHECKED, PACKAGES, ROOT, SHAPED, UNCHECKED

TREES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
        path.read_text(encoding="utf-8")
    )
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
# Names that stand for an annotation with a shape, such as `Values = Shaped[np.ndarray, "..."]`.
ALIASES = {
    node.targets[0].id
    for tree in TREES.values()
    for node in tree.body
    if isinstance(node, ast.Assign)
    and isinstance(node.targets[0], ast.Name)
    and isinstance(node.value, ast.Subscript)
    and SHAPED.search(ast.unparse(node.value))
}


def is_shaped(hint: ast.expr | None) -> bool:
    """Whether an annotation says anything of a shape."""
    if hint is None:
        return False
    names = {getattr(node, "id", getattr(node, "attr", "")) for node in ast.walk(hint)}
    return bool(SHAPED.search(ast.unparse(hint)) or names & ALIASES)


def shaped_names(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Function and argument (or `return`) of each annotation with a shape, of methods as well.

    Functions within functions aren't checked, and are left out.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from shaped_names(child, f"{prefix}{child.name}.")
            if any("dataclass" in ast.unparse(each) for each in child.decorator_list):
                for field in child.body:
                    if isinstance(field, ast.AnnAssign) and is_shaped(field.annotation):
                        yield f"{prefix}{child.name}.__init__", ast.unparse(field.target)
        elif isinstance(child, ast.FunctionDef):
            of = child.args
            hints = {each.arg: each.annotation for each in (*of.posonlyargs, *of.args)}
            hints |= {each.arg: each.annotation for each in of.kwonlyargs}
            for name, hint in (hints | {"return": child.returns}).items():
                if is_shaped(hint):
                    yield prefix + child.name, name


@pytest.mark.parametrize("package", PACKAGES)
def test_every_shape_is_checked(package):
    unchecked = []
    for module, tree in TREES.items():
        wanted = module.split(".")[0] == package and module not in UNCHECKED
        shaped = list(shaped_names(tree)) if wanted else []
        if shaped:
            importlib.import_module(module)
        unchecked += [
            f"{module}.{function}: {name}"
            for function, name in shaped
            if name not in CHECKED[module, function]
        ]
    assert not unchecked


def test_the_search_finds_shapes():
    source = 'class C:\n    def f(self, a: int, *, b: list[Float[Array, "n"]]) -> rules.Values: ...'
    assert list(shaped_names(ast.parse(source))) == [("C.f", "b"), ("C.f", "return")]
    assert sum(len(list(shaped_names(tree))) for tree in TREES.values()) > 300


def test_a_wrong_shape_is_an_error():
    with pytest.raises(TypeCheckError):
        packed_gram(np.ones(3, np.float32))
