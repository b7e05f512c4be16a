"""OPT: biases everywhere, an MLP of two Linears that lie in the block itself."""

from dlpkit.archs import Arch

ARCH = Arch(
    blocks="model.decoder.layers",
    attn="self_attn",
    mlp="",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attn_out="self_attn.out_proj",
    mlp_in=("fc1",),
    mlp_out="fc2",
    attn_norms=("self_attn_layer_norm",),
    mlp_norms=("final_layer_norm",),
    width="ffn_dim",
)
