"""Small ``rkm`` models, their dictionaries and batches for them."""

from types import SimpleNamespace

import torch
from fairseq.data import Dictionary
from helpers import randomized
from omegaconf import OmegaConf

from fairseq_rkm import RKM
from fairseq_rkm.models.translation.rkm_model import RKMConfig, RKMModel


def dictionary(words):
    made = Dictionary()
    for i in range(words):
        made.add_symbol(f"w{i}")
    return made


SOURCE, TARGET = dictionary(30), dictionary(40)
SMALL = {
    "encoder_embed_dim": 5, "encoder_hidden_size": 6, "decoder_embed_dim": 7, "decoder_hidden_size": 8, "dropout": 0.0,
    "criterion_name": None,
}  # fmt: skip
JOINED = {"share_all_embeddings": True, "encoder_embed_dim": 7}
JOINED_SOFTMAX = {"share_decoder_input_output_embed": True}


def build(source=SOURCE, target=TARGET, **flags):
    cfg = OmegaConf.structured(RKMConfig(**{**SMALL, **flags}))
    task = SimpleNamespace(source_dictionary=source, target_dictionary=target)
    model = RKMModel.build_model(cfg, task).double()
    for module in model.modules():
        if isinstance(module, RKM):
            randomized(module)
    for part in (model.decoder.attention, model.decoder.bridges):  # a source is to make a difference
        for parameter in part.parameters():
            torch.nn.init.uniform_(parameter, -1, 1)
    return model.eval()


def batch(rows=3, source_length=6, target_length=7):
    return torch.randint(4, 34, (rows, source_length)), torch.randint(4, 44, (rows, target_length))


def pad(tokens, width, side):
    filler = torch.full((tokens.size(0), width), SOURCE.pad())
    return torch.cat([filler, tokens] if side == "left" else [tokens, filler], dim=1)
