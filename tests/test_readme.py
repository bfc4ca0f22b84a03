"""README's examples run as they are printed, and need nothing but the two public packages."""

import ast
import re
from pathlib import Path

import pytest

import converters
import jhessians

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## From Python")[1].split("\n## ")[0]
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
OURS = ("jhessians", "converters")


def test_the_examples_from_python_run(capsys):
    """One after the other, as a reader would paste them into one session."""
    assert len(BLOCKS) == 4
    session: dict = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), session)  # noqa: S102
    out = capsys.readouterr().out
    assert out.count("Veltastrand") > 1  # what the demo model was taught, and the source of it
    shapes = {name: value.shape for name, value in session["fisher"].items()}
    assert shapes and all(len(shape) == 3 for shape in shapes.values())
    assert session["factors"]["eigenvalue_correction"]["inner"].shape == (16, 5)


def imports(code: str):
    """Module and names of every import of ours."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(OURS):
            yield node.module, [each.name for each in node.names]
        if isinstance(node, ast.Import):
            yield from ((each.name, []) for each in node.names if each.name.startswith(OURS))


PLACES = {
    path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("examples/*.py"))
} | {"README.md": "\n".join(BLOCKS)}


@pytest.mark.parametrize("place", PLACES)
def test_examples_need_the_public_names_only(place):
    for module, names in imports(PLACES[place]):
        assert module in OURS, f"{place} imports {module}"
        package = {"jhessians": jhessians, "converters": converters}[module]
        for name in names:
            assert name in (*package.__all__, "demo"), f"{place} imports {module}.{name}"


@pytest.mark.parametrize("package", [jhessians, converters])
def test_public_names_resolve_and_are_explained(package):
    for name in package.__all__:
        value = getattr(package, name)
        if name not in ("__version__", "demo"):
            assert (value.__doc__ or "").strip(), f"{package.__name__}.{name} has no docstring"
