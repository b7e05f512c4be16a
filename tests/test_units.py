import json
import subprocess
import sys

import pytest
import torch
from conftest import tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

import dlpkit
from dlpkit import archs, checkpoint, edits, surgery, units
from dlpkit.edits import Drop, Merge, Slice

MHA = ("gpt_neox", "opt")  # four heads, each with its own key and value; the others have two groups of two heads
UNEVEN = [Slice(0, "attn", (1,)), Slice(1, "mlp", (*range(8, 56), 90)), Slice(2, "mlp", (0, 95))]
EVEN = [Slice(layer, "mlp", tuple(range(layer, layer + 64))) for layer in range(3)]
every_kind = pytest.mark.parametrize("kind", archs.names())


def emptied(model, slices):
    """The same function in the model's own shapes: what the slices cut off is zero where it would be added up."""
    arch = archs.of(model)
    for edit in slices:
        block = archs.blocks(model, arch)[edit.layer]
        closing = units.members(block, arch, edit.part)[-1]
        gone = ~torch.isin(closing.unit, torch.tensor(edit.units))
        block.get_submodule(closing.name).weight.data[:, gone] = 0
    return model


@every_kind
@pytest.mark.parametrize("slices", [UNEVEN, EVEN], ids=["uneven", "even"])
def test_a_sliced_model_computes_what_is_left(kind, slices, tokens):
    expected = emptied(tiny_model(kind), slices)(tokens).logits
    model = tiny_model(kind)
    dense = model(tokens).logits
    surgery.apply(model, slices)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)  # float32, sums in another order
    assert not torch.allclose(dense, expected, atol=1e-2)


@every_kind
def test_a_trial_of_slices_leaves_no_trace(kind, tokens):
    model = tiny_model(kind)
    expected, before = model(tokens).logits, model.config.to_dict()
    with surgery.trial(model, UNEVEN):
        assert not torch.equal(model(tokens).logits, expected)
    assert torch.equal(model(tokens).logits, expected)
    assert model.config.to_dict() == before


@every_kind
@pytest.mark.parametrize("cache", [None, "static"])
def test_cached_decoding_equals_uncached(kind, cache, tokens):
    model = tiny_model(kind)
    surgery.apply(model, UNEVEN)
    prompt = tokens[:2, :20]
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 256, "eos_token_id": None, "attention_mask": torch.ones_like(prompt)}  # fmt: skip
    expected = model.generate(prompt, use_cache=False, **how)
    assert torch.equal(model.generate(prompt, cache_implementation=cache, **how), expected)


@every_kind
@pytest.mark.parametrize("packed", [False, True])
def test_sizes_of_their_own_come_back_bit_for_bit(kind, packed, tokens, tmp_path):
    model = checkpoint.edit(tiny_model(kind, torch.bfloat16), [*UNEVEN, Drop(2, "attn")])
    if packed:
        checkpoint.pack(model)
    dlpkit.save(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert surgery.residue(again) == surgery.residue(model)
    assert Slice(1, "mlp", 49) in surgery.residue(again)
    again.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@every_kind
def test_one_width_for_all_is_an_ordinary_checkpoint(kind, tokens, tmp_path):
    model = checkpoint.edit(tiny_model(kind), EVEN)
    assert surgery.residue(model) == []
    dlpkit.save(model, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits, model(tokens).logits)


def test_one_width_and_one_number_of_heads_load_without_dlpkit(tokens, tmp_path):
    model = checkpoint.edit(tiny_model(), [*EVEN, *(Slice(layer, "attn", (1,)) for layer in range(3))])
    dlpkit.save(model, tmp_path / "out")
    torch.save(model(tokens).logits, tmp_path / "expected")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A; folder = sys.argv[1]\n"
        "model = A.from_pretrained(folder + '/out'); assert 'dlpkit' not in sys.modules\n"
        "tokens = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(1))\n"
        "assert torch.equal(model(tokens).logits, torch.load(folder + '/expected', weights_only=True))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@every_kind
def test_one_number_of_heads_for_all_is_told_where_transformers_takes_it(kind, tokens, tmp_path):
    """GPT-NeoX and OPT compute the size of a head from the number of heads, so they cannot be told."""
    model = checkpoint.edit(tiny_model(kind), [Slice(layer, "attn", (1,)) for layer in range(3)])
    if kind in MHA:
        assert surgery.residue(model) == [Slice(layer, "attn", 1) for layer in range(3)]
    else:
        assert surgery.residue(model) == []
        assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)
    dlpkit.save(model, tmp_path / "out")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits, model(tokens).logits)


