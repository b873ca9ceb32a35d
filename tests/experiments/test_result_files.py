import re

from hypothesis import given
from hypothesis import strategies as st

from fairseq_rkm.experiments import result_files

WORDS = st.lists(st.sampled_from(["a", "word", "another,", "-", "1.", "#", "##", "|", ">", "x" * 40]), min_size=1)


@given(words=WORDS, item=st.booleans())
def test_long_prose_is_wrapped_into_one_paragraph_or_item(words, item):
    line = ("- " if item else "The ") + " ".join(words)
    first, *others = result_files._filled(line)
    assert " ".join([first, *(other.strip() for other in others)]) == line
    for other in others:
        assert other.startswith("  ") == item
        assert not re.match(r"\s*([-+*>|]|#+|\d+[.)])( |$)", other), "it would be read as a list, a heading or a table"
    if not set(words) & {"-", "1.", "#", "##", "|", ">"}:
        assert all(len(short) <= 120 for short in (first, *others))


def test_tables_and_short_lines_are_written_as_they_are(tmp_path):
    table = f"| {'cell | ' * 40}|"
    text = f"{table}\n\nShort.\n\n{'long ' * 40}end.\n"
    written = result_files.write_results(tmp_path, text)
    assert written == (tmp_path / "results.md").read_text()
    assert written.startswith(f"{table}\n\nShort.\n\nlong")
    assert max(map(len, written.split("\n")[1:])) <= 120
    assert written.split() == text.split()
