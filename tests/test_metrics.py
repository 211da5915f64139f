"The metrics, one call for all, and how far scores would move on other images. The unmodified tools and literal bootstraps are the reference."
import json
import math
import re
from dataclasses import FrozenInstanceError

import numpy as np
import pandas as pd
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from scoring_data import read_vectors, words_of

from clipcap.scoring import metrics
from clipcap.scoring.metrics import (SPICE_COLUMNS, Column, Scores, average, bleu, check_pairs, cider, intervals, mean_of_images, meteor,
                                     percentile_interval, ratio, resample, rouge_l, score)

QUICK = ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"]
CAPTIONS = {"dog": "a black dog runs through the snow", "girl": "a girl in a pink dress climbs stairs", "surfer": "a man rides a horse over a fence"}
REFERENCES = {"dog": ["A black dog is running in the snow .", "The dog runs through deep snow ."],
              "girl": ["A child in a pink dress is climbing up a set of stairs in an entry way .",
                       "A little girl climbing into a wooden playhouse .", "A girl going into a wooden building ."],
              "surfer": ["A surfer in a yellow shirt rides a wave .", "A man surfs a big wave ."]}


def close(value, tolerance): return pytest.approx(value, rel=0, abs=tolerance)


# --- columns

def test_corpus_score_pools_images_that_have_one():
    some = mean_of_images([1, math.nan, 4])
    assert some.corpus == 2.5 and some.pool(np.array([[0, 0], [8, 2]])).tolist()[1] == 4  # image 3, twice
    assert math.isnan(some.pool(np.zeros(2)))
    assert average([some, mean_of_images([0, 1, 1])]).corpus == close((2.5 + 2/3)/2, 1e-12)
    assert average([some, some]).images[[0, 2]].tolist() == [1, 4]


# --- single metrics

def test_bleu_and_rouge_by_hand():
    words, people = {"x": "the dog runs"}, {"x": ["the brown dog runs fast"]}
    column = bleu(words, people)["bleu_1"]  # 3 of 3 words, 2 too few
    assert [column.corpus, *column.images] == close([math.exp(1 - 5/3)]*2, 1e-8)
    assert rouge_l(words, people)["rouge_l"].corpus == close((1 + 1.2**2)*0.6/(0.6 + 1.2**2), 1e-12)  # precision 1, recall 3/5


def test_captions_against_themselves_are_perfect():
    same = {"dog": "a brown dog runs on wet grass", "girl": "two small girls ride their red bikes"}
    itself = {i: [c] for i, c in same.items()}
    for column in [*bleu(same, itself).values(), *rouge_l(same, itself).values()]: assert [column.corpus, *column.images] == close([1, 1, 1], 1e-8)
    assert cider(same, itself)["cider"].corpus == close(10, 1e-8)


def test_cider_of_one_image_is_refused():
    with pytest.raises(ValueError, match="only one image"): cider({"x": "a dog"}, {"x": ["a dog"]})


# --- input

TWO = {"1": ["A dog ."], "2": ["A cat ."]}


@pytest.mark.parametrize("captions, references, message", [
    ({"1": "a dog"}, TWO, "1 images have references but no caption: '2'"),
    ({"1": "a dog", "3": "a cat"}, {"1": ["A dog ."]}, "1 images have a caption but no references: '3'; add their"),
    ({"1": "a dog", "2": "a cat"}, {**TWO, "2": []}, "'2'; add at least one"),
    ({"1": "a dog", "2": "a cat"}, {**TWO, "2": "A cat ."}, "not a list of strings: '2'"),
    ({"1": "a dog", "2": "a cat"}, {**TWO, "2": ["A cat .", None]}, "not a list of strings: '2'"),
    ({"1": "a dog", "2": None}, TWO, "not a string: '2'"), ({}, TWO, "no captions")])
def test_captions_and_references_must_be_of_the_same_images(captions, references, message):
    with pytest.raises(ValueError, match=re.escape(message)): check_pairs(captions, references)
    with pytest.raises(ValueError, match=re.escape(message)): score(captions, references, ["bleu_1"])


def test_empty_caption_is_a_caption(): check_pairs({"1": "a dog", "2": ""}, TWO)


@pytest.mark.parametrize("options, message", [
    (dict(metrics=["cider", "spider-man"]), "got ['spider-man']"), (dict(metrics="cider"), "metrics is a list"), (dict(tokenization="spacy"), "not 'spacy'")])
def test_unknown_metrics_and_tokenization_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)): score(CAPTIONS, REFERENCES, **options)


def test_references_without_a_word_are_dropped_and_captions_without_a_word_score_zero():
    with pytest.warns(UserWarning) as told: dull = score({"a": "", "b": "..."}, {"a": ["A dog .", "..."], "b": ["A cat ."]}, QUICK)
    assert len(told) == 1 and "'a'" in str(told[0].message) and dull.protocol["references"] == 2
    assert (dull.per_image == 0).all(axis=None) and {*dull.corpus.values()} == {0.0}
    with pytest.raises(ValueError, match="'b'; leave them out"): score({"a": "x", "b": "y"}, {"a": ["x"], "b": ["...", ""]})


