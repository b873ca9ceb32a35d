import pytest
import torch
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import make_builder
from fairseq.logging import metrics
from fairseq.logging.meters import MetersDict
from omegaconf import OmegaConf

from fairseq_rkm import RKMError
from fairseq_rkm.data import token_stream, tokens
from fairseq_rkm.data.token_stream import TokenStream, random_lengths
from fairseq_rkm.fairseq_patches.error_messages import sentence_of
from fairseq_rkm.models.language_model.rkm_language_model import RKMLanguageModelConfig
from fairseq_rkm.optim.nt_asgd import FairseqNonMonotoneASGD, NonMonotoneASGDConfig
from fairseq_rkm.tasks.stateful_language_modeling import (
    DYNAMIC,
    StatefulLanguageModelingConfig,
    StatefulLanguageModelingTask,
)


def build(**flags):
    values = {"batch_size": 2, "batch_size_valid": 2, "train_subset": "train", "dataset_impl": None, "update_freq": [1]}
    cfg = StatefulLanguageModelingConfig(**{**values, "distributed_world_size": 1, "tokens_per_sample": 20, **flags})
    return StatefulLanguageModelingTask(OmegaConf.structured(cfg), Dictionary())


def batches(task, training=True, epoch=1, seed=3, **kwargs):
    """Of a training set, as the trainer asks for it or as an evaluation does."""
    stream = TokenStream(torch.arange(1000) + 4, 2, "train")
    if training:
        kwargs["update_epoch_batch_itr"] = False
    iterator = task.get_batch_iterator(stream, max_sentences=2, seed=seed, epoch=epoch, **kwargs)
    assert (task.train_iterator is iterator) == training
    return list(iterator.next_epoch_itr(shuffle=False))


def lengths(items):
    return [item["target"].size(1) for item in items]


def optimizer():
    cfg = NonMonotoneASGDConfig(lr=[30.0], task_name=None, non_monotone_window=1)
    return FairseqNonMonotoneASGD(OmegaConf.structured(cfg), [torch.nn.Parameter(torch.zeros(3))])


def run(task, item, sgd):
    """One update, and the learning rate that it had."""
    (weight,) = sgd.params

    def criterion(model, sample):
        return weight.sum(), 1, {}

    before = weight.detach().clone()
    sgd.zero_grad()
    task.train_step(item, Model(), criterion, sgd, 0)
    task.optimizer_step(sgd, None, 0)
    return (before - weight.detach())[0].item()


class Model(torch.nn.Module):
    def set_num_updates(self, updates):
        """As fairseq's models have it."""


def test_training_segments_vary_with_seed_and_epoch_and_others_do_not():
    task = build(variable_bptt=True)
    assert lengths(batches(task)) == random_lengths(500, 20, (3, 1))
    assert lengths(batches(task, epoch=2)) == random_lengths(500, 20, (3, 2))
    assert lengths(batches(task, training=False)) == [20] * 25
    assert lengths(batches(build())) == [20] * 25


def test_another_order_is_for_training_alone():
    """Of the training set itself, too: its perplexity is of the text in order, and once."""
    plain = batches(build())
    for flags in ({"partial_shuffle": True}, {"overlap": 3}, {"partial_shuffle": True, "overlap": 3}):
        task = build(**flags)
        trained, scored = batches(task), batches(task, training=False)
        assert len(trained) == (75 if "overlap" in flags else 25)
        assert not torch.equal(trained[1]["target"], plain[1]["target"])
        assert all(torch.equal(one["target"], other["target"]) for one, other in zip(scored, plain, strict=True))
        again, later = batches(build(**flags)), batches(task, epoch=2)
        assert all(torch.equal(one["target"], other["target"]) for one, other in zip(trained, again, strict=True))
        same = [torch.equal(one["target"], other["target"]) for one, other in zip(trained, later, strict=True)]
        assert not any(same) if "partial_shuffle" in flags else all(same)


def test_an_overlap_is_checked_against_the_streams_of_all_processes_when_the_text_is_opened(tmp_path):
    path = folder_of_data(tmp_path / "data", "abcd", [4] * 1000)
    for processes, overlap, refused in ((1, 3, False), (3, 3, True), (1, 2, True), (1, 21, True), (5, 7, False)):
        cfg = build(data=path, overlap=overlap, distributed_world_size=processes).args
        task = StatefulLanguageModelingTask.setup_task(cfg)
        if refused:
            with pytest.raises(RKMError, match=f"--overlap {overlap} "):
                task.load_dataset("train")
        else:
            task.load_dataset("train")
        cfg.train_subset = "other"
        task.load_dataset("train")  # to be evaluated


