"""The rows of the table of document classifiers, and each data set's settings."""

from dataclasses import dataclass, field

PAPER_CELLS = ["lstm", "rkm_lstm", "rkm_cifg", "linear_kernel_gated", "linear_kernel", "gated_cnn", "cnn"]
"""The cells of the paper's tables of documents and signals."""
BASELINES = ["logistic_regression", "torch_lstm"]
RESULT = "result.json"
"""The file that a job writes last."""


@dataclass(frozen=True)
class Settings:
    """The settings of one data set.

    The paper trained on hundreds of thousands of documents and needed no dropout. These training sets are smaller, and
    a smaller set drops more words. In DBpedia's test set, one word in 16 is in no training document: the text is
    therefore cut into a vocabulary of ``pieces`` pieces of words. Most of its training documents have lost the
    characters outside ASCII, and no test document has: ``ascii`` drops them everywhere.
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
        """The name of its folder."""
        return f"{self.dataset}/{self.model}-{self.ngram}gram-seed{self.seed}"


def settings_of(dataset: str) -> Settings:
    """A data set's settings; an unknown one gets the defaults."""
    return SETTINGS.get(dataset, Settings())
