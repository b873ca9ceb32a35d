"""The rows of the table of signals: cells with their n-grams, and baselines."""

from dataclasses import dataclass

BASELINES = ["band_power", "minirocket", "dtw", "torch_lstm"]
WITHOUT_EPOCHS = ["band_power", "minirocket", "dtw"]
WITHOUT_CHANCE = ["band_power", "dtw"]
"""Baselines that draw nothing: one fold of an archive's set stands for all seeds."""
SET_TITLES = {
    "eeg": "EEG, mental arithmetic", "seglearn": "Exercises (seglearn)", "SelfRegulationSCP1": "SelfRegulationSCP1",
    "SelfRegulationSCP2": "SelfRegulationSCP2", "FingerMovements": "FingerMovements",
    "HandMovementDirection": "HandMovementDirection", "BasicMotions": "BasicMotions",
    "JapaneseVowels": "JapaneseVowels",
}  # fmt: skip
"""The data sets, with their names in tables."""
GROUPED = ("eeg", "seglearn")
"""The sets whose folds leave one group out."""
RESULT = "result.json"
"""The file that a job writes last."""


@dataclass(frozen=True)
class Job:
    """One row: a cell with an n-gram, or a baseline, on all folds of a data set.

    Attributes:
        dataset: a key of :data:`fairseq_rkm.experiments.signal_sets.SETS`.
        model: a cell or a baseline.
        ngram: samples that a step sees; 1 for baselines.
        seed: of a set whose folds are people; an archive's set has a fold for each seed, and 0 here.
    """

    dataset: str
    model: str
    ngram: int
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        seed = f"-seed{self.seed}" if self.seed else ""
        ngram = "" if self.model in BASELINES else f"-{self.ngram}gram"
        return f"{self.dataset}/{self.model}{ngram}{seed}"
