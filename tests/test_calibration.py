import pytest
import torch
from conftest import tiny_model

from dlpkit import archs
from dlpkit.calibration import Stream


def inputs_by_hook(model, arch, batches):
    """Every Linear's inputs in one plain forward pass of the whole model: [tokens, K] by name."""
    seen = {}
    handles = [
        linear.register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
        for name, linear in archs.model_linears(model, arch)
    ]
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("kind", archs.names())
def test_stream_sees_what_the_whole_model_sees(kind, tokens):
    model = tiny_model(kind)
    arch, batches = archs.of(model), list(tokens.split(2))
    expected = inputs_by_hook(model, arch, batches)
    stream = Stream(model, arch, batches, "cpu")
    for index in range(len(archs.blocks(model, arch))):
        with stream.resident.at(index):
            found = stream.stats(index, {"sq", "hessian"}, advance=index == 1)
            if index != 1:
                stream.advance(index)
        for name, stats in found.items():
            x = expected[f"{arch.blocks}.{index}.{name}"].double()
            assert stats.tokens == tokens.numel()
            torch.testing.assert_close(stats.sq.double(), x.square().sum(0), rtol=1e-4, atol=1e-5)  # float32 sums
            torch.testing.assert_close(stats.hessian.double(), x.T @ x, rtol=1e-4, atol=1e-3)


def test_the_model_is_as_before(tokens):
    model = tiny_model()
    before = model(tokens).logits
    Stream(model, archs.of(model), [tokens], "cpu").stats(0, {"sq"})
    assert all("forward" not in block.__dict__ for block in model.model.layers)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(tokens).logits, before)


def test_linears_of_one_input_share_their_stats(tokens):
    model = tiny_model()
    stats = Stream(model, archs.of(model), [tokens], "cpu").stats(0, {"sq"})
    assert stats["self_attn.q_proj"] is stats["self_attn.v_proj"]
    assert stats["mlp.gate_proj"] is stats["mlp.up_proj"]
    assert stats["mlp.down_proj"].hessian is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_activations_name_the_linear(bad, tokens):
    model = tiny_model()
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = bad
    stream = Stream(model, archs.of(model), [tokens], "cpu")
    stream.stats(0, {"sq"}, advance=True)
    with pytest.raises(ValueError, match=r"inputs of model\.layers\.1\.self_attn\.o_proj hold NaN or Inf"):
        stream.stats(1, {"sq"})


def test_masks_and_tables_are_kept_once(tokens):
    model = tiny_model("gemma2", attn_implementation="eager")
    stream = Stream(model, archs.of(model), list(tokens.split(1)), "cpu")
    masks = {id(kwargs["attention_mask"]) for calls in stream.calls for _, kwargs in calls}
    assert len(masks) == 2  # sliding and full, over 3 blocks and 6 windows
