"""The tiers of CONTRIBUTING are made of markers; these stand where they should."""

import re

from package_imports import ROOT


def test_all_tests_of_fairseq_s_commands_are_marked_and_no_others(request):
    for item in request.session.items:
        in_folder = item.path.is_relative_to(ROOT / "tests/cli")
        assert (item.get_closest_marker("cli") is not None) == in_folder, item.nodeid


def test_no_test_looks_for_a_gpu_by_itself():
    """One that did would be left out by ``-m gpu``."""
    by_itself = re.compile(r"(?:skip|skipif)[(][^\n]*(?:cuda|gpu)", re.IGNORECASE)
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if by_itself.search(path.read_text(encoding="utf-8"))]
    assert files == []


def test_the_tiers_name_markers_that_there_are(request):
    known = {line.split(":")[0].split("(")[0] for line in request.config.getini("markers")}
    asked = re.findall(r'test\.sh -m (?:"([^"]+)"|(\w+))', (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    names = {name for expression in asked for name in re.findall(r"\w+", " ".join(expression))} - {"not", "and"}
    assert names == {"cli", "slow", "gpu"}
    assert names <= known
