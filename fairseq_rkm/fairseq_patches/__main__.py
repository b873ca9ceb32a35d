"""``python -m fairseq_rkm.fairseq_patches`` lists the changes to fairseq as a table."""

import os
import sys

from fairseq_rkm import fairseq_patches
from fairseq_rkm.errors import RKMError
from fairseq_rkm.fairseq_patches import registry


def main() -> None:
    """Print a table of names, targets, reasons and ends. ``*`` marks the patches that are switched on.

    Raises:
        RKMError: ``FAIRSEQ_RKM_PATCHES`` names an unknown patch.
    """
    fairseq_patches.load()
    on = {patch.name for patch in registry.selected(os.environ.get(registry.SWITCH, ""))}
    print("| on | patch | changes | why | until |\n| --- | --- | --- | --- | --- |")
    for name, patch in registry.PATCHES.items():
        print(f"| {'*' if name in on else ''} | `{name}` | `{patch.target}` | {patch.why} | {patch.until} |")


if __name__ == "__main__":
    try:
        main()
    except RKMError as error:
        sys.exit(f"fairseq-rkm: error: {error}")
