"""Paired tests, tables of systems, baselines and controls (clipcap.reporting.compare)."""
import json
import math
import shutil
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from clipcap.core import make_config
from clipcap.data import Data, load_clip, load_data
from clipcap.decoding.load import load_run
from clipcap.formats.embeddings import Embeddings, write_embeddings
from clipcap.formats.readers import random_split, read_captions
from clipcap.reporting.compare import (CONTROLS, _text_encoder, baseline_captions, compare, compare_scores, control_captions,
                                       human_scores, most_common_caption, paired_test, plot_comparison, several_references, shuffle_images,
                                       side_by_side, stars, write_comparison)
from clipcap.runs.files import write_json
from clipcap.scoring.metrics import Column, mean_of_images, percentile_interval, ratio, resample, score
from clipcap.scoring.neighbours import nearest_training_images


# --- the paired test

def test_paired_test_sees_what_intervals_of_single_systems_do_not():
    rng = np.random.default_rng(0)
    hard = rng.normal(1, 0.5, 200)  # images differ much, systems little
    first, second = hard + rng.normal(0, 0.1, 200), hard + 0.04 + rng.normal(0, 0.1, 200)
    alone = [percentile_interval(resample(mean_of_images(s).rows, 1000) @ np.array([1/200, 0])) for s in (first, second)]
    paired = paired_test(mean_of_images(first), mean_of_images(second))
    assert alone[0][1] > alone[1][0] and paired["p"] < 0.05 and paired["low"] > 0
    assert paired["difference"] == pytest.approx((second - first).mean(), abs=1e-12)
    error = (second - first).std()/200**.5  # the textbook's interval of paired differences
    assert [paired["low"], paired["high"]] == pytest.approx([paired["difference"] + z*error for z in (-1.96, 1.96)], abs=0.2*error)
    assert paired_test(mean_of_images(second), mean_of_images(first))["difference"] == -paired["difference"]


def test_equal_systems_are_not_different():
    same = mean_of_images([1., 2., 4.])
    assert {k: v for k, v in paired_test(same, same, 50).items() if k in ("difference", "p")} == {"difference": 0, "p": 1}
    assert all(map(math.isnan, paired_test(same, mean_of_images([math.nan]*3)).values()))


def test_p_value_of_three_images_can_be_counted():
    assert paired_test(mean_of_images([0, 0, 0]), mean_of_images([1, 2, 3]), 20_000)["p"] == pytest.approx(2/8, abs=0.01)


@pytest.mark.soak
@pytest.mark.parametrize("kind, expected", [("means", 0.05), ("ratios", 0.05), ("different means", 0.85)])
def test_paired_test_errs_as_often_as_it_says(kind, expected, times=500):  # 0.85: the power of a normal test at a difference of 0.3 standard deviations
    rng = np.random.default_rng(0)

    def pair():
        if kind != "ratios":
            hard = rng.normal(1, 0.5, 100)
            return [mean_of_images(hard + shift + rng.normal(0, 0.5**.5, 100)) for shift in (0, 0.3*(kind != "means"))]
        easy = rng.beta(3, 6, 100)
        counts = [rng.poisson(9, 100) + 1 for _ in range(2)]
        return [Column(np.zeros(100), np.stack([rng.binomial(n, easy), n], 1), ratio) for n in counts]

    rejected = np.mean([paired_test(*pair(), 199)["p"] <= 0.05 for _ in range(times)])
    assert abs(rejected - expected) <= 3*math.sqrt(expected*(1 - expected)/times)


# --- the table

REFERENCES = {f"{n}": ["a dog runs in the snow", "a black dog is running"] if n % 2 else ["two men climb a rock", "men on a rock"] for n in range(40)}
GOOD = {i: "a dog runs" if int(i) % 2 else "men climb" for i in REFERENCES}
WORSE = {i: c if int(i) % 4 else "a cat" for i, c in reversed(GOOD.items())}  # in another order


