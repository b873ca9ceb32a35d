import pytest
from fairseq import options

import fairseq_rkm
from fairseq_rkm.fairseq_patches.help import HINT

fairseq_rkm.register()


@pytest.mark.parametrize("asked", ["-h", "--help"])
@pytest.mark.parametrize(
    ("get_parser", "words", "flags"),
    [
        (
            options.get_training_parser,
            ["--arch", "rkm_lm", "--task=stateful_language_modeling", "--optimizer", "nt_asgd"],
            ["--memory-clip", "--variable-bptt", "--non-monotone-window", "--max-update"],
        ),
        (options.get_training_parser, ["-a", "rkm"], ["--input-feeding", "--source-lang"]),
        (options.get_training_parser, [], ["--max-update"]),
        (options.get_eval_lm_parser, ["--task", "stateful_language_modeling"], ["--cache-size", "--path"]),
        (options.get_generation_parser, [], ["--beam"]),
    ],
)
def test_help_shows_the_flags_of_what_is_chosen(capsys, get_parser, words, flags, asked):
    with pytest.raises(SystemExit, match="0"):
        options.parse_args_and_arch(get_parser(), [asked, *words])
    text = capsys.readouterr().out
    assert all(f"{flag} " in text or f"{flag}\n" in text for flag in flags)
    assert " ".join(HINT.split()) in " ".join(text.split())
