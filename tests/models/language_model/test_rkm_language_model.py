import itertools

import pytest
import torch
from fairseq.data import Dictionary
from helpers import assert_close, randomized
from omegaconf import OmegaConf

from fairseq_rkm import CELLS, RKM, RKMError
from fairseq_rkm.models.language_model.language_model_decoder import RKMLanguageModelDecoder, ngrams_by_layer
from fairseq_rkm.models.language_model.rkm_language_model import RKMLanguageModelConfig, check_flags

DROPOUTS = "dropout", *(f"dropout_{place}" for place in ("input", "hidden", "words", "weights", "state"))


@pytest.fixture(scope="module")
def dictionary():
    words = Dictionary()
    for i in range(40):
        words.add_symbol(f"w{i}")
    return words


def decoder(dictionary, **flags):
    sizes = {"decoder_embed_dim": 6, "decoder_hidden_size": 8, "criterion_name": None}
    cfg = OmegaConf.structured(RKMLanguageModelConfig(**{**sizes, **flags}))
    built = RKMLanguageModelDecoder(cfg, dictionary, dictionary).double()
    for layer in built.layers:
        randomized(layer)
    return built.eval()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("ngram", [1, 3, [2, 1]])
def test_step_by_step_equals_the_full_pass_and_beams_reorder(dictionary, cell, ngram):
    model = decoder(dictionary, cell=cell, ngram=ngram, decoder_layers=2, skip_connections=True)
    tokens = torch.randint(4, 44, (3, 7))
    full, _ = model(tokens)
    incremental: dict = {}
    for t in range(4):
        step, _ = model(tokens[:, : t + 1], incremental_state=incremental)
        assert_close(step[:, 0], full[:, t])
    beams = torch.tensor([2, 2, 0, 1])
    model.reorder_incremental_state_scripting(incremental, beams)
    for t in range(4, 7):
        step, _ = model(tokens[beams, : t + 1], incremental_state=incremental)
        assert_close(step[:, 0], full[beams, t])


def test_a_prefix_may_enter_the_incremental_state_at_once(dictionary):
    model = decoder(dictionary, ngram=2)
    tokens = torch.randint(4, 44, (2, 6))
    full, _ = model(tokens)
    incremental: dict = {}
    assert_close(model(tokens[:, :4], incremental_state=incremental)[0], full[:, :4])
    assert_close(model(tokens[:, :5], incremental_state=incremental)[0][:, 0], full[:, 4])


@pytest.mark.parametrize("tied", [False, True])
def test_a_mixture_of_softmaxes_in_all_modes(dictionary, tied):
    model = decoder(dictionary, softmaxes=3, share_decoder_input_output_embed=tied, decoder_layers=2)
    assert [layer.hidden_size for layer in model.layers] == [8, 8]
    tokens = torch.randint(4, 44, (2, 6))
    full, extra = model(tokens)
    assert_close(full.exp().sum(-1), torch.ones(2, 6, dtype=torch.float64))
    assert_close(full, model.mixture(extra["features"].transpose(0, 1), model.output_projection))
    incremental: dict = {}
    for t in range(6):
        assert_close(model(tokens[:, : t + 1], incremental_state=incremental)[0][:, 0], full[:, t])
    assert_close(torch.cat([model(tokens[:, :2], segment=0)[0], model(tokens[:, 2:], segment=1)[0]], 1), full)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"softmaxes": 0}, "--softmaxes must be at least 1, not 0"),
        ({"softmaxes": 2, "adaptive_softmax_cutoff": "8,16"}, "exclude each other"),
        ({"dropout_latent": 0.1}, "--dropout-latent is for a mixture of softmaxes: give --softmaxes, too"),
    ],
)
def test_flags_of_a_mixture_that_do_not_go_together(flags, sentence):
    with pytest.raises(RKMError, match=sentence):
        check_flags(RKMLanguageModelConfig(criterion_name=None, **flags), 44, 44)


@pytest.mark.parametrize("ngram", ["3,1", "[3, 1]", " 3, 1 ", (3, 1)])
def test_n_grams_of_layers_are_read_as_text_too(ngram):
    assert ngrams_by_layer(ngram, 2) == [3, 1]
    assert ngrams_by_layer("2", 3) == ngrams_by_layer([2], 3) == ngrams_by_layer(2, 3) == [2, 2, 2]


