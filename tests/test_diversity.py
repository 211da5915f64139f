"Diversity of captions: the shortcut is the plain computation."
import math

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu

from clipcap.scoring.diversity import UNDEFINED, diversity, self_bleu


def test_measures_by_hand():
    found = diversity({1: "A dog runs .", 2: "a dog sleeps", 3: "The cat"}, ["a dog  sleeps.", "two cats"])
    found.pop("mbleu_4")
    assert found == {"distinct_1": 6/8, "distinct_2": 4/5, "vocabulary": 6, "mean_length": 8/3, "novel": 2/3}
    assert diversity({1: "one two three four", 2: "one two three four"})["mbleu_4"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("captions, undefined", [({1: "a dog"}, ["mbleu_4", "novel"]), ({1: "", 2: ""}, ["distinct_1"])])
def test_measures_without_a_value_are_nan(captions, undefined):
    found = diversity(captions)
    assert all(math.isnan(found[n]) for n in undefined)


@pytest.mark.parametrize("captions", [{1: "a dog"}, {1: "", 2: ""}, {1: "."}, {1: "dog"}, {1: "dog", 2: "a cat"}])
def test_each_undefined_measure_has_a_reason(captions):
    assert {n for n, value in diversity(captions).items() if math.isnan(value)} <= UNDEFINED.keys()


def test_self_bleu_is_the_tools_bleu_with_all_others_as_references():
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice("a dog cat runs on the red grass".split(), random.integers(1, 12))) for _ in range(60)] + ["a a a a", "a a a"]
    tool, _ = Bleu(4).compute_score({k: texts[:k] + texts[k + 1:] for k in range(len(texts))}, {k: [t] for k, t in enumerate(texts)}, verbose=0)
    assert self_bleu(texts) == pytest.approx(tool[3], rel=0, abs=1e-9)
