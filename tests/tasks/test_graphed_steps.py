from argparse import Namespace

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.distributed import LegacyDistributedDataParallel, ModuleProxyWrapper
from omegaconf import OmegaConf

import fairseq_rkm
from fairseq_rkm import RKMError
from fairseq_rkm.criterions.cross_entropy_ar_tar import CrossEntropyARTARCriterion
from fairseq_rkm.graphs.recording import record
from fairseq_rkm.models.language_model.language_model_decoder import RKMLanguageModelDecoder
from fairseq_rkm.models.language_model.rkm_language_model import RKMLanguageModel, RKMLanguageModelConfig
from fairseq_rkm.optim.adamw_average import AveragedAdamWConfig, FairseqAveragedAdamW
from fairseq_rkm.optim.gradient_buckets import buckets_of
from fairseq_rkm.tasks.graphed_steps import StepGraphs, check_graphs
from fairseq_rkm.tasks.stateful_language_modeling import StatefulLanguageModelingConfig, StatefulLanguageModelingTask

fairseq_rkm.register()
WORDS = Dictionary()
for number in range(40):
    WORDS.add_symbol(f"w{number}")
LENGTHS = [5, 7, 5, 7, 7, 5, 9, 5, 5, 7, 9]
CPU = pytest.param("cpu", torch.float32, id="cpu")
GPU = [pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.float32, torch.bfloat16)]


def again(run, pool):
    """What stands in for a graph on a CPU: to replay is to run again, from the same tensors to the same tensors."""
    return run


def build(device, dtype, **flags):
    torch.manual_seed(0)
    sizes = {"decoder_embed_dim": 12, "decoder_hidden_size": 16, "criterion_name": None}
    drops = dict.fromkeys(("dropout", "dropout_input", "dropout_hidden", "dropout_words", "dropout_weights"), 0.2)
    cfg = OmegaConf.structured(RKMLanguageModelConfig(**{**sizes, **drops, "memory_clip": 1.0, **flags}))
    model = RKMLanguageModel(RKMLanguageModelDecoder(cfg, WORDS, WORDS)).to(device, dtype).train()
    config = OmegaConf.structured(AveragedAdamWConfig(lr=[0.01], max_update=10, task_name=None, average_last=0.5))
    criterion = CrossEntropyARTARCriterion(Namespace(target_dictionary=WORDS), False, 2.0, 1.0, 0.5)
    criterion.to(device, dtype).train()
    optimizer = FairseqAveragedAdamW(config, [p for p in (*model.parameters(), criterion.past.bias) if p.requires_grad])
    optimizer.criterion = criterion
    return model, optimizer


def samples(device):
    """Segments of lengths that recur; the stream begins anew, one segment comes twice, and one has padding."""
    generator = torch.Generator().manual_seed(1)
    segments = [0, 1, 2, 3, 3, 4, 0, 1, 2, 3, 4]
    for segment, length in zip(segments, LENGTHS, strict=True):
        source, target = torch.randint(4, 44, (2, 3, length), generator=generator).to(device)
        if segment == 4:
            target[-1, -1] = WORDS.pad()
        yield {
            "net_input": {"src_tokens": source, "segment": segment}, "target": target,
            "ntokens": int(target.ne(WORDS.pad()).sum()), "nsentences": 3,
        }  # fmt: skip


def train(model, optimizer, device, graphs=None):
    """The weights at the end, and all that was logged."""
    criterion, logs = optimizer.criterion, []
    for update, sample in enumerate(samples(device)):
        torch.manual_seed(update)
        optimizer.zero_grad()

        def plainly(sample=sample):
            loss, size, logged = criterion(model, sample)
            optimizer.backward(loss)
            return loss, size, logged

        # The loss, and with it the whole pass, is held until the next step is done.
        held, size, logged = plainly() if graphs is None else graphs.step(sample, plainly)
        logs.append({key: value.item() if torch.is_tensor(value) else value for key, value in logged.items()})
        optimizer.multiply_grads(1 / size)
        optimizer.clip_grad_norm(0.25)
        optimizer.step()
    del held
    assert criterion.past.bias.any()
    return [p.detach().clone() for p in (*model.parameters(), criterion.past.bias)], logs


def graphs_of(model, optimizer, device):
    return StepGraphs(model, optimizer.criterion, optimizer, record if device == "cuda" else again)


@pytest.mark.parametrize(("device", "dtype"), [CPU, *GPU])
@pytest.mark.parametrize(
    "flags",
    [
        {"cell": "rkm_lstm", "share_decoder_input_output_embed": True, "dropout_state": 0.2},
        {"cell": "lstm", "ngram": 2, "memory_clip": None, "learn_initial_state": True},
        {"cell": "rkm_cifg", "no_feedback": True, "ngram": 2},
        {"cell": "rkm_lstm", "kernel": "gaussian"},
        {"cell": "linear_kernel_gated", "kernel": "arccos"},
        {"cell": "rkm_cifg", "kernel": "polynomial", "no_feedback": True},
    ],
    ids=lambda flags: f"{flags['cell']}-{flags.get('kernel', 'linear')}",
)
def test_replayed_steps_are_the_same_training(device, dtype, flags):
    model, optimizer = build(device, dtype, **flags)
    wanted, wanted_logs = train(model, optimizer, device)
    model, optimizer = build(device, dtype, **flags)
    graphs = graphs_of(model, optimizer, device)
    given, given_logs = train(model, optimizer, device, graphs)
    assert optimizer.criterion.past.bias in set(graphs.weights), "whose gradient is a replay's"
    assert {shape[1] for shape in graphs.steps} == {5, 7}, "what has been met before, without padding"
    assert given_logs == wanted_logs
    assert all(torch.equal(g, w) for g, w in zip(given, wanted, strict=True))


