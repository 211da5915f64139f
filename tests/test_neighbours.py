"Neighbours in a plane, similarity of captions by its definition, agreement on a line, regression against a numeric search."
import math

import numpy as np
import pandas as pd
import pytest
import torch
from pycocoevalcap.bleu.bleu_scorer import precook

from clipcap.data import Data
from clipcap.formats.embeddings import Embeddings, write_embeddings
from clipcap.scoring.neighbours import (CiderVectors, ExpectedSimilarity, LandmarkWeights, RegressionWeights, agreement, consensus, mean_embedding,
                                        nearest_training_images)

NAMES = ["n", "ne", "w", "s"]
PLANE = torch.tensor([[0., 5.], [1., 1.], [-2., 0.], [1., -1.]]) + 100  # the mean of all but the first is (100, 100)
PATCHES = torch.tensor([[7., -1.], [-7., 1.]])  # of an image, around its mean


@pytest.fixture
def toy(tmp_path):
    "A function that makes a data set of four photos, the first of them not for training."
    def make(embeddings, names=NAMES):
        write_embeddings(tmp_path/"e.safetensors", names, embeddings, "plane")
        table = pd.DataFrame({"image": NAMES, "caption": "x", "split": ["test", "train", "train", "train"]})
        return Data(table, Embeddings(tmp_path), None)
    return make


# --- nearest photos

@pytest.mark.numerics
def test_neighbours_are_nearest_once_the_mean_is_subtracted(toy):
    data = toy(PLANE)
    np.testing.assert_allclose(mean_embedding(data), [100, 100])
    assert nearest_training_images(data, ["n", "s"], 2) == {"n": ["ne", "w"], "s": ["s", "ne"]}
    assert nearest_training_images(data, data.embeddings.stack(["n", "s"]), 2) == {0: ["ne", "w"], 1: ["s", "ne"]}
    assert nearest_training_images(data, ["n"], 60) == {"n": ["ne", "w", "s"]}


@pytest.mark.numerics
def test_neighbours_of_patches_are_those_of_their_mean(toy):
    data = toy(torch.cat([PLANE, PLANE[:1]])[:, None] + PATCHES, [*NAMES, "other"])  # a photo outside of the table is nobody's neighbour
    np.testing.assert_allclose(mean_embedding(data), 100 + PATCHES, rtol=0, atol=1e-4)
    assert nearest_training_images(data, ["n", "s"], 3) == {"n": ["ne", "w", "s"], "s": ["s", "ne", "w"]}


# --- similarity of captions

TRAINING = [["a dog runs", "a dog runs fast"], ["two cats sit", "a cat sits"], ["men climb a rock"]]


def cosine(n, x, y):
    "The definition, for runs of n words: log(3/1) is the rarity of all but `a`."
    counts = [{r: c*math.log(3/(3 if r == ("a",) else 1)) for r, c in precook(t, 4)[1].items() if len(r) == n} for t in (x, y)]
    norm = [math.sqrt(sum(v*v for v in c.values())) for c in counts]
    return sum(v*counts[1].get(r, 0) for r, v in counts[0].items())/(norm[0]*norm[1]) if all(norm) else 0


@pytest.mark.numerics
@pytest.mark.parametrize("one, other", [
    ("a dog runs", "a dog runs fast"), ("a dog runs fast", "a dog runs fast"), ("a dog runs", "two cats sit"),
    ("a dog runs", "a dog runs"),  # no run of 4 words: that quarter is 0
    ("a dog swims", "a dog swims"), ("a dog swims", "a dog runs")])  # unseen runs are as rare as those of one image
def test_similarity_is_the_mean_cosine_of_weighted_counts(one, other):
    similarity = CiderVectors(TRAINING).similarity([one, "two cats sit on a rock", other])
    expected = np.mean([cosine(n, one, other) for n in range(1, 5)])
    assert similarity[0, 2] == pytest.approx(expected, abs=1e-5) and (expected > 0) == ({*one.split()[1:]} & {*other.split()[1:]} != set())
    assert similarity[0, 0] == pytest.approx(1 if len(one.split()) == 4 else 0.75, abs=1e-5)


# --- agreement

LINE = -np.abs(np.subtract.outer([0, 1, 3, 6, 6], [0, 1, 3, 6, 6])).astype(float)


def test_consensus_of_few_is_a_pair_of_twins_and_of_all_the_middle():
    assert (consensus(LINE, 1), consensus(LINE, 4), consensus(np.ones((1, 1)))) == (3, 2, 0)


