import copy
import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator
from helpers import assert_close, product_type, run_at_once
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from small_translation import JOINED, JOINED_SOFTMAX, SMALL, SOURCE, TARGET, batch, build, dictionary, pad

from fairseq_rkm import CELLS, RKMError
from fairseq_rkm.graphs.decoding_graphs import DecodingGraphs
from fairseq_rkm.graphs.graphed_function import GraphedFunction
from fairseq_rkm.models.translation import rkm_model
from fairseq_rkm.models.translation.rkm_model import RKMConfig, RKMModel, check_flags, check_graphs, initialize
from fairseq_rkm.models.translation.translation_presets import rkm_iwslt_de_en, rkm_tiny


def assert_steps_equal_the_full_pass(model):
    """As fairseq decodes, without gradients, and with them: through packed weights and through the layers."""
    with torch.no_grad():
        _assert_steps_equal_the_full_pass(model)
    _assert_steps_equal_the_full_pass(model)


def _assert_steps_equal_the_full_pass(model):
    """Four steps in order, then three more of reordered beams; outputs and attention."""
    source, tokens = batch()
    encoder_out = model.encoder(source)
    full, extra = model.decoder(tokens, encoder_out)
    incremental: dict = {}
    beams = torch.tensor([2, 2, 0, 1])
    for t in range(7):
        if t == 4:
            model.decoder.reorder_incremental_state_scripting(incremental, beams)
            encoder_out = model.encoder.reorder_encoder_out(encoder_out, beams)
            tokens, full, extra = tokens[beams], full[beams], {"attn": [extra["attn"][0][beams]]}
        step, step_extra = model.decoder(tokens[:, : t + 1], encoder_out, incremental_state=incremental)
        assert_close(step[:, 0], full[:, t])
        assert_close(step_extra["attn"][0][:, 0], extra["attn"][0][:, t])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("ngram", [1, 2, 3, 5])
@pytest.mark.parametrize("input_feeding", [False, True])
def test_step_by_step_equals_the_full_pass_and_beams_reorder(cell, ngram, input_feeding):
    assert_steps_equal_the_full_pass(
        build(cell=cell, ngram=ngram, input_feeding=input_feeding, decoder_layers=2, attention_layer=1)
    )


@pytest.fixture
def replayed(monkeypatch):
    """Steps of decoders are replayed on a CPU too, where to replay is to do again; GPUs do it by themselves."""
    monkeypatch.setattr(DecodingGraphs.__init__, "__defaults__", (run_at_once,))
    monkeypatch.setattr(DecodingGraphs, "available", lambda self, _like: not self.refused)


@pytest.mark.usefixtures("replayed")
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("ngram", [1, 3])
@pytest.mark.parametrize("flags", [{}, {"input_feeding": True}, {"layer_norm": True, "attention_layer": 0}])
def test_replayed_steps_equal_the_full_pass(cell, ngram, flags):
    model = build(**{"cell": cell, "ngram": ngram, "decoder_layers": 2, "attention_layer": 1, **flags})
    for _ in range(2):
        with torch.no_grad():
            _assert_steps_equal_the_full_pass(model)
        assert len(model.decoder.graphs.recorded) == 1
    _assert_steps_equal_the_full_pass(model)  # with gradients, through the layers


@pytest.mark.usefixtures("replayed")
def test_two_sequences_in_turns_do_not_mix():
    """Graphs are the decoder's and states are not."""
    model = build(ngram=2, decoder_layers=2).requires_grad_(False)
    batches = [batch(), batch(2), batch()]
    for _ in range(2):
        incremental = [{} for _ in batches]
        for t in range(7):
            for (source, tokens), state in zip(batches, incremental, strict=True):
                with torch.no_grad():
                    step, _ = model.decoder(tokens[:, : t + 1], model.encoder(source), state)
                assert_close(step[:, 0], model(source, None, tokens)[0][:, t])
    assert len(model.decoder.graphs.recorded) == 1


