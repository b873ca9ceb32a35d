from datetime import datetime

from fairseq_rkm.experiments.fairseq_log import entries, parse_line, time_of

LINE = '2026-01-01 00:00:07 | INFO | valid | {"epoch": 1, "valid_ppl": "9.5"}\n'
OTHERS = ("Traceback", "2026-01-01 00:00:00 | INFO | valid | {broken}", "")


def test_the_json_of_lines_that_have_some():
    assert parse_line(LINE) == ("valid", {"epoch": 1, "valid_ppl": "9.5"})
    for other in OTHERS:
        assert parse_line(other) == ("", {})
    lines = [*OTHERS, LINE, LINE.replace("valid |", "train |")]
    assert entries(lines, "valid") == [{"epoch": 1, "valid_ppl": "9.5"}]


def test_the_time_of_lines_that_have_one():
    assert time_of(LINE) == datetime(2026, 1, 1, 0, 0, 7)
    assert time_of("Traceback") is None
    assert time_of("2026-01-01 00:00:07 was long ago") is None
