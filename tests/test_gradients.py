import pytest
import torch
from conftest import tiny_model

from dlpkit import archs, gradients, units


def by_hand(model, batch, name, dim, unit_of, kind):
    """From autograd's own gradient and a loop over units."""
    model.zero_grad()
    model(input_ids=batch, labels=batch).loss.backward()
    weight = model.get_submodule(name).weight
    product = (weight * weight.grad).detach()
    found = []
    for unit in range(int(unit_of.max()) + 1):
        part = product[unit_of == unit] if dim == 0 else product[:, unit_of == unit]
        each = part.sum(1 - dim).abs() if kind == "vector" else (part - part**2 / 2).abs()
        found.append(each.sum())
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt_neox", "opt"])
@pytest.mark.parametrize("part", units.PARTS)
def test_terms_are_autograds(kind, part, tokens):
    model = tiny_model(kind)
    arch = archs.of(model)
    batches = list(tokens.split(3))
    found = gradients.terms(model, batches)[1, part]
    table = units.members(archs.blocks(model, arch)[1], arch, part)
    assert found.vector.shape == found.element.shape == (len(table), 2, int(table[-1].unit[-1]) + 1)
    for m, member in enumerate(table):
        for b, batch in enumerate(batches):
            for term in ("vector", "element"):
                expected = by_hand(model, batch, f"{arch.blocks}.1.{member.name}", member.dim, member.unit, term)
                torch.testing.assert_close(getattr(found, term)[m, b], expected, rtol=1e-4, atol=1e-6)  # float32


def test_nothing_is_left_behind(tokens):
    model = tiny_model()
    wanted = [index % 2 == 0 for index, _ in enumerate(model.parameters())]
    for parameter, want in zip(model.parameters(), wanted, strict=True):
        parameter.requires_grad_(want)
    gradients.terms(model, [tokens])
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_rank_alike(dtype, tokens):
    """Gradients are accumulated in float32, and float16's are scaled out of its smallest numbers."""
    expected = gradients.terms(tiny_model(), [tokens])[1, "mlp"].total("element")
    found = gradients.terms(tiny_model().to(dtype), [tokens])[1, "mlp"].total("element")
    assert torch.corrcoef(torch.stack([expected, found]))[0, 1] > 0.99


def test_aggregations():
    values = torch.tensor([[[1.0, 4.0]], [[3.0, 2.0]]])  # two Linears, one batch, two units
    terms = gradients.Terms(values, values, values[:, 0])
    for found in (
        lambda name: terms.each("vector", name)[0],
        lambda name: terms.total("vector", name),
        lambda name: terms.total("element", name),
    ):
        assert {name: found(name).tolist() for name in gradients.AGGREGATIONS} == {
            "sum": [4, 6],
            "prod": [3, 8],
            "max": [3, 4],
            "last": [3, 2],
        }


def test_the_pooled_term_is_that_of_one_large_batch(tokens):
    """Opposite signs in two batches cancel, as they do in the gradient of both."""
    model = tiny_model()
    parts, whole = gradients.terms(model, list(tokens.split(3))), gradients.terms(model, [tokens])
    for half, terms in parts.items():
        torch.testing.assert_close(terms.pooled, whole[half].vector[:, 0], rtol=1e-3, atol=1e-6)  # float32
        assert (terms.pooled <= terms.vector.mean(1) * (1 + 1e-5)).all()


def test_a_damaged_model_is_refused(tokens):
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"gradient of model\.layers\..* is not finite"):
        gradients.terms(model, [tokens])
