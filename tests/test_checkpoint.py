import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import folder_bytes, random_sparse, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig

import dlpkit
from dlpkit import archs, checkpoint, packing, surgery
from dlpkit.edits import Drop, Merge
from dlpkit.kernels import dispatch, formats, storage
from dlpkit.packing import sparse_linears


def pruned(kind="llama", sparsity=0.6, dtype=torch.bfloat16):
    model = tiny_model(kind, dtype)
    for i, (_, linear) in enumerate(archs.model_linears(model, archs.of(model))):
        linear.weight.data.mul_(random_sparse(*linear.weight.shape, sparsity, seed=i) != 0)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A packed tiny Llama."""
    path = tmp_path_factory.mktemp("packed") / "model"
    dlpkit.save(dlpkit.pack(pruned()), path)
    return path


def damaged(folder, tmp_path, change):
    """A copy of `folder` whose tensors `change` has edited."""
    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize("kind", archs.names())
def test_every_architecture_comes_back_bit_for_bit(kind, tokens, tmp_path):
    model = pruned(kind)
    dlpkit.save(model, tmp_path / "dense")
    expected = model(tokens).logits
    dlpkit.save(dlpkit.pack(model), tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype="auto")
    assert torch.equal(again(tokens).logits, expected)
    again.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes()
    assert folder_bytes(tmp_path / "packed") < 0.9 * folder_bytes(tmp_path / "dense")
    dlpkit.save(dlpkit.unpack(again), tmp_path / "unpacked")
    dense, unpacked = (load_file(tmp_path / which / "model.safetensors") for which in ("dense", "unpacked"))
    assert dense.keys() == unpacked.keys()
    assert all(torch.equal(dense[key], unpacked[key]) for key in dense)


HOLES = [Drop(0, "attn"), Drop(2, "mlp")]


def shorter(kind="llama", seed=0):
    return tiny_model(kind, torch.bfloat16, num_hidden_layers=4, seed=seed)


@pytest.mark.parametrize("packs", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("kind", archs.names())
def test_dropped_halves_come_back_bit_for_bit(kind, packs, tokens, tmp_path):
    model = dlpkit.edit(shorter(kind), [*HOLES, Drop(1, "layer")])
    if packs:
        for i, (_, linear) in enumerate(archs.model_linears(model, archs.of(model))):
            linear.weight.data.mul_(random_sparse(*linear.weight.shape, 0.6, seed=i) != 0)
        dlpkit.pack(model)
    expected = model(tokens).logits
    dlpkit.save(model, tmp_path / "edited")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "edited", dtype="auto")
    assert bool(sparse_linears(again)) == packs
    assert torch.equal(again(tokens).logits, expected)
    assert surgery.residue(again) == [Drop(0, "attn"), Drop(1, "mlp")]
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 256, "eos_token_id": None}
    assert torch.equal(again.generate(tokens, **how), again.generate(tokens, use_cache=False, **how))
    again.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "edited" / name).read_bytes()
    # what transformers does, with a warning, for a quant_method that nobody registered
    config = AutoConfig.from_pretrained(tmp_path / "edited")
    del config.quantization_config
    with pytest.raises((RuntimeError, ValueError), match=r"mismatch|ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "edited", config=config)


WITHOUT_DLPKIT = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
tokens = torch.load(sys.argv[2])
torch.save({"logits": model(tokens).logits, "text": model.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None)}, sys.argv[3])
assert "dlpkit" not in sys.modules
"""


@pytest.mark.parametrize(
    "wanted", [[Drop(1, "layer")], [Merge(1, 2)], [Drop(0, "layer"), Merge(1, 3, "average")]], ids=str
)
def test_removed_and_merged_layers_load_without_dlpkit(wanted, tokens, tmp_path):
    for kind in ("llama", "gemma2", "opt"):
        model = dlpkit.edit(shorter(kind), wanted)
        dlpkit.save(model, tmp_path / kind)
        assert "quantization_config" not in json.loads((tmp_path / kind / "config.json").read_text())
        torch.save(tokens, tmp_path / "tokens.pt")
        subprocess.run(
            [sys.executable, "-c", WITHOUT_DLPKIT, tmp_path / kind, tmp_path / "tokens.pt", tmp_path / "found.pt"],
            check=True,
        )
        found = torch.load(tmp_path / "found.pt")
        assert torch.equal(found["logits"], model(tokens).logits)
        how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        assert torch.equal(found["text"], model.generate(tokens, **how))


def test_an_edited_model_can_be_edited_and_unpacked(tokens, tmp_path):
    dlpkit.save(dlpkit.pack(dlpkit.edit(shorter(), HOLES)), tmp_path / "packed")
    model = dlpkit.unpack(dlpkit.load(tmp_path / "packed"))
    dlpkit.edit(model, [Drop(1, "layer")])
    assert model.config.quantization_config.to_dict()["edits"] == [
        {"kind": "drop", "layer": 0, "part": "attn"},
        {"kind": "drop", "layer": 1, "part": "mlp"},
    ]
    dlpkit.save(model, tmp_path / "dense")
    assert torch.equal(dlpkit.load(tmp_path / "dense")(tokens).logits, model(tokens).logits)
    dlpkit.edit(model, [Drop(0, "layer"), Drop(1, "layer")])
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("runtime", [name for name in formats.names() if name not in ("nm", "fragment", "cusparselt")])
def test_runtime_formats_agree_and_save_the_same_bytes(runtime, folder, tokens, tmp_path):
    model = dlpkit.load(folder, runtime=runtime)
    assert {sparse.format for sparse in sparse_linears(model).values()} == {runtime}
    torch.testing.assert_close(
        model(tokens).logits, dlpkit.load(folder, "dense")(tokens).logits, rtol=5e-2, atol=5e-2
    )  # bfloat16
    dlpkit.save(model, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def compiled():
    """What transformers does by itself on a GPU: the decoding step under torch.compile, whole or not at all."""
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


@pytest.mark.parametrize(
    "how",
    [
        dict,
        lambda: {"cache_implementation": "static"},
        compiled,
        lambda: {"assistant_model": tiny_model("llama", torch.bfloat16)},
        lambda: {"prompt_lookup_num_tokens": 2},
        lambda: {"num_beams": 2},
    ],
    ids=["dynamic", "static", "compiled", "assisted", "lookup", "beams"],
)
def test_generate_equals_the_dense_model(how, folder, tokens):
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 256}
    prompt = tokens[:1, :7]
    expected, found = (
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **options, **how())
        for model in (dlpkit.unpack(dlpkit.load(folder)), dlpkit.load(folder))
    )
    assert torch.equal(found, expected)