# --- one call for all

def test_order_of_images_and_other_metrics_do_not_matter():
    scores, turned = score(CAPTIONS, REFERENCES, QUICK), score(dict(reversed(CAPTIONS.items())), REFERENCES, ["cider", "bleu_4"])
    assert [*turned.per_image] == ["cider", "bleu_4"] and turned.per_image.index.name == "image_id"
    pd.testing.assert_frame_equal(turned.per_image.loc[[*CAPTIONS]], scores.per_image[["cider", "bleu_4"]], rtol=0, atol=0)
    assert turned.corpus == close({n: scores.corpus[n] for n in turned.corpus}, 1e-12)


def test_protocol_is_json_and_counts_references():
    protocol = score(CAPTIONS, REFERENCES, ["bleu_1"]).protocol
    assert (protocol["references"], protocol["references_min"], protocol["references_max"]) == (7, 2, 3)
    assert json.loads(json.dumps(protocol)) == protocol


def test_raw_text_scores_lower():
    raw, ptb = [score(CAPTIONS, REFERENCES, ["bleu_1"], tokenization).corpus["bleu_1"] for tokenization in ("raw", "ptb")]
    assert raw < ptb


def test_one_image_has_all_metrics_but_cider():
    with pytest.warns(UserWarning, match="only one image"): one = score({7: "A dog\nruns ."}, {7: ["a dog runs"]}, ["cider", "bleu_1"])
    assert math.isnan(one.corpus["cider"]) and math.isnan(one.per_image.loc[7, "cider"]) and "only one image" in one.unavailable["cider"]
    assert one.per_image.loc[7, "bleu_1"] == close(1, 1e-8) and np.isnan(intervals(one)["cider"]).all()
    with pytest.raises(FrozenInstanceError): one.corpus = {}


def test_metric_without_its_files_costs_its_own_columns_only(outputs, tmp_path, monkeypatch):
    from clipcap.scoring import spice as parser
    monkeypatch.setattr(parser, "_KNOWN", {})
    monkeypatch.setattr(parser, "_spice", parser._spice.__wrapped__)  # else a parser of an earlier test needs no files
    for name, value in {"M2_REPO": str(tmp_path), "CLIPCAP_SPICE_JARS": "", "CLIPCAP_MAVEN": "http://127.0.0.1:9"}.items(): monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning) as told: partly = score(CAPTIONS, REFERENCES, ["cider", "spice", "spider", "meteor"])
    assert len(told) == 1 and {*partly.unavailable} == {"spice", "spider"}
    for part in ("stanford-corenlp-3.6.0.jar", "7.271 MB", "python -m clipcap.scoring.spice_files"): assert part in partly.unavailable["spider"], part
    assert partly.corpus["cider"] == score(CAPTIONS, REFERENCES, ["cider"]).corpus["cider"] and 0 < partly.corpus["meteor"] < 1  # Java itself is there
    assert math.isnan(partly.corpus["spider"]) and partly.per_image.spice.isna().all()


def test_spider_is_the_mean_of_spice_and_cider(monkeypatch):
    def table(captions, references): return pd.DataFrame({n: [0.5, 0.2, math.nan] for n in SPICE_COLUMNS}, index=[*captions]).assign(spice_size=math.nan)
    monkeypatch.setattr(metrics, "spice_scores", table)
    whole = score(CAPTIONS, REFERENCES, ["spider", "spice", "cider"])
    assert whole.corpus["spice"] == close(0.35, 1e-12)  # the mean of the two images that have one
    assert whole.corpus["spider"] == close((0.35 + whole.corpus["cider"])/2, 1e-12)
    assert whole.per_image.spider.dog == close((0.5 + whole.per_image.cider.dog)/2, 1e-12)
    assert ([*whole.corpus], whole.unavailable) == (["spider", "spice", "cider"], {})
    assert score(CAPTIONS, REFERENCES, ["spice_size"]).unavailable == {"spice_size": "no image has such a score"}


# --- scripts without spaces

SPACELESS = {"1": "狗在草地上跑", "2": "一个人在海边", "3": "两个女孩在说话"}


def test_captions_without_spaces_are_warned_of_and_scored_by_characters():
    people = {"1": ["一只狗在草地上跑"], "2": ["男人站在海边"], "3": ["女孩们在说话"]}
    with pytest.warns(UserWarning, match="6 of 6 captions and references are written without spaces.*tokenization='characters'"): whole = score(SPACELESS, people, ["bleu_1"])
    single = score(SPACELESS, people, ["bleu_1"], "characters")
    assert whole.corpus["bleu_1"] < 0.01 < 0.5 < single.corpus["bleu_1"] and single.protocol["tokenization"] == "characters"


@pytest.mark.parametrize("text", ["A dog runs on the grass", "a sign that says 禁止", "狗 在 草地 上 跑", "un niño corre", "собака бежит", "γατα"])
def test_captions_with_spaces_are_not_warned_of(text, recwarn):
    score({"1": text, "2": "a cat"}, {"1": [text], "2": ["a cat"]}, ["bleu_1"])
    assert not recwarn.list


