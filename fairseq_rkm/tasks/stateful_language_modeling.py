"""``stateful_language_modeling``: truncated backpropagation through time, with state carried between segments."""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq import utils
from fairseq.data import Dictionary, iterators
from fairseq.data.indexed_dataset import get_available_dataset_impl
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingTask
from omegaconf import II
from torch import Tensor

from fairseq_rkm.data.binarized_split import open_tokens
from fairseq_rkm.data.stream_order import check_overlap
from fairseq_rkm.data.token_stream import SegmentIterator, StreamSegments, TokenStream
from fairseq_rkm.errors import RKMError, first_line
from fairseq_rkm.flag_ranges import flag_of
from fairseq_rkm.models.language_model.stream_learner import CheckedBatches, StreamLearner
from fairseq_rkm.modules.continuous_cache import ContinuousCache
from fairseq_rkm.tasks import saved_streams
from fairseq_rkm.tasks.averaged_validation import AveragedValidation
from fairseq_rkm.tasks.graphed_steps import GraphedSteps

logger = logging.getLogger(__name__)

DYNAMIC = {"dynamic_lr": 5e-5, "dynamic_decay": 0.02, "dynamic_epsilon": 2e-5}
"""Defaults of the flags that say how ``--dynamic-eval`` learns."""

STATISTICS_STREAMS = 100
"""Parallel streams of the training text, of which ``--dynamic-eval`` takes the statistics."""
TRAINING = "update_epoch_batch_itr"
"""An argument that fairseq's trainer gives for the iterator that it trains with, and nobody gives for another."""


@dataclass
class StatefulLanguageModelingConfig(FairseqDataclass):
    """Flags of ``--task stateful_language_modeling``."""

    data: Optional[str] = field(default=None, metadata={"help": "folder of binarized data"})
    tokens_per_sample: int = field(default=70, metadata={"help": "tokens in a segment of a stream"})
    variable_bptt: bool = field(
        default=False,
        metadata={
            "help": "draw the length of each training segment around --tokens-per-sample, and scale its update's "
            "learning rate in proportion"
        },
    )
    no_lr_rescaling: bool = field(
        default=False, metadata={"help": "with --variable-bptt: leave the learning rate as scheduled"}
    )
    partial_shuffle: bool = field(
        default=False,
        metadata={
            "help": "in training, begin each epoch at a random place of each stream, and read what is before it last"
        },
    )
    overlap: int = field(
        default=1,
        metadata={
            "help": "in training, read the text this many times an epoch, cut into segments at other places each time; "
            "it must share no factor with the number of streams"
        },
    )
    cache_size: int = field(
        default=0, metadata={"help": "in evaluation, mix in a continuous cache of this many outputs; 0: none"}
    )
    cache_theta: float = field(default=1.0, metadata={"help": "how sharply the cache prefers outputs that are alike"})
    cache_lambda: float = field(default=0.1, metadata={"help": "the cache's share of the probability"})
    softmax_temperature: float = field(
        default=1.0, metadata={"help": "in evaluation, divide the logits by this number before the softmax"}
    )
    dynamic_eval: bool = field(
        default=False,
        metadata={"help": "in fairseq-eval-lm, learn each segment after it was scored (dynamic evaluation)"},
    )
    dynamic_lr: Optional[float] = field(
        default=None, metadata={"help": "learning rate of --dynamic-eval (default: 5e-5)"}
    )
    dynamic_decay: Optional[float] = field(
        default=None, metadata={"help": "decay of --dynamic-eval to the trained weights (default: 0.02)"}
    )
    dynamic_epsilon: Optional[float] = field(
        default=None,
        metadata={"help": "added to the root mean squares that --dynamic-eval divides gradients by (default: 2e-5)"},
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": "on a GPU, replay each training segment's forward and backward pass as a CUDA graph, which spares "
            "the host most of its work"
        },
    )
    cpu: bool = II("common.cpu")
    fp16: bool = II("common.fp16")
    amp: bool = II("common.amp")
    batch_size: Optional[int] = II("dataset.batch_size")
    batch_size_valid: Optional[int] = II("dataset.batch_size_valid")
    train_subset: str = II("dataset.train_subset")
    dataset_impl: Optional[ChoiceEnum(get_available_dataset_impl())] = II("dataset.dataset_impl")
    update_freq: Any = II("optimization.update_freq")
    distributed_world_size: int = II("distributed_training.distributed_world_size")


