"""The compared translation models, as flags of fairseq-train."""

COMMON = (
    "--user-dir {plugin} --task translation --criterion label_smoothed_cross_entropy --label-smoothing 0.1 "
    # AdamW in one launch, for all models alike and without an average.
    "--optimizer adamw_average --adam-betas (0.9,0.98) --weight-decay 0.05 --clip-norm 1 "
    "--lr-scheduler inverse_sqrt --warmup-init-lr 1e-7 --batch-size 256 --log-format json --log-interval 20 "
    "--share-all-embeddings --seed {seed} --tokenizer moses --bpe sentencepiece"
)
# Workers put batches together beside training; a GPU would wait otherwise.
ON_GPU, ON_CPU = "--num-workers 2", "--num-workers 0 --cpu"
RKM_IN_STEPS = "--arch rkm_iwslt_de_en --lr 3e-3 --warmup-updates 400"
RKM = f"{RKM_IN_STEPS} {{graphs}}"
MODELS = {
    "rkm_lstm": f"{RKM} --cell rkm_lstm",
    "rkm_cifg": f"{RKM} --cell rkm_cifg",
    "lstm": f"{RKM} --cell lstm",
    "linear_kernel_gated": f"{RKM} --cell linear_kernel_gated",
    # These runs test the defaults: attention after the last layer, attention fed back, and no n-grams.
    "rkm_lstm_attention_last": f"{RKM} --cell rkm_lstm --attention-layer 0",
    # No graphs: each would hold every step of every layer.
    "rkm_lstm_input_feeding": f"{RKM_IN_STEPS} --cell rkm_lstm --attention-layer 0 --input-feeding",
    "rkm_lstm_1gram": f"{RKM} --cell rkm_lstm --encoder-ngram 1",
    # fairseq's own LSTM has the same sizes; its transformer has sizes that suit a small corpus.
    "fairseq_lstm": "--arch lstm --encoder-embed-dim 256 --encoder-hidden-size 256 --encoder-layers 2 "
    "--encoder-bidirectional --decoder-embed-dim 256 --decoder-hidden-size 512 --decoder-layers 2 "
    "--decoder-out-embed-dim 256 --dropout 0.3 --lr 3e-3 --warmup-updates 400",
    "fairseq_transformer": "--arch transformer --encoder-embed-dim 128 --encoder-ffn-embed-dim 256 --encoder-layers 4 "
    "--encoder-attention-heads 4 --decoder-embed-dim 128 --decoder-ffn-embed-dim 256 --decoder-layers 4 "
    "--decoder-attention-heads 4 --dropout 0.3 --lr 5e-3 --warmup-updates 2000",
}
"""The flags of each model for fairseq-train."""
