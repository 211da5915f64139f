"The nine kinds of error: rules on words, reading of claims, comparison with references, precision and recall on the embedded scenes."
import pandas as pd
import pytest
import torch

from clipcap.formats.embeddings import Embeddings
from clipcap.formats.readers import find_layout, read_captions
from clipcap.mini.scenes import caption_facts, read_scenes
from clipcap.reporting.compare import shuffle_images
from clipcap.runs.files import asset_path
from clipcap.scoring import error_kinds
from clipcap.scoring.error_kinds import (ERROR_KINDS, MANY, SCENE_KINDS, Reading, contradicted, count_things, error_rates, find_errors,
                                         majority_things, names_thing, plurals, read_tuples, repeated, same_color, same_number,
                                         same_person, text_errors, verbs_in)
from clipcap.scoring.spice_files import SpiceFilesMissing

DOGS = ["Two brown dogs run behind a house in the snow .", "Two dogs are running behind the house .",
        "Two tan dogs run through snow .", "A pair of brown dogs running ."]


# --- words alone

@pytest.mark.parametrize("caption, words", [
    ("a dog and a dog", ""), ("a man next to a dog next to a cat", ""), ("a dog a dog runs", "a dog"), ("a white dog with a white dog", "a white dog")])
def test_repeated_words_carry_meaning_or_stand_in_a_row(caption, words): assert repeated(caption.split()) == words


@pytest.mark.parametrize("captions, expected", [
    ({"a": "A dog runs in the", "b": "A dog runs", "c": "A dog runs with a.", "d": "", "e": "The dog " + "is so very happy "*3},
     {("a", "truncation"), ("e", "truncation"), ("e", "repetition")}),
    ({"a": "A dog .", "b": "a dog", "c": "A dog.", "d": "A cat .", "e": "A cat ."}, {(i, "generic") for i in "abc"})])
def test_truncated_repetitive_and_generic_captions(captions, expected):
    words = {i: c.rstrip(" .").lower() for i, c in captions.items()}
    found = text_errors(captions, words, dict.fromkeys(captions, ["a dog runs in the snow"]))
    assert {(i, kind) for i, kind, _ in found} == expected


# --- claims

@pytest.mark.parametrize("text, things, counts", [
    ("two small brown dogs and a cat in the grass", {"dog", "cat", "grass"}, {"dog": 2, "cat": 1}),
    ("a pair of toy balls near children", {"ball", "child"}, {"ball": 2}),
    ("a group of three ponies", {"pony", "group"}, {"pony": 3}), ("a group of people", {"people"}, {"people": MANY}),
    *[(text, {"dog", "boy"}, {}) for text in ("a black dog and a dog", "a dog and another", "a boy and a girl", "the dog", "a dogs")]])
def test_numbers_of_things_that_are_mentioned_once(text, things, counts): assert count_things(text, things) == counts


@pytest.mark.parametrize("thing, plural", [("wolf", "wolves"), ("knife", "knives"), ("fireman", "firemen"), ("pony", "ponies"), ("child", "children")])
def test_irregular_plurals(thing, plural): assert plural in plurals(thing)


GROUP = "a group of brown dogs runs behind a house", [("group",), ("dog",), ("house",), ("dog", "brown"), ("group", "dog", "of"), ("group", "house", "run behind")]
FRONT = "a dog runs in front of a red and white house", [("dog",), ("house",), ("front",), ("dog", "house", "run in front of"), ("house", "red"), ("house", "white")]


def test_verbs_head_relations(): assert verbs_in(dict([GROUP, FRONT])) == {"run"}


def test_of_a_group_the_members_are_the_thing():
    found = read_tuples(*GROUP, {"run"})
    assert (found.things, found.colors, found.counts) == ({"dog", "house"}, {"dog": {"brown"}}, {"dog": {MANY}, "house": {1}})
    assert (found.actions, found.places) == ({"dog": {"run"}}, {("dog", "house"): {"behind"}})


