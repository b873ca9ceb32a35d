"""No module of the package imports itself, by whatever way round, and no file outside tests edits sys.path."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
from package_imports import ROOT, imported, module_of, modules


def circles(root: Path) -> list[str]:
    """A circle for each import that closes one."""
    known = modules(root)
    graph = {}
    for name, path in known.items():
        into_functions = name != "fairseq_rkm"  # its register() imports all that imports it
        found_there = (module_of(read, known) for read in imported(name, path, into_functions))
        graph[name] = {other for other in found_there if other} - {name}
    found, done, way = [], set(), []

    def visit(name: str) -> None:
        if name in way:
            found.append(" -> ".join([*way[way.index(name) :], name]))
        elif name not in done:
            way.append(name)
            for other in sorted(graph[name]):
                visit(other)
            done.add(way.pop())

    for name in sorted(graph):
        visit(name)
    return found


def test_the_package_has_no_import_circles():
    assert circles(ROOT) == []


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        ({"a": "from fairseq_rkm import b", "b": "import fairseq_rkm.a"}, "a -> b -> a"),
        ({"a": "def f():\n    from .b import x", "b": "from .a import f"}, "a -> b -> a"),
        (
            {"a": "from fairseq_rkm.b import x", "b": "from fairseq_rkm.c import x", "c": "from . import b"},
            "b -> c -> b",
        ),
        ({"a": "from .b import x\nfrom .c import x", "b": "from .c import x", "c": ""}, None),
    ],
)
def test_a_circle_is_found(tmp_path, files, circle):
    (tmp_path / "fairseq_rkm").mkdir()
    for name, text in {"__init__": "", **files}.items():
        (tmp_path / "fairseq_rkm" / f"{name}.py").write_text(text)
    found = [text.replace("fairseq_rkm.", "") for text in circles(tmp_path)]
    assert found == ([circle] if circle else [])


def test_no_two_files_have_one_name():
    names = Counter(path.name for path in modules(ROOT).values())
    assert len(names) > 80
    assert [name for name, count in names.items() if count > 1 and not name.startswith("__")] == []


def test_no_two_numbers_have_one_name():
    """A reader who meets a constant in two files takes it for one number of one unit."""
    found: dict[str, set] = {}
    for path in modules(ROOT).values():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign):
                for name, number in numbers(node.targets[0], node.value):
                    found.setdefault(name, set()).add(number)
    assert len(found) > 20
    assert {name: values for name, values in found.items() if len(values) > 1} == {}


def numbers(target: ast.expr, value: ast.expr):
    """The constants that an assignment gives a number, written as one or as a sum, a power and the like."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for one, other in zip(target.elts, value.elts, strict=True):
            yield from numbers(one, other)
    elif isinstance(target, ast.Name) and target.id.isupper():
        parts = list(ast.walk(value))
        computed = all(isinstance(node, ast.Constant | ast.BinOp | ast.operator) for node in parts)
        leaves = [node.value for node in parts if isinstance(node, ast.Constant)]
        if computed and all(isinstance(leaf, int | float) for leaf in leaves):
            yield target.id, ast.unparse(value)


def test_no_file_outside_tests_edits_the_path_of_imports():
    folders = [ROOT / name for name in ("fairseq_rkm", "scripts", "examples")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in {".py", ".sh"}]
    assert len(files) > 50
    edits = re.compile(r"sys\.path\s*(?:\.\w|\[|\+?=)")
    assert [str(path) for path in files if edits.search(path.read_text(encoding="utf-8"))] == []
