"""Does a sentencepiece model fit a dictionary?"""

from typing import Any

from fairseq.data import Dictionary

from fairseq_rkm.errors import RKMError


def check_pieces(bpe: Any, dictionary: Dictionary) -> None:
    """Refuse a sentencepiece model that a source dictionary cannot have come from.

    A model has every character that it was trained on as a piece, and what it does not know it passes on in runs of
    unknown characters. So a symbol of the dictionary that is no piece, but has a character that is one, was not made
    by it. One in a hundred is let pass: language tags and the like, which people add.

    Args:
        bpe: fairseq's encoder; any but sentencepiece's passes.
        dictionary: the source's.

    Raises:
        RKMError: a model that does not fit.
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
