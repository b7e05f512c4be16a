import pytest
import torch
from conftest import CONFIGS, tiny_model
from torch import nn

from dlpkit import archs


def test_every_architecture_is_tested():
    assert set(CONFIGS) == set(archs.names())


@pytest.mark.parametrize("kind", archs.names())
def test_paths_fit_the_model(kind):
    model = tiny_model(kind)
    arch = archs.of(model)
    blocks = archs.blocks(model, arch)
    assert len(blocks) == model.config.num_hidden_layers
    for block in blocks:
        in_block = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        assert set(archs.linears(block, arch)) == in_block
        for path in (arch.attn, arch.mlp, *arch.attn_norms, *arch.mlp_norms):
            block.get_submodule(path)


@pytest.mark.parametrize("kind", archs.names())
def test_embeddings_head_and_norms_are_left_alone(kind):
    model = tiny_model(kind)
    pruned = {id(linear.weight) for _, linear in archs.model_linears(model, archs.of(model))}
    assert id(model.get_input_embeddings().weight) not in pruned
    assert id(model.get_output_embeddings().weight) not in pruned


def test_unknown_type_lists_the_known():
    model = tiny_model()
    model.config.model_type = "martian"
    with pytest.raises(ValueError, match=r"model_type 'martian': dlpkit knows .*llama.*qwen3"):
        archs.of(model)


def test_fused_experts_are_refused():
    model = tiny_model()
    model.model.layers[1].mlp.experts = nn.ParameterDict({"gate_up_proj": nn.Parameter(torch.zeros(4, 64, 96))})
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.experts.*mixture-of-experts models are not supported, because"
    ):
        archs.of(model)


def test_a_linear_that_the_description_forgot_is_an_error():
    model = tiny_model()
    model.model.layers[0].extra = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="does not name: extra"):
        archs.of(model)
