"""Candidate captions and rerankers (clipcap.decoding.rerank)."""
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clipcap.checks.literal import literal_loss, literal_model
from clipcap.core import DECODING, RERANKERS, Config, make_config
from clipcap.data import Data, encode_images
from clipcap.decoding import rerank, stream
from clipcap.decoding.load import load_run
from clipcap.decoding.rerank import (Candidates, Reranker, TrainingCaptions, asks_neighbours, candidate_captions, caption_writer, diverse_beams,
                                     log_likelihoods)
from clipcap.formats.embeddings import Embeddings, write_embeddings
from clipcap.formats.photos import read_photo
from clipcap.model import generate_ids, generation_options, ids_to_text
from clipcap.scoring.tokenization import tokenize
from clipcap.scoring.neighbours import CiderVectors, ExpectedSimilarity, RegressionWeights, nearest_training_images

ALL = ["mbr", "consensus", "regression", "clip"]
CONFIG = make_config("mini", max_length=12, num_beams=4)
EMBEDDINGS = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def data(tmp_path_factory, scene_captions) -> Data:
    "Captions of 24 scenes for training and 3 for validation, with random embeddings."
    names = sorted(scene_captions.image.unique())[:27]
    table = scene_captions[scene_captions.image.isin(names)]
    path = tmp_path_factory.mktemp("rerank")/"embeddings.safetensors"
    write_embeddings(path, names, torch.randn(27, 16, generator=torch.Generator().manual_seed(1)), "random")
    return Data(table.assign(split=table.image.map(dict(zip(names, ["val"]*3 + ["train"]*24)))), Embeddings(path), None)


@pytest.fixture(scope="module")
def texts(data) -> list[list[str]]:
    "Five candidates for each of the three validation images: captions of that image and the next."
    own = list(data.references("val").values())
    return [own[n][:3] + own[(n + 1) % 3][:2] for n in range(3)]


@pytest.fixture
def given(monkeypatch, texts):
    "Candidates are `texts`, whatever the model would write."
    monkeypatch.setattr(rerank, "candidate_captions", lambda model, embeddings, config: texts[:len(embeddings)])


def encode(captions): return np.stack([np.random.default_rng(list(c.encode())).standard_normal(16) for c in captions])


@pytest.mark.parametrize("changes, options", [
    (dict(), {"temperature": 0.}),
    (dict(start_token="given", length_penalty=2., no_repeat_ngram=3), {"temperature": 0., "start_token": "given", "length_penalty": 2., "no_repeat_ngram_size": 3}),
    (dict(num_beams=1, length_penalty=2., temperature=0.7, top_p=0.9), {"temperature": 0.7, "top_p": 0.9, "top_k": 0}),  # no beams, nothing to penalize
])
def test_settings_become_options_of_generate(changes, options): assert generation_options(Config(**changes)) == options


@pytest.mark.parametrize("changes", [dict(temperature=1e-6), dict(temperature=1., top_p=1e-6)])
def test_sampling_without_chance_is_greedy(mini_model, changes):
    greedy, config = generate_ids(EMBEDDINGS, mini_model, 12, 1), dataclasses.replace(CONFIG, num_beams=1, **changes)
    assert generate_ids(EMBEDDINGS, mini_model, 12, 1, **generation_options(config)).equal(greedy)


@pytest.mark.parametrize("n", [0, 1])
def test_no_token_sequence_is_repeated(mini_model, n):
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, num_beams=1, temperature=3., no_repeat_ngram=n)
    ids = generate_ids(EMBEDDINGS, mini_model, 40, 1, num_return_sequences=4, **generation_options(config))
    words = [[i for i in row if i != mini_model.tokenizer.pad_token_id] for row in ids.tolist()]
    assert any(len(row) > len(set(row)) for row in words) == (n == 0)


