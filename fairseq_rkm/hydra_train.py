"""fairseq-hydra-train, with ``common.user_dir`` as the shell that runs it sees it.

    python -m fairseq_rkm.hydra_train --config-dir DIR --config-name NAME common.user_dir=../x/fairseq_rkm

hydra changes to a new folder before fairseq imports ``common.user_dir``, and no code of the plugin has run by then: a
relative folder on the command line would be looked for in the new one.
"""

import sys
from pathlib import Path

from fairseq_rkm import register

KEY = "common.user_dir"


def main() -> None:
    """Run the command line."""
    sys.argv[1:] = [from_here(word) for word in sys.argv[1:]]
    register()  # fairseq takes a package that is imported already, as this one is, for registered
    from fairseq_cli.hydra_train import cli_main

    cli_main()


def from_here(word: str) -> str:
    """A word of the command line; ``common.user_dir`` of a folder that is here becomes absolute.

    Others are fairseq's business: it looks beside itself, too.
    """
    name, equals, value = word.partition("=")
    if name.lstrip("+") != KEY or not equals:
        return word
    plain = value[1:-1] if value[:1] == value[-1:] and value[:1] in ("'", '"') and len(value) > 1 else value
    if not plain or "${" in plain or not Path(plain).is_dir():
        return word
    absolute = str(Path(plain).resolve()).replace("'", "\\'")
    return f"{name}='{absolute}'"


if __name__ == "__main__":
    main()
