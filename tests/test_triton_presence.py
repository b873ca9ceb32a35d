import pytest

from fairseq_rkm import triton_presence

triton = pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("version", "older"), [("3.2.0", True), ("3.4.0+git1", True), ("3.5.0", False), ("3.10.1", False), ("4.0.0", False)]
)
def test_versions_are_numbers(version, older, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    assert triton_presence.is_triton_before.__wrapped__(3, 5) is older


def test_no_triton_is_older_than_none(monkeypatch):
    monkeypatch.setattr(triton_presence, "has_triton", lambda: False)
    assert triton_presence.is_triton_before.__wrapped__(99, 0) is False
