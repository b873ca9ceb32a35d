"""CONTRIBUTING's table "Where things are" names every part of the package, and no import contradicts it."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from package_imports import ROOT, imported, module_of, modules

PACKAGE = "fairseq_rkm"


@dataclass
class Layer:
    """A row of the table.

    Attributes:
        parts: files and folders of the package, as paths.
        may: the parts that these may import, beside themselves.
        fairseq: whether these may import fairseq.
    """

    parts: list[str]
    may: set[str]
    fairseq: bool


def read_table(text: str) -> list[Layer]:
    """The table's rows: "the above" is all parts of earlier rows; parts in backticks are these."""
    section = text.split("## Where things are")[1].split("\n## ", maxsplit=1)[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith(f"| `{PACKAGE}/")]
    layers: list[Layer] = []
    for folder, _, *imports in rows:
        allowed = " ".join(imports)
        above = {part for layer in layers for part in layer.parts} if "the above" in allowed else set()
        named = {f"{PACKAGE}/{name}" for name in re.findall(r"`([\w./]+)`", allowed)}
        fairseq = "fairseq" in re.sub("`.*?`", "", allowed)
        layers.append(Layer(re.findall(r"`([\w./]+)`", folder), above | named, fairseq))
    return layers


def part_of(path: Path, root: Path) -> str:
    """The part of the package that a file belongs to: a folder, or itself."""
    relative = path.relative_to(root)
    return relative.as_posix() if len(relative.parts) == 2 else "/".join(relative.parts[:2]) + "/"


def contradictions(root: Path) -> list[str]:
    """What table and code below a folder say differently, each a sentence."""
    layers = read_table((root / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    layer_of = {part: layer for layer in layers for part in layer.parts}
    known = modules(root)
    there = {part_of(path, root) for path in known.values()}
    found = [f"the table lacks {part}" for part in sorted(there - layer_of.keys())]
    named = layer_of.keys() | {part for layer in layers for part in layer.may}
    found += [f"there is no {part}" for part in sorted(named - there)]
    for name, path in sorted(known.items()):
        own = part_of(path, root)
        layer = layer_of.get(own)
        for read in imported(name, path) if layer else ():
            if read.split(".")[0] in {"fairseq", "fairseq_cli"} and not layer.fairseq:
                found.append(f"{own} imports {read}")
            other = module_of(read, known)
            if other is not None and part_of(known[other], root) not in {own, *layer.may}:
                found.append(f"{own} imports {read}")
    return found


def test_the_table_is_complete_and_no_import_contradicts_it():
    assert contradictions(ROOT) == []


def test_what_is_below_the_package_s_door_asks_it_for_nothing_but_to_register():
    """Hubs and processes that are started need the whole plugin, and so call up, for this alone."""
    layers = read_table((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    door = next(i for i, layer in enumerate(layers) if f"{PACKAGE}/__init__.py" in layer.parts)
    below = {part for layer in layers[:door] for part in layer.parts}
    asked = set()
    for path in modules(ROOT).values():
        if part_of(path, ROOT) in below:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == PACKAGE:
                    asked.add(node.attr)
                elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
                    asked |= {alias.name for alias in node.names}
    assert {name for name in asked if f"{PACKAGE}.{name}" not in modules(ROOT)} == {"register"}


TABLE = """
## Where things are

| folder | what it holds | imports |
| --- | --- | --- |
| `fairseq_rkm/low.py`, `fairseq_rkm/ops/` | fairseq's sums | |
| `fairseq_rkm/high/` | models | `ops/`, fairseq |
| `fairseq_rkm/__init__.py` | the door | the above |

## Next
"""
GOOD = {"__init__": "import fairseq_rkm.high.a", "low": "", "ops/a": "from . import b", "ops/b": "", "high/a": ""}


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({}, []),
        ({"high/a": "import fairseq\nfrom fairseq_rkm.ops.b import x"}, []),
        ({"high/a": "from fairseq_rkm.low import x"}, ["fairseq_rkm/high/ imports fairseq_rkm.low.x"]),
        ({"ops/b": "def f():\n    import fairseq_rkm.high.a"}, ["fairseq_rkm/ops/ imports fairseq_rkm.high.a"]),
        ({"ops/b": "from .. import low"}, ["fairseq_rkm/ops/ imports fairseq_rkm.low"]),
        ({"ops/b": "import fairseq.models"}, ["fairseq_rkm/ops/ imports fairseq.models"]),
        ({"ops/b": "import fairseq_rkm"}, ["fairseq_rkm/ops/ imports fairseq_rkm"]),
        ({"new": ""}, ["the table lacks fairseq_rkm/new.py"]),
        ({"low": None}, ["there is no fairseq_rkm/low.py"]),
    ],
)
def test_contradictions_are_found(tmp_path, changes, sentences):
    (tmp_path / "CONTRIBUTING.md").write_text(TABLE)
    for name, text in {**GOOD, **changes}.items():
        if text is not None:
            path = tmp_path / "fairseq_rkm" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    assert contradictions(tmp_path) == sentences
