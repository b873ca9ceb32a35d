import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from fairseq_rkm import CELLS, RKM

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_module_alone_imports_neither_fairseq_nor_triton():
    loaded = python("import sys; from fairseq_rkm import RKM; print(*sys.modules)").split()
    assert "fairseq_rkm.modules.rkm" in loaded
    assert not {"fairseq", "triton", "omegaconf"} & set(loaded)


def test_register_makes_the_plugin_known_outside_fairseq_s_commands():
    code = "import fairseq_rkm; fairseq_rkm.register(); from fairseq.models import ARCH_MODEL_REGISTRY as a; "
    assert (
        python(code + "from fairseq.tasks import TASK_REGISTRY as t; print('rkm_lm' in a, len(t) > 0)") == "True True\n"
    )


@pytest.mark.parametrize(
    "load", ["import fairseq_rkm; fairseq_rkm.register()", "from fairseq_rkm.models import RKMModel"]
)
@pytest.mark.parametrize("own", ["", "logging.basicConfig(level=17)"])
def test_fairseq_s_import_leaves_a_program_s_logging_as_it_is(load, own):
    show = "print(logging.getLogger().level, len(logging.getLogger().handlers))"
    assert python(f"import logging; {own}\n{load}\n{show}") == ("17 1\n" if own else "30 0\n")


def test_python_m_prints_the_plugin_s_folder():
    output = subprocess.run([sys.executable, "-m", "fairseq_rkm"], cwd="/", capture_output=True, text=True, check=True)
    assert Path(output.stdout.strip()) == ROOT / "fairseq_rkm"


@pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))
def test_the_readme_s_table_of_cells_is_the_one_in_the_code(cell):
    memory, output = cell.equations()
    (row,) = (line for line in README.splitlines() if line.startswith(f"| `{cell.name}`") and "c~_t" in line)
    columns = [column.strip() for column in row.strip("|").split("|")]
    assert columns[1:4] == [cell.title, f"`{memory}`", f"`{output}`"]


def test_the_readme_s_flags_are_the_configurations():
    from fairseq_rkm.models.rkm import RKMConfig
    from fairseq_rkm.models.rkm_lm import RKMLanguageModelConfig

    for config in (RKMLanguageModelConfig, RKMConfig):
        flags = {f"--{f.name.replace('_', '-')}" for f in fields(config) if not f.name.startswith("_")}
        missing = flags - {"--criterion-name"} - set(re.findall(r"--[a-z0-9-]+", README))
        assert not missing


def test_the_classifier_s_flags_are_in_its_readme():
    from fairseq_rkm.models.rkm_classifier import RKMClassifierConfig

    readme = (ROOT / "examples" / "document_classification" / "README.md").read_text()
    flags = {f"--{f.name.replace('_', '-')}" for f in fields(RKMClassifierConfig) if not f.name.startswith("_")}
    assert not flags - set(re.findall(r"--[a-z0-9-]+", readme))


def test_the_readme_s_example_runs():
    example = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert len(example.strip().splitlines()) <= 12
    scope: dict = {}
    exec(example, scope)  # noqa: S102
    assert isinstance(scope["rnn"], RKM)
    assert scope["output"].shape == (35, 20, 400)
