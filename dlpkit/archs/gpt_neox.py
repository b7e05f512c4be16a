"""GPT-NeoX and Pythia: q, k, v interleaved per head in one Linear, attention and MLP in parallel."""

from dlpkit.archs import Arch

ARCH = Arch(
    blocks="gpt_neox.layers",
    attn="attention",
    mlp="mlp",
    qkv=("attention.query_key_value",),
    attn_out="attention.dense",
    mlp_in=("mlp.dense_h_to_4h",),
    mlp_out="mlp.dense_4h_to_h",
    attn_norms=("input_layernorm",),
    mlp_norms=("post_attention_layernorm",),
    interleaved=True,
)
