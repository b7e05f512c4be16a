import pytest
import torch
import transformers
from conftest import tiny_model
from transformers import DynamicCache

from dlpkit import archs, edits, surgery
from dlpkit.edits import Drop, Merge

LISTS = {
    "attention": [Drop(0, "attn")],
    "mlp": [Drop(1, "mlp")],
    "both": [Drop(2, "mlp"), Drop(0, "attn"), Drop(2, "attn")],
    "layer": [Drop(1, "layer")],
    "merge": [Merge(0, 1, "replace")],
    "sum": [Merge(1, 2, "sum")],
}


def editable(kind, **changes):
    """Five layers; full and sliding attention alternate in the models that mix them."""
    if kind.startswith("gemma") and kind != "gemma":
        changes["layer_types"] = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    return tiny_model(kind, num_hidden_layers=5, **changes)


def state(model):
    """Everything an edit may touch, to compare before and after."""
    arch = archs.of(model)
    modules = {name: (type(module), getattr(module, "layer_idx", None)) for name, module in model.named_modules()}
    weights = {name: (parameter.data_ptr(), parameter.shape) for name, parameter in model.named_parameters()}
    return modules, weights, model.config.to_dict(), [id(block) for block in archs.blocks(model, arch)]


@pytest.mark.parametrize("kind", archs.names())
@pytest.mark.parametrize("name", LISTS)
def test_a_trial_leaves_no_trace(kind, name, tokens):
    model = editable(kind)
    before, expected = state(model), model(tokens).logits
    with surgery.trial(model, LISTS[name]):
        during = model(tokens).logits
    assert not torch.equal(during, expected)
    assert state(model) == before
    assert torch.equal(model(tokens).logits, expected)
    surgery.apply(model, LISTS[name])
    assert torch.equal(model(tokens).logits, during)


@pytest.mark.parametrize("kind", archs.names())
@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("cache", [None, "static"])
def test_cached_decoding_equals_uncached(kind, name, cache, tokens):
    model = editable(kind)
    surgery.apply(model, LISTS[name])
    prompt = tokens[:2, :20]
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 256, "eos_token_id": None, "attention_mask": torch.ones_like(prompt)}  # fmt: skip
    expected = model.generate(prompt, use_cache=False, **how)
    # the second call finds the static cache that the first left behind; transformers 4 asks its layers for what an unfilled one lacks
    for _ in range(2 if transformers.__version__ >= "5" else 1):
        assert torch.equal(model.generate(prompt, cache_implementation=cache, **how), expected)


@pytest.mark.parametrize("kind", archs.names())
def test_layers_without_attention_hold_no_cache(kind, tokens):
    model = editable(kind)
    surgery.apply(model, [Drop(0, "attn"), Drop(2, "attn"), Drop(1, "layer")])
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache, use_cache=True)
    held = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None and layer.keys.numel()]
    assert len(held) == 2
    assert cache.get_seq_length() == tokens.shape[1]


@pytest.mark.parametrize("kind", archs.names())
@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_a_dropped_half_adds_nothing(kind, part, tokens):
    """Against the block's own arithmetic: what it computes once the last weight of that half is zero."""
    model = editable(kind)
    arch = archs.of(model)
    block = archs.blocks(model, arch)[1]
    last = block.get_submodule(arch.attn_out if part == "attn" else arch.mlp_out)
    kept = {name: parameter.detach().clone() for name, parameter in last.named_parameters()}
    for parameter in last.parameters():
        parameter.data.zero_()
    expected = model(tokens).logits
    for name, parameter in last.named_parameters():
        parameter.data.copy_(kept[name])
    with surgery.trial(model, [Drop(1, part)]):
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-6)


def test_post_norm_goes_with_its_half(tokens):
    """OPT-350m normalises behind each half: dropping both halves must be dropping the layer."""
    model = tiny_model("opt", do_layer_norm_before=False)
    with surgery.trial(model, [Drop(1, "attn"), Drop(1, "mlp")]):
        both = model(tokens).logits
    with surgery.trial(model, [Drop(1, "layer")]):
        assert torch.equal(model(tokens).logits, both)
        assert model.config.num_hidden_layers == 2