def test_each_update_has_the_rate_of_its_segment_s_length():
    for flags, rescaled in (({}, True), ({"no_lr_rescaling": True}, False)):
        task, sgd = build(variable_bptt=True, **flags), optimizer()
        for item in batches(task)[:8]:
            scale = item["target"].size(1) / 20 if rescaled else 1
            assert run(task, item, sgd) == pytest.approx(30 * scale, rel=1e-5)
            assert sgd.get_lr() == 30, "the schedule's rate is as it was"


def test_two_processes_draw_the_same_lengths():
    task = build(variable_bptt=True)
    one, two = (lengths(batches(task, num_shards=2, shard_id=rank)) for rank in (0, 1))
    assert one == two


def folder_of_data(folder, words, text):
    folder.mkdir()
    dictionary = Dictionary()
    for word in words:
        dictionary.add_symbol(word)
    dictionary.save(str(folder / "dict.txt"))
    builder = make_builder(f"{folder}/train.bin", "mmap", vocab_size=len(dictionary))
    builder.add_item(torch.tensor(text))
    builder.finalize(f"{folder}/train.idx")
    return str(folder)


def test_of_several_folders_each_epoch_has_one(tmp_path):
    texts = [[4, 5, 6, 5, 4, 2], [6, 5, 6, 6, 2]]
    paths = [folder_of_data(tmp_path / f"data{k}", "abc", text) for k, text in enumerate(texts)]
    cfg = build(data=":".join(paths)).args
    task = StatefulLanguageModelingTask.setup_task(cfg)
    assert task.has_sharded_data("train")
    for epoch in (1, 2, 3):
        task.load_dataset("train", epoch)
        iterator = task.get_batch_iterator(task.dataset("train"), max_sentences=1, epoch=epoch)
        (item,) = iterator.next_epoch_itr()
        wanted = texts[(epoch - 1) % 2]
        assert item["target"].tolist() == [wanted]
        assert item["net_input"]["src_tokens"].tolist() == [[2, *wanted[:-1]]]
        assert item["net_input"]["segment"] == 0, "the state begins anew"


@pytest.mark.parametrize(
    ("words", "text", "message"),
    [
        ("abd", [4, 5, 2], "data1/dict.txt has other words than .*data0/dict.txt"),
        ("abc", [4, 7, 2], "data1/train.bin, sentence 1: token 2 is number 7, and the dictionary has 0 to 6"),
        ("abc", [2], "the split 'train' has 1 tokens, fewer than the 2 parallel streams"),
        ("abc", None, "no binarized split 'train' at .*data1/train.bin"),
    ],
)
def test_a_fault_in_a_later_folder_is_found_before_training(tmp_path, words, text, message):
    paths = [
        folder_of_data(tmp_path / "data0", "abc", [4, 5, 2]),
        folder_of_data(tmp_path / "data1", words, text or [2]),
    ]
    if text is None:
        (tmp_path / "data1" / "train.bin").unlink()
    with pytest.raises(RKMError, match=message):
        StatefulLanguageModelingTask.setup_task(build(data=":".join(paths)).args).load_dataset("train")