# --- the unmodified tools

@pytest.fixture(scope="module")
def tools(shared):
    "Scores of 240 images by the unmodified tools, and ours."
    known = read_vectors(shared)
    items = known["items"]
    return known, score({i: item["hypothesis"] for i, item in items.items()}, {i: item["references"] for i, item in items.items()}, [*QUICK, "meteor"])


def test_scores_of_240_images_are_the_unmodified_tools(tools):
    known, ours = tools
    theirs = pd.DataFrame({i: item["scores"] for i, item in known["items"].items()}).T
    pd.testing.assert_frame_equal(ours.per_image, theirs[[*ours.corpus]], rtol=0, atol=1e-9, check_names=False)
    assert ours.corpus == close({n: known["corpus"][n] for n in ours.corpus}, 1e-9)


def tool_bleu(picked, captions, references):
    "The tool's BLEU-1 to BLEU-4 of images, some of which may be picked several times."
    gts, res = {n: references[i] for n, i in enumerate(picked)}, {n: [captions[i]] for n, i in enumerate(picked)}
    return Bleu(4).compute_score(gts, res, verbose=0)[0]


def test_sums_of_rows_score_any_selection_as_the_tools(tools):
    known, ours = tools
    captions, references = words_of(known)
    twice = [i for i in list(captions)[::2] for _ in range(2)]
    for n, expected in enumerate(tool_bleu(twice, captions, references), 1):
        column = ours.columns[f"bleu_{n}"]
        assert column.pool(2*column.rows[::2].sum(0)) == close(expected, 1e-9)
    column = ours.columns["meteor"]
    again = meteor({k: captions[i] for k, i in enumerate(twice)}, {k: references[i] for k, i in enumerate(twice)})["meteor"]
    assert column.pool(2*column.rows[::2].sum(0)) == close(again.corpus, 1e-12)


# --- confidence intervals

@pytest.mark.numerics
def test_bootstrap_is_scoring_each_draw_anew(shared):
    captions, references = words_of(read_vectors(shared), 100)
    rng, column, draws = np.random.default_rng(5), bleu(captions, references)["bleu_4"], []
    for _ in range(10):
        counts = rng.multinomial(len(captions), np.full(len(captions), 1/len(captions)))
        draws.append(tool_bleu([i for i, count in zip(captions, counts) for _ in range(count)], captions, references)[3])
    np.testing.assert_allclose(column.pool(resample(column.rows, 10, 5)), draws, rtol=0, atol=1e-9)


def test_intervals_hold_the_score_and_follow_the_seed():
    rng = np.random.default_rng(0)
    scores = Scores({}, pd.DataFrame(), {}, columns={n: mean_of_images(rng.gamma(1.5, 0.6, 60)) for n in ("a", "b")})
    found = intervals(scores, 200)
    assert found == intervals(scores, 200) != intervals(scores, 200, seed=1)
    assert all(low < scores.columns[n].corpus < high for n, (low, high) in found.items())
    assert intervals(Scores({}, pd.DataFrame(), {})) == {}


@pytest.mark.parametrize("resamples, seed, text", [(0, 0, "resamples=0"), (-5, 0, "resamples=-5"), (10, -1, "seed=-1"), (1.5, 0, "resamples=1.5")])
def test_draws_that_cannot_be_are_refused(resamples, seed, text):
    with pytest.raises(ValueError, match=text): intervals(Scores({}, pd.DataFrame(), {}, columns={"a": mean_of_images([1, 2])}), resamples, seed)


@pytest.mark.numerics
def test_interval_of_a_mean_is_close_to_the_normal_one():
    values = np.random.default_rng(0).normal(5, 2, 400)
    column = mean_of_images(values)
    low, high = percentile_interval(column.pool(resample(column.rows, 2000)))
    assert [low, high] == close(values.mean() + values.std()/20*np.array([-1.96, 1.96]), 0.02)
    assert np.isnan(percentile_interval(np.full(3, np.nan))).all()


@pytest.mark.soak
def test_95_percent_intervals_hold_the_truth_95_times_in_100():
    def covers(column, truth):
        low, high = percentile_interval(column.pool(resample(column.rows, 300, seed=int(column.rows.sum()*1e6) % 2**32)))
        return low <= truth <= high

    rng, hits = np.random.default_rng(0), {"mean": [], "ratio": []}
    for _ in range(600):
        hits["mean"].append(covers(mean_of_images(rng.gamma(1.5, 0.6, 200)), truth=0.9))
        runs = rng.poisson(9, 200) + 1  # of 1 + 9 words on average, 30% match
        hits["ratio"].append(covers(Column(np.zeros(200), np.stack([rng.binomial(runs, 0.3), runs], 1), ratio), truth=0.3))
    for kind, hit in hits.items(): assert np.mean(hit) == close(0.95, 3*math.sqrt(0.95*0.05/600)), kind  # three standard errors
