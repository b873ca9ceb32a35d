"""Trained models for use from Python, on fairseq's hub interface."""

import os
from pathlib import Path
from typing import Any, Union

from fairseq import hub_utils
from fairseq.hub_utils import GeneratorHubInterface
from torch import Tensor

import fairseq_rkm
from fairseq_rkm.checkpoints.loading import Wanted, only
from fairseq_rkm.errors import RKMError


def load(wanted: Wanted, folder: str, checkpoint_file: str, data: str, **kwargs: Any) -> dict[str, Any]:
    """Load models and their task as fairseq's ``hub_utils.from_pretrained`` does.

    Args:
        wanted: the classes that the models and their task must be of; nothing else is built.
        folder: that ``checkpoint_file`` is in, or an archive of it or its URL.
        checkpoint_file: a checkpoint, or several separated by colons: an ensemble.
        data: the folder of the dictionaries; ``"."`` is the models' own.
        kwargs: fairseq's options where they differ from training's.

    Returns:
        ``args``, ``task`` and ``models``.

    Raises:
        RKMError: no checkpoint there, one that is damaged or carries code, or one of another kind of model.
    """
    fairseq_rkm.register()
    if "://" not in folder:
        _check_files(Path(folder), checkpoint_file.split(os.pathsep))
    with only(wanted):
        loaded: dict[str, Any] = hub_utils.from_pretrained(folder, checkpoint_file, data, **kwargs)
    return loaded


def _check_files(path: Path, checkpoints: list[str]) -> None:
    if not path.exists():
        raise RKMError(f"no model at {path}: give the folder of a trained model's checkpoint")
    missing = [file for file in checkpoints if path.is_dir() and not (path / file).is_file()]
    if missing:
        raise RKMError(f"no checkpoint {missing[0]} in {path}: name it by checkpoint_file")


class TranslationHub(GeneratorHubInterface):
    """What :meth:`fairseq_rkm.models.rkm.RKMModel.from_pretrained` returns; all else as in fairseq's class.

    >>> model.translate("Zwei junge Männer")
    >>> model.translate(["Eins", "Zwei"], beam=10, lenpen=1.2)  # any of fairseq-generate's options
    >>> model.sample("Eins", beam=3, sampling=True, sampling_topp=0.9)
    """

    def sample(
        self, sentences: Union[str, list[str]], beam: int = 1, verbose: bool = False, **kwargs: Any
    ) -> Union[str, list[str]]:
        """Translations in the order of the sentences; an empty sentence's is empty.

        Raises:
            RKMError: a sentence of more tokens than ``max_source_positions``.
        """
        if isinstance(sentences, str):
            return self.sample([sentences], beam, verbose, **kwargs)[0]
        full = [sentence for sentence in sentences if sentence.strip()]
        translations = iter(super().sample(full, beam, verbose, **kwargs) if full else [])
        return [next(translations) if sentence.strip() else "" for sentence in sentences]

    def attention(self, sentence: str, beam: int = 5, **kwargs: Any) -> tuple[list[str], list[str], Tensor]:
        """Where the model looked as it translated.

        Returns:
            The source's S tokens and the translation's T, both with the end-of-sentence symbol, and the weights
            ``(T, S)``, on the CPU: what each of the T had of each of the S. An ensemble's are averages.
        """
        source = self.encode(sentence)
        best = self.generate(source, beam=beam, **kwargs)[0]
        names = [self.src_dict[i] for i in source.tolist()], [self.tgt_dict[i] for i in best["tokens"].tolist()]
        return *names, best["attention"].t().float().cpu()
