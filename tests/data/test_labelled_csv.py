import csv
import gzip
import io
import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_rkm import RKMError
from fairseq_rkm.data.labelled_csv import BrokenRow, Document, read_rows

FIELDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\\\ufeff"))


def rows(tmp_path, content: bytes, name: str = "rows.csv"):
    (tmp_path / name).write_bytes(content)
    return list(read_rows(tmp_path / name))


@given(documents=st.lists(st.tuples(st.integers(1, 14), st.lists(FIELDS, min_size=1, max_size=3))), data=st.data())
def test_what_csv_writes_is_read_again_whatever_ends_the_lines(tmp_path_factory, documents, data):
    content = ""
    for label, texts in documents:
        text = io.StringIO()
        end = data.draw(st.sampled_from(["\n", "\r\n", "\r"]))
        csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator=end).writerow([label, *texts])
        content += text.getvalue()
    given_rows = rows(tmp_path_factory.mktemp("csv"), content.encode())
    wanted = [(str(label), " ".join(" ".join(texts).split())) for label, texts in documents]
    assert [(row.label, row.text) for row in given_rows] == wanted


def test_escapes_and_lines_within_quotes(tmp_path):
    content = b'"3","one\\ntwo\\three","four\nfive"\r\n\n"4",""\n1,plain text\n'
    assert rows(tmp_path, content) == [
        Document(1, "3", "one two three four five"),
        Document(4, "4", ""),
        Document(5, "1", "plain text"),
    ]


def test_broken_rows_have_their_line_and_reason_and_do_not_take_others_with_them(tmp_path):
    content = (
        b'"1","fine"\n"2"\n"","no class"\n"3","half"quoted"\n"1","\xff\xfe"\n"2","fine again"\n"4","never closed\n'
    )
    given_rows = rows(tmp_path, content)
    assert [row.line for row in given_rows] == [1, 2, 3, 4, 5, 6, 7]
    reasons = [row.reason if isinstance(row, BrokenRow) else row.text for row in given_rows]
    for reason, wanted in zip(
        reasons,
        ["fine", "one field only", "no class", "broken quotes", "not UTF-8", "fine again", "broken quotes"],
        strict=True,
    ):
        assert wanted in reason


def test_compressed_files_and_a_byte_order_mark(tmp_path):
    content = b'\xef\xbb\xbf"1","text"\n'
    wanted = [Document(1, "1", "text")]
    assert rows(tmp_path, content) == wanted
    assert rows(tmp_path, lzma.compress(content), "rows.csv.xz") == wanted
    assert rows(tmp_path, gzip.compress(content), "rows.csv.gz") == wanted


@pytest.mark.parametrize("suffix", ["xz", "gz"])
def test_a_file_that_is_not_compressed_as_it_says_or_missing(tmp_path, suffix):
    with pytest.raises(RKMError, match="is not compressed as its name says"):
        rows(tmp_path, b'"1","text"\n', f"rows.csv.{suffix}")
    compress = {"xz": lzma.compress, "gz": gzip.compress}[suffix]
    with pytest.raises(RKMError, match="or is cut off"):
        rows(tmp_path, compress(b'"1","text"\n' * 100)[:-20], f"rows.csv.{suffix}")
    with pytest.raises(RKMError, match=r"no file of labelled documents at .*none.csv"):
        list(read_rows(tmp_path / "none.csv"))


def test_a_class_as_long_as_a_text_is_a_broken_row(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text(f"1,a\n{'7' * 5000},b\n2,c\n")
    first, broken, last = read_rows(path)
    assert broken.line == 2
    assert broken.reason.startswith("a class of 5,000 characters, '77777777777777777777'...")
    assert (first.label, last.label) == ("1", "2")


TABLE = 'id,Title,"the text",label\r\n1,"A ""title""","two\nlines",Sports\r\n2,B,"a, b",World\r\n3,C\r\n'


@pytest.mark.parametrize(
    ("columns", "text"), [(["label", "the text"], "two lines"), (["label", "Title", "the text"], 'A "title" two lines')]
)
def test_columns_by_the_header_s_names(tmp_path, columns, text):
    path = tmp_path / "x.csv"
    path.write_text(TABLE, encoding="utf-8-sig", newline="")
    first, _, broken = read_rows(path, columns)
    assert first == Document(2, "Sports", text)
    assert broken == BrokenRow(5, "2 fields: column 4 is asked for")


@pytest.mark.parametrize(
    ("name", "between", "given"), [("x.csv", ";", ";"), ("x.tsv", "\t", None), ("x.csv", ",", None)]
)
def test_columns_by_number_and_what_is_between(tmp_path, name, between, given):
    path = tmp_path / name
    path.write_text(f'"some text"{between}x{between}2\n')
    assert list(read_rows(path, ["3", "1"], given)) == [Document(1, "2", "some text")]


@pytest.mark.parametrize("name", ["none", "id"])
def test_a_column_that_is_not_there_once(tmp_path, name):
    path = tmp_path / "x.csv"
    path.write_text("id,text,id,label\n")
    with pytest.raises(RKMError, match=r"in its first line, whose fields are .'id', 'text', 'id', 'label'"):
        list(read_rows(path, [name, "text"]))
