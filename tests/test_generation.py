import pytest
import torch
from conftest import tiny_model
from torch._dynamo.testing import CompileCounter
from transformers import GenerationConfig

import dlpkit
from dlpkit import archs, edits, static_cache, surgery
from dlpkit.generation import Decoder, Sampling, generate, largest
from dlpkit.kernels import formats

NEW = 12  # past the sliding window of 8 in the tiny models


def reference(model, ids, mask=None, tokens=NEW, **how):
    """transformers' own generate with its dynamic cache -> the new tokens."""
    mask = torch.ones_like(ids) if mask is None else mask
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, pad_token_id=256, eos_token_id=how.pop("eos", None)
    )
    return model.generate(ids, attention_mask=mask, generation_config=config, **how)[:, ids.shape[1] :]


def padded(prompts):
    """Prompts of unlike length, padded on the left -> ids, mask."""
    longest = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0), value=256) for p in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (longest - len(p), 0)) for p in prompts])
    return ids, mask


@pytest.mark.parametrize("kind", archs.names())
def test_equals_transformers_generate(kind, tokens, device):
    model = tiny_model(kind).to(device)
    ids = tokens[:3, :9].to(device)
    assert torch.equal(generate(model, ids, tokens=NEW), reference(model, ids).cpu())


@pytest.mark.parametrize("kind", archs.names())
def test_a_padded_batch_is_its_rows_alone(kind, tokens, device):
    model = tiny_model(kind).to(device)
    prompts = [tokens[0, :3], tokens[1, :14], tokens[2, :1], tokens[3, :9]]
    found = generate(model, *padded(prompts), tokens=NEW)
    for row, prompt in zip(found, prompts, strict=True):
        alone = generate(model, prompt[None], tokens=NEW)[0]  # shorter where the row has ended
        assert torch.equal(row[: len(alone)], alone)


def compiled_without_inductor(model, ids, monkeypatch):
    """The tokens that compiled steps draw, and how often the blocks and the rest were compiled."""
    torch._dynamo.reset()
    blocks, rest, real = CompileCounter(), CompileCounter(), torch.compile

    def compile(function, fullgraph, dynamic, options):
        backend = blocks if function is static_cache._run else rest
        return real(function, fullgraph=fullgraph, dynamic=dynamic, backend=backend)

    monkeypatch.setattr(torch, "compile", compile)
    decoder = Decoder(model, len(ids), 32)
    decoder._read(ids, None)
    with static_cache.compiled(model, decoder.cache) as part:
        for _ in range(NEW - 1):
            decoder._step(part)
    return decoder.drawn, blocks.frame_count, rest.frame_count


@torch.no_grad()
@pytest.mark.parametrize("kind", archs.names())
def test_compiling_changes_nothing_and_happens_once_for_all_blocks_of_a_kind(kind, tokens, monkeypatch):
    model, ids = tiny_model(kind), tokens[:2, :9]
    expected = generate(model, ids, tokens=NEW)
    before, state = {**vars(model.config)}, [set(vars(module)) for module in model.modules()]
    drawn, blocks, rest = compiled_without_inductor(model, ids, monkeypatch)
    assert torch.equal(drawn[:, : expected.shape[1]], expected)
    assert 1 <= blocks <= len(set(getattr(model.config, "layer_types", None) or [None]))
    assert rest > 0
    assert before == vars(model.config)
    assert state == [set(vars(module)) for module in model.modules()]


