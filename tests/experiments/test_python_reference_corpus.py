from fairseq_rkm.experiments import python_reference_corpus


def test_the_corpus_is_the_same_each_time_and_its_splits_share_no_sentence(tmp_path):
    counts = python_reference_corpus.build(tmp_path / "one")
    assert python_reference_corpus.build(tmp_path / "two") == counts
    assert counts["train"] > 30_000
    assert min(counts.values()) > 3_000
    lines = {}
    for split in counts:
        text = (tmp_path / "one" / f"{split}.txt").read_bytes()
        assert text == (tmp_path / "two" / f"{split}.txt").read_bytes()
        lines[split] = set(text.decode().splitlines())
    # Two sentences may differ before tokenisation and not after it, but hardly any do.
    assert len(lines["train"] & lines["test"]) <= 0.01 * len(lines["test"])