@pytest.mark.parametrize("skip", [False, True])
def test_each_layer_has_its_own_n_gram_and_a_skip_connection_leads_over_it(dictionary, skip):
    model = decoder(dictionary, ngram=[3, 1, 2], decoder_layers=3, skip_connections=skip)
    tokens = torch.randint(4, 44, (2, 7))
    x = model.embed_tokens(tokens).transpose(0, 1)
    for layer, (n, m, d) in zip(model.layers, ((3, 6, 8), (1, 8, 8), (2, 8, 8)), strict=True):
        alone = RKM(m, d, ngram=n).double()
        alone.load_state_dict(layer.state_dict())
        output, state = alone(x)
        assert state.context is None if n == 1 else state.context[0].shape == (n - 1, 2, m)
        x = x + output if skip and m == d else output
    full, extra = model(tokens)
    assert_close(extra["raw_features"], x)
    assert_close(full, model.output_projection(x.transpose(0, 1)))
    for segment in range(3):
        columns = slice(3 * segment, 3 * segment + 3)
        assert_close(model(tokens[:, columns], segment=segment)[0], full[:, columns])


def test_a_skip_connection_passes_by_the_dropout_between_layers(dictionary):
    model = decoder(dictionary, decoder_layers=2, decoder_hidden_size=6, dropout_hidden=0.9, skip_connections=True)
    for p in model.layers[1].parameters():
        torch.nn.init.zeros_(p)  # this layer's output is zero
    tokens = torch.randint(4, 44, (2, 7))
    wanted = model(tokens)[1]["raw_features"]
    assert_close(model.train()(tokens)[1]["raw_features"], wanted)


def test_segments_carry_the_state_and_training_and_evaluation_do_not_mix(dictionary):
    model = decoder(dictionary, ngram=3)
    tokens = torch.randint(4, 44, (2, 9))
    full, _ = model(tokens)
    for mode in (True, False):
        model.train(mode)
        assert_close(model(tokens[:, :3], segment=0)[0], full[:, :3])
    model.train()
    assert_close(model(tokens[:, 3:6], segment=1)[0], full[:, 3:6])
    assert_close(model(tokens[:, 3:6], segment=1)[0], full[:, 3:6])
    model.eval()
    assert_close(model(tokens[:, 3:6], segment=1)[0], full[:, 3:6])
    model.train()
    output, _ = model(tokens[:, 6:], segment=2)
    assert_close(output, full[:, 6:])
    output.sum().backward()
    with pytest.raises(RKMError, match="carried state is of 2 streams, this batch of 1"):
        model(tokens[:1, :3], segment=3)


def test_sentences_and_streams_start_from_the_learned_state(dictionary):
    model = decoder(dictionary, ngram=2, learn_initial_state=True)
    tokens = torch.randint(4, 44, (2, 6))
    full, _ = model(tokens)
    starts = [layer.initial_state(2) for layer in model.layers]
    assert_close(model.output_layer(model.run(tokens, starts, None, None)[0].transpose(0, 1)), full)
    incremental: dict = {}
    for t in range(6):
        assert_close(model(tokens[:, : t + 1], incremental_state=incremental)[0][:, 0], full[:, t])
    model.train()
    first, _ = model(tokens[:, :3], segment=0)
    assert_close(first, full[:, :3])
    assert_close(model(tokens[:, 3:], segment=1)[0], full[:, 3:])
    first.sum().backward()
    learned = {name: p for name, p in model.named_parameters() if ".initial_" in name}
    assert len(learned) == 4
    assert all(p.grad.ne(0).any() for p in learned.values())


@pytest.mark.parametrize("no_feedback", [False, True])
def test_no_segment_leaves_parameters_without_a_gradient(dictionary, no_feedback):
    """Which distributed training would stumble over."""
    model = decoder(dictionary, learn_initial_state=True, no_feedback=no_feedback).train()
    tokens = torch.randint(4, 44, (2, 6))
    full, _ = model(tokens)
    for segment in (0, 1):
        model.zero_grad()
        output, _ = model(tokens[:, 3 * segment : 3 * segment + 3], segment=segment)
        assert_close(output, full[:, 3 * segment : 3 * segment + 3])
        output.sum().backward()
        assert not {name for name, p in model.named_parameters() if p.grad is None}


