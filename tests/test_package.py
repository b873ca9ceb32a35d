import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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