@pytest.mark.usefixtures("replayed")
@pytest.mark.parametrize("feeding", [False, True])
def test_beam_search_of_replayed_steps_is_the_same_also_after_training_on(feeding):
    model = build(ngram=2, decoder_layers=2, input_feeding=feeding, **JOINED_SOFTMAX)
    found = []
    for number in range(4):
        torch.manual_seed(number)
        source, _ = batch(5, source_length=6 + number % 2)
        found.append([generate(model, source, beam_size=3) for _ in range(2)])
        assert len(model.decoder.graphs.recorded) == min(number + 1, 2)
        model.decoder.graphs.refused = True
        found[-1].append(generate(model, source, beam_size=3))
        model.decoder.graphs.refused = False
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
    for one, again, without in found:
        assert one == again == without
    assert found[0] != found[2]


def test_beams_may_be_reordered_more_than_once_between_steps_and_before_the_first():
    model = build(ngram=2).requires_grad_(False)
    source, tokens = batch()
    encoder_out, incremental = model.encoder(source), {}
    model.decoder.reorder_incremental_state(incremental, torch.tensor([1, 2, 0]))  # of nothing yet
    model.decoder(tokens[:, :3], encoder_out, incremental)
    for order in (torch.tensor([2, 0, 1]), torch.tensor([1, 1])):
        model.decoder.reorder_incremental_state(incremental, order)
        encoder_out, tokens = model.encoder.reorder_encoder_out(encoder_out, order), tokens[order]
        source = source[order]
    step, _ = model.decoder(tokens[:, :4], encoder_out, incremental)
    assert_close(step[:, 0], model(source, None, tokens)[0][:, 3])


@pytest.mark.usefixtures("replayed")
def test_a_sequence_that_began_without_graphs_goes_on_without(monkeypatch):
    """Its packed weights are not where graphs would look for those of the next."""
    model = build().requires_grad_(False)
    source, tokens = batch()
    encoder_out, incremental = model.encoder(source), {}
    for t in range(7):
        monkeypatch.setattr(DecodingGraphs, "available", lambda *_, t=t: t > 0)
        with torch.no_grad():
            model.decoder(tokens[:, : t + 1], encoder_out, incremental)
    assert not model.decoder.graphs.recorded


