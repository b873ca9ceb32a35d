"""``--help`` of fairseq's commands."""

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any

from fairseq import options

from fairseq_rkm.fairseq_patches.registry import patch

HINT = "python -m fairseq_rkm --flags NAME lists the flags of one architecture, task, criterion or optimizer."
_ASKED = {"-h", "--help"}


@patch(
    options,
    "parse_args_and_arch",
    why="--help leaves before the flags of --arch, --task, --criterion and --optimizer are there",
    until="fairseq's --help shows them",
)
def help_of_all_flags(parse: Callable) -> Callable:
    """Make ``parse_args_and_arch`` print help once it knows all flags."""

    def parse_args_and_arch(
        parser: ArgumentParser, input_args: Sequence[str] | None = None, *args: Any, **named: Any
    ) -> Any:
        words = sys.argv[1:] if input_args is None else list(input_args)
        if not _ASKED & set(words):
            return parse(parser, input_args, *args, **named)
        parser.epilog = HINT
        calls = []

        def modify_parser(parser: ArgumentParser) -> None:
            # fairseq calls it before it knows the components' flags, and again after.
            calls.append(parser)
            if len(calls) == 1:
                for action in parser._actions:
                    action.required = False
            else:
                parser.print_help()
                parser.exit()

        chosen = [word for word in words if word not in _ASKED]
        arch = parser._option_string_actions.get("--arch")
        if arch is not None and arch.default is None and not any(w.split("=")[0] in ("--arch", "-a") for w in words):
            chosen = words  # fairseq fails without an architecture
        return parse(parser, chosen, modify_parser=modify_parser)

    return parse_args_and_arch
