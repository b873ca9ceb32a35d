"""Which modules of the package import which, and what else, read from their text."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def modules(root: Path = ROOT) -> dict[str, Path]:
    """The files of ``fairseq_rkm`` below a folder, by the names under which they are imported."""
    found = {}
    for path in (root / "fairseq_rkm").rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, into_functions: bool = True) -> Iterator[str]:
    """All that a module imports, at once or in a function: modules, or names of them after a point."""
    for node in nodes(ast.parse(path.read_text(encoding="utf-8")), into_functions):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def nodes(tree: ast.AST, into_functions: bool) -> Iterator[ast.AST]:
    """A module's nodes, those of its functions' bodies only if asked for."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if into_functions or not isinstance(node, ast.FunctionDef):
            yield from nodes(node, into_functions)


def module_of(name: str, known: dict[str, Path]) -> str | None:
    """The module of the package that an import of :func:`imported` reads, if it is one of the package."""
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name if name in known else None
