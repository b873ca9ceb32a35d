import csv
from pathlib import Path

import pytest
from fairseq.data import Dictionary, data_utils

from fairseq_rkm.experiments import classification_data as prepare

ROWS = [("2", "one two two"), ("1", "three"), ("2", ""), ("10", "four four one one")] * 5


LONG = [("World", "some more words than a header has"), ("Sports", "and even more words than the other has")] * 10


def write(path: Path, rows) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def run(tmp_path, rows=ROWS, *flags) -> Path:
    train = write(tmp_path / "train.csv", rows)
    prepare.main(["--train", str(train), "--out", str(tmp_path / "data"), *map(str, flags)])
    return tmp_path / "data"


def split(data, kind, name) -> list[str]:
    dictionary = Dictionary.load(str(data / kind / "dict.txt"))
    dataset = data_utils.load_indexed_dataset(str(data / kind / name), dictionary)
    return [dictionary.string(dataset[i]) for i in range(len(dataset))]


def test_no_document_is_lost_and_texts_keep_their_classes(tmp_path):
    test = write(tmp_path / "test.csv", ROWS)
    data = run(tmp_path, ROWS, "--test", test, "--valid-fraction", 0.2)
    classes = ["1", "2", "10"]
    assert prepare.Preparation.load(data).classes == classes
    pairs = {name: list(zip(split(data, "label", name), split(data, "input0", name), strict=True))
             for name in ("train", "valid", "test")}  # fmt: skip
    wanted = [(str(classes.index(label) + 1), text) for label, text in ROWS]
    assert pairs["test"] == wanted, "in the file's order"
    assert sorted(pairs["train"] + pairs["valid"]) == sorted(wanted)
    assert len(pairs["valid"]) == 4
    for name in ("train", "valid"):
        lengths = [len(text.split()) for _, text in pairs[name]]
        assert lengths == sorted(lengths)


def test_columns_in_any_order_and_a_class_of_one_document(tmp_path):
    rows = [("text", "label"), *((text, label) for label, text in LONG), ("one document alone", "Rare")]
    data = run(tmp_path, rows, "--columns", "label,text", "--valid-fraction", 0.1)
    assert prepare.Preparation.load(data).classes == ["Rare", "Sports", "World"]
    (tmp_path / "other").mkdir()
    first = [("Rare", "a document with as many words"), *LONG]
    assert len(prepare.Preparation.load(run(tmp_path / "other", first)).classes) == 3


@pytest.mark.parametrize(
    "flags", [["--columns", "label"], ["--columns", "a,,b"], ["--delimiter", "ab"], ["--delimiter", '"']]
)
def test_columns_and_delimiters_that_make_no_sense(flags, capsys):
    with pytest.raises(SystemExit):
        prepare.parse(["--train", "x", "--out", "y", *flags])
    assert flags[0] in capsys.readouterr().err.splitlines()[-1]


def test_the_split_follows_the_seed_and_workers_change_nothing(tmp_path):
    valid = {}
    for name, flags in {"a": [], "b": ["--workers", 2], "c": ["--seed", 2]}.items():
        (tmp_path / name).mkdir()
        rows = [(str(i % 2), f"w{i}") for i in range(50)]
        data = run(tmp_path / name, rows, "--min-count", 1, *flags)
        valid[name] = set(map(str, range(50))) - {word[1:] for word in split(data, "input0", "train")}
        assert len(valid[name]) == 2
    assert valid["a"] == valid["b"] != valid["c"]


def test_the_vocabulary_is_cut(tmp_path):
    data = run(tmp_path, [*ROWS, ("2", "once")], "--max-words", 1)
    assert [line.split()[0] for line in (data / "input0" / "dict.txt").read_text().splitlines()] == ["one"]


def test_sentencepiece(tmp_path, capsys):
    rows = [(str(i % 2), f"The committee met {i} times, said number {i * 37 % 101}") for i in range(200)]
    data = run(tmp_path, rows, "--sentencepiece", 60, "--lowercase", "--ascii")
    preparation = prepare.Preparation.load(data)
    pieces = preparation.tokens("The cömmittee").split()
    assert "".join(pieces) == "▁the▁committee"
    known = Dictionary.load(str(data / "input0" / "dict.txt"))
    assert all(piece in known for piece in pieces)
    with pytest.raises(SystemExit, match="--sentencepiece 100000: "):
        run(tmp_path / "..", rows, "--sentencepiece", 100_000, "--out", tmp_path / "more")
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([*ROWS, ("3",)], [], "train.csv: 1 broken rows:\n  line 21: one field only"),
        ([*ROWS] + [("", "x")] * 30, [], "line 30: no class\n  and 20 more\nCorrect them"),
        ([("label", "text"), *ROWS], [], "line 1: class 'label', where all others are numbers: a header?"),
        ([("label", "text"), *LONG], [], "line 1: class 'label', which no other row has: a header?"),
        ([("Class Name", "some text of any length"), *LONG], [], "which no other row has: a header?"),
        ([("kind", "text"), *LONG], [], "which no other row has: a header?"),
        ([(f"{i} w", label) for i, (label, _) in enumerate(LONG)], [], "20 classes for 20 training documents"),
        (LONG, ["--columns", "label,text"], "not one column 'label' in its first line"),
        (LONG, ["--columns", "1,3"], "20 broken rows:\n  line 1: 2 fields: column 3 is asked for"),
        ([("3", "a"), ("4", "b")], ["--classes", "names", "--skip-broken"], "has no documents of the classes 1, 2"),
        ([("1", "a"), ("1", "b")], [], "all training documents are of the class '1'"),
        ([], [], "has no labelled documents"),
        ([("1", "a"), ("2", "b")], ["--valid-fraction", 0.9], "2 training documents cannot be divided"),
        (ROWS, ["--classes", "names"], "line 4: class '10' is none of 1, 2"),
        (ROWS, ["--classes", "none"], "no file of class names at"),
        (ROWS, ["--test", "test.csv"], "test.csv: 1 broken rows:\n  line 2: class '4' is none of 1, 2, 10"),
    ],
)
def test_what_cannot_be_used_is_told_and_leaves_nothing(tmp_path, monkeypatch, rows, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("names").write_text("World\nSports\n")
    write(Path("test.csv"), [("1", "fine"), ("4", "unknown")])
    with pytest.raises(SystemExit) as error:
        run(tmp_path, rows, *flags)
    assert message in str(error.value)
    assert not (tmp_path / "data").exists()


def test_broken_rows_may_be_left_out_and_nothing_is_overwritten(tmp_path, capsys):
    data = run(tmp_path, [("class", "text"), *ROWS, ("3",), ("", "x")], "--skip-broken")
    assert "left out of" in capsys.readouterr().err
    assert len(split(data, "label", "train")) == 19
    with pytest.raises(SystemExit, match="is there already: delete it"):
        run(tmp_path)
