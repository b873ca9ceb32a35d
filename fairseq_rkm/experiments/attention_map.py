"""Translate a sentence and draw where the model looked for each of the translation's subwords.

    python examples/translation/attention_map.py MODEL "Ein Hund läuft durch den Schnee." --out map.png

MODEL is a folder made by table.py (OUT/MODEL-SEED), or any folder that RKMModel.from_pretrained takes.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from fairseq_rkm.errors import RKMError
from fairseq_rkm.experiments.result_files import pyplot


def draw(source: list[str], target: list[str], weights: Tensor, path: Path) -> None:
    """Draw the weights, ``(T, S)``, into the file ``path``: the source across, the translation down."""
    plt = pyplot()
    families, missing = fonts_with({letter for token in source + target for letter in _shown(token)})
    if missing:
        print(f"no font here has {' '.join(sorted(missing))}: a box stands in the picture for each", file=sys.stderr)
    with plt.rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        _draw(plt, source, target, weights, path)


def _draw(plt: Any, source: list[str], target: list[str], weights: Tensor, path: Path) -> None:
    width, height = 2.5 + 0.34 * len(source), 1.8 + 0.3 * len(target)
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    image = axes.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(source)), [_shown(token) for token in source], rotation=60, ha="left")
    axes.set_yticks(range(len(target)), [_shown(token) for token in target])
    axes.xaxis.tick_top()
    figure.colorbar(image, label="attention")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def fonts_with(letters: set[str]) -> tuple[list[str], set[str]]:
    """Choose fonts: matplotlib's usual ones and, for letters that they lack, others of the machine.

    Returns:
        The families in the order in which a letter is looked for, and the letters that no font has.
    """
    from matplotlib import font_manager, rcParams

    families = list(rcParams["font.family"])
    missing = {ord(letter) for letter in letters}
    missing -= font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap().keys()
    # The Last Resort font has a box for every letter.
    files = {font.name: font.fname for font in font_manager.fontManager.ttflist if "Last Resort" not in font.name}
    for family, file in sorted(files.items()):
        if not missing:
            break
        found = missing & font_manager.get_font(file).get_charmap().keys()
        if found:
            families.append(family)
            missing -= found
    return families, {chr(letter) for letter in missing}


def _shown(token: str) -> str:
    """A subword with "_" at a word's beginning: fonts may lack sentencepiece's own mark."""
    return token.replace("\u2581", "_").replace("$", r"\$")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="the model's folder")
    parser.add_argument("sentence")
    parser.add_argument("--checkpoint", default="model.pt", help="its name in the folder (model.pt)")
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("attention.png"), help="the picture (attention.png)")
    args = parser.parse_args()
    if not args.sentence.strip():
        parser.error("the sentence is empty")
    logging.disable(logging.INFO)

    from fairseq_rkm.models import RKMModel

    try:
        pyplot()  # before the seconds that a model takes to load
        model = RKMModel.from_pretrained(args.model, args.checkpoint)
        source, target, weights = model.attention(args.sentence, beam=args.beam)
    except RKMError as error:
        raise SystemExit(f"attention_map: {error}") from error
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(source, target, weights, args.out)
    print(f"{model.detokenize(model.remove_bpe(' '.join(target[:-1])))}\n{args.out}")


if __name__ == "__main__":
    main()
