"""A trained translation model for use from Python, with fairseq's hub interface."""

from typing import Any, Union

from fairseq.hub_utils import GeneratorHubInterface
from torch import Tensor


class TranslationHub(GeneratorHubInterface):
    """The result of ``RKMModel.from_pretrained``; methods not listed here are fairseq's.

    >>> model.translate("Zwei junge Männer")
    >>> model.translate(["Eins", "Zwei"], beam=10, lenpen=1.2)  # any of fairseq-generate's options
    >>> model.sample("Eins", beam=3, sampling=True, sampling_topp=0.9)
    """

    def sample(
        self, sentences: Union[str, list[str]], beam: int = 1, verbose: bool = False, **kwargs: Any
    ) -> Union[str, list[str]]:
        """Translate sentences, in their order; an empty sentence's translation is empty.

        Raises:
            RKMError: a sentence has more tokens than ``max_source_positions``.
        """
        if isinstance(sentences, str):
            return self.sample([sentences], beam, verbose, **kwargs)[0]
        full = [sentence for sentence in sentences if sentence.strip()]
        translations = iter(super().sample(full, beam, verbose, **kwargs) if full else [])
        return [next(translations) if sentence.strip() else "" for sentence in sentences]

    def attention(self, sentence: str, beam: int = 5, **kwargs: Any) -> tuple[list[str], list[str], Tensor]:
        """Translate a sentence, and return the attention weights too.

        Returns:
            The source's S tokens, the translation's T tokens, and the weights, ``(T, S)`` on the CPU. Both sequences
            end with the end-of-sentence symbol. An ensemble's weights are averages.
        """
        source = self.encode(sentence)
        best = self.generate(source, beam=beam, **kwargs)[0]
        names = [self.src_dict[i] for i in source.tolist()], [self.tgt_dict[i] for i in best["tokens"].tolist()]
        return *names, best["attention"].t().float().cpu()
