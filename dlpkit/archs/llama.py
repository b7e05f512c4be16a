"""Llama, and the layout that most later models share."""

from dlpkit.archs import Arch

ARCH = Arch(
    blocks="model.layers",
    attn="self_attn",
    mlp="mlp",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attn_out="self_attn.o_proj",
    mlp_in=("mlp.gate_proj", "mlp.up_proj"),
    mlp_out="mlp.down_proj",
    attn_norms=("input_layernorm",),
    mlp_norms=("post_attention_layernorm",),
)
