"""Controls, errors and hard images of a split, whatever the data and the model (clipcap.analysis)."""
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from clipcap.analysis import (NO_NOUN, compare_errors, confusion, content_words, controls_table, copied_captions, correlations,
                              error_table, image_table, plot_confusion, plot_controls, plot_error_rates, plot_never_said,
                              plot_score_by, show_errors, spearman, stem, word_use)
from clipcap.data import Data, load_data
from clipcap.evaluate import read_captions_json
from clipcap.reporting.compare import CONTROLS
from clipcap.scoring import error_kinds, tokenization
from clipcap.scoring.error_kinds import ERROR_KINDS, SCENE_KINDS
from clipcap.scoring.spice_files import SpiceFilesMissing

TRAINING = ["the cat", *["a dog"]*8]
CASES = {  # captions, references: what any data and any model may give
    "nothing is written": ({"1": "", "2": ""}, {"1": ["a puppy in a field"], "2": ["a dog"]}),
    "one word": ({"1": "dog", "2": "dog"}, {"1": ["a puppy in a field"], "2": ["a field"]}),
    "one image": ({"1": "a dog in a field"}, {"1": ["a puppy", "a dog in the field"]}),
    "one image, one caption": ({"1": "a dog"}, {"1": ["a puppy in a field"]}),
    "no thing": ({"1": "of the", "2": "is"}, {"1": ["is on"], "2": ["and the"]}),
    "not only words": ({"1": "$x_$ costs $5", "2": "..."}, {"1": ["...", "a $1 bill of $_^"], "2": ["🎉", "dog", "!"]}),
}
cases = pytest.mark.parametrize("captions, references", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def words(request, monkeypatch):
    "A tokenizer in place of the PTB tokenizer, which starts Java; tests on a trained run or with SPICE keep that."
    if {"trained", "spice"} & {*request.fixturenames}: return
    def split(line): return " ".join(w for w in re.findall(r"\w+|[^\w\s]", line.lower()) if w < "\U00010000")
    monkeypatch.setattr(tokenization, "ptb_lines", lambda lines: [split(line) for line in lines])


@pytest.fixture
def parser(monkeypatch):
    "A parser in place of SPICE's: every word that is no function word is a thing; each is its own synonym alone."
    monkeypatch.setattr(error_kinds, "parse", lambda texts: {t: [(w,) for w in content_words(t)] for t in texts})
    monkeypatch.setattr(error_kinds, "look_up", lambda kind, words, *_, **__: {w: [w] for w in words})


def drawn(plot, *given, panels=1):
    "Draw a figure to the last letter; the axes."
    figure, axes = plt.subplots(1, panels)
    plot(*given, axes)
    figure.canvas.draw()
    plt.close(figure)
    return axes


# --- controls

def test_controls_are_scored_like_the_model(trained):
    run, config = trained
    data, captions = load_data(run, config), read_captions_json(run.path/"captions_test.json")
    references = data.references("test")
    table = controls_table(captions, {kind: captions for kind in CONTROLS}, references)
    known = pd.read_csv(run.path/"scores_test.csv").cider.mean()
    assert list(table.index) == ["model", *CONTROLS] and table.cider.tolist() == pytest.approx([known]*4, abs=1e-9)
    assert table.share_of_model.tolist() == [1]*4
    assert drawn(plot_controls, table).get_title() == "With another image's caption, CIDEr drops by 0%"


@pytest.mark.filterwarnings("ignore::UserWarning")
@cases
def test_controls_of_any_split_can_be_drawn(captions, references):
    controls = {kind: captions for kind in CONTROLS[len(captions) < 2:]}  # one image can't be shuffled
    table = controls_table(captions, controls, references)
    assert list(table.index) == ["model", *CONTROLS] and list(table) == ["cider", "share_of_model"]
    ax = drawn(plot_controls, table)
    if len(captions) < 2: assert table.cider.isna().all() and "at least two images" in ax.texts[0].get_text()


# --- errors

def test_errors_are_summarized_by_kind():
    rows = [("1", "missed", "cat"), ("2", "missed", "dog"), ("2", "missed", "cat"), ("1", "invented", "car")]
    table = error_table(pd.DataFrame(rows, columns=["image_id", "kind", "what"]))
    assert list(table.index) == ["invented", "missed"] and table.loc["missed"].tolist() == [2, 3, "cat", "1, 2"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@cases
def test_errors_of_any_split_are_counted_and_drawn(parser, captions, references):
    rates, errors, unavailable = compare_errors(captions, references, captions if len(captions) > 1 else None)
    assert list(rates.index) == list(ERROR_KINDS) and not unavailable
    assert list(rates)[0] == "model" and ("shuffled" in rates) == (len(captions) > 1)
    assert ("people" in rates) == any(sum(any(map(str.isalpha, t)) for t in texts) > 1 for texts in references.values())
    if "shuffled" in rates: assert rates.model.tolist() == rates.shuffled.tolist()  # the same captions
    drawn(plot_error_rates, rates)
    data = Data(pd.DataFrame([(i, t) for i, texts in references.items() for t in texts], columns=["image", "caption"]), None, None)
    for rows in (errors["model"], errors["model"][:0]):
        assert len(error_table(rows)) == rows.kind.nunique()
        figure = show_errors(data, captions, rows, "Errors of $5 and $_")
        figure.canvas.draw()
        plt.close(figure)


def test_errors_need_no_parser(monkeypatch):
    def missing(*_): raise SpiceFilesMissing("no parser here")
    monkeypatch.setattr(error_kinds, "parse", missing)
    with pytest.warns(UserWarning, match="no parser here"): rates, errors, unavailable = compare_errors({"1": "a dog with a"}, {"1": ["a dog"]})
    assert list(unavailable) == SCENE_KINDS and rates.model.isna().sum() == len(SCENE_KINDS)
    assert drawn(plot_error_rates, rates).get_title() == "Most frequent: truncation, in 100% of the model's captions"


def test_a_split_without_errors_can_be_drawn():
    rates = pd.DataFrame({"model": 0., "people": 0.}, index=list(ERROR_KINDS))
    assert drawn(plot_error_rates, rates).get_title() == "No errors found in the model's captions"


@pytest.mark.slow
def test_people_make_fewer_errors_than_captions_of_other_images(trained):
    run, config = trained
    references = load_data(run, config).references("train")
    names = list(references)[:12]
    captions = {n: references[m][0] for n, m in zip(names, names[1:] + names[:1])}
    rates, _, unavailable = compare_errors(captions, {n: references[n] for n in names})
    assert not unavailable
    for kind in ("invented", "missed"): assert rates.people[kind] < rates.model[kind] - 0.2


# --- what makes an image hard

def test_difficulty_length_and_rarity():
    table = image_table({"a": "A dog runs !", "b": "The cat ."}, {"a": ["A dog .", "a dog"], "b": ["a zebra"]}, TRAINING)
    assert list(table) == ["difficulty", "words", "human_words", "rarity", "copied"]
    assert (table.words.tolist(), table.human_words.tolist(), table.copied.tolist()) == ([3, 2], [2, 2], [False, True])
    assert table.rarity.tolist() == pytest.approx([-math.log10(9/10), 1])
    assert table.difficulty["a"] == pytest.approx(0, abs=1e-9) and math.isnan(table.difficulty["b"])


def test_spearman_is_the_textbooks():
    assert spearman([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert spearman([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)  # 1 - 6·2/(3·8)
    assert math.isnan(spearman([1, 1], [1, 2])) and math.isnan(spearman([], []))


def test_correlations_have_intervals():
    rng = np.random.default_rng(0)
    images = pd.DataFrame({"difficulty": rng.random(60), "words": rng.integers(3, 9, 60), "rarity": math.nan})
    related = correlations(images, 5 - images.difficulty, resamples=50)
    assert related.images.tolist() == [60, 60, 0] and related.spearman["difficulty"] == pytest.approx(-1)
    assert related.low["words"] < related.spearman["words"] < related.high["words"] and related.loc["rarity"].isna().sum() == 3


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("score", [0., math.nan])
@cases
def test_hardness_of_any_split_can_be_drawn(captions, references, score):
    images = image_table(captions, references, TRAINING)
    assert list(images.index) == list(captions)
    cider = pd.Series(score, images.index, name="CIDEr")
    axes = drawn(plot_score_by, images, cider, correlations(images, cider), panels=3)
    if math.isnan(score): assert [ax.texts[0].get_text() for ax in axes] == ["unknown for\nall images"]*3


# --- repeated and missing words

def test_copied_captions_are_counted():
    table = copied_captions({"1": "A dog .", "2": "a dog", "3": "a cat", "4": "a fish"}, ["A cat .", "a dog", "a dog ."])
    assert table.reset_index().to_numpy().tolist() == [["a dog", 2, 2, ["1", "2"]], ["a cat", 1, 1, ["3"]]]
    assert copied_captions({"1": ""}, ["a dog"]).empty


def test_stems_unite_the_forms_of_a_word():
    assert len({stem(w) for w in ("race", "races", "racing", "raced")}) == 1
    assert [stem(w) for w in ("running", "runs", "puppies", "red", "dress", "dresses")] == ["run", "run", "puppy", "red", "dres", "dres"]


def test_words_that_are_never_said():
    use = word_use({"1": "a dog", "2": "a dog runs"}, {"1": ["Two dogs .", "a dog and a cat"], "2": ["the cat runs"]})
    assert use.people.to_dict() == {"cat": 2, "dog": 1, "dogs": 1, "runs": 1}
    assert use.never.to_dict() == {"cat": True, "dog": False, "dogs": False, "runs": False}
    assert use.loc["dog"].tolist() == [1, 2, False, "1"]


@cases
def test_words_of_any_split_can_be_drawn(captions, references):
    use = word_use(captions, references)
    assert use[use.never].people.dtype == int
    drawn(plot_never_said, use)


# --- confusion of nouns

@pytest.mark.slow
def test_confusion_counts_what_is_said_instead(spice):
    table = confusion({"1": "a kid runs", "2": "a horse runs", "3": "a bird runs", "4": "a dog and a horse run"},
                      {"1": ["a child runs"]*2, "2": ["a dog runs"]*2, "3": ["a puppy runs", "one dog runs"], "4": ["a horse runs"]*2}, 3)
    assert table.loc["dog"].to_dict() == {"dog": 0, "child": 0, "horse": 1, NO_NOUN: 1}
    assert (table.loc["child", "child"], table.loc["horse", "horse"], table.loc["horse", "dog"]) == (1, 1, 0)


@pytest.mark.parametrize("word, name", [("field", "grass"), ("puppy", "dog"), ("bicycle", "bike")])
def test_words_that_stand_for_another_need_not_meet_it(parser, word, name):  # a KeyError once: nobody says "grass" here
    table = confusion({"1": f"a {word}", "2": "a cat"}, {"1": [f"a {word}"], "2": [f"a {word}"]})
    assert list(table.index) == [name] and table.loc[name].to_dict() == {name: 1, NO_NOUN: 1}


@cases
def test_confusion_of_any_split_can_be_drawn(parser, captions, references):
    table = confusion(captions, references)
    assert list(table) == [*table.index, NO_NOUN] and (table.to_numpy().sum(1) > 0).all()
    ax = drawn(plot_confusion, table)
    if table.empty: assert ax.texts[0].get_text() == "no noun that most references of an image have"