def test_the_state_and_the_order_of_segments_matter_to_the_test_above():
    model, optimizer = build("cpu", torch.float32)
    graphs = graphs_of(model, optimizer, "cpu")
    first, second, third, fourth, *_ = samples("cpu")
    for sample in (first, second, third, fourth):
        graphs.step(sample, lambda sample=sample: graphs.criterion(model, sample))
    assert graphs.steps
    carried = model.decoder.carried[True]
    with_state = carried.left[-1].hidden.clone()
    carried.restore(2, [layer.map(torch.zeros_like) for layer in graphs.entered])
    graphs.step(fourth, None)
    assert not torch.equal(carried.left[-1].hidden, with_state)
    with pytest.raises(RKMError, match="segment 1 of the stream came after segment 3"):
        graphs.step(second, None)


def test_hooks_are_called():
    model, optimizer = build("cpu", torch.float32)
    graphs = graphs_of(model, optimizer, "cpu")
    _, second, _, fourth, *_ = samples("cpu")
    graphs.takes(second)
    assert graphs.takes(fourth)
    wrapped = LegacyDistributedDataParallel(model, process_group=None)
    graphs = graphs_of(ModuleProxyWrapper(wrapped), optimizer, "cpu")
    assert graphs.takes(fourth)
    model.register_forward_hook(lambda *_: None)
    assert not graphs.takes(fourth)


def test_graphs_of_several_processes_leave_gradients_where_they_are_averaged():
    model, optimizer = build("cpu", torch.float32)
    wrapped = ModuleProxyWrapper(LegacyDistributedDataParallel(model, process_group=None))
    graphs = graphs_of(wrapped, optimizer, "cpu")
    first, second, third, fourth, *_ = samples("cpu")
    for sample in (first, second, third):
        graphs.step(sample, lambda sample=sample: graphs.criterion(model, sample))
    graphs.step(fourth, None)
    places = buckets_of(wrapped).places
    assert all(p.grad is place for p, place in zip(model.parameters(), places, strict=True))
    assert any(place.any() for place in places)


@pytest.mark.parametrize("wrapped", [False, True])
def test_half_precision_is_told_of_new_gradients(wrapped):
    model, optimizer = build("cpu", torch.float32)
    half = Namespace(backward=optimizer.backward, _needs_sync=False, criterion=optimizer.criterion)
    outer = Namespace(backward=half.backward, _optimizer=half, criterion=optimizer.criterion)
    graphs = graphs_of(model, outer if wrapped else half, "cpu")
    first, second, third, fourth, *_ = samples("cpu")
    for sample in (first, second, third):
        graphs.step(sample, lambda sample=sample: graphs.criterion(model, sample))
    assert not half._needs_sync
    graphs.step(fourth, None)
    assert half._needs_sync


def task_of(**flags):
    values = {
        "batch_size": 3, "batch_size_valid": 3, "train_subset": "train", "dataset_impl": None, "update_freq": [1],
        "distributed_world_size": 1, "cpu": False, "fp16": False, "amp": False, "cuda_graphs": True,
    }  # fmt: skip
    return StatefulLanguageModelingTask(OmegaConf.structured(StatefulLanguageModelingConfig(**values | flags)), WORDS)


def test_the_task_replays_what_it_can(monkeypatch):
    outcomes = []
    for flag in (False, True):
        model, optimizer = build("cpu", torch.float32)
        task = task_of(cuda_graphs=flag)
        criterion = CrossEntropyARTARCriterion(Namespace(target_dictionary=WORDS), False, 2.0, 1.0)
        monkeypatch.setattr(StepGraphs.__init__, "__defaults__", (again,))
        for update, sample in enumerate(samples("cpu")):
            torch.manual_seed(update)
            optimizer.zero_grad()
            task.train_step(sample, model, criterion, optimizer, update)
            optimizer.step()
        outcomes.append([p.detach().clone() for p in model.parameters()])
        assert (task.graphs is not None) == flag
    assert len(task.graphs.steps) == 2
    assert all(torch.equal(plain, replayed) for plain, replayed in zip(*outcomes, strict=True))


@pytest.mark.parametrize(
    ("flags", "decoder", "message"),
    [
        ({"cpu": True}, {}, "needs a CUDA GPU"),
        ({"fp16": True}, {}, "use --bf16"),
        ({"amp": True}, {}, "use --bf16"),
        ({}, {"adaptive_softmax": object()}, "adaptive softmax"),
        ({}, {"reset_at_eos": True}, "cannot be had with --reset-at-eos, which cuts"),
    ],
)
def test_where_there_can_be_none_training_does_not_begin(monkeypatch, flags, decoder, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = Namespace(decoder=Namespace(**{"adaptive_softmax": None, "reset_at_eos": False, **decoder}))
    given = {"cpu": False, "fp16": False, "amp": False, **flags}
    with pytest.raises(RKMError, match=f"--cuda-graphs.*{message}"):
        check_graphs(Namespace(**given), model)
