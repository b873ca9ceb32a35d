"""What fairseq's commands read is checked; each command's way is gone once (``tests/data`` has the kinds of damage)."""

import io
import sys
from types import SimpleNamespace

import pytest
from fairseq_cli import interactive

import fairseq_rkm
from fairseq_rkm import RKMError


@pytest.fixture(autouse=True)
def _registered():
    fairseq_rkm.register()


def test_text_to_translate_has_no_byte_order_mark(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("\ufeff Ein Hund \r\n\nläuft\n".encode())
    assert list(interactive.buffered_read(str(path), 2)) == [["Ein Hund", ""], ["läuft"]]


def test_text_to_translate_that_is_not_utf8(tmp_path, monkeypatch):
    path = tmp_path / "text"
    path.write_bytes(b"Ein Hund\nl\xe4uft\n")
    with pytest.raises(RKMError, match=r"text, line 2, byte 2 \(0xe4\): not UTF-8"):
        list(interactive.buffered_read(str(path), 1))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\xff")))
    with pytest.raises(RKMError, match="standard input, line 1, byte 1"):
        list(interactive.buffered_read("-", 1))
    with pytest.raises(RKMError, match="no file of text at"):
        list(interactive.buffered_read(str(tmp_path / "none"), 1))


def test_it_takes_the_commands_place_when_that_is_the_program(monkeypatch):
    main = SimpleNamespace(buffered_read=None, make_batches=None)
    monkeypatch.setitem(sys.modules, "__main__", main)
    fairseq_rkm.register()
    assert main.buffered_read is interactive.buffered_read
