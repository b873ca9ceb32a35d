"""``fairseq-eval-lm`` in this process: perplexity of words that does not depend on where the text is cut."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from fairseq.data import Dictionary
from fairseq_cli import eval_lm as command

import fairseq_rkm
from fairseq_rkm import RKMError
from fairseq_rkm.data.token_stream import StreamSegments, TokenStream


@pytest.fixture(autouse=True)
def _registered():
    fairseq_rkm.register()


def dictionary():
    made = Dictionary()
    for symbol in ("low@@", "est", "new", "wid@@"):
        made.add_symbol(symbol)
    return made


WORDS = dictionary()
LINE = "new low@@ est wid@@ est </s> low@@ low@@ new new wid@@ low@@ est </s> est wid@@ est </s>"
TEXT = LINE.split()
TOKENS = torch.tensor([WORDS.index(symbol) for symbol in TEXT])
COUNT = TEXT.count("est") + TEXT.count("new") + TEXT.count("</s>")


class Unigram(torch.nn.Module):
    """The logarithms of the probabilities that it is given, whatever the context."""

    def __init__(self, scores):
        super().__init__()
        self.scores = torch.nn.Parameter(scores)

    def forward(self, src_tokens, **_):
        return self.scores.expand(*src_tokens.shape, -1), None

    def get_normalized_probs(self, output, log_probs, sample):
        return output[0] if log_probs else output[0].exp()


SCORES = torch.randn(len(WORDS), generator=torch.Generator().manual_seed(0)).log_softmax(0)


def evaluate(length, streams, scores=SCORES, **flags):
    stream = TokenStream(TOKENS, WORDS.eos(), "test")
    segments = StreamSegments(stream, streams, (0, streams), length, WORDS.pad())
    return command.eval_lm([Unigram(scores)], WORDS, list(segments), target_dictionary=WORDS, **flags)


@pytest.mark.parametrize("post_process", ["@@ ", "subword_nmt"])
def test_perplexity_of_words_is_the_same_wherever_the_text_is_cut(post_process):
    wanted = -float(SCORES[TOKENS].double().sum()) / COUNT / math.log(2)
    for length in range(1, len(TEXT) + 2):
        for streams in range(1, 6):
            result = evaluate(length, streams, post_process=post_process)
            assert math.isclose(result["loss"], wanted, rel_tol=1e-6), (length, streams)
            assert math.isclose(result["perplexity"], 2**wanted, rel_tol=1e-6)


def test_perplexity_of_tokens_is_fairseqs():
    wanted = -float(SCORES[TOKENS].double().mean()) / math.log(2)
    for length, streams in ((1, 1), (4, 2), (50, 3)):
        assert math.isclose(evaluate(length, streams)["loss"], wanted, rel_tol=1e-6)


def test_words_are_reported_whole(caplog):
    with caplog.at_level("INFO"):
        evaluate(2, 1, post_process="@@ ", output_word_probs=True, output_word_stats=True)
    lines = [record.getMessage() for record in caplog.records]
    words = [entry.split(" [")[0] for line in lines if line.startswith("0 ") for entry in line[2:].split("\t") if entry]
    assert " ".join(words) == LINE.replace("@@ ", "")
    statistics = {line.split("\t")[0]: line.split("\t")[1:] for line in lines if line.count("\t") == 5}
    assert statistics["widest"][0] == "2"
    assert statistics["lowest"][2] == "True"
    assert statistics["new"][2] == "False"


def test_impossible_words_are_not_skipped():
    scores = SCORES.clone()
    scores[WORDS.index("new")] = -math.inf
    message = "3 of 18 tokens have probability 0, a perplexity without bound; the first is token 1 of the text, 'new'"
    with pytest.raises(RKMError, match=message.replace("3", str(TEXT.count("new"))).replace("18", str(len(TEXT)))):
        evaluate(5, 1, scores)
    with pytest.raises(RKMError, match="have no probability that is a number"):
        evaluate(5, 1, scores * math.nan)


def test_other_post_processing_and_empty_texts_are_refused():
    with pytest.raises(RKMError, match="--post-process 'letter'"):
        evaluate(5, 1, post_process="letter")
    with pytest.raises(RKMError, match="no tokens to evaluate"):
        command.eval_lm([Unigram(SCORES)], WORDS, [])


def test_it_takes_the_commands_place_when_that_is_the_program(monkeypatch):
    main = SimpleNamespace(eval_lm=None, WordStat=command.WordStat)
    monkeypatch.setitem(sys.modules, "__main__", main)
    fairseq_rkm.register()
    assert main.eval_lm is command.eval_lm