@pytest.mark.parametrize("text, tuples, colors, places", [
    (*FRONT, {"house": {"red", "white"}}, {("dog", "house"): {"in front of"}}),
    ("a dog sits next to a cat", [("dog",), ("cat",), ("dog", "cat", "sit to")], {}, {("dog", "cat"): {"near"}})])
def test_places_and_colors_are_read(text, tuples, colors, places):
    found = read_tuples(text, tuples, {"run", "sit"})
    assert (found.colors, found.places) == (colors, places)


# --- comparison

def same(a, b): return a == b or {a, b} == {"kid", "child"}
def nouns(*things, words=""): return Reading(frozenset(words.split()), frozenset(things), {}, {}, {}, {})


@pytest.mark.parametrize("alike, pairs", [
    (same_person, {("man", "skier"): True, ("boy", "girl"): False, ("man", "dog"): False}),
    (same_color, {("tan", "golden"): True, ("navy", "black"): False}),
    (same_number, {(2, 2): True, (1, 2): False, (MANY, 3): True, (MANY, 1): False})])
def test_which_claims_may_both_be_true(alike, pairs): assert {pair: alike(*pair) for pair in pairs} == pairs


def test_things_are_named_by_synonyms_or_inside_words():
    found = nouns("child", words="grassy dogs")
    assert [names_thing(found, t, same) for t in ("kid", "grass", "dog", "man", "cat")] == [True, True, True, True, False]
    assert majority_things([nouns("kid", "ball"), nouns("child"), nouns("ball", "tree")], same) == ["ball", "kid"]


@pytest.mark.parametrize("theirs, expected", [([{2}], False), ([{2}, {3}], True), ([{2}, {1}], False), ([], False)])
def test_two_references_contradict(theirs, expected): assert contradicted({1}, theirs, same_number) == expected


# --- all kinds

PAIRS = {"invented": ("Two brown dogs run with a frisbee .", "Two puppies run by a home in the snow ."),
         "missed": ("It runs in the snow .", "Two puppies run in the snow ."),
         "wrong_color": ("Two black dogs run in the snow .", "Two golden dogs run in the snow ."),
         "wrong_count": ("A dog runs in the snow .", "Several dogs run in the snow ."),
         "wrong_action": ("Two brown dogs sit in the snow .", "Two brown dogs race in the snow ."),
         "wrong_relation": ("Two dogs run in front of the house .", "Two dogs run behind a home ."),
         "repetition": ("Two brown dogs and two brown dogs run .", "Two brown dogs and two dogs run ."),
         "truncation": ("Two brown dogs run in the", "Two brown dogs run in the snow"),
         "generic": ("Two dogs run .", "Two dogs run there .")}


def test_each_kind_is_found_where_it_is_and_only_there(spice):
    table = {(kind, n): text for kind, both in PAIRS.items() for n, text in enumerate(both)} | {("again", n): "Two dogs run ." for n in range(2)}
    found, unavailable = find_errors(table, {i: [*DOGS, "They are sitting in a car ."] if i[0] == "missed" else DOGS for i in table})
    has = {*zip(found.image_id, found.kind)}
    assert [*PAIRS] == [*ERROR_KINDS] and not unavailable
    assert {(kind, n): ((kind, n), kind) in has for kind in PAIRS for n in (0, 1)} == {(kind, n): n == 0 for kind in PAIRS for n in (0, 1)}


def test_without_spice_three_kinds_are_found_and_the_others_have_a_reason(monkeypatch):
    def missing(texts): raise SpiceFilesMissing("SPICE needs 9 files")
    monkeypatch.setattr(error_kinds, "parse", missing)
    with pytest.warns(UserWarning, match="SPICE needs 9 files"): rows, reasons = find_errors({"a": "A dog and a"}, {"a": DOGS})
    assert (rows.to_numpy().tolist(), [*reasons]) == ([["a", "truncation", "ends with “a”"]], SCENE_KINDS)
    assert all("SPICE needs 9 files" in reason for reason in reasons.values())
    with pytest.warns(UserWarning): rates, errors, _ = error_rates({"who": {"a": "A dog and a"}}, {"who": {"a": DOGS}})
    assert [*rates.index] == [*ERROR_KINDS] and rates.who.isna().sum() == len(SCENE_KINDS) and rates.who["truncation"] == 1


