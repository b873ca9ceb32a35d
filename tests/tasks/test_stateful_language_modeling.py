import pytest
import torch
from fairseq.data import Dictionary
from fairseq.logging import metrics
from fairseq.logging.meters import MetersDict
from omegaconf import OmegaConf

from fairseq_rkm.data.token_stream import TokenStream, random_lengths
from fairseq_rkm.optim.nt_asgd import FairseqNonMonotoneASGD, NonMonotoneASGDConfig
from fairseq_rkm.tasks.stateful_language_modeling import StatefulLanguageModelingConfig, StatefulLanguageModelingTask


def build(**flags):
    values = {"batch_size": 2, "batch_size_valid": 2, "train_subset": "train", "dataset_impl": None, "update_freq": [1]}
    cfg = StatefulLanguageModelingConfig(**{**values, "distributed_world_size": 1, "tokens_per_sample": 20, **flags})
    return StatefulLanguageModelingTask(OmegaConf.structured(cfg), Dictionary())


def batches(task, split="train", epoch=1, seed=3, **kwargs):
    stream = TokenStream(torch.randint(4, 9, (1000,)), 2, split)
    iterator = task.get_batch_iterator(stream, max_sentences=2, seed=seed, epoch=epoch, **kwargs)
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
    assert lengths(batches(task, "valid")) == [20] * 25
    assert lengths(batches(build())) == [20] * 25


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
