"SPICE: parsing, the cache of parses, scene graphs, scores. The unmodified tool's own numbers and classes are the reference."
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from scoring_data import read_vectors, words_of

from clipcap.scoring import spice as module
from clipcap.scoring.java import start_java
from clipcap.scoring.spice import (CATEGORIES, Concept, by_category, facts_path, find_synsets, is_right, look_up, merge_tuples, parse,
                                   parse_with_java, precision_recall_f, spice_scores, spice_tuples, too_long)


@pytest.fixture
def fresh(outputs, monkeypatch) -> dict:
    "Neither memory nor a database of parses: the memory."
    monkeypatch.setattr(module, "_KNOWN", {})
    return module._KNOWN


def must_not(keys): raise AssertionError(f"{keys} should be known")


# --- the cache of parses

def test_facts_come_from_memory_then_the_database_then_are_found(fresh):
    asked = []
    def lengths(words): asked.append(words); return {w: len(w) for w in words if w != "?"}
    assert look_up("length", ["dog", "cats", "dog", "?"], lengths) == {"dog": 3, "cats": 4}
    assert look_up("length", ["niño", "cats"], lengths, batch=1) == {"niño": 4, "cats": 4}  # memory
    fresh.clear()
    assert look_up("length", ["niño", "dog", "?"], lengths) == {"niño": 4, "dog": 3}  # database
    assert asked == [["dog", "cats", "?"], ["niño"], ["?"]]  # what wasn't found is asked again


def test_damaged_database_costs_a_warning_and_not_the_result(fresh):
    facts_path().parent.mkdir(parents=True)
    facts_path().write_bytes(b"not a database" * 1000)
    with pytest.warns(UserWarning, match="file is not a database; if the file is damaged, delete it"):
        assert look_up("length", ["dog"], lambda words: {"dog": 3}) == {"dog": 3}


def test_known_facts_are_read_in_one_transaction(fresh, monkeypatch):
    keys, opened, connect = [f"caption {n}" for n in range(1000)], [], sqlite3.connect
    look_up("tuples", keys, lambda some: dict.fromkeys(some, [["dog", "grass", "run on"]]), batch=1000)
    fresh.clear()
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: opened.append(args) or connect(*args, **options))
    assert len(look_up("tuples", keys, must_not)) == 1000 and len(opened) == 1


WRITER = """
import sys, time
from clipcap.scoring.spice import look_up
def slow(words): time.sleep(0.02); return {w: len(w) for w in words}
for start in range(0, 200, 100):
    look_up("length", [f"{sys.argv[1]} {n}" for n in range(start, start + 100)], slow, batch=10); print(start, flush=True)
"""


def test_killed_process_keeps_what_it_found_and_two_write_at_once(fresh):
    killed, other = [subprocess.Popen([sys.executable, "-c", WRITER, name], stdout=subprocess.PIPE, text=True, cwd=ROOT) for name in ("killed", "other")]
    killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.wait(), killed.stdout.close()
    assert other.communicate()[0].split() == ["0", "100"]
    assert len(look_up("length", [f"killed {n}" for n in range(100)] + [f"other {n}" for n in range(200)], must_not)) == 300
    with closing(sqlite3.connect(facts_path())) as database: assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# --- parsing

ODD = {"empty": "", "blank": "  ", "loop": "dog " * 2500, "one long word": "x" * 10_000, "signs": "!?" * 300,
       "lines": "a dog\nruns\r\non grass", "control": "a \x00 dog \x1b[0m runs", "emoji": "a 😀 dog", "half": "a \ud83d dog",
       "separator": "a dog\u2028runs", "spanish": "un niño corre por la playa", "chinese": "狗 跑", "right to left": "كلب يركض",
       "brackets": "( [ { -LRB- dog )", "html": "<b> a dog </b>", "long": " ".join(["a dog and"] * 13), "plain": "a dog runs"}


def test_parser_reads_things_attributes_and_relations(spice):
    text = "A black dog runs on the grass ."
    parsed = parse_with_java([text, ""])
    assert parsed[""] == [] and sorted(parsed[text]) == [["dog"], ["dog", "black"], ["dog", "grass", "run on"], ["grass"]]


def test_odd_captions_have_their_tuples_or_a_warning(spice, fresh):
    with pytest.warns(UserWarning) as told: parsed = parse(ODD.values())
    assert len(told) == 1 and "3 captions count as empty for SPICE" in str(told[0].message) and "'dog dog dog" in str(told[0].message)
    assert {name for name, c in ODD.items() if too_long(c)} == {"loop", "one long word", "signs"}
    for name in ("empty", "blank", "loop", "one long word", "signs"): assert parsed[ODD[name]] == [], name
    for name in ("lines", "control", "emoji", "half", "separator", "brackets", "long", "plain"): assert ("dog",) in parsed[ODD[name]], name
    # the same caption, the same tuples, whatever its neighbours
    for name in ("lines", "emoji", "html", "chinese"): assert parse_with_java([ODD[name]])[ODD[name]] == [[*t] for t in parsed[ODD[name]]]