@pytest.mark.parametrize("subset, expected", [(125, [-2, -1.5, -2.5, -14/3, -14/3]), (1, [-1, -1, -2, -3, -3])])
def test_agreement_is_with_the_first_captions_but_not_with_itself(subset, expected):
    np.testing.assert_allclose(agreement(LINE, 3, subset), expected)  # of 0, 1 and 3; the two at 6 are compared with all three


# --- regression

def many(folder, number, width, twins=0):
    "A data set of random embeddings, all but the last five for training, and those five; `twins` photos are there twice."
    rows = torch.randn(number + 5, width, generator=torch.Generator().manual_seed(0))
    rows[:twins] = rows[twins:2*twins]
    names = [f"{n:04d}" for n in range(number + 5)]
    write_embeddings(folder/"many.safetensors", names, rows, "random")
    return Data(pd.DataFrame({"image": names, "caption": "x", "split": ["train"]*number + ["test"]*5}), Embeddings(folder/"many.safetensors"), None), rows[number:]


@pytest.mark.numerics
def test_ridge_decides_between_the_average_and_the_image_itself(toy):
    data = toy(PLANE)
    weights = RegressionWeights(data, 0.5)(["n", "s"])
    assert weights.shape == (2, 3) and (RegressionWeights(data, 0.5)(data.embeddings.stack(["n", "s"])) == weights).all()  # of ne, s, w
    np.testing.assert_allclose(weights.sum(1), [1, 1])
    np.testing.assert_allclose(RegressionWeights(data, 1e9)(["n", "s"]), np.full((2, 3), 1/3), atol=1e-6)
    np.testing.assert_allclose(RegressionWeights(data, 1e-9)(["s"]), [[0, 1, 0]], atol=1e-6)


@pytest.mark.numerics
def test_weights_minimize_squared_errors_and_the_ridge(toy):
    "Over functions in the kernel's span, plus a constant, by least squares."
    data, answers = toy(PLANE), np.array([1., -2., 5.])
    unit = torch.nn.functional.normalize(data.embeddings.stack(["ne", "s", "w", "n"]).double() - mean_embedding(data).double(), dim=1).numpy()
    kernel, center = np.exp(unit @ unit.T - 1), np.eye(3) - 1/3
    centered = center @ kernel[:3, :3] @ center
    values, vectors = np.linalg.eigh(centered)
    root = vectors*np.sqrt(values.clip(0)) @ vectors.T  # |root @ alpha|² is the norm of the function
    alpha = np.linalg.lstsq(np.vstack([centered, math.sqrt(0.5)*root]), np.append(answers - answers.mean(), np.zeros(3)), rcond=None)[0]
    predicted = (kernel[3, :3] - kernel[:3, :3].mean(0)) @ center @ alpha + answers.mean()
    assert RegressionWeights(data, 0.5)(["n"])[0] @ answers == pytest.approx(predicted, abs=1e-9)


@pytest.mark.numerics
@pytest.mark.parametrize("number, width, twins", [(30, 5, 0), (60, 16, 0), (40, 8, 10)])
def test_all_landmarks_give_what_the_whole_kernel_gives(tmp_path, number, width, twins):
    data, asked = many(tmp_path, number, width, twins)
    exact = RegressionWeights(data, 0.5)
    bounded = LandmarkWeights(exact.known, exact.known, 0.5)
    np.testing.assert_allclose(bounded(exact.directions(asked)), exact(asked), rtol=0, atol=1e-9)


@pytest.mark.numerics
def test_weights_of_more_photos_need_memory_for_the_landmarks_alone(tmp_path):
    data, asked = many(tmp_path, 300, 6)
    exact, bounded = RegressionWeights(data, 1.)(asked), RegressionWeights(data, 1., landmarks=64)
    found = bounded(asked)
    assert found.shape == exact.shape and max(v.numel() for v in vars(bounded.bounded).values()) <= max(64*64, 300*6)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-9)
    assert (found == RegressionWeights(data, 1., landmarks=64)(asked)).all()
    answers = np.random.default_rng(0).standard_normal((300, 40))
    assert np.corrcoef((found @ answers).ravel(), (exact @ answers).ravel())[0, 1] > 0.9


@pytest.mark.numerics
def test_expected_similarity_is_the_weighted_sum_of_similarities():
    vectors, images, weights = CiderVectors(TRAINING), TRAINING[:1] + [["two cats sit"]], [0.7, -0.2]
    candidates = ["a dog runs fast", "two dogs sit"]
    by_hand = [sum(w*np.mean([vectors.similarity([c, s])[0, 1] for s in captions]) for w, captions in zip(weights, images)) for c in candidates]
    np.testing.assert_allclose(ExpectedSimilarity(vectors, images)(candidates, np.array(weights)), by_hand, rtol=0, atol=1e-5)