@register_task("stateful_language_modeling", dataclass=StatefulLanguageModelingConfig)
class StatefulLanguageModelingTask(AveragedValidation, GraphedSteps, LanguageModelingTask):
    """Language modelling over streams.

    The corpus is one stream of tokens. It is cut into ``--batch-size`` parallel streams for each process, and these
    into segments of ``--tokens-per-sample`` tokens. A model with carried state (``rkm_lm``) starts each segment from
    the state at the end of the one before. Gradients stop there. With ``--batch-size 1`` ``fairseq-eval-lm`` thus
    scores the whole text in one pass.

        fairseq-train DATA --user-dir fairseq_rkm --task stateful_language_modeling --arch rkm_lm --batch-size 20

    With ``--variable-bptt`` training segments have random lengths L, so that no token is always the first of its
    segment. The learning rate of a segment's update is multiplied by ``L / tokens_per_sample`` (Merity et al. 2018).
    The lengths depend on ``--seed`` and the epoch alone. The number of updates in an epoch varies: ``--max-update``
    ends a run after a known number.

    With ``--partial-shuffle`` each epoch rotates every stream by a number of tokens that depends on ``--seed``, the
    epoch and the stream alone (Press 2019). With ``--overlap P`` an epoch reads the text P times, and cuts it into
    segments at other places each time (Kocher et al. 2019): see :mod:`fairseq_rkm.data.stream_order`. Segments of equal
    lengths then stay on these places under ``--partial-shuffle``: the rotations are of whole segments. Every token is a
    target once, or P times. These and ``--variable-bptt`` are for training alone: any evaluation, of the training set
    too, reads the text once and in order.

    With ``--cuda-graphs`` training steps are recorded once for each length and replayed (see
    :mod:`fairseq_rkm.tasks.graphed_steps`).

    With ``--cache-size`` evaluation mixes in a continuous cache (Grave et al. 2017). Any trained model can have one. So
    it can have ``--softmax-temperature``, and in ``fairseq-eval-lm`` ``--dynamic-eval`` (Krause et al. 2018).
    """

    def __init__(self, cfg: StatefulLanguageModelingConfig, dictionary: Dictionary, **kwargs: Any) -> None:
        super().__init__(cfg, dictionary, targets=["future"])
        self.training_state: Any = None
        self.learner: Optional[StreamLearner] = None
        self.gathered: Optional[list[Tensor]] = None
        self.train_iterator: Optional[SegmentIterator] = None
        self.lr_scale = 1.0

    @classmethod
    def setup_task(cls, cfg: StatefulLanguageModelingConfig, **_kwargs: Any) -> "StatefulLanguageModelingTask":
        """Load the dictionary and check the flags.

        Raises:
            RKMError: flags that exclude carried state, no dictionary in the folder of data, or another in another one.
        """
        if any(freq > 1 for freq in cfg.update_freq or []):
            raise RKMError(
                "--update-freq above 1 would sum the gradients of segments that follow each other; with carried state "
                "use a larger --batch-size instead"
            )
        if cfg.no_lr_rescaling and not cfg.variable_bptt:
            raise RKMError("--no-lr-rescaling says how --variable-bptt is to train: give that too, or neither")
        for name in DYNAMIC:
            if getattr(cfg, name) is not None and not cfg.dynamic_eval:
                raise RKMError(f"{flag_of(name)} says how --dynamic-eval is to learn: give that too, or neither")
        if cfg.tokens_per_sample < 1:
            raise RKMError(f"--tokens-per-sample must be at least 1, not {cfg.tokens_per_sample}")
        dictionary = load_dictionary(utils.split_paths(cfg.data or ""))
        logger.info(f"dictionary: {len(dictionary):,} types")
        return cls(cfg, dictionary)

    def build_model(self, cfg: FairseqDataclass, from_checkpoint: bool = False) -> Any:
        """Build a model and keep hold of its carried state.

        Raises:
            RKMError: the model carries no state, or cannot have what evaluation adds; or it is to be trained with
                ``--dynamic-eval``.
        """
        model = super().build_model(cfg, from_checkpoint)
        carried = getattr(model.decoder, "carried", None)
        if carried is None:
            raise RKMError(
                f"{type(model).__name__} carries no state between segments: use --arch rkm_lm, or another task"
            )
        model.cuda_graphs = self.args.cuda_graphs  # for the wrapper of several processes
        self.training_state = carried[True]
        self._prepare_evaluation(model.decoder, trains=not from_checkpoint)
        return model

    def _prepare_evaluation(self, decoder: Any, trains: bool) -> None:
        """Give a decoder what evaluation adds to it."""
        flags = self.args
        if flags.cache_size:
            decoder.use_cache(ContinuousCache(flags.cache_size, flags.cache_theta, flags.cache_lambda))
        if flags.softmax_temperature != 1.0:
            decoder.use_temperature(flags.softmax_temperature)
        if flags.dynamic_eval:
            if trains:
                raise RKMError("--dynamic-eval changes the weights as it scores a text: it is for fairseq-eval-lm")
            given = (getattr(flags, name) for name in DYNAMIC)
            rate, decay, epsilon = (d if g is None else g for g, d in zip(given, DYNAMIC.values(), strict=True))
            self.learner = StreamLearner(decoder, (rate, decay, epsilon), self._training_segments)
            decoder.use_learner(self.learner)

    def _training_segments(self) -> Iterable[dict]:
        """Return the segments of the training text, for the statistics of ``--dynamic-eval``.

        Raises:
            RKMError: there is no training text in the folder of data.
        """
        folder = utils.split_paths(self.args.data)[0]
        path = os.path.join(folder, self.args.train_subset)
        tokens = open_tokens(path, self.dictionary, self.args.dataset_impl, combine=False)
        stream = TokenStream(tokens, self.dictionary.eos(), self.args.train_subset)
        streams = max(1, min(STATISTICS_STREAMS, len(stream) // self.args.tokens_per_sample))
        segments = StreamSegments(stream, streams, (0, streams), self.args.tokens_per_sample, self.dictionary.pad())
        return (segments[index] for index in range(len(segments)))

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """Open a split as one stream. Of several folders of data each epoch has one, in turn.

        Training data is opened in all folders the first time, so that a fault in one is found before training starts.

        Args:
            split: the split's name, for example ``"train"``.
            epoch: from 1; chooses among several folders of data.
            combine: read ``train1``, ``train2``, ... after ``train``.
            kwargs: unused; fairseq gives more.

        Raises:
            RKMError: the split is missing, empty, of another format than ``--dataset-impl``, or has fewer tokens than
                streams.
        """
        paths = utils.split_paths(self.args.data)
        here = paths[(epoch - 1) % len(paths)]
        if split == self.args.train_subset and split not in self.datasets:
            for path in paths:
                if path != here:
                    self._open(path, split, combine)
        self.datasets[split] = self._open(here, split, combine)

    def _open(self, folder: str, split: str, combine: bool) -> TokenStream:
        path = os.path.join(folder, split)
        tokens = open_tokens(path, self.dictionary, self.args.dataset_impl, combine)
        stream = TokenStream(tokens, self.dictionary.eos(), split)
        training = split == self.args.train_subset
        per_process = self.args.batch_size if training else self.args.batch_size_valid
        streams = (per_process or 1) * max(1, self.args.distributed_world_size)
        stream.check_streams(streams)
        if training:
            check_overlap(self.args.overlap, streams, self.args.tokens_per_sample)
        return stream

    def get_batch_iterator(
        self,
        dataset: Any,
        max_tokens: Optional[int] = None,
        max_sentences: Optional[int] = None,
        num_shards: int = 1,
        shard_id: int = 0,
        num_workers: int = 0,
        seed: int = 1,
        epoch: int = 1,
        data_buffer_size: int = 0,
        skip_remainder_batch: bool = False,
        **kwargs: Any,
    ) -> iterators.EpochBatchIterator:
        """Return the segments, in order, of one process's streams. The arguments are fairseq's.

        fairseq-interactive and hubs give sentences to continue or score. These are batched by fairseq's own task, and
        begin afresh. Fairseq's trainer alone gives :data:`TRAINING`, for training: without it a split is evaluated.

        Raises:
            RKMError: there is no ``--batch-size``, there are fewer tokens than streams, or ``--overlap`` does not go
                with them.
        """
        if not isinstance(dataset, TokenStream):
            return super().get_batch_iterator(
                dataset, max_tokens, max_sentences, num_shards=num_shards, shard_id=shard_id, num_workers=num_workers,
                seed=seed, epoch=epoch, data_buffer_size=data_buffer_size, skip_remainder_batch=skip_remainder_batch,
                **kwargs,
            )  # fmt: skip
        if not max_sentences:
            raise RKMError("--task stateful_language_modeling needs --batch-size, the number of parallel streams")
        rows = (shard_id * max_sentences, (shard_id + 1) * max_sentences)
        training = TRAINING in kwargs
        order: dict[str, Any] = {
            "length_seed": (seed, epoch) if self.args.variable_bptt else None,
            "shuffle_seed": (seed, epoch) if self.args.partial_shuffle else None,
            "overlap": self.args.overlap,
        }
        segments = StreamSegments(
            dataset, num_shards * max_sentences, rows, self.args.tokens_per_sample, self.dictionary.pad(),
            **(order if training else {}),
        )  # fmt: skip
        iterator = SegmentIterator(
            segments, num_workers=num_workers, epoch=epoch, buffer_size=data_buffer_size,
            skip_remainder_batch=skip_remainder_batch,
        )  # fmt: skip
        if training:
            self.train_iterator = iterator
        return iterator

    def eval_lm_dataloader(
        self, dataset: TokenStream, batch_size: Optional[int] = None, context_window: int = 0, **kwargs: Any
    ) -> Any:
        """Return the iterator of fairseq-eval-lm. The state carries all of the past: there is no context window.

        Raises:
            RKMError: ``--context-window`` is above 0; or an error of :meth:`get_batch_iterator`.
        """
        if context_window:
            raise RKMError("--context-window is for models without carried state; leave it at 0 with this task")
        for unused in ("max_tokens", "max_positions"):
            kwargs.pop(unused, None)
        batches = self.get_batch_iterator(dataset, max_sentences=batch_size, **kwargs).next_epoch_itr(shuffle=False)
        return batches if self.learner is None else CheckedBatches(batches, self.learner)

    def inference_step(self, generator: Any, models: list, sample: dict, *args: Any, **kwargs: Any) -> Any:
        """Continue sentences, as fairseq does.

        Raises:
            RKMError: the sample is a segment of a stream, which fairseq-generate would take for a sentence.
        """
        if "segment" in sample["net_input"]:
            raise RKMError(
                "--task stateful_language_modeling has streams, and fairseq-generate continues sentences: "
                "give --task language_modeling --sample-break-mode eos"
            )
        return super().inference_step(generator, models, sample, *args, **kwargs)

    def train_step(self, sample: dict, *args: Any, **kwargs: Any) -> tuple:
        """Do fairseq's step, and take note of the segment's length for the update that follows.

        Raises:
            MemoryError: the GPU has too little memory.
        """
        if self.args.variable_bptt and not self.args.no_lr_rescaling:
            self.lr_scale = sample["target"].size(1) / self.args.tokens_per_sample
        try:
            return super().train_step(sample, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            # fairseq's trainer would leave the segment out, and the next one without its state.
            raise MemoryError(first_line(error)) from error

    def optimizer_step(self, optimizer: Any, model: Any, update_num: int) -> None:
        """Update at the segment's learning rate."""
        scheduled = optimizer.get_lr()
        optimizer.set_lr(scheduled * self.lr_scale)
        super().optimizer_step(optimizer, model, update_num)
        optimizer.set_lr(scheduled)

    def gather_checkpoint_state(self) -> None:
        """Collect the state of all processes' streams. Each process calls this before one writes a checkpoint."""
        left = self.training_state.left
        self.gathered = None if left is None else saved_streams.gather(left)

    def get_checkpoint_dict(self) -> dict[str, dict[str, Any]]:
        """Return the last segment's number and the state that it left, for a checkpoint in the middle of an epoch.

        Returns:
            A dictionary under the task's name: ``segment``, and what :func:`fairseq_rkm.tasks.saved_streams.save`
            returns. It is empty before the first segment.

        Raises:
            RKMError: :meth:`gather_checkpoint_state` was not called.
        """
        left, gathered = self.training_state.left, self.gathered
        if left is None:
            return {}
        if gathered is None:
            raise RKMError(
                "the state of all streams was not gathered before this checkpoint: do not switch off the plugin's "
                "change checkpoint_writing.gather_state (FAIRSEQ_RKM_PATCHES)"
            )
        self.gathered = None  # it is of this checkpoint alone
        return {type(self).__name__: {"segment": self.training_state.segment, **saved_streams.save(left, gathered)}}

    def set_checkpoint_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state that :meth:`get_checkpoint_dict` returned. An epoch's start needs none.

        The number of processes and the batch size may have changed, if their product is the same.

        Raises:
            RKMError: the checkpoint has another number of streams.
        """
        if self.train_iterator is not None and not self.train_iterator.iterations_in_epoch:
            return
        self.training_state.restore(state["segment"], saved_streams.restore(state, self.args.batch_size))


def load_dictionary(folders: list[str]) -> Dictionary:
    """Return the dictionary of some folders of data.

    Raises:
        RKMError: there is none in the first, or another one in another: a number would be another word there.
    """
    first, *others = (Path(folder, "dict.txt") for folder in folders)
    if not first.is_file():
        raise RKMError(f"no dictionary at {first}: give the folder that fairseq-preprocess wrote")
    dictionary = Dictionary.load(os.fspath(first))
    for other in others:
        if not other.is_file() or other.read_bytes() == first.read_bytes():
            continue
        if Dictionary.load(os.fspath(other)).symbols != dictionary.symbols:
            raise RKMError(
                f"{other} has other words than {first}: binarize all folders with one dictionary (fairseq-preprocess "
                f"--srcdict {first})"
            )
    return dictionary
