"""The ranges of all flags that hold numbers or files, in one table, and the check of a configuration against it.

fairseq's command line and ``fairseq-hydra-train`` both end in one configuration of sections (``model``, ``task``,
``optimizer``, ...). :mod:`fairseq_rkm.fairseq_patches.configuration` checks it before anything is built. A test demands
an entry for each flag of this package.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fairseq_rkm.errors import RKMError


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds.

    >>> Range(0, 1, below=True).holds(1.0), Range(0, 1, below=True).problem(1.0)
    (False, 'must lie within [0, 1), not be 1.0')

    Attributes:
        low: the least value; infinity and NaN are never within.
        high: the largest value.
        above: whether ``low`` itself is out.
        below: whether ``high`` itself is out.
        also: values outside the bounds that have a meaning of their own.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    also: tuple[float, ...] = ()

    def holds(self, value: float) -> bool:
        """Return whether a value is within."""
        if value in self.also:
            return True
        high_enough = value > self.low if self.above else value >= self.low
        low_enough = value < self.high if self.below else value <= self.high
        return math.isfinite(value) and high_enough and low_enough

    def problem(self, value: float) -> str:
        """Return the fault of a value outside, as the end of a sentence that begins with the flag's name."""
        also = "".join(f", or be {other:g}" for other in self.also)
        if self.low == 0 and self.high == 1:
            bounds = f"{'(' if self.above else '['}0, 1{')' if self.below else ']'}"
            return f"must lie within {bounds}{also}, not be {value}"
        if not math.isfinite(value):
            return f"must be a finite number, not {value}"
        if value > self.high:
            return f"must be at most {_digits(self.high)}, not {value}"
        return f"must be {'above' if self.above else 'at least'} {self.low:g}{also}, not {value}"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value < 10**15 else f"{value:g}"


FILE = "file"
"""A flag that names a file. It may be left out, and must not be empty."""

LARGEST = 2**31 - 1
"""The largest whole number that C reads in 32 bits."""

LARGE = 1e30
"""A number below the overflow of float32."""

FINITE = Range(-LARGE, LARGE)
COUNT = Range(0, LARGEST)
AT_LEAST_1 = Range(1, LARGEST)
SIZE = Range(1, 10**6)
"""The size of a layer: far beyond use, and far from overflow."""
NOT_NEGATIVE = Range(0, LARGE)
POSITIVE = Range(0, LARGE, above=True)
SHARE = Range(0, 1)
PROBABILITY = Range(0, 1, below=True)
WITHIN_1 = Range(0, 1, above=True, below=True)
OFF_OR_POSITIVE = Range(1, LARGEST, also=(-1,))
SEED = Range(0, 2**32 - 1)

