"""The README's table of supported models: `python -m converters.table` prints it."""

from converters import registry


def markdown() -> str:
    """A row for each registered family, in the order of their names."""
    families = sorted(registry.families(), key=lambda f: (f.title or f.model_type).lower())
    rows = [f"| {f.title or f.model_type} | `{f.model_type}` | {f.checked} |" for f in families]
    return "\n".join(["| family | `model_type` | checked |", "|---|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
