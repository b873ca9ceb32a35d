"""The steps from raw text to a classifier's tokens. They are saved with the data, for texts to come."""

import hashlib
import json
import unicodedata
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from fairseq.data import encoders
from omegaconf import OmegaConf

import fairseq_rkm.data.words_tokenizer  # noqa: F401  registers it
from fairseq_rkm.errors import RKMError, first_line

PREPARATION_FILE = "preparation.json"
SENTENCEPIECE_MODEL = "sentencepiece.bpe.model"
"""The model's file name. fairseq's hub, too, looks for it."""
CHECKED = ("label/dict.txt", SENTENCEPIECE_MODEL)
"""Files beside ``preparation.json`` that give classes and tokens their meaning."""
TOKENIZERS = ("moses", "words", "space")
"""Tokenizers that need no further settings."""


@dataclass
class Preparation:
    """Turn text into tokens, and classes into names.

    >>> Preparation(["World", "Sports"], tokenizer="words", lowercase=True).tokens("It's 3:1!")
    "it ' s 3 : 1 !"

    Attributes:
        classes: the classes' names; the k-th (from 1) has the symbol k in ``label/dict.txt``.
        tokenizer: one of :data:`TOKENIZERS`.
        language: the language of the tokenizer's rules, for example ``"en"``.
        lowercase: whether case is dropped.
        ascii: whether letters lose their accents, and other characters beyond ASCII are left out.
        sentencepiece: whether ``sentencepiece.bpe.model`` cuts the text into pieces, in place of a tokenizer.
        folder: the folder of ``preparation.json`` and the sentencepiece model.
    """

    classes: list[str]
    tokenizer: str = "moses"
    language: str = "en"
    lowercase: bool = False
    ascii: bool = False
    sentencepiece: bool = False
    folder: Path = field(default=Path(), repr=False)

    def tokens(self, text: str) -> str:
        """Return a document as tokens separated by spaces. Runs of white space count as one space.

        Raises:
            RKMError: the sentencepiece model is missing or damaged.
        """
        text = self.normalize(text)
        try:
            return str(self._encoder.encode(text)) if text else ""
        except RuntimeError as error:
            raise RKMError(f"{self.folder / SENTENCEPIECE_MODEL} is damaged: {first_line(error)}") from None

    def normalize(self, text: str) -> str:
        """Return a text as the tokenizer sees it."""
        if self.ascii:
            text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
        text = " ".join(text.split())
        return text.lower() if self.lowercase else text

    @cached_property
    def _encoder(self) -> Any:
        if self.sentencepiece:
            model = self.folder / SENTENCEPIECE_MODEL
            if not model.is_file():
                raise RKMError(f"{self.folder / PREPARATION_FILE} asks for {model}, which is missing: copy it there")
            given = {"_name": "sentencepiece", "sentencepiece_model": str(model)}
            try:
                return encoders.build_bpe(OmegaConf.create(given))
            except (RuntimeError, OSError) as error:
                raise RKMError(f"{model} is damaged, or no sentencepiece model: {first_line(error)}") from None
        if self.tokenizer != "moses":
            return encoders.build_tokenizer(OmegaConf.create({"_name": self.tokenizer}))
        flags = {"source_lang": self.language, "target_lang": self.language, "moses_no_escape": True}
        return encoders.build_tokenizer(OmegaConf.create({"_name": "moses", **flags}))

    def save(self) -> None:
        """Write ``preparation.json`` into the folder."""
        values = {name: value for name, value in asdict(self).items() if name != "folder"}
        values["checksums"] = self.checksums()
        (self.folder / PREPARATION_FILE).write_text(
            json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    def checksums(self) -> dict[str, str]:
        """Return SHA-256 in hexadecimal of the classes' names, and of each file of :data:`CHECKED` that is there."""
        parts = {"classes": json.dumps(self.classes).encode()}
        parts |= {name: (self.folder / name).read_bytes() for name in CHECKED if (self.folder / name).is_file()}
        return {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()}

    def check(self, saved: Any) -> None:
        """Compare saved checksums with today's.

        Args:
            saved: the checksums from ``preparation.json``, by name. A name that is missing passes.

        Raises:
            RKMError: the classes or a file have changed since.
        """
        path = self.folder / PREPARATION_FILE
        if not isinstance(saved, dict):
            raise RKMError(f"{path}: checksums must be of names, each with its checksum")
        for name, checksum in self.checksums().items():
            if saved.get(name, checksum) != checksum:
                what = "the classes in it have" if name == "classes" else f"{self.folder / name} has"
                raise RKMError(
                    f"{path}: {what} changed since it was written, so that classes or tokens may not be what they "
                    "were: restore the folder that prepare.py wrote, or, if the change is meant, delete the entry "
                    f"{name!r} of checksums"
                )

    @classmethod
    def load(cls, folder: Path) -> "Preparation":
        """Read the file that :meth:`save` wrote.

        Raises:
            RKMError: there is no such file, its contents are not as they should be, or a checksum differs.
        """
        path = folder / PREPARATION_FILE
        if not path.is_file():
            raise RKMError(
                f"no {path}: it tells how text is tokenised and what the classes are called. Give the folder that "
                "examples/document_classification/prepare.py wrote"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise RKMError(f"{path} is not JSON: {error}") from None
        keys = [f.name for f in fields(cls) if f.name != "folder"]
        if isinstance(values, dict):
            values.setdefault("ascii", False)  # older files lack it
        saved = values.pop("checksums", {}) if isinstance(values, dict) else {}  # older files lack them
        if not isinstance(values, dict) or set(values) != set(keys):
            raise RKMError(f"{path} must have the keys {', '.join(keys)}")
        names = values["classes"]
        right = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not right or values["tokenizer"] not in TOKENIZERS:
            raise RKMError(f"{path}: classes must be a list of names, and tokenizer one of {', '.join(TOKENIZERS)}")
        flags = ("lowercase", "ascii", "sentencepiece")
        if not all(isinstance(values[name], bool) for name in flags) or not isinstance(values["language"], str):
            raise RKMError(f"{path}: {', '.join(flags)} must be true or false, and language a name")
        preparation = cls(**values, folder=folder)
        preparation.check(saved)
        return preparation
