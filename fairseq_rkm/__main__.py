"""Print the plugin's folder for fairseq's commands: ``--user-dir "$(python -m fairseq_rkm)"``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fairseq_rkm.errors import RKMError

EPILOG = (
    "Other commands: python -m fairseq_rkm.predict (classify text), python -m fairseq_rkm.score (BLEU, as "
    "fairseq-score), python -m fairseq_rkm.fairseq_patches (list the changes to fairseq)."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: the words after the command; None takes them from ``sys.argv``.

    Raises:
        RKMError: ``--flags`` names an unknown component.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fairseq_rkm", description=(__doc__ or "").replace("``", ""), epilog=EPILOG
    )
    parser.add_argument(
        "--flags", metavar="NAME", help="print the flags of an architecture, task, criterion or optimizer instead"
    )
    name = parser.parse_args(arguments).flags
    print(Path(__file__).resolve().parent if name is None else _flags(name), end="\n" if name is None else "")


def _flags(name: str) -> str:
    from fairseq_rkm.flags import describe

    return describe(name)


if __name__ == "__main__":
    try:
        main()
    except RKMError as error:
        sys.exit(f"fairseq-rkm: error: {error}")
