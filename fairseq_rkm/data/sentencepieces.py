"""Compare a sentencepiece model with a dictionary."""

from typing import Any

from fairseq.data import Dictionary

from fairseq_rkm.errors import RKMError


def check_pieces(bpe: Any, dictionary: Dictionary) -> None:
    """Refuse a sentencepiece model that cannot have made a source dictionary.

    A model has a piece for every character of its training text. It passes unknown characters on in runs. So a symbol
    did not come from the model if it is not a piece, but one of its characters is. One symbol in a hundred may be
    strange: people add language tags and the like.

    Args:
        bpe: fairseq's encoder; encoders of other kinds than sentencepiece pass.
        dictionary: the source's.

    Raises:
        RKMError: the model does not fit.
    """
    if not hasattr(bpe, "sp"):
        return
    pieces = {bpe.sp.IdToPiece(i) for i in range(bpe.sp.GetPieceSize())}
    symbols = [s for s in dictionary.symbols[dictionary.nspecial :] if not s.startswith("madeupword")]
    strange = [s for s in symbols if s not in pieces and any(character in pieces for character in s)]
    if len(strange) > 0.01 * len(symbols):
        raise RKMError(
            f"the sentencepiece model does not fit the source's dictionary: {len(strange):,} of its {len(symbols):,} "
            f"types, such as {strange[0]!r}, are no pieces of the model. Give the model that the data was encoded with"
        )