@torch.no_grad()
@pytest.mark.parametrize("kind", archs.names())
def test_models_without_some_layers_and_halves(kind, tokens, monkeypatch):
    changes = {"layer_types": ["sliding_attention", "full_attention"] * 3} if kind in ("gemma2", "gemma3_text") else {}
    model, ids = tiny_model(kind, num_hidden_layers=6, **changes), tokens[:2, :9]
    surgery.apply(model, [edits.Drop(0, "attn"), edits.Drop(2, "mlp"), edits.Drop(3, "layer")])
    expected = generate(model, ids, tokens=NEW)
    assert torch.equal(expected, reference(model, ids))
    drawn, *_ = compiled_without_inductor(model, ids, monkeypatch)
    assert torch.equal(drawn[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("V", [1, 5, 128, 129, 1000, 32000])
def test_largest_is_argmax(V, device):
    scores = torch.rand(4, V, device=device)
    scores[0] = -torch.inf
    scores[0, V // 2] = 0
    assert torch.equal(largest(scores), scores.argmax(1))


def test_sampling_repeats_by_seed(tokens, device):
    model, ids = tiny_model().to(device), tokens[:2, :9]
    how = {"temperature": 1.5, "top_k": 50, "top_p": 0.95}
    decoder = Decoder(model, 2, 64, Sampling(**how, seed=1))
    first, again = (torch.stack(list(decoder.stream(ids, tokens=NEW)), 1) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first, generate(model, ids, tokens=NEW, sampling=Sampling(**how, seed=1)))
    assert not torch.equal(first, generate(model, ids, tokens=NEW, sampling=Sampling(**how, seed=2)))
    assert not torch.equal(first[0], first[1])


def test_top_k_of_one_is_greedy(tokens, device):
    model, ids = tiny_model().to(device), tokens[:2, :9]
    drawn = generate(model, ids, tokens=NEW, sampling=Sampling(temperature=5.0, top_k=1))
    assert torch.equal(drawn, generate(model, ids, tokens=NEW))


def test_draws_follow_the_probabilities(tokens, device):
    """The first token of 4096 equal prompts, against the model's own distribution cut to its top 4."""
    model = tiny_model().to(device)
    ids = tokens[:1, :9].to(device)
    shares = model(ids).logits[0, -1].float().topk(4)
    expected = (shares.values / 2).softmax(0).cpu()  # temperature 2
    drawn = generate(model, ids.expand(4096, -1), tokens=1, sampling=Sampling(temperature=2.0, top_k=4))
    counts = (drawn == shares.indices.cpu()).float().mean(0)
    assert counts.sum() == 1
    torch.testing.assert_close(counts, expected, rtol=0, atol=0.04)  # five standard deviations


def test_ends_at_eos_and_pads_until_all_have_ended(tokens, device):
    model, ids = tiny_model().to(device), tokens[:3, :9].to(device)
    free = generate(model, ids, tokens=NEW)
    eos = [int(free[0, 2]), int(free[1, 5])]
    expected = reference(model, ids, eos=eos).cpu()
    found = generate(model, ids, tokens=NEW, eos=eos)
    assert torch.equal(found, expected)
    assert (found[0] == 256).any()
    alone = list(Decoder(model, 1, 64, eos=eos).stream(ids[:1], tokens=NEW))
    assert len(alone) == len(reference(model, ids[:1], eos=eos)[0])


def test_a_decoder_serves_prompt_after_prompt(tokens):
    model = tiny_model()
    decoder = Decoder(model, 2, 40)
    for length in (9, 20, 1):
        ids = tokens[:2, :length]
        next(decoder.stream(tokens[2:4, :5], tokens=4))  # one that was given up
        assert torch.equal(torch.stack(list(decoder.stream(ids, tokens=NEW)), 1), reference(model, ids))


@pytest.mark.parametrize("format", ["dense", "sell"])
def test_packed_models_go_through_the_same_loop(format, tokens, device):
    model = tiny_model().to(device)
    for _, linear in archs.model_linears(model, archs.of(model)):
        linear.weight.data.masked_fill_(linear.weight.abs() < 0.06, 0.0)
    expected = generate(model, tokens[:2, :9], tokens=NEW)
    assert format in formats.names()
    assert torch.equal(generate(dlpkit.pack(model, format), tokens[:2, :9], tokens=NEW), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
@pytest.mark.parametrize("kind", archs.names())
@pytest.mark.parametrize("compile", [False, True])
def test_a_graph_is_the_eager_loop(kind, compile, tokens):
    model, ids = tiny_model(kind).cuda(), tokens[:2, :9]
    decoder = Decoder(model, 2, 64, compile=compile)
    expected = torch.stack(list(Decoder(model, 2, 64, graph=False).stream(ids, tokens=NEW)), 1)
    for _ in range(2):
        assert torch.equal(torch.stack(list(decoder.stream(ids, tokens=NEW)), 1), expected)
    assert decoder.how == ("CUDA graph, blocks compiled" if compile else "CUDA graph")
    assert decoder.reason is None


def test_eager_says_why(tokens, monkeypatch):
    decoder = Decoder(tiny_model(), 1, 32)
    list(decoder.stream(tokens[:1, :4], tokens=2))
    assert decoder.how == "eager"
    assert "the model is on cpu" in decoder.reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": torch.zeros(3, 4, dtype=torch.int64)}, r"int64 ids \[2, T\], got \(3, 4\)"),
        ({"ids": torch.zeros(2, 4)}, "of torch.float32"),
        ({"ids": torch.zeros(2, 0, dtype=torch.int64)}, r"got \(2, 0\)"),
        ({"tokens": 0}, "do not fit"),
        ({"tokens": 30}, "4 prompt and 30 new tokens do not fit this decoder's 32 slots"),
        ({"mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}, "padding on the left"),
        ({"mask": torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1]])}, "padding on the left"),
        ({"mask": torch.ones(2, 5)}, r"wants ids' shape \(2, 4\)"),
    ],
)
def test_bad_prompts_are_refused(arguments, message):
    decoder = Decoder(tiny_model(), 2, 32)
    with pytest.raises(ValueError, match=message):
        next(decoder.stream(**{"ids": torch.zeros(2, 4, dtype=torch.int64), "tokens": 4} | arguments))


def test_longer_than_the_model_is_refused():
    with pytest.raises(ValueError, match="at most 256 tokens, prompt included, not 300"):
        Decoder(tiny_model(), 1, 300)


@pytest.mark.parametrize(
    "how", [{"temperature": -1}, {"top_k": -1, "temperature": 1}, {"top_p": 0, "temperature": 1}, {"top_k": 5}]
)
def test_bad_sampling_is_refused(how):
    with pytest.raises(ValueError, match="top_k"):
        Sampling(**how)
