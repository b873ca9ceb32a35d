"""README and docs are held to the code: flags, cells, examples, links, widths."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from fairseq_rkm import CELLS, RKM
from fairseq_rkm.ops.kernel_functions import KERNELS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FLAGS = (ROOT / "docs" / "flags.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/*.md")]


@pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))
def test_the_readme_s_table_of_cells_is_the_one_in_the_code(cell):
    memory, output = cell.equations()
    (row,) = (line for line in README.splitlines() if line.startswith(f"| `{cell.name}`") and "c~_t" in line)
    columns = [column.strip() for column in row.strip("|").split("|")]
    assert columns[1:4] == [cell.title, f"`{memory}`", f"`{output}`"]


@pytest.mark.parametrize("document", ["README.md", "docs/kernel_machines.md"])
def test_the_tables_of_kernels_are_the_code_s(document):
    text = (ROOT / document).read_text().replace(r"\|", "/norm/")
    rows = [line for line in text.splitlines() if re.match(r"\| `(linear|polynomial|gaussian|arccos)`", line)]
    for name, kernels in KERNELS.items():
        own = [row.replace("/norm/", "|") for row in rows if row.startswith(f"| `{name}`")]
        default, *others = kernels if name == "arccos" else kernels[:1]
        for kernel, row in zip([default, *others], own, strict=True):
            assert kernel.equation.split(",")[0] in row
            assert (row.rstrip("| ").endswith(("yes", "1"))) == (kernel.bound is not None)


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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document):
    for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
        assert target.startswith("http") or (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_ends_at_column_120(document):
    long = [line for line in document.read_text().splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not long