OURS: dict[str, dict[str, Range | str]] = {
    "model": {
        "ngram": Range(1, 10**4),
        "encoder_ngram": Range(1, 10**4),
        "decoder_ngram": Range(1, 10**4),
        "kernel_degree": Range(0, 8),
        "kernel_scale": POSITIVE,
        "kernel_offset": NOT_NEGATIVE,
        "sigma_i2": WITHIN_1,
        "sigma_f2": WITHIN_1,
        "forget_bias": Range(-1000, 1000),
        "encoder_embed_dim": SIZE,
        "encoder_hidden_size": SIZE,
        "encoder_layers": Range(1, 1000),
        "encoder_embed_path": FILE,
        "decoder_embed_dim": SIZE,
        "decoder_hidden_size": SIZE,
        "decoder_layers": Range(1, 1000),
        "decoder_embed_path": FILE,
        "decoder_out_embed_dim": SIZE,
        "attention_layer": COUNT,
        "classifier_hidden_size": Range(0, 10**6),
        "dropout": PROBABILITY,
        "dropout_input": PROBABILITY,
        "dropout_hidden": PROBABILITY,
        "dropout_words": PROBABILITY,
        "dropout_weights": PROBABILITY,
        "dropout_state": PROBABILITY,
        "dropout_latent": PROBABILITY,
        "softmaxes": Range(1, 1000),
        "dropout_channels": PROBABILITY,
        "noise": Range(0, 1000),
        "pooling_parts": Range(1, 1000),
        "time_masks": Range(0, 1000),
        "time_mask_steps": Range(1, 10**6),
        "encoder_dropout_in": PROBABILITY,
        "encoder_dropout_out": PROBABILITY,
        "decoder_dropout_in": PROBABILITY,
        "decoder_dropout_out": PROBABILITY,
        "adaptive_softmax_dropout": PROBABILITY,
        "adaptive_softmax_factor": Range(1, 1000),
    },
    "task": {
        "data": FILE,
        "tokens_per_sample": AT_LEAST_1,
        "overlap": AT_LEAST_1,
        "cache_size": COUNT,
        "cache_theta": NOT_NEGATIVE,
        "cache_lambda": PROBABILITY,
        "softmax_temperature": Range(0.01, 100),
        "dynamic_lr": NOT_NEGATIVE,
        "dynamic_decay": NOT_NEGATIVE,
        "dynamic_epsilon": POSITIVE,
    },
    "criterion": {
        "alpha": NOT_NEGATIVE,
        "beta": NOT_NEGATIVE,
        "past_decode": NOT_NEGATIVE,
    },
    "optimizer": {
        "weight_decay": NOT_NEGATIVE,
        "non_monotone_window": AT_LEAST_1,
        "adam_eps": POSITIVE,
        "average_last": SHARE,
        "average_decay": SHARE,
    },
}
"""For each section, the flags of this package's own models, tasks, criterions and optimizers."""

CHECKED_BY_THEIR_READERS = {
    "memory_clip": "auto, none or a number: RKM",
    "adaptive_softmax_cutoff": "numbers below the dictionary's size: word_layers.parse_cutoffs",
    "adam_betas": "a pair: adamw_average.parse_betas",
}
"""Flags of ours that a range does not describe, and the code that refuses bad values before training."""