@pytest.mark.parametrize("rule", edits.RULES)
def test_merge_rules(rule):
    model = tiny_model("qwen2")  # with biases
    arch = archs.of(model)
    layers = [
        {name: (linear.weight.clone(), linear.bias) for name, linear in archs.linears(block, arch).items()}
        for block in archs.blocks(model, arch)
    ]
    norms = [block.input_layernorm for block in archs.blocks(model, arch)]
    surgery.apply(model, [Merge(0, 2, rule)])
    (block,) = archs.blocks(model, arch)
    assert block.input_layernorm is norms[0]
    for name, linear in archs.linears(block, arch).items():
        a, b, c = (layer[name][0] for layer in layers)
        expected = {"replace": c, "delete": a, "sum": a + (b - a) + (c - a), "average": (a + b + c) / 3}[rule]
        torch.testing.assert_close(linear.weight, expected, rtol=0, atol=1e-6)  # float32
        assert (linear.bias is None) == (layers[0][name][1] is None)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "qwen2"])
def test_kinds_of_attention_travel_with_their_layers(kind, tokens):
    model = editable(kind)
    types = list(model.config.layer_types)
    surgery.apply(model, [Drop(0, "layer"), Drop(3, "attn")])
    assert model.config.layer_types == types[1:]
    assert type(model.config)(**model.config.to_dict()).layer_types == types[1:]


def test_a_merge_moves_weights_and_copies_none():
    model = tiny_model()
    before = {parameter.data_ptr() for parameter in model.parameters()}
    surgery.apply(model, [Merge(0, 2, "replace")])
    assert {parameter.data_ptr() for parameter in model.parameters()} <= before


@pytest.mark.parametrize("kind", archs.names())
def test_edits_survive_json_and_are_read_off_the_model(kind):
    model = editable(kind)
    wanted = [Drop(1, "mlp"), Drop(0, "attn"), Drop(3, "layer"), Drop(4, "mlp")]
    assert [edits.from_dict(edits.to_dict(edit)) for edit in wanted] == wanted
    surgery.apply(model, wanted)
    assert surgery.residue(model) == [Drop(0, "attn"), Drop(1, "mlp"), Drop(3, "mlp")]


@pytest.mark.parametrize("edit", [Drop(3, "layer"), Merge(1, 4, "average")])
def test_one_edit_comes_back_from_json(edit):
    assert edits.from_dict(edits.to_dict(edit)) == edit


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "shear", "layer": 1}, "one of drop, merge"),
        ({"kind": "drop", "layer": 1}, "with all of its fields"),
        ({"kind": "drop", "layer": 1, "part": "attn", "more": 1}, "with all of its fields"),
        ("drop", "one of drop, merge"),
        ({"kind": "drop", "layer": 1, "part": "head"}, "removes attn, mlp, layer, got 'head'"),
        ({"kind": "drop", "layer": True, "part": "attn"}, "whole numbers, got True"),
        ({"kind": "drop", "layer": -1, "part": "attn"}, "whole numbers, got -1"),
        ({"kind": "merge", "low": 2, "high": 2, "rule": "sum"}, "low < high"),
        ({"kind": "merge", "low": 1, "high": 2, "rule": "mean"}, "a rule of replace, sum"),
    ],
)
def test_wrong_edits_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        edits.from_dict(values)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([Drop(5, "attn")], "has no attn in layer 5"),
        ([Drop(5, "layer")], r"layers \[5\], which the model does not have"),
        ([Drop(1, "attn"), Drop(1, "attn")], "in each other's way"),
        ([Drop(1, "attn"), Drop(1, "layer")], "in each other's way"),
        ([Merge(1, 2), Drop(2, "mlp")], "in each other's way"),
        ([Merge(1, 2), Merge(2, 3)], "in each other's way"),
        ([Merge(1, 2), Drop(1, "layer")], "in each other's way"),
        ([Drop(layer, "attn") for layer in range(5)], "leave no attention"),
        ([Drop(layer, "layer") for layer in range(5)], "leave no attention"),
    ],
)
def test_edits_that_do_not_fit_change_nothing(wanted, message):
    model = editable("llama")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        surgery.apply(model, wanted)
    assert state(model) == before


def test_what_is_gone_cannot_go_again():
    model = editable("llama")
    surgery.apply(model, [Drop(1, "attn")])
    with pytest.raises(ValueError, match="has no attn in layer 1"):
        surgery.apply(model, [Drop(1, "attn")])
    with pytest.raises(ValueError, match="has no attn in layer 1"):
        surgery.apply(model, [Merge(0, 1)])
    surgery.apply(model, [Drop(1, "layer")])
    assert model.config.num_hidden_layers == 4


def test_one_attention_of_each_kind_stays():
    with pytest.raises(ValueError, match="keep one of each kind"):
        surgery.apply(editable("gemma2"), [Drop(1, "attn"), Drop(3, "attn")])
    surgery.apply(editable("gemma2"), [Drop(1, "layer"), Drop(3, "layer")])  # no such layer, no such need
