"""Small files of parallel text."""

import gzip


def write_text(folder, **splits):
    """Splits of German and English, the English ones compressed."""
    folder.mkdir(exist_ok=True)
    for split, lines in splits.items():
        (folder / f"{split}.de").write_text("\n".join(lines) + "\n", encoding="utf-8")
        with gzip.open(folder / f"{split}.en.gz", "wt", encoding="utf-8") as compressed:
            compressed.write("\n".join(lines) + "\n")
    return folder