def test_data_that_workers_read_are_the_same(tmp_path):
    """Each worker opens the file for itself."""
    path = folder_of_data(tmp_path / "data", "abcd", (torch.arange(400) % 4 + 4).tolist())
    task = StatefulLanguageModelingTask.setup_task(build(data=path).args)
    task.load_dataset("train")
    read = [
        list(task.get_batch_iterator(task.dataset("train"), max_sentences=2, num_workers=count).next_epoch_itr())
        for count in (0, 2)
    ]
    assert len(read[0]) == 10
    for one, other in zip(*read, strict=True):
        assert torch.equal(one["target"], other["target"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_token_beyond_the_dictionary_ends_training_when_its_batch_is_read(tmp_path, monkeypatch, workers):
    """In a sentence, out of a worker too, if the file is too large to be looked at whole before."""
    monkeypatch.setattr(tokens, "SAMPLE", 256)
    for name, value in {"READ_WHOLE": 256, "FINGERPRINT": 256, "BLOCK": 100}.items():
        monkeypatch.setattr(token_stream, name, value)
    path = folder_of_data(tmp_path / "data", "abcd", [4] * 2501 + [9] + [4] * 2498)
    task = StatefulLanguageModelingTask.setup_task(build(data=path).args)
    task.load_dataset("train")
    iterator = task.get_batch_iterator(task.dataset("train"), max_sentences=1, num_workers=workers)
    batches = iterator.next_epoch_itr()
    for _ in range(125):
        next(batches)
    with pytest.raises(RKMError) as raised:
        list(batches)
    sentence = sentence_of(raised.value)
    assert sentence.startswith(f"{path}/train.bin, sentence 1: token 2,502 is number 9, and the dictionary has 0 to 7")
    assert "\n" not in sentence


def validate(task, loss, subsets=1):
    with metrics.aggregate(new_root=True):
        task.begin_valid_epoch(1, None)
        for subset in range(subsets):
            agg = MetersDict()
            agg.add_meter("loss", metrics.AverageMeter(), 0)
            agg["loss"].update(loss + subset)
            task.post_validate(None, {}, agg)


def test_the_average_is_in_the_model_from_validation_to_the_next_update():
    task, sgd = build(), optimizer()
    (item, *_), (weight,) = batches(task), list(sgd.params)
    iterates = []
    for loss in (3.0, 2.0, 2.5, 4.0, 4.0, 4.0):
        if task.optimizer is not None:
            validate(task, loss, subsets=2)
        history = sgd.optimizer.param_groups[0]
        if iterates and history["averaged_updates"]:
            expected = torch.stack(iterates[-history["averaged_updates"] :]).mean(0)
            torch.testing.assert_close(weight.detach(), expected)
        run(task, item, sgd)
        iterates.append(weight.detach().clone())
    torch.testing.assert_close(iterates[-1], torch.full((3,), -30.0 * 6), msg="training went on with the weights")
    assert history["validation_losses"] == [2.0, 2.5, 4.0, 4.0, 4.0], "the first validation set's"
    assert history["averaged_updates"] == 3, "begun when 2.5 was above 2.0, recorded a validation before"


@pytest.mark.parametrize("flag", list(DYNAMIC))
def test_how_to_learn_is_for_dynamic_evaluation_alone(flag):
    cfg = OmegaConf.structured(StatefulLanguageModelingConfig(**{flag: 0.1, "update_freq": [1]}))
    with pytest.raises(RKMError, match=f"--{flag.replace('_', '-')} says how --dynamic-eval is to learn"):
        StatefulLanguageModelingTask.setup_task(cfg)


def test_dynamic_evaluation_is_refused_in_training():
    task = build(dynamic_eval=True)
    model = OmegaConf.structured(RKMLanguageModelConfig(_name="rkm_lm", criterion_name=None))
    with pytest.raises(RKMError, match="it is for fairseq-eval-lm"):
        task.build_model(model)
    learner = task.build_model(model, from_checkpoint=True).decoder.learner
    assert learner.numbers == tuple(DYNAMIC.values())


def test_the_end_of_a_text_waits_for_what_was_learned(monkeypatch):
    model = OmegaConf.structured(RKMLanguageModelConfig(_name="rkm_lm", criterion_name=None))
    task, stream, looks = build(dynamic_eval=True), TokenStream(torch.arange(90) + 4, 2, "test"), []
    learner = task.build_model(model, from_checkpoint=True).decoder.learner
    monkeypatch.setattr(learner, "check", lambda: looks.append("now"))
    batches = task.eval_lm_dataloader(stream, 2)
    assert len(batches) == 3
    given = iter(batches)
    assert [next(given)["net_input"]["segment"] for _ in range(3)] == [0, 1, 2]
    assert not looks
    assert next(given, None) is None
    assert looks == ["now"]


def test_evaluation_flags_are_refused_for_an_adaptive_softmax():
    values = {"adaptive_softmax_cutoff": "2", "criterion_name": "adaptive_loss"}
    model = OmegaConf.structured(RKMLanguageModelConfig(_name="rkm_lm", **values))
    for flag, value in (("softmax_temperature", 1.1), ("dynamic_eval", True), ("cache_size", 3)):
        with pytest.raises(RKMError, match=f"--{flag.replace('_', '-')} is for models with a plain softmax"):
            build(**{flag: value}).build_model(model, from_checkpoint=True)