@pytest.mark.parametrize(("ngram", "learned"), [(1, False), (3, False), (2, True)])
def test_with_reset_at_eos_sentences_in_a_stream_are_scored_as_sentences_alone(dictionary, ngram, learned):
    flags = {"ngram": ngram, "decoder_layers": 2, "learn_initial_state": learned}
    model = decoder(dictionary, reset_at_eos=True, **flags)
    eos, lengths = torch.tensor([dictionary.eos()]), [[3, 1, 6, 2], [5, 5, 2, 0]]
    rows = [[torch.cat([eos, torch.randint(4, 44, (n,))]) for n in row] for row in lengths]
    wanted = torch.stack([torch.cat([model(s.unsqueeze(0))[0][0] for s in row]) for row in rows])
    tokens = torch.stack([torch.cat(row) for row in rows])
    whole, extra = model(tokens)
    assert_close(whole, wanted)
    assert torch.equal(extra["reset"].t(), tokens.eq(dictionary.eos()))
    assert not torch.allclose(decoder(dictionary, **flags)(tokens)[0], wanted)
    for training in (True, False):
        model.train(training)
        cuts = [(0, 4), (4, 5), (5, 12), (12, 16)]
        pieces = [model(tokens[:, a:b], segment=k)[0] for k, (a, b) in enumerate(cuts)]
        assert_close(torch.cat(pieces, dim=1), wanted)
    incremental: dict = {}
    steps = [model(tokens[:, :6], incremental_state=incremental)[0]]
    steps += [model(tokens[:, : t + 1], incremental_state=incremental)[0] for t in range(6, 16)]
    assert_close(torch.cat(steps, dim=1), wanted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(dictionary, side):
    model = decoder(dictionary, ngram=2, layer_norm=True)
    tokens = torch.randint(4, 44, (1, 5))
    pad = torch.full((1, 2), dictionary.pad())
    padded = torch.cat([pad, tokens] if side == "left" else [tokens, pad], dim=1)
    output, _ = model(torch.cat([padded, torch.randint(4, 44, (1, 7))]))
    real = slice(2, 7) if side == "left" else slice(0, 5)
    assert_close(output[:1, real], model(tokens)[0])


@pytest.mark.parametrize(("layers", "tied"), itertools.product([1, 2, 3], [False, True]))
def test_layers_end_at_the_embedding_s_size_when_tied(dictionary, layers, tied):
    flags = {"decoder_hidden_size": 6} if layers == 1 and tied else {}
    model = decoder(dictionary, decoder_layers=layers, share_decoder_input_output_embed=tied, **flags)
    sizes = [layer.hidden_size for layer in model.layers]
    hidden = flags.get("decoder_hidden_size", 8)
    assert sizes == [hidden] * (layers - 1) + [6 if tied else hidden]
    assert (model.output_projection.weight is model.embed_tokens.weight) == tied
    assert model(torch.randint(4, 44, (2, 3)))[0].shape == (2, 3, 44)


def test_each_dropout_acts_where_its_flag_says(dictionary):
    tokens = torch.arange(4, 44).view(1, 40)
    for flag in DROPOUTS:
        model = decoder(dictionary, **{flag: 0.5})
        assert torch.equal(model(tokens)[0], model(tokens)[0]), "none in evaluation"
        model.train()
        assert not torch.equal(model(tokens)[0], model(tokens)[0]), flag
    model = decoder(dictionary, dropout=0.5, decoder_hidden_size=50).train()
    zero = model.extract_features(tokens)[0].eq(0)
    assert (zero == zero[:, :1]).all(), "one mask for all steps"
    assert 0.2 < zero[0, 0].double().mean() < 0.8


def test_adaptive_softmax(dictionary):
    model = decoder(dictionary, adaptive_softmax_cutoff="10,20", adaptive_softmax_factor=2)
    tokens = torch.randint(4, 44, (2, 3))
    output = model(tokens)
    assert output[0].shape == (2, 3, 8)
    probabilities = model.get_normalized_probs(output, log_probs=False, sample=None)
    assert_close(probabilities.sum(-1), torch.ones(2, 3), dtype=torch.float32)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ngram": 3, "ngram_padding": "same"}, "looks ahead"),
        ({"ngram": [1, 3], "ngram_padding": "same"}, "looks ahead"),
        ({"ngram": [2, 1, 1]}, "--ngram has 3 numbers, one for each layer, and --decoder-layers is 2"),
        ({"ngram": [2, 0]}, "--ngram takes a whole number from 1 to 10,000, or one for each layer"),
        ({"ngram": "2,1,1"}, "--ngram has 3 numbers, one for each layer, and --decoder-layers is 2"),
        ({"ngram": "2,-1"}, "--ngram takes a whole number from 1 to 10,000, or one for each layer, as 2,1,1, not '2,"),
        ({"ngram": "2,1,"}, "--ngram takes a whole number from 1 to 10,000, or one for each layer"),
        ({"ngram": 10**6}, "--ngram takes a whole number from 1 to 10,000, or one for each layer"),
        ({"ngram": ""}, "--ngram takes a whole number from 1 to 10,000, or one for each layer"),
        ({"ngram": 1.5}, "--ngram takes a whole number from 1 to 10,000, or one for each layer, as 2,1,1, not 1.5"),
        ({"ngram": True}, "--ngram takes a whole number"),
        ({"ngram": "two"}, "--ngram takes a whole number"),
        ({"ngram": None}, "--ngram takes a whole number"),
        ({"ngram": []}, "--ngram has 0 numbers"),
        ({"share_decoder_input_output_embed": True, "adaptive_softmax_cutoff": "10"}, "exclude each other"),
        ({"share_decoder_input_output_embed": True, "decoder_layers": 1}, "ends at the embedding's size"),
        ({"criterion_name": "adaptive_loss"}, "needs --adaptive-softmax-cutoff"),
        ({"decoder_layers": 0}, "must be at least 1"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, message):
    cfg = RKMLanguageModelConfig(**{"criterion_name": None, "decoder_hidden_size": 8, "decoder_embed_dim": 6, **flags})
    with pytest.raises(RKMError, match=message):
        check_flags(cfg, 44, 44)


def test_skip_connections_need_a_layer_that_ends_at_its_input_s_size(dictionary):
    with pytest.raises(RKMError, match=r"none does: the sizes are 6, 8, 6 \(--decoder-embed-dim"):
        decoder(dictionary, skip_connections=True, share_decoder_input_output_embed=True)


def test_tied_embeddings_need_one_dictionary():
    cfg = RKMLanguageModelConfig(share_decoder_input_output_embed=True, criterion_name=None)
    with pytest.raises(RKMError, match="input's has 44 types and the output's 40"):
        check_flags(cfg, 44, 40)


def test_dropouts_outside_the_range_are_refused_by_name(dictionary):
    for flag in DROPOUTS:
        with pytest.raises(RKMError, match=f"--{flag.replace('_', '-')} must lie within"):
            decoder(dictionary, **{flag: 1.0})


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"cell": "gated_cnn"}, "without feedback nothing reads it"),
        ({"no_feedback": True}, "without feedback nothing reads it"),
        ({"kernel": "gaussian"}, "the gaussian kernel does more than multiply"),
    ],
)
def test_dropout_of_a_state_that_no_product_reads_is_refused(flags, reason):
    cfg = RKMLanguageModelConfig(dropout_state=0.2, criterion_name=None, **flags)
    with pytest.raises(RKMError, match=f"--dropout-state .* {reason}"):
        check_flags(cfg, 40, 40)


def test_recurrent_weights_are_trained_through_their_dropout_with_one_mask_for_all_steps(dictionary):
    model = decoder(dictionary, cell="lstm", dropout_weights=0.5, decoder_layers=2).train()
    output, _ = model(torch.randint(4, 44, (2, 9)))
    output.square().sum().backward()
    for layer in model.layers:
        assert isinstance(layer.weight_hh_l0, torch.nn.Parameter)
        # An element dropped at one step is dropped at all: else none would be without gradient.
        assert 0.3 < layer.weight_hh_l0.grad.eq(0).double().mean() < 0.7
        assert layer.weight_ih_l0.grad.ne(0).all()


def test_the_extras_hold_the_last_layer_s_output_before_and_after_its_dropout(dictionary):
    model = decoder(dictionary, dropout=0.5).train()
    _, extra = model(torch.randint(4, 44, (2, 5)))
    kept = extra["features"].ne(0)
    assert extra["features"].shape == extra["raw_features"].shape == (5, 2, 8)
    assert_close(extra["features"], 2 * extra["raw_features"] * kept)
