from pathlib import Path

from fairseq_rkm.experiments.circumstances import PLUGIN, portable


def test_a_command_is_told_without_this_machine_s_paths():
    flags = [
        "fairseq-train",
        "/x/data/news",
        "--user-dir",
        PLUGIN,
        "--save-dir",
        "/x/a b",
        "--lr",
        3,
    ]
    told = portable(flags, DATA=Path("/x/data/news"), OUT=Path("/x"))
    assert told == "fairseq-train DATA --user-dir ./fairseq_rkm --save-dir 'OUT/a b' --lr 3"
    assert portable(["runs", "runsome", "runs/1"], OUT=Path("runs")) == "OUT runsome OUT/1"
