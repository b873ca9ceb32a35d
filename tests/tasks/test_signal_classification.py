import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from signal_samples import waves, write_npz

from fairseq_rkm import RKMError
from fairseq_rkm.experiments import signal_data
from fairseq_rkm.models.signals import RKMSignalClassifierConfig
from fairseq_rkm.tasks.signal_classification import SignalClassificationConfig, SignalClassificationTask


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    draw = np.random.default_rng(0)
    arrays = {**waves(60), "lengths": draw.integers(40, 101, 60)}
    source = write_npz(folder / "train.npz", **arrays)
    signal_data.main(["--train", str(source), "--out", str(folder / "data")])
    return folder / "data"


def task(data, **flags) -> SignalClassificationTask:
    defaults = {
        "classification_head_name": "sentence_classification_head", "regression_target": False, "train_subset": "train"
    }  # fmt: skip
    return SignalClassificationTask.setup_task(SignalClassificationConfig(data=str(data), **{**defaults, **flags}))


def batches(built, split, **arguments):
    iterator = built.get_batch_iterator(built.load_dataset(split), **arguments)
    return list(iterator.next_epoch_itr(shuffle=split == "train"))


def test_max_tokens_counts_time_steps_and_every_window_is_seen(data):
    built = task(data)
    found = batches(built, "train", max_tokens=350)
    assert sorted(i for batch in found for i in batch["id"].tolist()) == list(range(len(built.datasets["train"])))
    shapes = [batch["net_input"]["source"].shape for batch in found]
    assert max(rows * steps for rows, steps, _ in shapes) <= 350
    assert max(rows for rows, _, _ in shapes) > 5 > min(rows for rows, _, _ in shapes)
    with pytest.raises(RKMError, match=r"has \d+ tokens, more than the 50 that --max-tokens allows"):
        batches(built, "train", max_tokens=50)


def test_batches_differ_from_epoch_to_epoch_in_training_alone(data):
    def seen(split, **flags):
        built = task(data, **flags)
        return [
            [batch["id"].tolist() for batch in batches(built, split, max_sentences=8, epoch=epoch)] for epoch in (1, 2)
        ]

    first, second = seen("train")
    assert sorted(map(sorted, first)) != sorted(map(sorted, second)) or first != second
    assert first == seen("train")[0], "the seed tells them"
    assert len({str(epoch) for epoch in seen("valid")}) == 1


def test_the_order_of_windows_changes_no_logit(data):
    built = task(data)
    config = OmegaConf.structured(RKMSignalClassifierConfig(encoder_hidden_size=5, ngram=6))
    OmegaConf.set_struct(config, False)
    config._name = "rkm_signal_classifier"
    model = built.build_model(config).double().eval()
    assert model.classification_heads["sentence_classification_head"][-1].out_features == 2
    dataset = built.load_dataset("train")

    def logits(rows):
        sample = dataset.collater([dataset[i] for i in rows])["net_input"]
        return model(**sample, classification_head_name="sentence_classification_head")[0]

    order = torch.randperm(len(dataset))
    together = logits(range(len(dataset)))
    assert torch.allclose(logits(order.tolist()), together[order], atol=1e-12)
    assert torch.allclose(torch.cat([logits([i]) for i in range(len(dataset))]), together, atol=1e-12)


def test_the_task_s_mistakes(data, tmp_path):
    with pytest.raises(RKMError, match="--regression-target is for numbers"):
        task(data, regression_target=True)
    with pytest.raises(RKMError, match=r"no .*signals\.json"):
        task(tmp_path)
    with pytest.raises(RKMError, match="needs the folder that"):
        task("")
    with pytest.raises(RKMError, match="no split 'nowhere' at"):
        task(data).load_dataset("nowhere")