@pytest.mark.usefixtures("replayed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_length_has_one_graph(dtype):
    """From the first step on states are of the same types, and n-grams have their contexts."""
    model = build(ngram=3, decoder_layers=2).to(dtype)
    for rows in (3, 2):
        source, tokens = batch(rows)
        incremental = {}
        with torch.no_grad():
            encoder_out = model.encoder(source)
            for t in range(4):
                model.decoder(tokens[:, : t + 1], encoder_out, incremental)
    assert len(model.decoder.graphs.recorded.met) == len(model.decoder.graphs.recorded) == 1


@pytest.mark.usefixtures("replayed")
@pytest.mark.parametrize("draws", ["training", "retain dropout"])
def test_steps_that_draw_dropout_are_not_replayed(draws):
    model = build(dropout=0.5).requires_grad_(False)
    source, tokens = batch()
    encoder_out = model.encoder(source)
    if draws == "training":
        model.train()
    else:
        model.decoder.dropout_out.apply_during_inference = True
    with torch.no_grad():
        runs = []
        for _ in range(4):
            incremental = {}
            runs.append([model.decoder(tokens[:, : t + 1], encoder_out, incremental)[0] for t in range(3)][-1])
    assert not model.decoder.graphs.recorded
    assert not torch.equal(runs[2], runs[3])


@pytest.mark.gpu
def test_a_gpu_replays_the_steps_of_beam_search():
    model = build(ngram=3, decoder_layers=2, layer_norm=True, attention_layer=1).to("cuda")
    for rows in (5, 3, 8):
        source = batch(rows)[0].cuda()
        replays = generate(model, source, beam_size=4)
        assert model.decoder.graphs.recorded
        model.decoder.graphs.refused = True
        assert generate(model, source, beam_size=4) == replays
        model.decoder.graphs.refused = False


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("flags", [{}, {"input_feeding": True}])
def test_replayed_steps_on_a_gpu_equal_those_that_are_not(dtype, flags):
    model = build(ngram=3, decoder_layers=2, layer_norm=True, **flags).to("cuda", dtype)
    source, tokens = (x.cuda() for x in batch(6))
    outcomes = []
    for refused in (True, False, False):
        model.decoder.graphs.refused = refused
        incremental, scores, given = {}, [], tokens
        with torch.no_grad():
            encoder_out = model.encoder(source)
            for t in range(7):
                if t in {3, 5}:
                    order = torch.tensor([5, 0, 0, 2] if t == 3 else [3, 1], device="cuda")
                    model.decoder.reorder_incremental_state(incremental, order)
                    encoder_out, given = model.encoder.reorder_encoder_out(encoder_out, order), given[order]
                scores += [x.float() for x in model.decoder(given[:, : t + 1], encoder_out, incremental)[0]]
        outcomes.append(torch.cat(scores))
    assert [graph.rows for graph in model.decoder.graphs.recorded.values()] == [6]
    for replayed in outcomes[1:]:
        assert_close(replayed, outcomes[0], dtype=product_type(dtype, "cuda"))


@pytest.mark.parametrize("flags", [{"attention_layer": 0}, {"attention_layer": 2, "input_feeding": True}])
def test_step_by_step_with_attention_elsewhere_and_layer_norm(flags):
    assert_steps_equal_the_full_pass(build(decoder_layers=3, encoder_layers=2, ngram=2, layer_norm=True, **flags))


def test_the_state_matters_to_the_tests_above():
    """Forgetting to reorder, or an n-gram context left behind, would show."""
    model = build(ngram=3, cell="cnn").requires_grad_(False)
    source, tokens = batch(2)
    encoder_out, incremental = model.encoder(source), {}
    model.decoder(tokens[:, :3], encoder_out, incremental_state=incremental)
    swapped = model.encoder.reorder_encoder_out(encoder_out, torch.tensor([1, 0]))
    step, _ = model.decoder(tokens[:, :4].flip(0), swapped, incremental_state=incremental)
    full, _ = model(source.flip(0), None, tokens[:, :4].flip(0))
    assert not torch.allclose(step[:, 0], full[:, 3])


def test_a_prefix_may_enter_the_incremental_state_at_once():
    for input_feeding in (False, True):
        model = build(ngram=2, input_feeding=input_feeding)
        source, tokens = batch()
        full, _ = model(source, None, tokens)
        encoder_out, incremental = model.encoder(source), {}
        assert_close(model.decoder(tokens[:, :4], encoder_out, incremental)[0], full[:, :4])
        assert_close(model.decoder(tokens[:, :5], encoder_out, incremental)[0][:, 0], full[:, 4])


@settings(max_examples=40, deadline=None)
@given(
    cell=st.sampled_from(list(CELLS)), ngram=st.sampled_from([1, 3]), padding=st.sampled_from(["causal", "same"]),
    layers=st.integers(1, 2), width=st.integers(1, 4), source_side=st.sampled_from(["left", "right"]),
    target_side=st.sampled_from(["left", "right"]), input_feeding=st.booleans(), bidirectional=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_padding_on_either_side_of_source_and_target_changes_nothing(
    cell, ngram, padding, layers, width, source_side, target_side, input_feeding, bidirectional, seed
):
    torch.manual_seed(seed)
    model = build(
        cell=cell, ngram=ngram, ngram_padding=padding, encoder_layers=layers, input_feeding=input_feeding,
        encoder_bidirectional=bidirectional, layer_norm=seed % 2 == 0,
    )  # fmt: skip
    source, tokens = batch(1, 4, 3)
    other_source, other_tokens = batch(1, 4 + width, 3 + width)
    full, extra = model(source, None, tokens)
    padded, padded_extra = model(
        torch.cat([pad(source, width, source_side), other_source]),
        None,
        torch.cat([pad(tokens, width, target_side), other_tokens]),
    )
    here = slice(width, None) if target_side == "left" else slice(0, 3)
    there = slice(width, None) if source_side == "left" else slice(0, 4)
    assert_close(padded[:1, here], full)
    assert_close(padded_extra["attn"][0][:1, here, there], extra["attn"][0])


def generate(model, source, **options):
    generator = SequenceGenerator([model], model.decoder.dictionary, max_len_b=12, **options)
    sample = {"net_input": {"src_tokens": source, "src_lengths": source.ne(SOURCE.pad()).sum(1)}}
    return [[h["tokens"].tolist() for h in beams] for beams in generator.generate([model], sample)]


@pytest.mark.parametrize("input_feeding", [False, True])
def test_batch_size_and_side_of_padding_do_not_change_a_translation(input_feeding):
    model = build(
        ngram=3, ngram_padding="same", encoder_bidirectional=True, decoder_layers=2, input_feeding=input_feeding
    )
    lengths = [9, 2, 5, 1]
    sentences = [torch.cat([torch.randint(4, 34, (1, n)), torch.tensor([[SOURCE.eos()]])], dim=1) for n in lengths]
    alone = [generate(model, sentence, beam_size=4)[0] for sentence in sentences]
    assert len({str(beams) for beams in alone}) == len(lengths)
    for side in ("left", "right"):
        together = torch.cat([pad(sentence, 10 - sentence.size(1), side) for sentence in sentences])
        assert generate(model, together, beam_size=4) == alone


def test_encoder_and_decoder_have_their_own_cells_and_n_grams():
    model = build(cell="ran", ngram=2, encoder_cell="gated_cnn", encoder_ngram=3, decoder_layers=2)
    assert {(layer.cell, layer.ngram) for layer in model.encoder.layers} == {("gated_cnn", 3)}
    assert {(layer.cell, layer.ngram) for layer in model.decoder.layers} == {("ran", 2)}
    model = build(decoder_cell="lstm", ngram=3, decoder_ngram=1, ngram_padding="same")
    assert [(layer.cell, layer.ngram, layer.ngram_padding) for layer in model.encoder.layers] == [
        ("rkm_lstm", 3, "same")
    ]
    assert [(layer.cell, layer.ngram, layer.ngram_padding) for layer in model.decoder.layers] == [("lstm", 1, "causal")]


@pytest.mark.parametrize(("encoder_layers", "decoder_layers"), itertools.product([1, 2, 3], repeat=2))
def test_stacks_of_any_depths_meet_and_all_parameters_learn(encoder_layers, decoder_layers):
    model = build(encoder_layers=encoder_layers, decoder_layers=decoder_layers, encoder_bidirectional=True)
    source, tokens = batch()
    model(source, None, tokens)[0].pow(2).sum().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert not idle


@pytest.mark.parametrize("cell", CELLS)
def test_no_cell_leaves_parameters_without_a_gradient(cell):
    """Which distributed training would stumble over."""
    model = build(cell=cell, decoder_layers=2)
    source, tokens = batch()
    model(source, None, tokens)[0].pow(2).sum().backward()
    assert not {name for name, p in model.named_parameters() if p.grad is None}


def test_the_encoder_learns_where_it_starts_and_the_bridges_start_the_decoder():
    model = build(learn_initial_state=True, encoder_bidirectional=True, encoder_layers=2, ngram=3)
    source, tokens = batch()
    model(source, None, tokens)[0].sum().backward()
    learned = {name: p for name, p in model.named_parameters() if "initial" in name}
    assert len(learned) == 8
    assert all(name.startswith("encoder.layers") and p.grad.ne(0).any() for name, p in learned.items())
    assert_steps_equal_the_full_pass(model)


def test_no_step_sees_the_target_ahead_but_each_sees_all_of_the_source():
    for flags in ({}, {"input_feeding": True}, {"decoder_layers": 2, "attention_layer": 1}):
        model = build(ngram=3, ngram_padding="same", **flags)
        source, tokens = batch()
        output, _ = model(source, None, tokens)
        changed = tokens.clone()
        changed[:, 4] = (tokens[:, 4] - 3) % 40 + 4
        other, _ = model(source, None, changed)
        assert_close(other[:, :4], output[:, :4])
        assert not torch.allclose(other[:, 4], output[:, 4])
        for position in (0, 5):
            changed = source.clone()
            changed[:, position] = (source[:, position] - 3) % 30 + 4
            other, _ = model(changed, None, tokens)
            assert all(not torch.allclose(other[:, t], output[:, t], atol=1e-12) for t in range(7))


def test_initial_weights_are_luong_s():
    sizes = {"encoder_hidden_size": 300, "decoder_hidden_size": 300, "encoder_bidirectional": True}
    task = SimpleNamespace(source_dictionary=SOURCE, target_dictionary=TARGET)
    model = RKMModel.build_model(OmegaConf.structured(RKMConfig(**{**SMALL, **sizes})), task)
    encoder, decoder = model.encoder, model.decoder
    matrices = [encoder.layers[0].weight_hh_l0_reverse, decoder.layers[0].weight_ih_l0, decoder.attention.score.weight]
    for matrix in matrices:
        assert 0.099 < matrix.abs().max() <= 0.1
    assert decoder.layers[0].bias_l0.max() == 1, "the forget gate's bias remains"
    others = (decoder.embed_tokens.weight, decoder.output_projection.weight)
    before = [weight.clone() for weight in others]
    initialize(model)
    assert all(map(torch.equal, others, before))


def test_shared_embeddings():
    model = build(share_decoder_input_output_embed=True)
    assert model.decoder.output_projection.weight is model.decoder.embed_tokens.weight
    assert model.encoder.embed_tokens is not model.decoder.embed_tokens
    joined = build(TARGET, TARGET, share_all_embeddings=True, encoder_embed_dim=7, decoder_layers=2, attention_layer=1)
    assert joined.encoder.embed_tokens is joined.decoder.embed_tokens
    assert joined.decoder.output_projection.weight is joined.encoder.embed_tokens.weight
    assert joined.decoder.layers[-1].hidden_size == 7
    source, tokens = batch()
    assert joined(source, None, tokens)[0].shape == (3, 7, 44)
    assert build(decoder_out_embed_dim=3).decoder.output_projection.weight.shape == (44, 3)


def test_word_vectors_of_both_languages(tmp_path):
    for name, size in (("source", 5), ("target", 7)):
        lines = [f"w{i} " + " ".join(["0.25"] * size) for i in range(3)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    model = build(
        encoder_embed_path=str(tmp_path / "source"), decoder_embed_path=str(tmp_path / "target"),
        encoder_freeze_embed=True,
    )  # fmt: skip
    assert (model.encoder.embed_tokens.weight[SOURCE.index("w1")] == 0.25).all()
    assert (model.decoder.embed_tokens.weight[TARGET.index("w2")] == 0.25).all()
    assert not model.encoder.embed_tokens.weight.requires_grad
    assert model.decoder.embed_tokens.weight.requires_grad


def test_adaptive_softmax():
    model = build(adaptive_softmax_cutoff="10,20", adaptive_softmax_factor=2)
    source, tokens = batch()
    output = model(source, None, tokens)
    assert output[0].shape == (3, 7, 8)
    probabilities = model.get_normalized_probs(output, log_probs=False, sample=None)
    assert_close(probabilities.sum(-1), torch.ones(3, 7), dtype=torch.float32)


def test_each_dropout_acts_where_its_flag_says():
    source, tokens = batch()
    places = ("encoder_dropout_in", "encoder_dropout_out", "decoder_dropout_in", "decoder_dropout_out")
    for flag in ("dropout", "dropout_words", "dropout_weights", *places):
        model = build(**{flag: 0.5})
        assert torch.equal(model(source, None, tokens)[0], model(source, None, tokens)[0]), "none in evaluation"
        model.train()
        assert not torch.equal(model(source, None, tokens)[0], model(source, None, tokens)[0]), flag
        encoded = [model.encoder(source) for _ in range(2)]
        assert torch.equal(*(out["encoder_out"][0] for out in encoded)) == flag.startswith("decoder"), flag
        decoded = [model.decoder(tokens, encoded[0])[0] for _ in range(2)]
        assert torch.equal(*decoded) == flag.startswith("encoder"), flag


@pytest.mark.parametrize("input_feeding", [False, True])
def test_half_precision_follows_double(input_feeding):
    model = build(ngram=2, encoder_bidirectional=True, decoder_layers=2, input_feeding=input_feeding)
    source, tokens = batch()
    full, _ = model(source, None, tokens)
    half = copy.deepcopy(model).bfloat16()
    assert_close(half(source, None, tokens)[0], full)
    encoder_out, incremental = half.encoder(source), {}
    with torch.no_grad():
        steps = [half.decoder(tokens[:, : t + 1], encoder_out, incremental)[0] for t in range(7)]
    assert_close(torch.cat(steps, dim=1), full, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = model.float()(source, None, tokens)
    assert_close(output, full, dtype=torch.bfloat16)
    output.float().sum().backward()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"encoder_layers": 0}, "--encoder-layers must be at least 1, not 0"),
        ({"decoder_layers": 0}, "--decoder-layers must be at least 1, not 0"),
        ({"decoder_dropout_in": 1.0}, "--decoder-dropout-in must lie within"),
        ({"dropout": -0.1}, "--dropout must lie within"),
        ({"dropout_weights": 1.0}, "--dropout-weights must lie within"),
        ({"dropout_words": -0.1}, "--dropout-words must lie within"),
        ({"dropout_weights": 0.2, "input_feeding": True}, "--dropout-weights draws once for a sequence"),
        ({"attention_layer": 2}, "--attention-layer must name a decoder layer, 1 to 1"),
        ({"criterion_name": "adaptive_loss"}, "needs --adaptive-softmax-cutoff"),
        ({"share_all_embeddings": True, "encoder_embed_dim": 5}, "needs equal sizes, but --encoder-embed-dim is 5"),
        (
            {"share_decoder_input_output_embed": True, "adaptive_softmax_cutoff": "10"},
            "--share-decoder-input-output-embed and --adaptive-softmax-cutoff exclude each other",
        ),
        (
            {"share_decoder_input_output_embed": True, "decoder_out_embed_dim": 9},
            r"needs --decoder-out-embed-dim \(9\) to be --decoder-embed-dim \(7\)",
        ),
        ({**JOINED, "decoder_embed_path": "x"}, "give the word vectors by --encoder-embed-path alone"),
        ({**JOINED, "decoder_freeze_embed": True}, "--decoder-freeze-embed both"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, message):
    with pytest.raises(RKMError, match=message):
        check_flags(RKMConfig(**{**SMALL, **flags}), joined=True)


def test_one_embedding_needs_one_dictionary():
    with pytest.raises(RKMError, match="--joined-dictionary"):
        build(share_all_embeddings=True, encoder_embed_dim=7)


def test_a_centred_window_must_be_odd_in_the_encoder_alone():
    with pytest.raises(RKMError, match="centres an odd window"):
        build(ngram=2, ngram_padding="same")
    build(ngram=2, encoder_ngram=3, ngram_padding="same")


@pytest.mark.parametrize("preset", [rkm_tiny, rkm_iwslt_de_en])
@pytest.mark.parametrize("flags", [{}, {"layer_norm": True}, {"memory_clip": 2.0}])
def test_presets_fill_what_is_not_given_and_are_idempotent(preset, flags):
    args = SimpleNamespace(encoder_embed_dim=12, dropout=0.5, **flags)
    preset(args)
    assert (args.encoder_embed_dim, args.dropout) == (12, 0.5)
    bounds = {"layer_norm": preset is rkm_tiny, "memory_clip": "auto" if preset is rkm_tiny else "3.0"}
    if flags:
        bounds = {"layer_norm": False, "memory_clip": "auto", **flags}
    assert (getattr(args, "layer_norm", False), getattr(args, "memory_clip", "auto")) == tuple(bounds.values())
    again = copy.copy(args)
    preset(again)
    assert again == args
    build(**{name: value for name, value in vars(args).items() if name != "criterion_name"})


def test_a_preset_yields_to_flags_that_it_would_contradict():
    args = SimpleNamespace(ngram=1, adaptive_softmax_cutoff="10,20", layer_norm=True, input_feeding=True)
    rkm_iwslt_de_en(args)
    model = build(**vars(args))
    assert model.encoder.layers[0].memory_clip is None
    assert model.encoder.layers[0].weight_dropout == 0
    assert {layer.ngram for layer in model.encoder.layers} == {1}
    assert model.decoder.adaptive_softmax is not None
    args = SimpleNamespace()
    rkm_iwslt_de_en(args)
    model = build(**vars(args))
    assert {(layer.ngram, layer.ngram_padding) for layer in model.encoder.layers} == {(3, "same")}
    assert {layer.ngram for layer in model.decoder.layers} == {1}
    assert model.decoder.output_projection.weight is model.decoder.embed_tokens.weight


def test_checkpoints_of_another_dictionary_are_refused():
    state = build().state_dict()
    with pytest.raises(RKMError, match="trained with another dictionary"):
        build(source=dictionary(31)).load_state_dict(dict(state))
    with pytest.raises(RKMError, match="trained with another dictionary"):
        build(target=dictionary(41)).load_state_dict(dict(state))


@pytest.mark.parametrize(
    "flags", [{"ngram": 3, "dropout_words": 0.2}, {"input_feeding": True, "learn_initial_state": True}]
)
def test_replayed_training_is_the_same(monkeypatch, flags):
    """Recording and replaying is done again, on a CPU: :mod:`graphs.test_graphed_function` has it on GPUs."""
    monkeypatch.setattr(rkm_model, "check_graphs", lambda _tokens: None)
    monkeypatch.setattr(GraphedFunction.__init__, "__defaults__", (run_at_once, ""))
    batches = [batch(), batch(source_length=4), batch(), batch(source_length=4), batch()]
    batches[2][0][1, 4:] = SOURCE.pad()
    outcomes = []
    for graphs in (False, True):
        torch.manual_seed(0)
        model = build(cuda_graphs=graphs, dropout=0.2, layer_norm=True, decoder_layers=2, **JOINED_SOFTMAX, **flags)
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
        for number, (source, tokens) in enumerate(batches):
            torch.manual_seed(number)
            scores, extra = model(source, None, tokens)
            assert extra["attn"][0].shape == (3, 7, source.size(1))
            scores.logsumexp(-1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        outcomes.append(model.state_dict())
        assert (model.graphs is not None and len(model.graphs.recorded) == 2) == graphs
        source, tokens = batches[0]
        recorded = model.graphs
        model.eval()(source, None, tokens)
        with torch.no_grad():
            model.train()(source, None, tokens)
        assert model.graphs is recorded
        assert recorded is None or recorded.forward_passes == 3
    for name, wanted in outcomes[0].items():
        torch.testing.assert_close(outcomes[1][name], wanted, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({}, "needs a CUDA GPU"),
        ({"autocast": True}, r"cannot be had with --amp.*use --bf16 or --fp16"),
    ],
)
def test_where_there_can_be_no_graphs_the_first_step_says_so(monkeypatch, where, message):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: "autocast" in where)
    with pytest.raises(RKMError, match=f"--cuda-graphs {message}"):
        check_graphs(SimpleNamespace(is_cuda=bool(where)))
    if not where:
        model = build(cuda_graphs=True)
        source, tokens = batch()
        model(source, None, tokens)
        with pytest.raises(RKMError, match="--cuda-graphs needs a CUDA GPU"):
            model.train()(source, None, tokens)


@pytest.mark.slow
def test_an_exported_program_needs_torch_alone_and_gives_the_same(tmp_path):
    """Lengths are fixed, which padding fills; the batch is of any size."""
    model = build(ngram=3, ngram_padding="same", layer_norm=True)
    source, tokens = batch(3)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(
        model.float(),
        (source, torch.full((3,), 6), tokens),
        dynamic_shapes={name: {0: rows} for name in ("src_tokens", "src_lengths", "prev_output_tokens")},
    )
    torch.export.save(program, tmp_path / "model.pt2")
    source, tokens = batch(5)
    source[2, :3], tokens[1, 5:] = SOURCE.pad(), TARGET.pad()
    torch.save((source, tokens, model(source, None, tokens)[0].detach()), tmp_path / "example.pt")
    code = f"""
import sys, torch
source, tokens, wanted = torch.load({str(tmp_path / "example.pt")!r})
program = torch.export.load({str(tmp_path / "model.pt2")!r}).module()
torch.testing.assert_close(program(source, torch.full((5,), 6), tokens)[0], wanted)
assert not {{"fairseq", "fairseq_rkm"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