def test_caption_without_references_is_refused():
    with pytest.raises(ValueError, match="'a'"): find_errors({"a": "A dog"}, {"b": ["A dog"]})


# --- precision and recall

FACTS = {"invented": ((), ("kind", "other", "setting")), "wrong_color": (("kind",), ("color",)), "wrong_count": (("kind",), ("count",)),
         "wrong_action": (("kind",), ("action",))}  # kind -> facts that have to be right, those of which one has to be wrong


@pytest.mark.slow
def test_errors_on_scenes_are_those_of_their_facts(spice, scenes, scene_captions):
    drawn, texts = read_scenes(asset_path("mini/scenes.zip")), scene_captions.groupby("image").caption.apply(list)
    texts = {i: texts[i] for i in sorted((scenes.text/"Flickr_8k.testImages.txt").read_text().split())[:60]}
    any_scene, same_kind = shuffle_images([*texts], seed=0), {}
    for kind in sorted({drawn[i].kind for i in texts}): same_kind |= shuffle_images([i for i in texts if drawn[i].kind == kind], seed=0)
    written = {who: {i: texts[of[i]][0] for i in texts} for who, of in {"own": {i: i for i in texts}, "same kind": same_kind, "any scene": any_scene}.items()}
    rates, errors, unavailable = error_rates(written, dict.fromkeys(written, {i: t[1:] for i, t in texts.items()}))
    assert not unavailable and rates.own["missed"] == errors["own"][errors["own"].kind == "missed"].image_id.nunique()/len(texts)
    assert all(rates["any scene"][kind] > rates.own[kind] + 0.5 for kind in ("invented", "missed"))
    assert all(rates["same kind"][kind] > rates.own[kind] + 0.2 for kind in ("wrong_color", "wrong_count", "wrong_action"))
    facts = {i: caption_facts(c) for i, c in written["same kind"].items()}
    for kind, (right, wrong) in FACTS.items():
        found = set(errors["same kind"].image_id[errors["same kind"].kind == kind])
        false = {i for i, f in facts.items() if any(k in f and f[k] != getattr(drawn[i], k) for k in wrong) and all(f.get(k) == getattr(drawn[i], k) for k in right)}
        assert len(found) > 10 and len(found & false)/len(found) > 0.9 and len(found & false)/len(false) > 0.4, kind


@pytest.mark.soak
def test_rates_on_real_photos_are_those_of_the_notebooks_table(shared, spice):
    "Parses 4,500 captions of Flickr8k: 8 minutes on one core."
    known, photos = read_captions(find_layout(shared/"flickr8k").captions), Embeddings(shared/"real/photos.safetensors")
    texts = known[known.image.isin(photos.names)].groupby("image").caption.apply(list).to_dict()
    vectors = photos.stack([*texts])
    vectors = torch.nn.functional.normalize(vectors - vectors.mean(0), dim=1)
    nearest = [[*texts][k] for k in (vectors @ vectors.T).fill_diagonal_(-1).argmax(1)]
    of = {"people": [*texts], "most similar photo": nearest, "another photo": [*[*texts][1:], [*texts][0]]}
    written = {who: {i: texts[j][0] for i, j in zip(texts, names)} for who, names in of.items()}
    rates = 100*error_rates(written, dict.fromkeys(written, {i: t[1:] for i, t in texts.items()}))[0]
    table = pd.DataFrame({"people": [41.6, 22.3, 0.6, 1.2, 5.4, 0.3, 0.3], "most similar photo": [74.3, 49.8, 0.9, 12.6, 13.3, 0.0, 0.3],
                          "another photo": [89.2, 71.4, 1.2, 8.8, 9.8, 0.1, 0.3]}, [*ERROR_KINDS][:7])
    pd.testing.assert_frame_equal(rates.loc[table.index], table, rtol=0, atol=0.1, check_names=False)