def test_a_width_that_the_config_cannot_say_is_carried(tokens, tmp_path):
    """Three heads of 16 do not divide a hidden size of 64: transformers 5 refuses such a config."""
    model = tiny_model("llama", num_key_value_heads=4)
    checkpoint.edit(model, [Slice(layer, "attn", (0, 2, 3)) for layer in range(3)])
    dlpkit.save(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert again.model.layers[1].self_attn.o_proj.weight.shape == (64, 48)


def test_the_published_counts_of_llm_pruner():
    """LLaMA-7B, a quarter of the heads and channels of layers 4 to 29: the count of its own log (horseee/LLM-Pruner issue 34)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig())
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    slices = [Slice(layer, part, n) for layer in range(4, 30) for part, n in (("attn", 24), ("mlp", 8256))]
    surgery.apply(model, slices)
    assert sum(p.numel() for p in model.parameters()) == 5_422_977_024


@every_kind
@pytest.mark.parametrize("part", units.PARTS)
def test_parameters_of_a_unit_are_what_slicing_removes(kind, part):
    model = tiny_model(kind)
    arch = archs.of(model)
    block = archs.blocks(model, arch)[1]
    held, each = units.count(block, arch, part), units.parameters(block, arch, part)
    assert held == (96 if part == "mlp" else 4 if kind in MHA else 2)
    before = sum(p.numel() for p in model.parameters())
    surgery.apply(model, [Slice(1, part, held - 1)])
    assert before - sum(p.numel() for p in model.parameters()) == each


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([Slice(0, "mlp", (96,))], "has 96 units"),
        ([Slice(0, "attn", 2), Slice(0, "attn", 1)], "in each other's way"),
        ([Slice(0, "mlp", 8), Drop(0, "mlp")], "in each other's way"),
        ([Slice(0, "mlp", 8), Merge(0, 1)], "in each other's way"),
        ([Slice(3, "mlp", 8)], "has no mlp in layer 3"),
    ],
)
def test_slices_that_do_not_fit_are_refused(wrong, message):
    model = tiny_model()
    before = {name: p.shape for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        surgery.apply(model, wrong)
    assert {name: p.shape for name, p in model.named_parameters()} == before


def test_packed_weights_are_not_sliced_and_unlike_layers_not_merged():
    with pytest.raises(ValueError, match="wants dense weights: unpack the model first"):
        surgery.apply(checkpoint.pack(tiny_model(), "sell"), [Slice(0, "mlp", 8)])
    model = tiny_model()
    surgery.apply(model, [Slice(1, "mlp", 8)])
    for rule in edits.RULES:
        with pytest.raises(ValueError, match="whose layers 0 to 1 differ in size"):
            surgery.apply(model, [Merge(0, 1, rule)])


@pytest.mark.parametrize("keep", [(), 0, (2, 1), (1, 1), (-1,), True])
def test_slices_that_make_no_sense_are_refused(keep):
    with pytest.raises(ValueError, match=r"Slice keeps|whole numbers"):
        Slice(0, "mlp", keep)


def test_slices_are_json():
    for edit in (Slice(1, "attn", (0, 2)), Slice(1, "attn", 2)):
        assert edits.from_dict(edits.to_dict(edit)) == edit
    assert edits.from_dict({"kind": "slice", "layer": 1, "part": "attn", "keep": [0, 2]}) == Slice(1, "attn", (0, 2))
