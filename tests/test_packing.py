import gc
import weakref

import pytest
import torch
from conftest import random_sparse, tiny_model

from dlpkit import archs
from dlpkit.kernels import dispatch, formats, storage
from dlpkit.kernels.formats import sell
from dlpkit.packing import keep_dense, pack_linears, pack_stored, put, rewrite, sparse_linears, unpack_linears
from dlpkit.sparse import FusedLinear, SparseLinear


def sparse_model(kind="llama"):
    model = tiny_model(kind)
    for i, (_, linear) in enumerate(archs.model_linears(model, archs.of(model))):
        linear.weight.data.mul_(random_sparse(*linear.weight.shape, 0.5, seed=i) != 0)
    return model


def stored_model():
    """A model as a checkpoint leaves it before it is packed."""
    model = sparse_model()
    for name, linear in list(archs.model_linears(model, archs.of(model))):
        packed = pack_one(linear)
        stored = SparseLinear.empty(linear, packed.nnz())
        stored.load_state_dict(packed.state_dict())
        put(model, name, stored)
    return model


def pack_one(linear):
    return SparseLinear.of(linear, formats.get("dense").pack(linear.weight.detach() + 0.0))


@pytest.mark.parametrize("kind", archs.names())
@pytest.mark.parametrize("format", ["dense", "sell"])
def test_a_packed_model_is_the_model(kind, format, tokens):
    model = sparse_model(kind)
    expected = model(tokens).logits
    packed = pack_linears(model, format)
    assert set(packed) == {name for name, _ in archs.model_linears(model, archs.of(model))}
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)  # float32
    unpack_linears(model)
    assert not sparse_linears(model)
    assert torch.equal(model(tokens).logits, expected)


def test_linears_of_one_input_are_fused_where_a_sparse_kernel_runs():
    model = sparse_model()
    pack_linears(model, "sell")
    block = model.model.layers[0]
    assert block.self_attn.k_proj.leader is block.self_attn.q_proj
    assert block.mlp.up_proj.leader is block.mlp.gate_proj
    assert not isinstance(block.mlp.down_proj, FusedLinear)
    dense = sparse_model()
    pack_linears(dense, "dense")
    assert not any(isinstance(sparse, FusedLinear) for sparse in sparse_linears(dense).values())


@pytest.mark.parametrize("most", [0, 1000])
def test_dense_copies_multiply_where_packed_loses(most, tokens, monkeypatch):
    model = sparse_model()
    expected, weights = (
        model(tokens).logits,
        {n: linear.weight.clone() for n, linear in archs.model_linears(model, archs.of(model))},
    )
    pack_linears(model, "sell")
    stored = model.state_dict().keys()
    monkeypatch.setattr("dlpkit.sparse.dispatch.most_rows", lambda packed: most)
    taken = keep_dense(model)
    assert taken == sum(weight.nbytes for weight in weights.values())
    assert keep_dense(model) == 0  # they are there
    assert model.state_dict().keys() == stored
    calls = []
    monkeypatch.setattr(
        sell.Sell,
        "matmul",
        lambda self, x, bias=None: calls.append(x) or torch.nn.functional.linear(x, self.dense(), bias),
    )
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)  # float32
    assert bool(calls) == (most >= tokens.numel())


def test_packing_twice_changes_nothing():
    model = sparse_model()
    first = pack_linears(model, "sell")
    assert all(a is b for a, b in zip(first.values(), pack_linears(model, "dense").values(), strict=True))


def test_an_error_names_the_weights():
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj and .*v_proj: .*2:4"):
        pack_linears(sparse_model(), "fragment")


def test_packing_anew_lets_go_of_the_weights_before():
    """At once, not when the garbage collector comes: until then the model would be in memory twice."""
    model = sparse_model()
    before = [weakref.ref(sparse) for sparse in pack_linears(model, "sell").values()]
    gc.disable()
    try:
        rewrite(model, lambda name, weight: weight, "sell")
        assert not any(sparse() for sparse in before)
    finally:
        gc.enable()


def test_zeros_lose_their_sign_so_that_a_multiplied_mask_is_sparse():
    model = tiny_model()
    linear = model.model.layers[0].mlp.down_proj
    linear.weight.data.copy_(-torch.ones_like(linear.weight) * (torch.arange(linear.in_features) % 2))
    assert pack_linears(model, "dense")["model.layers.0.mlp.down_proj"].nnz() == linear.weight.numel() // 2


@pytest.mark.parametrize("format", ["dense", "sell"])
def test_stored_models_are_packed(format, tokens):
    model = stored_model()
    expected = sparse_model()(tokens).logits
    pack_stored(model, format)
    assert {sparse.format for sparse in sparse_linears(model).values()} == {format}
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)  # float32


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.weight_mask.bitwise_xor_(1), "disagree"),
        (lambda s: s.weight_offsets.__setitem__(3, 10**6), "disagree"),
        (lambda s: s.weight_offsets.__setitem__(0, -5), "disagree"),
        (lambda s: setattr(s, "weight_offsets", s.weight_offsets[:-1]), "offsets should be"),
        (lambda s: setattr(s, "weight_mask", s.weight_mask[:, :-1]), "mask should be"),
        (lambda s: setattr(s, "weight_mask", s.weight_mask.int()), "mask should be uint8"),
    ],
)
def test_damaged_tensors_are_refused_by_name(damage, message):
    model = stored_model()
    damage(model.model.layers[1].mlp.up_proj)
    with pytest.raises(ValueError, match=rf"model\.layers\.1\.mlp\.up_proj: .*{message}"):
        pack_stored(model)


@pytest.mark.skipif(
    not dispatch.available("cuda" if torch.cuda.is_available() else "cpu")[0],
    reason="wants a GPU on which sparse kernels win",
)
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_large_layers_run_sparse_on_the_gpu_and_under_a_cuda_graph(rows):
    model = tiny_model(
        "llama",
        torch.bfloat16,
        hidden_size=2048,
        intermediate_size=2048,
        num_attention_heads=16,
        num_key_value_heads=16,
    ).cuda()
    for i, (_, linear) in enumerate(archs.model_linears(model, archs.of(model))):
        linear.weight.data.normal_(0, 0.02).mul_((random_sparse(*linear.weight.shape, 0.6, seed=i) != 0).cuda())
    tokens = torch.randint(0, 256, (1, rows), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits.float()
        packed = pack_linears(model, "auto")
        assert {sparse.format for sparse in packed.values()} == {"sell"}
        assert (
            model.get_memory_footprint()
            < 0.7 * sum(2 * linear.in_features * linear.out_features for linear in packed.values()) + 5e6
        )
        eager = model(tokens, use_cache=False).logits
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            captured = model(tokens, use_cache=False).logits
        graph.replay()
    assert torch.equal(captured, eager)  # the same sums in the same order
    assert ((eager.float() - expected).norm() / expected.norm()).item() < 2e-2  # bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures the GPU's memory")
def test_packing_and_checking_stay_near_one_dense_weight():
    """Counting through 64-bit integers once took nine bytes a weight."""
    weight = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) * (
        torch.rand(4096, 4096, device="cuda") < 0.4
    )
    stored = storage.encode(weight)
    for call in (
        lambda: dispatch.choose(weight),
        lambda: storage.validate(stored),
        lambda: formats.get("sell").pack(weight),
    ):
        call()  # the first matmul of a process takes cuBLAS's workspace, 32 MiB
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        kept = getattr(result, "nbytes", 0)
        assert torch.cuda.max_memory_allocated() - before - kept <= 1.25 * weight.nbytes
        del result