def scores_of(captions, tokenization="ptb"): return score(captions, {i: REFERENCES[i] for i in captions}, ["bleu_1", "cider"], tokenization)


def test_systems_are_compared_with_the_first():
    three = {"good": scores_of(GOOD), "worse": scores_of(WORSE), "again": scores_of(GOOD)}
    table = compare_scores(three, 200)
    assert table.loc[("cider", "worse"), "mark"].startswith("**")
    assert table.loc[("cider", "again"), ["difference", "p"]].tolist() == [0, 1]
    assert table.loc[("cider", "worse"), "difference"] == pytest.approx(three["worse"].corpus["cider"] - three["good"].corpus["cider"], abs=1e-9)
    assert table.difference.isna()[[("bleu_1", "good"), ("cider", "good")]].all()
    cells = side_by_side(table)
    assert cells.loc["again", "cider"] == cells.loc["good", "cider"] and cells.loc["worse", "cider"].endswith("*")


def test_different_images_are_not_compared():
    fewer = scores_of({i: GOOD[i] for i in list(GOOD)[:30]})
    with pytest.raises(ValueError, match="different images: 40 and 30, 30 of them in common"): compare_scores({"good": scores_of(GOOD), "fewer": fewer})


def test_scores_of_another_tokenization_are_shown_but_not_tested():
    table = compare_scores({"good": scores_of(GOOD), "raw": scores_of(WORSE, "raw")}, 50)
    assert table.p.isna().all() and table.score.notna().all()
    assert side_by_side(table.assign(score=math.nan)).to_numpy().tolist() == [["–", "–"]]*2


def test_stars():
    assert [stars(p) for p in (math.nan, 0.2, 0.05, 0.01, 0.001)] == ["", "", "*", "**", "***"]


def test_plot_bears_missing_scores_and_scores_outside_of_their_interval():
    rows = pd.DataFrame({"score": [0.5, math.nan], "low": [0.6, math.nan], "high": [0.7, math.nan]},
                        index=pd.MultiIndex.from_tuples([("cider", "a"), ("cider", "b")], names=["metric", "system"]))
    figure, ax = plt.subplots()
    plot_comparison(rows, "cider", ax)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    plt.close(figure)


# --- people

def test_people_are_scored_one_against_the_others():
    two, metrics = {"a": ["a dog runs", "a dog sleeps on grass"], "b": ["a cat", "one cat sits", "the cat"]}, ["rouge_l", "bleu_2"]
    people = human_scores(two, metrics)
    rounds = [score({"a": two["a"][k % 2], "b": two["b"][k]}, {"a": [two["a"][1 - k % 2]], "b": two["b"][:k] + two["b"][k + 1:]}, metrics) for k in range(3)]
    for name in metrics: assert people.corpus[name] == pytest.approx(np.mean([s.corpus[name] for s in rounds]), abs=1e-12)
    assert people.per_image.rouge_l.tolist() == pytest.approx(np.mean([s.per_image.rouge_l for s in rounds], axis=0), abs=1e-12)


def test_images_with_one_caption_are_named_or_left_out():
    with pytest.raises(ValueError, match="1 images have fewer than two captions"): human_scores({"a": ["x"], "b": ["y", "z"]})
    assert several_references({"a": ["x"], "b": ["y", "...", "z"], "c": ["!", "dog"]}) == {"b": ["y", "z"]}


@pytest.fixture(scope="session")
def flickr_captions(shared):
    "Photo -> its five captions, of the 900 photos of Flickr8k in ../shared."
    photos = {p.name for p in (shared/"flickr8k/Images").iterdir()}
    written = read_captions(shared/"flickr8k/captions.txt").groupby("image").caption.apply(list)
    return {n: c for n, c in written.items() if n in photos}