def test_a_packed_model_drafts_for_its_dense_one(folder, tokens):
    dense, prompt = dlpkit.unpack(dlpkit.load(folder)), tokens[:1, :7]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 256, "attention_mask": torch.ones_like(prompt)}
    expected = dense.generate(prompt, **options)
    assert torch.equal(dense.generate(prompt, assistant_model=dlpkit.load(folder), **options), expected)


def test_without_dlpkit_the_load_fails_loudly(folder):
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(folder)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "mismatch" in run.stderr


def test_the_config_does_not_fix_the_runtime(folder):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert set(config) == {"quant_method", "format_version", "modules"}


def test_weights_are_packed_for_the_batch(folder, monkeypatch, tokens):
    asked = []

    def choose(weight, batch):
        asked.append(batch)
        return ("tile" if batch > 1 else "sell"), "as asked"

    monkeypatch.setattr(dispatch, "available", lambda device: (True, "a GPU"))
    monkeypatch.setattr(dispatch, "choose", choose)
    for batch, format in ((1, "sell"), (16, "tile")):
        model = dlpkit.load(folder, batch=batch)
        assert {sparse.format for sparse in sparse_linears(model).values()} == {format}
        assert set(asked) == {batch}
        asked.clear()
    packing.rewrite(model, lambda name, weight: weight, batch=1)
    assert {sparse.format for sparse in sparse_linears(model).values()} == {"sell"}
    torch.testing.assert_close(model(tokens).logits, dlpkit.load(folder, "dense")(tokens).logits, rtol=5e-2, atol=5e-2)
    assert set(model.config.quantization_config.to_dict()) == {"quant_method", "format_version", "modules"}
    with pytest.raises(ValueError, match="at least 1, got 0"):
        dlpkit.load(folder, batch=0)


def test_decoding_to_dense_is_said_once(folder, monkeypatch):
    said = []
    monkeypatch.setattr(checkpoint.logger, "warning_once", said.append)
    dlpkit.load(folder, device="cpu")
    assert len(said) == 1
    assert "decoded to dense" in said[0]


def flip(tensors):
    tensors["model.layers.1.mlp.up_proj.weight_mask"][0, 0] ^= 3


def drop_offsets(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight_offsets"]


@pytest.mark.parametrize("change", [flip, drop_offsets])
def test_damaged_tensors_are_refused_by_name(change, folder, tmp_path):
    with pytest.raises((ValueError, RuntimeError), match=r"model\.layers\.1\.mlp\.up_proj"):
        dlpkit.load(damaged(folder, tmp_path, change))


def test_truncated_file_is_refused(folder, tmp_path):
    copy = tmp_path / "cut"
    shutil.copytree(folder, copy)
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        dlpkit.load(copy)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda q: q["modules"].update({"model.layers.9.mlp.up_proj": [96, 64, 10]}),
            "names a packed Linear 'model.layers.9.mlp.up_proj'",
        ),
        (lambda q: q["modules"].update({"model.layers.0.mlp.up_proj": [96, 64, 10**9]}), "is damaged"),
        (lambda q: q["modules"].update({"model.layers.0.mlp.up_proj": [95, 64, 10]}), "is damaged"),
        (lambda q: q["modules"].update({"model.layers.0.mlp.up_proj": "all"}), "is damaged"),
        (lambda q: q.update(format_version=2), "format version 2, this dlpkit reads 1"),
        (lambda q: q.update(edits="none"), "edits are a list, got 'none'"),
        (lambda q: q.update(edits=[{"kind": "fold"}]), "an edit is one of drop, merge"),
        (lambda q: q.update(edits=[{"kind": "drop", "layer": 7, "part": "mlp"}]), "has no mlp in layer 7; the file"),
    ],
)
def test_damaged_config_is_refused(edit, message, folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    edit(config["quantization_config"])
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        dlpkit.load(copy)


def test_unknown_runtime_lists_the_known(folder):
    with pytest.raises(ValueError, match="'auto' or one of cusparselt, dense, fragment, nm, sell, tile"):
        dlpkit.load(folder, runtime="csr")


def test_a_save_that_cannot_be_read_back_leaves_nothing(tmp_path, monkeypatch):
    model = dlpkit.pack(pruned())
    monkeypatch.setattr(storage, "decode", lambda stored: torch.zeros(stored.shape, dtype=stored.values.dtype))
    with pytest.raises(RuntimeError, match="does not compute what the one in memory does"):
        dlpkit.save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten_unasked(folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty"):
        dlpkit.save(pruned(), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_peft_trains_beside_packed_weights(folder, tokens):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(dlpkit.load(folder), peft.LoraConfig(target_modules="all-linear", r=2))
    model(input_ids=tokens, labels=tokens).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert grads
    assert all(grad is not None for grad in grads)