def test_beam_groups_share_no_token_at_a_place(mini_model):
    def beams(penalty): return diverse_beams(mini_model, EMBEDDINGS, dataclasses.replace(CONFIG, rerank="mbr", num_beams=6, beam_groups=3, diversity_penalty=penalty))
    same, apart = beams(0.), beams(1e4)
    assert same[:, 2:4].equal(same[:, :2]) and same[:, 4:].equal(same[:, :2])  # without a penalty, each group finds the same
    shorter = min(same.shape[2], apart.shape[2])
    assert apart[:, :2, :shorter].equal(same[:, :2, :shorter])  # the first group pays nothing
    free = torch.tensor([mini_model.tokenizer.bos_token_id, mini_model.tokenizer.pad_token_id])
    for a, b in [(0, 2), (0, 4), (2, 4)]:
        shared = apart[:, a:a + 2, None] == apart[:, None, b:b + 2]  # (B, 2, 2, T)
        assert not (shared & ~torch.isin(apart[:, a:a + 2, None], free)).any()


@pytest.mark.parametrize("groups", [1, 2])
def test_candidates_are_beams_then_seeded_samples(mini_model, groups):
    config = dataclasses.replace(CONFIG, rerank="mbr", beam_groups=groups, samples=3, temperature=1.)
    before = torch.random.get_rng_state()
    found = candidate_captions(mini_model, EMBEDDINGS, config)
    assert torch.random.get_rng_state().equal(before)
    assert {len(texts) for texts in found} == {4 + 3}
    torch.manual_seed(5)
    assert candidate_captions(mini_model, EMBEDDINGS, config) == found
    assert candidate_captions(mini_model, EMBEDDINGS, dataclasses.replace(config, seed=1)) != found
    best = ids_to_text(mini_model.tokenizer, generate_ids(EMBEDDINGS, mini_model, 12, 4//groups))
    assert [texts[0] for texts in found] == best


@pytest.mark.numerics
def test_log_likelihood_is_that_of_the_literal_recipe(mini_model, texts):
    own = log_likelihoods(mini_model, EMBEDDINGS[0], texts[0], sharing=2)
    literal = literal_model(mini_model)
    with torch.no_grad(): wanted = [-literal_loss(literal, EMBEDDINGS[:1], [text]).item() for text in texts[0]]
    np.testing.assert_allclose(own, wanted, atol=1e-4)


def expected_scores(name, data, embedding, texts):
    "All candidates of an image and their scores, one candidate at a time."
    train = data.split("train")
    words = dict(zip(train.caption, tokenize({0: train.caption.tolist()})[0]))
    by_image = train.groupby("image").caption.apply(list)
    near = [c for image in nearest_training_images(data, embedding[None], 4)[0] for c in by_image[image]] if name in ("consensus", "regression") else []
    every, vectors = near + texts, CiderVectors([[words[c] for c in captions] for captions in by_image])
    cut = tokenize({0: every})[0]
    if name == "clip": return every, [np.dot(encode([c])[0], embedding.double().numpy())/embedding.double().norm().item() for c in every]
    if name == "regression": return every, ExpectedSimilarity(vectors, [[words[c] for c in captions] for captions in by_image])(cut, RegressionWeights(data)(embedding[None])[0])
    judges = cut[:len(near)] or cut  # neighbours judge the model's candidates, which have no vote
    return every, [np.mean([vectors.similarity([c, other])[0, 1] for k, other in enumerate(judges) if k != n]) for n, c in enumerate(cut)]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.numerics
def test_scores_are_those_computed_one_by_one(given, data, texts, name):
    config = dataclasses.replace(CONFIG, rerank=name, neighbours=4)
    rerank = Reranker(None, data, config, encode)
    for candidates, own, best in zip(rerank.candidates(EMBEDDINGS), texts, rerank(EMBEDDINGS)):
        every, wanted = expected_scores(name, data, candidates.embedding, own)
        assert candidates.texts == every and candidates.neighbours == len(every) - len(own)
        np.testing.assert_allclose(rerank.scores_of(candidates), wanted, atol=1e-5)
        assert max(wanted) - wanted[every.index(best)] < 1e-5
    if training := getattr(rerank.scores_of, "training", None):  # candidates are forgotten: memory stays constant
        rerank(EMBEDDINGS)
        assert (len(training.vectors.known), len(training.vectors.number)) == training.sizes


@pytest.mark.parametrize("weight", [0.05, 1e6])
def test_likelihood_of_all_models_is_added(given, data, texts, monkeypatch, weight):
    models = {"first": 0, "second": 1}
    class Model(str): ensemble = ("second",)
    def of_model(model, embedding, captions, max_length): return np.array([len(c)*(1 + models[model]) for c in captions], float)
    monkeypatch.setattr(rerank, "log_likelihoods", of_model)
    writer = Reranker(Model("first"), data, dataclasses.replace(CONFIG, rerank="mbr", likelihood_weight=weight))
    wanted = [c.texts[int(np.argmax(writer.scores_of(c) + weight*1.5*np.array([len(t) for t in c.texts])))] for c in writer.candidates(EMBEDDINGS)]
    assert writer(EMBEDDINGS) == wanted
    if weight > 1: assert wanted == [max(t, key=len) for t in texts]


def test_one_candidate_is_the_caption(mini_model, data):
    writer = caption_writer(mini_model, dataclasses.replace(CONFIG, rerank="mbr", num_beams=1), lambda: data)
    assert writer(EMBEDDINGS) == ids_to_text(mini_model.tokenizer, generate_ids(EMBEDDINGS, mini_model, 12, 1))


@pytest.mark.parametrize("reads, patches", [(None, None), (encode, 49)])
def test_clip_reranker_needs_clip_and_one_vector_per_photo(reads, patches):
    with pytest.raises(ValueError, match="rerank='clip' needs the CLIP that saw the photos"):
        Reranker(None, SimpleNamespace(embeddings=SimpleNamespace(tokens=patches)), dataclasses.replace(CONFIG, rerank="clip"), reads)


def test_rerankers_that_offer_training_captions_say_so():
    assert [name for name in RERANKERS if asks_neighbours(name)] == ["consensus", "regression"]


class Longest:
    def __init__(self, data, config, encode): pass
    def __call__(self, candidates): return [len(text) for text in candidates.texts]


class Nearest:
    asks_neighbours = True
    def __init__(self, data, config, encode): self.training, self.prepare = TrainingCaptions(data), lambda embeddings: embeddings.sum(1).tolist()
    def __call__(self, candidates):
        assert isinstance(candidates, Candidates) and candidates.prepared == candidates.embedding.sum().item()
        return -np.arange(len(candidates.texts))


def test_new_reranker_is_one_line(given, data, texts, monkeypatch):
    monkeypatch.setitem(RERANKERS, "longest", Longest)
    assert caption_writer(None, dataclasses.replace(CONFIG, rerank="longest"), lambda: data)(EMBEDDINGS) == [max(t, key=len) for t in texts]
    monkeypatch.setitem(RERANKERS, "nearest", Nearest)  # asks for neighbours and prepares a batch
    near = nearest_training_images(data, EMBEDDINGS, 1)
    assert caption_writer(None, dataclasses.replace(CONFIG, rerank="nearest"), lambda: data)(EMBEDDINGS) == [data.references("train")[near[n][0]][0] for n in range(3)]


def test_clipcap_caption_reranks(trained, tmp_path, monkeypatch):
    run, config = trained
    config = dataclasses.replace(config, rerank="regression", neighbours=4, samples=2, temperature=1., max_length=10)
    monkeypatch.setattr(stream, "writing_config", lambda *_: config)
    from clipcap.data import load_data
    data, model = load_data(run, config), load_run(run.name, precision="float32")
    photos = [data.photos/name for name in sorted(data.references("val"))]
    stream.caption_files(photos, run.name, tmp_path/"captions.jsonl", precision="float32")
    first, *rows = map(json.loads, (tmp_path/"captions.jsonl").read_text().splitlines())
    embeddings = encode_images(model.clip, torch.stack([model.preprocess(read_photo(p)) for p in photos]))
    assert [row["caption"] for row in rows] == Reranker(model, data, config)(embeddings)
    assert {"rerank": "regression", "samples": 2}.items() <= first.items() and set(DECODING) & set(first)