@pytest.fixture
def failing(spice, fresh, monkeypatch):
    "A parser that fails on `poison`, and lacks memory for two captions and for those with `too much`: the tuples of two others, sizes of its lists."
    dog, man, sizes = "a dog runs", "a man in red", []
    alone = {c: [tuple(t) for t in parse_with_java([c])[c]] for c in (dog, man)}
    real = module._spice()

    def tuples(captions):
        import jpype
        sizes.append(len(captions))
        if "poison" in captions: jpype.java.lang.Integer.parseInt("x")
        if len(captions) == 2 or any("too much" in c for c in captions): jpype.java.lang.System.err.println("WARNING: ran out of memory. Will ignore")
        return real.tuples(captions)

    monkeypatch.setattr(module, "_spice", lambda: SimpleNamespace(tuples=tuples))
    assert all(alone.values())
    return alone, sizes


def test_failing_caption_does_not_cost_the_others(failing):
    (dog, man), (alone, sizes) = failing[0], failing
    with pytest.warns(UserWarning, match="1 captions count as empty.*'poison'"):
        assert parse([dog, "poison", man]) == {dog: alone[dog], "poison": [], man: alone[man]}
    assert sizes == [3, 1, 1, 1]


def test_captions_that_fill_the_memory_are_parsed_one_at_a_time(failing):
    alone, sizes = failing
    assert parse(alone) == alone and sizes == [2, 1, 1]
    with pytest.warns(UserWarning, match="'too much'"): assert parse(["too much"]) == {"too much": []}
    assert list(look_up("tuples", [*alone, "too much"], lambda unknown: {})) == [*alone]  # not kept as a parse


def test_no_memory_for_any_caption_is_an_error_and_no_score_of_zero(failing):
    with pytest.raises(MemoryError, match="CLIPCAP_JAVA_OPTIONS=-Xmx2g"): parse(["too much", "far too much"])


# --- scene graphs

SYNSETS = {"car": [1, 2], "auto": [1], "wagon": [2, 3], "red": [7], "crimson": [7], "near": [9], "by": [9]}
def concept(word): return Concept({word}, set(SYNSETS.get(word, ())))
def graph(*tuples): return merge_tuples(tuples, concept)
def as_text(graph): return [tuple(map(str, t)) for t in graph]


def test_synsets_tell_which_words_mean_the_same(spice):
    car, automobile, dog, cars, xyzzy = [Concept({w}, set(ids)) for w, ids in find_synsets(["car", "automobile", "dog", "cars", "xyzzy"]).items()]
    assert car.meets(automobile) and car.meets(cars) and not car.meets(dog) and not car.meets(xyzzy)
    assert 0 < car.similarity(automobile) < 1 == car.similarity(car) and car.similarity(dog) == 0


@pytest.mark.parametrize("tuples, merged", [
    ([("car",), ("auto", "red"), ("car", "crimson"), ("dog", "car", "be near"), ("dog", "auto", "by")],
     [("auto/car",), ("auto/car", "crimson/red"), ("dog",), ("dog", "by/near", "auto/car")]),
    # `wagon` shares synset 2 with `car`, less with the merged thing; alone it stays apart from `auto`
    ([("auto",), ("wagon",), ("car",)], [("auto/car",), ("wagon",)]),
    ([("wagon",), ("auto",), ("auto",)], [("wagon",), ("auto",)]),
    ([], [])])
def test_tuples_of_the_same_thing_are_merged(tuples, merged): assert as_text(graph(*tuples)) == merged


def test_scores_count_tuples_that_the_other_side_contains():
    ours, theirs = graph(("auto", "red"), ("dog",)), graph(("car", "crimson"), ("cat",), ("cat", "car", "near"))
    assert [is_right(t, theirs) for t in ours] == [True, True, False]  # car, red car, dog
    assert precision_recall_f(2, len(ours), len(theirs)) == pytest.approx((2/3, 2/4, 4/7))
    assert precision_recall_f(0, 3, 0) == (0, 0, 0)


def test_attributes_merged_from_several_words_are_in_no_category():
    found = by_category(graph(("car", "red"), ("dog", "red"), ("dog", "crimson")), {"color": {"red", "crimson"}})
    assert {c: as_text(t) for c, t in found.items()} == {
        "object": [("car",), ("dog",)], "attribute": [("car", "red"), ("dog", "crimson/red")],
        "color": [("car", "red")], "relation": [], "cardinality": [], "size": []}


