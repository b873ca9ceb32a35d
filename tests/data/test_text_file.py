import gzip
import io

import pytest

from fairseq_rkm import RKMError
from fairseq_rkm.data import text_file


def test_lines_end_as_they_may_and_a_byte_order_mark_is_no_text():
    lines = io.BytesIO("\ufeffGröße\r\nb\rc\n\n\ufeffd".encode())
    assert list(text_file.texts(lines, "f")) == ["Größe", "b", "c", "", "\ufeffd"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb \xe4\n", r"text, line 2, byte 3 \(0xe4\): not UTF-8; convert the file \(iconv"),
        (b"\xef\xbb\xbfab\xff", r"line 1, byte 6 \(0xff\)"),
        (b"a\nb \xe2\x82", r"line 2, byte 3 \(0xe2\)"),
        ("ab\n".encode("utf-16"), "is UTF-16"),
        ("\ufeffab\n".encode(), "line 1: begins with a byte order mark"),
        (None, "no file of text"),
    ],
)
def test_what_is_refused(tmp_path, content, message, capsys):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RKMError, match=message):
        text_file.check(path)
    with pytest.raises(SystemExit, match=message):
        text_file.main([str(path)])


def test_compressed_files(tmp_path):
    path = tmp_path / "text.gz"
    path.write_bytes(gzip.compress("Größe\n".encode()))
    text_file.check(path)
    path.write_bytes(gzip.compress("Größe\n".encode("latin1")))
    with pytest.raises(RKMError, match="line 1, byte 3"):
        text_file.check(path)
    path.write_bytes(b"no gzip")
    with pytest.raises(RKMError, match="is not compressed as its name says"):
        text_file.check(path)