FAIRSEQS: dict[str, dict[str, Range | str]] = {
    "common": {
        "seed": SEED,
        "log_interval": AT_LEAST_1,
        "fp16_init_scale": AT_LEAST_1,
        "fp16_scale_window": AT_LEAST_1,
        "fp16_scale_tolerance": SHARE,
        "min_loss_scale": POSITIVE,
        "threshold_loss_scale": POSITIVE,
        "amp_init_scale": AT_LEAST_1,
        "amp_scale_window": AT_LEAST_1,
        "amp_batch_retries": COUNT,
        "empty_cache_freq": COUNT,
    },
    "dataset": {
        "num_workers": Range(0, 1024),
        "max_tokens": AT_LEAST_1,
        "max_tokens_valid": AT_LEAST_1,
        "batch_size": AT_LEAST_1,
        "batch_size_valid": AT_LEAST_1,
        "required_batch_size_multiple": AT_LEAST_1,
        "required_seq_len_multiple": AT_LEAST_1,
        "data_buffer_size": COUNT,
        "validate_interval": AT_LEAST_1,
        "validate_interval_updates": COUNT,
        "validate_after_updates": COUNT,
        "fixed_validation_seed": SEED,
        "max_valid_steps": AT_LEAST_1,
        "curriculum": COUNT,
        "train_subset": FILE,
        "valid_subset": FILE,
        "gen_subset": FILE,
    },
    "optimization": {
        "max_epoch": COUNT,
        "max_update": COUNT,
        "stop_time_hours": NOT_NEGATIVE,
        "clip_norm": NOT_NEGATIVE,
        "update_freq": AT_LEAST_1,
        "lr": NOT_NEGATIVE,
        "stop_min_lr": Range(),
    },
    "checkpoint": {
        "save_dir": FILE,
        "restore_file": FILE,
        "finetune_from_model": FILE,
        "save_interval": AT_LEAST_1,
        "save_interval_updates": COUNT,
        "keep_interval_updates": OFF_OR_POSITIVE,
        "keep_interval_updates_pattern": OFF_OR_POSITIVE,
        "keep_last_epochs": OFF_OR_POSITIVE,
        "keep_best_checkpoints": OFF_OR_POSITIVE,
        "patience": OFF_OR_POSITIVE,
        "checkpoint_shard_count": AT_LEAST_1,
    },
    "lr_scheduler": {
        "warmup_updates": COUNT,
        "warmup_init_lr": Range(0, also=(-1,)),
        "lr_shrink": Range(0, 1, above=True),
        "lr_threshold": NOT_NEGATIVE,
        "lr_patience": COUNT,
        "min_lr": NOT_NEGATIVE,
        "max_lr": NOT_NEGATIVE,
        "end_learning_rate": NOT_NEGATIVE,
        "power": NOT_NEGATIVE,
        "total_num_update": NOT_NEGATIVE,
        "lr_period_updates": Range(1, also=(-1,)),
        "t_mult": Range(1),
    },
    "optimizer": {
        "weight_decay": NOT_NEGATIVE,
        "adam_eps": POSITIVE,
        "momentum": PROBABILITY,
    },
    "criterion": {"label_smoothing": PROBABILITY, "ignore_prefix_size": COUNT},
    "generation": {
        "beam": AT_LEAST_1,
        "nbest": AT_LEAST_1,
        "max_len_a": NOT_NEGATIVE,
        "max_len_b": COUNT,
        "min_len": COUNT,
        "lenpen": FINITE,
        "unkpen": FINITE,
        "prefix_size": COUNT,
        "no_repeat_ngram_size": COUNT,
        "sampling_topk": OFF_OR_POSITIVE,
        "sampling_topp": Range(0, 1, above=True, also=(-1,)),
        "temperature": POSITIVE,
        "diverse_beam_groups": OFF_OR_POSITIVE,
        "diverse_beam_strength": FINITE,
        "diversity_rate": Range(),
    },
    "eval_lm": {"context_window": COUNT, "softmax_batch": Range(1, 2**63)},
    "interactive": {"buffer_size": COUNT},
    "common_eval": {"path": FILE},
    "ema": {
        "ema_decay": SHARE,
        "ema_start_update": COUNT,
        "ema_update_freq": AT_LEAST_1,
        "ema_seed_model": FILE,
    },
    "task": {"max_source_positions": AT_LEAST_1, "max_target_positions": AT_LEAST_1, "num_batch_buckets": COUNT},
}
"""fairseq's own flags that our components are used with."""


def check_section(section: str, values: Any, ours: bool) -> None:
    """Refuse values outside their ranges.

    >>> check_section("model", {"dropout": 1.5}, ours=True)
    Traceback (most recent call last):
    fairseq_rkm.errors.RKMError: --dropout must lie within [0, 1), not be 1.5

    Args:
        section: the configuration's section, for example ``"model"``.
        values: a mapping, or an object with the flags as attributes. Flags that are absent or None pass.
        ours: whether the section belongs to a component of this package.

    Raises:
        RKMError: names the flag, the range and the value.
    """
    table = {**FAIRSEQS.get(section, {}), **(OURS.get(section, {}) if ours else {})}
    for name, allowed in table.items():
        for value in _given(values, name):
            _check(name, allowed, value)


def _given(values: Any, name: str) -> Iterator[Any]:
    """Yield a flag's value, each value of a list, or nothing."""
    value = values.get(name) if isinstance(values, Mapping) else getattr(values, name, None)
    if isinstance(value, Sequence) and not isinstance(value, str):
        yield from value
    elif value is not None:
        yield value


def _check(name: str, allowed: Range | str, value: Any) -> None:
    flag = flag_of(name)
    if isinstance(allowed, str):
        if isinstance(value, str) and not value.strip():
            raise RKMError(f"{flag} is empty: give a name, or leave the flag out")
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and not allowed.holds(value):
        raise RKMError(f"{flag} {allowed.problem(value)}")


def flag_of(name: str) -> str:
    """Return the command line's name of a configuration key.

    >>> flag_of("batch_size")
    '--batch-size'
    """
    return "data" if name == "data" else f"--{name.replace('_', '-')}"
