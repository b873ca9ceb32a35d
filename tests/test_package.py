import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import fairseq_rkm.__main__ as command_line

ROOT = Path(__file__).parents[1]


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_module_alone_imports_neither_fairseq_nor_triton():
    loaded = python("import sys; from fairseq_rkm import RKM; print(*sys.modules)").split()
    assert "fairseq_rkm.modules.rkm" in loaded
    assert not {"fairseq", "triton", "omegaconf"} & set(loaded)


@pytest.mark.parametrize("order", ["import fairseq.utils; from fairseq_rkm import RKM", "from fairseq_rkm import RKM"])
def test_rkm_alone_changes_nothing_of_fairseq(order):
    code = f"""
{order}
import torch
from fairseq import checkpoint_utils, utils
from fairseq.models import ARCH_MODEL_REGISTRY
changed = hasattr(utils.clip_grad_norm_, "wrapped_by_fairseq_rkm"), "rkm_lm" in ARCH_MODEL_REGISTRY
from types import SimpleNamespace
import fairseq_rkm
fairseq_rkm.register()
print(changed, hasattr(utils.clip_grad_norm_, "wrapped_by_fairseq_rkm"), "rkm_lm" in ARCH_MODEL_REGISTRY)
"""
    assert python(code) == "(False, False) True True\n"


def test_user_dir_registers_the_plugin_and_changes_fairseq():
    code = f"""
from types import SimpleNamespace
from fairseq import utils
from fairseq.models import ARCH_MODEL_REGISTRY
utils.import_user_module(SimpleNamespace(user_dir={str(ROOT / "fairseq_rkm")!r}))
print(hasattr(utils.clip_grad_norm_, "wrapped_by_fairseq_rkm"), "rkm_lm" in ARCH_MODEL_REGISTRY)
"""
    assert python(code).splitlines()[-1] == "True True"


def test_user_dir_may_name_the_folder_by_another_path_than_python_imported_it_by(tmp_path):
    (tmp_path / "fairseq_rkm").symlink_to(ROOT / "fairseq_rkm")
    code = f"""
import sys
from types import SimpleNamespace
sys.path.insert(0, {str(tmp_path)!r})
import fairseq_rkm
fairseq_rkm.register()
from fairseq import utils
for folder in ({str(ROOT / "fairseq_rkm")!r}, {str(tmp_path / "fairseq_rkm")!r}):
    utils.import_user_module(SimpleNamespace(user_dir=folder))
print(fairseq_rkm.__file__.startswith({str(tmp_path)!r}))
"""
    assert python(code).splitlines()[-1] == "True"


def test_register_makes_the_plugin_known_outside_fairseq_s_commands():
    code = "import fairseq_rkm; fairseq_rkm.register(); from fairseq.models import ARCH_MODEL_REGISTRY as a; "
    assert (
        python(code + "from fairseq.tasks import TASK_REGISTRY as t; print('rkm_lm' in a, len(t) > 0)") == "True True\n"
    )


@pytest.mark.slow
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


def test_python_m_has_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["--help"])
    assert "--flags NAME" in capsys.readouterr().out


WITHOUT_FAIRSEQ = """
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fairseq", "fairseq_cli", "sacremoses", "sentencepiece", "hydra", "omegaconf"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import torch
import fairseq_rkm
rnn = fairseq_rkm.RKM(3, 4)
rnn(torch.zeros(2, 1, 3))[0].sum().backward()
def sentence(call):
    try:
        call()
    except (fairseq_rkm.RKMError, SystemExit) as error:
        print(error)
sentence(fairseq_rkm.register)
for name in ("models", "tasks", "criterions", "optim"):
    sentence(lambda: importlib.import_module(f"fairseq_rkm.{name}"))
import fairseq_rkm.predict, fairseq_rkm.flags, fairseq_rkm.fairseq_patches
sentence(lambda: fairseq_rkm.predict.main(["--path", "x.pt"]))
sentence(lambda: fairseq_rkm.flags.describe("rkm_lm"))
sentence(fairseq_rkm.fairseq_patches.load)
"""


def test_without_fairseq_a_sentence_names_the_extra():
    lines = python(WITHOUT_FAIRSEQ).splitlines()
    assert len(lines) == 8
    wanted = "this needs fairseq, which is not installed: pip install 'fairseq-rkm[fairseq]'"
    assert all(wanted in line for line in lines)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The package as it is built from a copy of its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "fairseq_rkm", folder / "fairseq_rkm", ignore=shutil.ignore_patterns("__pycache__"))
    command = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", command], cwd=folder, capture_output=True, text=True, check=True)
    return zipfile.ZipFile(folder / "dist" / done.stdout.splitlines()[-1])


def test_a_wheel_has_all_kernels_and_types(wheel):
    wanted = {
        str(path.relative_to(ROOT))
        for ending in ("py", "c", "cu", "cuh", "typed")
        for path in (ROOT / "fairseq_rkm").rglob(f"*.{ending}")
    }
    assert {name for name in wheel.namelist() if "dist-info" not in name} == wanted
    assert "fairseq_rkm/py.typed" in wanted


def test_a_wheel_needs_torch_and_numpy_alone_and_says_so_in_the_same_words_on_all_pythons(wheel):
    name = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    requirements = metadata.get_all("Requires-Dist")
    assert [line for line in requirements if "extra" not in line] == ["torch>=2.6", "numpy"]
    assert 'fairseq-fixed>=0.12.3.1; extra == "fairseq"' in requirements
    assert metadata["Requires-Python"] == ">=3.11"
    assert not re.findall(r"\]\((?!https?://|#)", metadata.get_payload()), "links that lead nowhere from an index"
    assert "python_version" not in str(requirements)
