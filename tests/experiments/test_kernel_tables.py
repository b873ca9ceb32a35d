import json

import pytest

from fairseq_rkm.experiments import kernel_tables


def write(folder, **result):
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))


def tables(capsys, *flags):
    kernel_tables.main([str(flag) for flag in flags])
    return capsys.readouterr().out.splitlines()


def test_documents_have_a_row_a_cell_and_a_column_a_kernel(tmp_path, capsys):
    def run(kernel, model, ngram, seed, accuracy):
        about = {"dataset": "agnews", "model": model, "ngram": ngram, "seed": seed}
        write(tmp_path / kernel / "agnews" / f"{model}-{ngram}-{seed}", **about, accuracy=accuracy)

    for seed, accuracy in ((1, 80.0), (2, 82.0)):
        run("linear", "rkm_cifg", 1, seed, accuracy)
    run("gaussian", "rkm_cifg", 1, 1, 70.0)
    run("gaussian", "rkm_cifg", 3, 1, 71.5)
    (tmp_path / "empty").mkdir()
    assert tables(capsys, "--documents", tmp_path) == [
        "| Test accuracy of documents, % | linear | gaussian |", "| --- | ---: | ---: |",
        "| RKM-CIFG, 1-gram | 81.00 ± 1.41 (2) | 70.00 |", "| RKM-CIFG, 3-gram |  | 71.50 |",
    ]  # fmt: skip


def test_signals_are_averaged_over_people(tmp_path, capsys):
    folds = [{"name": "a", "confusion": [[8, 2], [0, 10]]}, {"name": "b", "confusion": [[5, 5], [5, 5]]}]
    write(tmp_path / "linear" / "eeg" / "cnn", dataset="eeg", model="cnn", ngram=40, seed=1, folds=folds)
    assert "| EEG, mental arithmetic: CNN, 40-gram | 70.00 ± 28.28 (2) |" in tables(capsys, "--signals", tmp_path)


def test_language_models_have_validations_and_some_updates(tmp_path, capsys):
    def line(kind, **entry):
        return f"2026-01-01 00:00:00 | INFO | {kind} | {json.dumps(entry)}\n"

    (tmp_path / "linear" / "run").mkdir(parents=True)
    inner = [line("train_inner", num_updates=str(50 * i), ppl=str(1000 / i)) for i in range(1, 14)]
    valid = line("valid", valid_num_updates="600", valid_ppl="123.4")
    (tmp_path / "linear" / "run" / "train.log").write_text("".join(["noise\n", *inner, valid]))
    lines = tables(capsys, "--language-models", tmp_path)
    assert [text.split(" |")[0] for text in lines[2:]] == [
        *(f"| training, updates to {update}" for update in (50, 200, 350, 500, 650)), "| validation, update 600",
    ]  # fmt: skip
    assert lines[-1] == "| validation, update 600 | 123.4 |"


def test_speeds_are_told_apart_by_size_and_way(tmp_path, capsys):
    def row(kernel, feedback, ms, **more):
        return {
            "shape": [2, 3, 4, 5], "dtype": "float32", "cell": "rkm_lstm", "kernel": kernel, "feedback": feedback,
            "forward_backward": {"median_ms": ms}, **more,
        }  # fmt: skip

    path = tmp_path / "speed.json"
    graphed = row("linear", True, 1.0, graphed={"median_ms": 0.5})
    lstm = {"shape": [2, 3, 4, 5], "cell": "nn.LSTM", "forward_backward": {"median_ms": 9}}
    path.write_text(json.dumps([lstm, graphed, row("arccos", True, 3.0), row("linear", False, 0.7)]))
    assert tables(capsys, "--speed", path)[2:] == [
        "| rkm_lstm, feedback, float32, 2, 3, 4, 5: as PyTorch runs it | 1.00 | 3.00 |",
        "| rkm_lstm, feedback, float32, 2, 3, 4, 5: as a CUDA graph | 0.50 |  |",
        "| rkm_lstm, no feedback, float32, 2, 3, 4, 5: as PyTorch runs it | 0.70 |  |",
    ]


def test_nothing_to_tabulate_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit, match=f"no results in {tmp_path}: it should hold a folder for each kernel"):
        kernel_tables.main(["--documents", str(tmp_path)])
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(SystemExit, match="--speed has no rows"):
        kernel_tables.main(["--speed", str(tmp_path / "a.json")])
    with pytest.raises(SystemExit):
        kernel_tables.main([])
    assert "give --documents, --signals, --language-models or --speed" in capsys.readouterr().err