@pytest.mark.slow
def test_people_on_flickr8k(flickr_captions):
    people = human_scores(flickr_captions, ["cider"])
    assert {k: people.protocol[k] for k in ("images", "references", "rounds")} == {"images": 900, "references": 3600, "rounds": 5}
    rounds = [part[:, 0].mean() for part in np.split(people.columns["cider"].rows, 5, axis=1)]
    assert rounds == pytest.approx([0.770, 0.873, 0.861, 0.814, 0.764], abs=1e-3)  # the numbers in the notebook
    assert people.corpus["cider"] == pytest.approx(np.mean(rounds), abs=1e-9)


# --- baselines and controls

def test_most_common_caption_is_the_first_in_the_alphabet_among_equals():
    assert most_common_caption(["Two cats .", "A dog runs .", "a dog runs", "two cats", "A bird"]) == "A dog runs ."


def test_shuffling_leaves_no_image_in_its_place():
    swapped = shuffle_images(list("abcdefgh"), seed=0)
    assert sorted(swapped) == sorted(swapped.values()) and all(a != b for a, b in swapped.items())
    assert swapped != shuffle_images(list("abcdefgh"), seed=1)
    with pytest.raises(ValueError, match="at least 2 images, found 1"): shuffle_images(["a"], 0)


def test_consensus_takes_what_neighbours_agree_on(tmp_path):
    captions = {"a": ["a dog runs", "the dog runs"], "b": ["a dog runs fast"], "c": ["two cats sleep"], "q": ["?"]}
    write_embeddings(tmp_path/"e.safetensors", list(captions), torch.tensor([[1., 0.1], [1., 0.2], [-1., 0.], [1., 0.15]]), "test")
    table = pd.DataFrame([(n, c, "test" if n == "q" else "train") for n, own in captions.items() for c in own], columns=["image", "caption", "split"])
    taken = baseline_captions(Data(table, Embeddings(tmp_path/"e.safetensors"), None), ["q"], neighbours=2)
    assert taken["consensus of 2 neighbours"]["q"] in {*captions["a"], *captions["b"]}
    assert taken["most common training caption"]["q"] == "a dog runs"  # all are as common


@pytest.mark.slow
def test_consensus_is_the_baseline_to_beat_on_real_photographs(shared, flickr_captions):
    table = pd.DataFrame([(n, c) for n, own in flickr_captions.items() for c in own], columns=["image", "caption"])
    data = Data(table.assign(split=table.image.map(random_split(flickr_captions, seed=1))), Embeddings(shared/"real/photos.safetensors"), None)
    wanted = sorted(data.references("test"))
    near = nearest_training_images(data, wanted)
    taken = baseline_captions(data, wanted) | {"nearest": {n: flickr_captions[near[n][0]][0] for n in wanted}}
    cider = {kind: score(own, data.references("test"), ["cider"]).corpus["cider"] for kind, own in taken.items()}
    assert cider["consensus of 60 neighbours"] > 1.3*cider["nearest"] > cider["most common training caption"]
    for n in wanted: assert taken["consensus of 60 neighbours"][n] in {c for m in near[n] for c in flickr_captions[m]}


def test_controls_hold_no_look_at_the_photo(trained):
    run, config = trained
    data, model = load_data(run, config), load_run(run.name, device="cpu")
    captions = {n: f"caption {n}" for n in sorted(data.references("test"))}
    controls = control_captions(data, captions, model, config)
    assert tuple(controls) == CONTROLS and all(set(own) == set(captions) for own in controls.values())
    assert sorted(controls["shuffled images"].values()) == sorted(captions.values())
    assert len(set(controls["mean embedding"].values())) == 1
    assert set(controls["nearest training photo"].values()) <= set(data.split("train").caption)
    one = next(iter(captions))
    assert set(control_captions(data, {one: "x"}, model, config)) == {*CONTROLS} - {"shuffled images"}


# --- runs

@pytest.fixture
def two_runs(trained_copy, outputs):
    "Beside the run `demo` a copy, of which every other image has its neighbour's caption: folder of the copy."
    shutil.copytree(outputs/"demo", outputs/"worse")
    rows = json.loads((outputs/"demo/captions_test.json").read_text())
    write_json(outputs/"worse/captions_test.json", [{**r, "caption": rows[k - 1]["caption"] if k % 2 else r["caption"]} for k, r in enumerate(rows)])
    return outputs/"worse"


