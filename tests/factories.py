"""Finds tensor factories that leave the type or the device of their result to torch's global settings.

`torch.set_default_dtype` and `torch.set_default_device` change what `torch.zeros(3)` gives. A library that wants one
kind of tensor must say so, so each call of a factory in it has `dtype=` and `device=`. `make lint` runs this program:

    python tests/factories.py extrapcomm
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FACTORIES = {
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "empty_permuted",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "logspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "scalar_tensor",
    "tensor",
    "zeros",
}
# They take no dtype, and always follow the global settings.
NEVER = {"Tensor", "normal", "range"}


def names_of(node: ast.expr) -> str | None:
    """The name after `torch.` of a function that is called; None for others."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
        return node.attr
    return None


def complaints(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines with bare factories, and the mistake in words."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            for alias in node.names:
                if alias.name in FACTORIES | NEVER:
                    yield (
                        node.lineno,
                        f"call torch.{alias.name} by this name, so that its arguments are checked",
                    )
        if not isinstance(node, ast.Call) or (name := names_of(node.func)) is None:
            continue
        if name in NEVER:
            yield (
                node.lineno,
                f"torch.{name}() follows torch's global settings: use a factory with dtype and device",
            )
        if name in FACTORIES:
            given = {keyword.arg for keyword in node.keywords}
            if missing := [wanted for wanted in ("dtype", "device") if wanted not in given]:
                yield (
                    node.lineno,
                    f"torch.{name}() follows torch's global settings: give it {' and '.join(missing)}",
                )


def in_folder(folder: Path) -> list[str]:
    """The complaints about all Python files below."""
    return [
        f"{file}:{line}: {text}"
        for file in sorted(folder.rglob("*.py"))
        for line, text in complaints(ast.parse(file.read_text()))
    ]


if __name__ == "__main__":
    found = [text for folder in sys.argv[1:] for text in in_folder(Path(folder))]
    print("\n".join(found), end="\n" if found else "")
    sys.exit(bool(found))
