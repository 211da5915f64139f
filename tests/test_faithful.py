"""Do relevance maps tell the truth: deletion, insertion, pointing (clipcap.interpret.faithful)."""
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from clipcap.attention import Explanation
from clipcap.core import make_config
from clipcap.interpret.faithful import (advantage, deletion_and_insertion, faithfulness, hide_patches, hide_tokens, hiding_orders,
                                        hiding_steps, in_boxes, patch_centers, plot_curves, pointing_game, word_probabilities)
from clipcap.model import load_model

ORDERS = ("relevance", "plain attention", "random")


@pytest.fixture(scope="module")
def captioner():
    "An untrained model of the preset `mini`, with CLIP."
    return load_model(make_config("mini")).eval()


def test_hidden_patches_take_the_mean_color():
    hidden = torch.zeros(2, 2, 2, dtype=torch.bool)
    hidden[1, 0, 1] = True
    twice = hide_patches(torch.ones(3, 4, 4), hidden)
    assert twice.sum((1, 2, 3)).tolist() == [48, 36]
    assert twice[1, 0].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_hidden_tokens_become_their_mean():
    assert hide_tokens(torch.ones(3, 1), torch.tensor([[False, True, False]]), torch.full((3, 1), 7.))[0, :, 0].tolist() == [1, 7, 1]


def test_most_relevant_is_hidden_first():
    assert hiding_steps(torch.tensor([0.1, 0.7, 0.2, 0.]), 2).int().tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]]
    assert hiding_steps(torch.zeros(3), 3).sum(1).tolist() == [0, 1, 2, 3]


def test_orders_are_of_patches_or_else_of_tokens():
    photo = Explanation(["dog", "."], torch.rand(2, 2, 2), torch.rand(2, 10), None, torch.rand(1, 1, 2, 13), None, None, torch.rand(2, 2))
    blind = Explanation(["dog", "."], None, torch.rand(2, 10), None, torch.rand(1, 1, 2, 13), None, None, None)
    for explanation, n in ((photo, 4), (blind, 10)):
        orders = hiding_orders(explanation)
        assert tuple(orders) == ORDERS and [len(o) for o in orders.values()] == [1, 1, 4]
        assert {tuple(o.shape) for several in orders.values() for o in several} == {(2, n)}
        assert all(torch.equal(a, b) for a, b in zip(orders["random"], hiding_orders(explanation)["random"]))


@pytest.mark.numerics
@pytest.mark.parametrize("order, deletion, insertion", [([0.1, 0.2, 0.9, 0.3], [0.8, 0, 0, 0, 0], [0, 0.8, 0.8, 0.8, 0.8]),
                                                        ([0.9, 0.8, 0.1, 0.7], [0.8, 0.8, 0.8, 0.8, 0], [0, 0, 0, 0, 0.8])], ids=["right", "wrong"])
def test_curves_of_a_word_that_needs_one_patch(order, deletion, insertion):
    def probabilities(hidden): return (~hidden[:, 2]).float()[:, None]*torch.tensor([[0.8]])
    found = deletion_and_insertion(probabilities, torch.tensor([order]), torch.tensor([0]), 4)
    torch.testing.assert_close(torch.stack(found)[:, 0], torch.tensor([deletion, insertion]))


def test_advantage_is_found_where_there_is_one():
    columns = pd.MultiIndex.from_product([["deletion", "insertion"], ORDERS])
    noise = pd.DataFrame(np.random.default_rng(0).random((200, 6)), columns=columns)
    found = advantage(noise, 500)
    assert ((found.low < 0) & (found.high > 0)).sum() >= 3
    noise["deletion", "relevance"] -= 0.3
    assert advantage(noise, 500).low["deletion"].min() > 0.1


def test_words_that_depend_on_the_photo_are_tested(captioner):
    "Every word of an untrained model's is as probable without the photo; of a made-up one none is."
    photo = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    cases = [("a", photo, "A dog runs ."), ("b", photo, "")]
    with pytest.MonkeyPatch.context() as patch:
        def needs_all(model, given, caption): return ((given != 0).flatten(1).double().mean(1)**2)[:, None].repeat(1, len(caption.split()))
        patch.setattr("clipcap.interpret.faithful.word_probabilities", needs_all)
        areas, curves = faithfulness(captioner, cases, steps=4)
        assert list(areas.index) == ["a"] and set(areas) == {(test, order) for test in ("deletion", "insertion") for order in ORDERS}
        assert tuple(curves) == ORDERS and all(c.shape == (2, 5) for c in curves.values())
        for both in curves.values(): assert both[0].tolist() == pytest.approx([1, 0.5625, 0.25, 0.0625, 0], abs=1e-6) and both[1].tolist() == pytest.approx(both[0][::-1])
        assert advantage(areas, 10).captions.tolist() == [1]*4


def test_prefix_tokens_are_hidden_of_a_run_on_embeddings(captioner):
    given = torch.randn(128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): prefix = captioner.prefix(given[None])[0]
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        def probabilities(model, given, caption): seen.append(given); return (given == prefix).all(2).double().mean(1)[:, None]
        patch.setattr("clipcap.interpret.faithful.word_probabilities", probabilities)
        areas, _ = faithfulness(captioner, [("a", given, "dog")], torch.full((10, 128), 7.), steps=5)
    assert len(areas) == 1 and torch.equal(seen[0][0], prefix) and (seen[0][1] == 7).all()


def test_words_beyond_the_models_positions_are_not_tested(captioner):
    with torch.no_grad(): prefix = captioner.prefix(torch.randn(1, 128, generator=torch.Generator().manual_seed(0)))
    found = word_probabilities(captioner, prefix, "dog "*200)
    assert found.shape == (1, 200) and (found[0, :100] < 1).all() and (found[0, 150:] == 1).all()


@pytest.mark.parametrize("captions", [[], [""], ["dog"]], ids=str)
def test_nothing_depends_on_the_photo(captioner, monkeypatch, captions):
    monkeypatch.setattr("clipcap.interpret.faithful.word_probabilities", lambda model, given, caption: torch.ones(len(given), len(caption.split())))
    areas, curves = faithfulness(captioner, [("a", torch.zeros(3, 64, 64), c) for c in captions])
    assert len(areas) == 0 and curves == {} and areas.columns.nlevels == 2
    assert advantage(areas).isna().sum().tolist() == [4, 4, 4, 0]
    figure = plot_curves(curves, "patches")
    assert figure.axes[0].texts[0].get_text() == "no word depends on what was hidden"
    plt.close(figure)


def test_peaks_point_into_boxes():
    centers = patch_centers((2, 2))
    assert centers.tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    assert in_boxes(centers, [(0, 0, 0.5, 0.5)]).tolist() == [True, False, False, False]
    assert in_boxes(centers, [(0, 0, 0.5, 0.5), (0.6, 0.6, 1, 1)]).tolist() == [True, False, False, True]
    maps = torch.tensor([[[0., 1], [0, 0]]])
    explanation = Explanation(["dog"], maps, None, None, None, None, None, maps[0].flip(0))
    assert pointing_game(explanation, {0: [(0.5, 0, 1, 0.5)]}).iloc[0].tolist() == ["dog", 1., 0., 1., 0.25]