def test_runs_are_compared_on_the_same_images(two_runs):
    comparison = compare(["demo", "worse"], "test", ["bleu_4", "cider"], resamples=100)
    assert list(comparison.table.index) == [(m, s) for m in ("bleu_4", "cider") for s in ("demo", "worse")]
    known = json.loads((two_runs.parent/"demo/scores_test.json").read_text())
    for column in ("bleu_4", "cider"): assert comparison.table.loc[(column, "demo"), "score"] == pytest.approx(known["corpus"][column], abs=1e-9)
    assert comparison.systems["worse"]["checkpoint"] == known["protocol"]["checkpoint"]
    write_comparison(comparison, two_runs/"comparison")
    written = json.loads((two_runs/"comparison.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert len(written["table"]) == len(pd.read_csv(two_runs/"comparison.csv")) == 4
    assert written["table"][0]["p"] is None and written["table"][0]["mark"] == ""


def test_what_can_not_be_compared_is_told(two_runs, monkeypatch):
    with pytest.raises(ValueError, match="there is no run 'never'"): compare(["demo", "never"])
    assert not (two_runs.parent/"never").exists()
    with pytest.raises(ValueError, match="name at least one run"): compare([])
    with pytest.raises(ValueError, match="has no captions and scores of the split 'train'"): compare(["demo"], "train")
    table = pd.read_csv(two_runs/"captions_table.csv", dtype=str, keep_default_na=False)
    images = sorted(set(table[table.split == "test"].image))
    table.assign(split=table.split.where(~table.image.isin(images[:2]), "val")).to_csv(two_runs/"captions_table.csv", index=False)
    with pytest.raises(ValueError, match="run 'worse' was trained with something else: data_hash was"): compare(["demo", "worse"], metrics=["cider"])
    monkeypatch.setattr("clipcap.reporting.compare.check_recorded", lambda *_: None)  # as if it had been trained on that
    with pytest.raises(ValueError, match=f"of their {len(images)} and {len(images) - 2} images, {len(images) - 2} are the same"): compare(["demo", "worse"], metrics=["cider"])


@pytest.mark.parametrize("encoder, there", [(None, True), ("another@0", False)])
def test_texts_are_read_only_by_the_clip_that_made_the_embeddings(encoder, there):
    made = SimpleNamespace(embeddings=SimpleNamespace(encoder=encoder or load_clip("mini")[2]))
    assert (_text_encoder(make_config("mini"), made) is not None) == there


def test_baselines_stand_beside_a_run(trained):
    comparison = compare(["demo"], metrics=["rouge_l", "clipscore"], baselines=True, resamples=20)
    names = {"demo", *CONTROLS, "consensus of 60 neighbours", "most common training caption"}
    assert set(comparison.scores) == {*names, "people, one left out"}
    assert comparison.table.xs("clipscore").index.tolist() == [n for n in comparison.scores if n in names]
    assert comparison.table.xs("rouge_l").p.notna().sum() == len(names) - 1  # people have fewer references


def test_people_are_left_out_where_images_have_one_caption(trained_copy, outputs, monkeypatch):
    for module in ("decoding.load", "reporting.compare"): monkeypatch.setattr(f"clipcap.{module}.check_recorded", lambda *_: None)  # the table is replaced below
    table = pd.read_csv(outputs/"demo/captions_table.csv", dtype=str, keep_default_na=False)
    table.drop_duplicates("image").to_csv(outputs/"demo/captions_table.csv", index=False)
    with pytest.warns(UserWarning, match="people are not compared: 6 of 6 images have fewer than two captions"):
        assert "people, one left out" not in compare(["demo"], metrics=["rouge_l"], baselines=True, resamples=20).scores
