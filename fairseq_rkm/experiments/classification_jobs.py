"""The rows of the table of document classifiers, and each data set's settings."""

from dataclasses import dataclass, field

from fairseq_rkm.ops import CELLS

PAPER_CELLS = [cell for cell in CELLS if cell != "ran"]
BASELINES = ["logistic_regression", "torch_lstm"]
RESULT = "result.json"
"""What a job writes last."""


@dataclass(frozen=True)
class Settings:
    """What differs from data set to data set.

    The dropouts are not the paper's: its training sets were hundreds of thousands of documents, on which it could do
    without. The smaller the set, the more words are dropped. Of the words of DBpedia's test set one in 16 is in no
    training document: it is read in ``pieces`` of words, so many. And most of its training documents have lost what is
    not ASCII, but none of the test documents: there it is ``ascii``, too.
    """

    epochs: int = 5
    lr: float = 0.003
    dropout_words: float = 0.2
    seeds: tuple[int, ...] = (1,)
    batch_size: int = 64
    pieces: int | None = None
    ascii: bool = False
    classes: list[str] = field(default_factory=list)


SETTINGS = {
    "agnews": Settings(epochs=3, seeds=(1, 2, 3), classes=["World", "Sports", "Business", "Sci/Tech"]),
    "dbpedia": Settings(
        epochs=12,
        lr=0.002,
        dropout_words=0.3,
        pieces=4000,
        ascii=True,
        classes=[
            "Company", "Educational institution", "Artist", "Athlete", "Office holder", "Mean of transportation",
            "Building", "Natural place", "Village", "Animal", "Plant", "Album", "Film", "Written work",
        ],
    ),
    "yelp_full": Settings(
        epochs=12, dropout_words=0.5, batch_size=32, classes=["1 star", "2 stars", "3 stars", "4 stars", "5 stars"]
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One row of one seed: a cell, or a baseline."""

    dataset: str
    model: str
    ngram: int
    seed: int

    @property
    def name(self) -> str:
        """What its folder is called."""
        return f"{self.dataset}/{self.model}-{self.ngram}gram-seed{self.seed}"


def settings_of(dataset: str) -> Settings:
    """A data set's settings; the defaults for one that is not known."""
    return SETTINGS.get(dataset, Settings())
