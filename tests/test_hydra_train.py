"""fairseq-hydra-train's folders, through hydra itself; fairseq's training stands aside."""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import fairseq_cli.hydra_train
import pytest
import yaml
from fairseq.models import MODEL_REGISTRY

import fairseq_rkm
from fairseq_rkm import RKMError, hydra_train
from fairseq_rkm.fairseq_patches.error_messages import sentence_of

HERE = Path(fairseq_rkm.__file__).parent
YAML = """# @package _group_
common: {{user_dir: {user_dir}, cpu: true}}
task: {{_name: stateful_language_modeling, data: {data}}}
model: {{_name: {model}}}
dataset: {{batch_size: 4}}
{more}
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run the command in a folder with a configuration; return those that fairseq would train by, and their folders."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr("logging.config.dictConfig", lambda _: None)  # hydra's logging would outlast the test
    folder = tmp_path / "it's here"
    (folder / "conf").mkdir(parents=True)
    (folder / "data").mkdir()
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "fairseq_rkm").symlink_to(HERE)
    monkeypatch.chdir(folder)

    def run(*words, user_dir="../x/fairseq_rkm", data="data", model="rkm_lm", more=""):
        text = YAML.format(user_dir=user_dir, data=data, model=model, more=more)
        (folder / "conf" / "small.yaml").write_text(text)
        given = []

        def note(cfg):
            fairseq_cli.hydra_train.add_defaults(cfg)
            given.append(SimpleNamespace(cfg=cfg, folder=Path.cwd()))
            return 0.0

        monkeypatch.setattr(fairseq_cli.hydra_train, "_hydra_main", note)
        flags = [] if "--config-path" in words else ["--config-dir", "conf"]
        monkeypatch.setattr(sys, "argv", ["fairseq-hydra-train", *flags, "--config-name", "small", *words])
        hydra_train.main()
        return given

    return run


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ((), {}),
        ((), {"user_dir": "'${oc.env:FOLDER}/fairseq_rkm'", "data": "'${oc.env:DATA}'"}),
        ((), {"user_dir": "~/x/fairseq_rkm", "data": '"~/it\'s here/data"'}),
        ((), {"user_dir": "null", "more": "defaults: [_self_, shared]"}),
        (("common.user_dir=../x/fairseq_rkm",), {"user_dir": "none"}),
        (("+task.tokens_per_sample=7", "common.user_dir='../x/fairseq_rkm'"), {"user_dir": "none"}),
        (("--config-path", "conf"), {}),
        (("--run", "hydra.run.dir=."), {}),
        (("hydra.job.chdir=false",), {}),
    ],
)
def test_folders_are_those_of_the_command(command, tmp_path, monkeypatch, words, changes):
    for name, value in {"FOLDER": "../x", "DATA": "data", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    start = Path.cwd()
    (start / "conf" / "shared.yaml").write_text("# @package _global_\ncommon: {user_dir: ../x/fairseq_rkm}\n")
    (given,) = command(*words, **changes)
    assert given.cfg.common.user_dir == str(tmp_path / "x" / "fairseq_rkm")
    assert os.path.samefile(given.folder / given.cfg.task.data, start / "data")
    assert Path.cwd() == start


def test_each_job_of_a_sweep_has_the_command_s_folders_and_one_to_write_to(command, tmp_path):
    start = Path.cwd()
    given = command("-m", f"common.user_dir=../x/fairseq_rkm,'{HERE}'")
    assert [job.cfg.common.user_dir for job in given] == [str(tmp_path / "x" / "fairseq_rkm"), str(HERE)]
    assert {job.cfg.task.data for job in given} == {str(start / "data")}
    assert len({job.folder / job.cfg.checkpoint.save_dir for job in given}) == 2


def test_what_hydra_shows_is_left_alone(command, capsys):
    assert command("--cfg", "job") == []
    assert "user_dir: ../x/fairseq_rkm" in capsys.readouterr().out


def test_a_configuration_without_a_plugin(command):
    (given,) = command(user_dir="null")
    assert given.cfg.common.user_dir is None


def test_another_plugin_s_names_are_known_before_they_are_looked_up(command, tmp_path, monkeypatch):
    plugin = tmp_path / "a_plugin_of_this_test"
    plugin.mkdir()
    lines = ["from fairseq.models import register_model", "from fairseq.models.lstm_lm import LSTMLanguageModel"]
    lines += ["register_model('model_of_this_test')(type('M', (LSTMLanguageModel,), {}))"]
    (plugin / "__init__.py").write_text("\n".join(lines))
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        (given,) = command(user_dir="../a_plugin_of_this_test", model="model_of_this_test")
        assert given.cfg.common.user_dir == str(plugin)
    finally:
        sys.modules.pop("a_plugin_of_this_test", None)
        MODEL_REGISTRY.pop("model_of_this_test", None)


def test_a_folder_that_is_nowhere_is_told_with_all_places(command):
    start = Path.cwd()
    with pytest.raises(RKMError) as refused:
        command("hydra.run.dir=run", user_dir="../none/fairseq_rkm")
    for part in ("common.user_dir=../none/fairseq_rkm", str(start), str(start / "run"), f"common.user_dir={HERE}"):
        assert part in str(refused.value)


def test_another_copy_of_this_plugin_is_refused(command, tmp_path):
    other = tmp_path / "y" / "fairseq_rkm"
    other.mkdir(parents=True)
    with pytest.raises(RKMError, match=rf"another copy.*PYTHONPATH={other.parent} python -m fairseq_rkm.hydra_train"):
        command(user_dir="../y/fairseq_rkm")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config-name", "smal"], "--config-name smal: no smal.yaml in conf; there are small"),
        (["--config-name", "sub/small.yaml"], "no sub/small.yaml in conf"),
        (["--config-dir", "none"], "none: no such folder in"),
        (["--config-path", "none"], "none: no such folder in"),
    ],
)
def test_a_configuration_that_is_not_there(command, words, message):
    with pytest.raises(RKMError, match=message):
        command(*words)


def test_what_a_run_starts_from_stays_its_own_though_the_command_s_folder_has_a_file_of_the_name(command):
    for name in ("checkpoint_last.pt", "first.pt"):
        Path(name).touch()
    start = Path.cwd()
    (given,) = command(more="checkpoint: {save_dir: '~/run', finetune_from_model: first.pt}")
    assert given.cfg.checkpoint.restore_file == "checkpoint_last.pt"
    assert given.cfg.checkpoint.finetune_from_model == str(start / "first.pt")
    assert given.cfg.checkpoint.save_dir == os.path.expanduser("~/run")


def test_all_shards_and_addresses(command):
    start = Path.cwd()
    data = command(data=f'"data:none:{start}/data"')[0].cfg.task.data
    assert data == f"{start}/data:none:{start}/data"
    assert command(data="s3://a|s3://b")[0].cfg.task.data == "s3://a|s3://b"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model.cell=ran"], "Could not override 'model.cell'. To append to your config use +model.cell=ran"),
        (["common.sed=1"], "Could not override 'common.sed'"),
        (["common.seed=x"], "configuration key common.seed: Value 'x'"),
        (["common.user_dir=~/x"], "hydra cannot read common.user_dir=~/x: write \"KEY='VALUE'\""),
        (["task.data='C:\\'"], "hydra cannot read task.data='C:\\': write"),
        (["common.user_dir='${none}/x'"], "configuration key common.user_dir: Interpolation key 'none' not found"),
        (["common.user_dir='${oc.env:NONE}/x'"], "configuration key common.user_dir: KeyError raised while resolving"),
        (["--cfg", "job", "-m"], "Only one of --run, --multirun, --cfg"),
        (["+more={"], "hydra cannot read +more={"),
    ],
)
def test_hydra_s_mistakes_are_told_in_a_sentence(command, words, sentence):
    with pytest.raises(Exception) as raised:
        command(*words)
    told = sentence_of(raised.value)
    assert told.startswith(sentence)
    assert "\n" not in told


def test_broken_yaml_is_told_with_file_and_line(command):
    with pytest.raises(yaml.YAMLError) as raised:
        command(more="common: [")
    assert re.search(r"no YAML: .*conf/small.yaml\", line \d+", sentence_of(raised.value))
