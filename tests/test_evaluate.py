import math

import pytest
import torch
from conftest import tiny_model

from dlpkit.evaluate import perplexity


def test_perplexity_against_the_models_own_loss(tokens):
    model = tiny_model()
    with torch.no_grad():
        losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in tokens]
    found = perplexity(model, tokens, batch_size=4)
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert (found.tokens, found.seqlen) == (6 * 23, 24)


def test_batches_do_not_change_it(tokens):
    model = tiny_model()
    assert perplexity(model, tokens, 1).loss == pytest.approx(perplexity(model, tokens, 6).loss, rel=1e-6)
