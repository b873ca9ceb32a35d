"""README and docs are held to the code: flags, cells, examples, links, widths."""

import itertools
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers import DEVICES

from fairseq_rkm import CELLS, RKM
from fairseq_rkm.ops import BACKENDS, dispatch
from fairseq_rkm.ops.backends.native import native
from fairseq_rkm.ops.kernel_functions import KERNELS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FLAGS = (ROOT / "docs" / "flags.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]


@pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))
def test_the_readme_s_table_of_cells_is_the_one_in_the_code(cell):
    memory, output = cell.equations()
    (row,) = (line for line in README.splitlines() if line.startswith(f"| `{cell.name}`") and "c~_t" in line)
    assert cells_of(row)[1:4] == [cell.title, f"`{memory}`", f"`{output}`"]


def rows_of_kernels(text: str) -> list[list[str]]:
    """The columns of each kernel's row in the page of kernels."""
    rows = [line for line in text.splitlines() if re.match(r"\| `(linear|polynomial|gaussian|arccos)`", line)]
    return [cells_of(row) for row in rows]


def columns_of_kernels(text: str) -> list[list[str]]:
    """The columns of the README's table of kernels, which has a kernel a column."""
    (start,) = (at for at, line in enumerate(text.splitlines()) if line.startswith("| `--kernel`"))
    names, _, equations = (cells_of(line) for line in text.splitlines()[start : start + 3])
    return [list(column) for column in zip(names, equations, strict=True)][1:]


def cells_of(row: str) -> list[str]:
    """The columns of a row of a table, in which an escaped ``|`` is no border."""
    columns = row.replace(r"\|", "/norm/").strip("| ").split("|")
    return [column.strip().replace("/norm/", "|") for column in columns]


@pytest.mark.parametrize(
    ("document", "table"), [("README.md", columns_of_kernels), ("docs/kernel_machines.md", rows_of_kernels)]
)
def test_the_tables_of_kernels_are_the_code_s(document, table):
    written = table((ROOT / document).read_text())
    assert len(written) == 5
    for name, kernels in KERNELS.items():
        own = [kernel for kernel in written if kernel[0].startswith(f"`{name}`")]
        default, *others = kernels if name == "arccos" else kernels[:1]
        for kernel, columns in zip([default, *others], own, strict=True):
            assert kernel.equation.split(",")[0] in " ".join(columns)
            assert columns[-1].endswith(("bounded", "1")) == (kernel.bound is not None)


def wishes() -> list[tuple[list[str], str, str]]:
    """The README's table of wishes: cells, flags and backends, with "any" and "the same" filled in."""
    lines = README.splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("| wanted |")) + 2
    rows: list[tuple[list[str], str, str]] = []
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines[start:]):
        _, cell, flags, backends = cells_of(line)
        cells = list(CELLS) if cell == "any" else [cell.strip("`")]
        rows.append((cells, flags, rows[-1][2] if backends == "the same" else backends))
    return rows


@pytest.mark.parametrize("device", DEVICES)
def test_the_readme_s_table_of_wishes_names_the_backends_that_auto_picks(device, monkeypatch):
    if device == "cpu" and native._missing(CELLS["rkm_lstm"]) is not None:
        pytest.skip("needs a C compiler")
    picked, pick = [], dispatch.pick

    def note(*problem):
        picked.append(pick(*problem))
        return BACKENDS["reference"]

    monkeypatch.setattr(dispatch, "pick", note)
    assert len(wishes()) >= 6
    for cells, flags, backends in wishes():
        given = {name.replace("-", "_"): value for name, value in re.findall(r"--([a-z-]+) (\w+)", flags)}
        given["ngram"] = int(given.get("ngram", 1))
        feedbacks = {False} if "--no-feedback" in flags else {None, False} if "without feedback" in backends else {None}
        picked.clear()
        for cell, size, feedback in itertools.product(cells, (64, 512, 2048), feedbacks):
            rnn = RKM(8, size, **{"cell": cell, "feedback": feedback, **given}, device=device)
            rnn(torch.zeros(4, 2, 8, device=device))
        named = set(re.findall(r"`(\w+)`", backends.split(";")[device == "cpu"]))
        found = {name for name, backend in BACKENDS.items() if backend in picked}
        assert found, flags
        assert found <= named, (flags, device)


def test_the_example_of_gram_matrices_is_right():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "kernel_machines.md").read_text(), re.S)
    scope: dict = {}
    exec(example, scope)  # noqa: S102
    assert scope["gram"].shape == (4, 4)
    assert scope["means"].shape == (1, 4)


def documented(section: str) -> set[str]:
    """The flags in the first column of a section's table."""
    (text,) = (part for part in FLAGS.split("\n## ") if part.startswith(section))
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `--")]
    return {flag for row in rows for flag in re.findall(r"--[a-z0-9-]+", row)}


@pytest.mark.parametrize("architecture", ["rkm_lm", "rkm", "rkm_classifier", "rkm_signal_classifier"])
def test_the_documented_flags_are_the_configuration_s(architecture):
    from fairseq.models import MODEL_DATACLASS_REGISTRY

    import fairseq_rkm

    fairseq_rkm.register()
    config = MODEL_DATACLASS_REGISTRY[architecture]
    in_code = {f"--{f.name.replace('_', '-')}" for f in fields(config) if not f.name.startswith("_")}
    in_code -= {"--criterion-name", "--max-positions"}  # read from the criterion and the task
    own, common = documented(f"`--arch {architecture}`"), documented("The recurrence")
    assert in_code <= own | common
    assert own <= in_code
    assert common <= {
        f"--{f.name.replace('_', '-')}" for name in ("rkm_lm", "rkm", "rkm_classifier", "rkm_signal_classifier")
        for f in fields(MODEL_DATACLASS_REGISTRY[name])
    }  # fmt: skip


def test_the_documented_flags_of_evaluation_are_the_task_s():
    from fairseq.tasks import TASK_DATACLASS_REGISTRY

    of_task = fields(TASK_DATACLASS_REGISTRY["stateful_language_modeling"])
    in_code = {f"--{f.name.replace('_', '-')}" for f in of_task if re.match("cache_|softmax_|dynamic_", f.name)}
    assert documented("`--task stateful_language_modeling`, in evaluation") == in_code


def test_the_readme_s_example_runs():
    example = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert len(example.strip().splitlines()) <= 12
    scope: dict = {}
    exec(example, scope)  # noqa: S102
    assert isinstance(scope["rnn"], RKM)
    assert scope["output"].shape == (35, 20, 400)


def test_the_examples_of_episodes_are_right():
    scope: dict = {}
    for example in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "episodes.md").read_text(), re.S):
        exec(example, scope)  # noqa: S102
    rnn, documents = scope["rnn"], scope["documents"]
    alone = [rnn(document)[0] for document in documents]
    assert torch.allclose(rnn(scope["row"], reset=scope["reset"])[0][0], torch.cat(alone), atol=1e-6)
    assert torch.allclose(scope["features"][:, -1], rnn(scope["rollout"], reset=scope["resets"])[0][:, -1])
    assert scope["memories"].shape == (16, 128, 64)


def anchors(document: Path) -> set[str]:
    """The names by which links find a document's headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document):
    for target, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", document.read_text()):
        file = document.parent / target if target else document
        assert target.startswith("http") or file.exists(), target
        assert not heading or target.startswith("http") or heading in anchors(file), (target, heading)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_ends_at_column_120(document):
    long = [line for line in document.read_text().splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not long