def tool_scores(sides):
    "Precision, recall and F of two sides' tuples by the tool's own classes."
    import jpype
    start_java()
    List, JClass = jpype.java.util.ArrayList, jpype.JClass
    base = JClass("edu.cmu.meteor.util.Constants").DEFAULT_SYN_DIR_URL.toString()
    synonyms = JClass("edu.cmu.meteor.aligner.SynonymDictionary")(
        *[jpype.java.net.URL(f"{base}/english.{part}") for part in ("exceptions", "synsets", "relations")])
    for pair in sides:
        graphs = [JClass("edu.anu.spice.SceneGraph")(synonyms, True) for _ in pair]
        for one, tuples in zip(graphs, pair):
            for t in tuples: one.addTuple(List(list(t)))
        found = JClass("edu.anu.spice.Evaluation")(*[JClass("edu.anu.spice.TupleSet")(g) for g in graphs], False, True)
        yield found.pr, found.re, found.f


def test_random_graphs_score_as_with_the_tools_classes(spice):
    words = "car automobile dog puppy animal boy child kid run jog sit red crimson small little near by on car_x big large".split()
    random = np.random.default_rng(0)
    sides = [[[tuple(map(str, random.choice(words, size=random.integers(1, 4)))) for _ in range(n)] for n in random.integers(0, 12, 2)] for _ in range(60)]
    known, _ = module._concepts({"x": [t for pair in sides for side in pair for t in side]})
    differ = 0
    for pair, tool in zip(sides, tool_scores(sides)):
        ours, theirs = [merge_tuples(side, known) for side in pair]
        differ += precision_recall_f(sum(is_right(t, theirs) for t in ours), len(ours), len(theirs)) != pytest.approx(tool, abs=1e-12)
    assert differ < 5  # the tool breaks ties between equally similar things by memory addresses


# --- scores

def choose(vectors, number):
    "Some of the 240 images of each kind, or all."
    items = list(vectors["items"].values())
    return items if number == 240 else [*items[:4], *items[200:202], *items[220:240:5]]


@pytest.mark.parametrize("number", [10, pytest.param(240, marks=pytest.mark.slow)])
def test_scores_and_tuples_are_the_unmodified_tools(shared, spice, fresh, number):
    vectors = read_vectors(shared)
    items = {v["image_id"]: v for v in choose(vectors, number)}
    captions, references = [{i: words[i] for i in items} for words in words_of(vectors)]
    ours = spice_scores(captions, references)
    tool = pd.DataFrame([{"spice": v["All"]["f"], "spice_precision": v["All"]["pr"], "spice_recall": v["All"]["re"],
                          **{f"spice_{c}": v[c.title()]["f"] for c in CATEGORIES}} for v in (v["spice"] for v in items.values())],
                        index=ours.index, dtype=float)
    pd.testing.assert_frame_equal(ours, tool, rtol=0, atol=1e-12)
    if number == 240: assert ours.spice.mean() == pytest.approx(vectors["corpus"]["spice"], abs=1e-12)

    def as_sets(tuples): return sorted([sorted(word.split("/")) for word in t] for t in tuples)
    for i, v in items.items():
        found = spice_tuples(captions[i], references[i])
        for side, name in (("caption", "hypothesis"), ("references", "references")):
            assert as_sets(found.tuple[found.side == side]) == as_sets(v["spice_tuples"][name]), (i, side)


def test_tuples_tell_what_the_other_side_contains(spice):
    found = spice_tuples("a black dog sits on an automobile", ["A black dog runs on grass .", "The dog is next to a red car"])
    by_tuple = {(r.side, r.tuple): (r.category, r.right) for r in found.itertuples()}
    assert by_tuple["caption", ("dog", "black")] == ("color", True) and by_tuple["caption", ("automobile",)] == ("object", True)
    assert by_tuple["references", ("grass",)] == ("object", False) and by_tuple["caption", ("dog", "sit on", "automobile")] == ("relation", False)


AGAIN = """
import json, sys
import jpype
from clipcap.scoring.spice import spice_scores
scores = spice_scores(*json.load(sys.stdin))
print(json.dumps([scores.spice.tolist(), jpype.isJVMStarted()]))
"""


def test_known_parses_need_neither_files_nor_network_nor_java(spice, outputs, fresh):
    pair = {"1": "a black dog runs", "2": ""}, {"1": ["A dog runs on grass ."], "2": ["A cat"]}
    scores = spice_scores(*pair).spice.tolist()
    (outputs/"cache/spice").unlink()
    done = subprocess.run([sys.executable, "-c", AGAIN], input=json.dumps(pair), capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "CLIPCAP_SPICE_JARS": "", "M2_REPO": "no", "CLIPCAP_MAVEN": "http://127.0.0.1:9"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [scores, False]


@pytest.mark.parametrize("captions, references, named", [
    ({"1": "a dog", "2": "a cat"}, {"1": ["a dog"]}, "'2'"), ({"1": "a dog"}, {"1": "a dog"}, "'1'"), ({"1": "a dog"}, {"1": []}, "'1'")])
def test_caption_without_references_is_refused(captions, references, named):
    with pytest.raises(ValueError, match=re.escape(f"1 images have a caption but no list of references: {named}")): spice_scores(captions, references)


def test_no_captions_have_no_scores(spice): assert spice_scores({}, {}).shape == (0, 9)
