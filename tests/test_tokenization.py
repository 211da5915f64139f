"Tokenization: a caption's words depend on that caption alone."
import pytest
from scoring_data import hide_java, read_vectors

from clipcap.scoring.tokenization import ptb_lines, tokenize


def test_lines_are_cut_by_the_penn_treebank_rules_without_java_on_path(monkeypatch):
    hide_java(monkeypatch)
    assert ptb_lines(["A dog's ball isn't red .", "“Two” dogs, running!"]) == ["a dog 's ball is n't red .", "`` two '' dogs , running !"]


SIGNS, AFTER = ["A sign with a P.", "In the U.S.", "at 5 p.m.", "holding a No.", "Acme Inc."], ["A dog", "a dog", "5 dogs", "", "'s"]


def test_words_do_not_depend_on_the_next_caption():
    found = tokenize({(s, a): [s, a] for s in SIGNS for a in AFTER})
    for s in SIGNS: assert len({found[s, a][0] for a in AFTER}) == 1
    assert tokenize({1: SIGNS[:1]}) == {1: [found[SIGNS[0], "A dog"][0]]} == {1: ["a sign with a p"]}  # alone in a Java of its own


ODD = ["", "a\nb", "a\r\nb\rc", "a\tb", "a\u2028b\u2029c\x85d\x0b\x0c", "...", "   ", "un niño corre", "狗 跑", "a \ud83d dog", "😀 dog",
       "<b>", "a <b", "c> d", "<img src='a", "b'>", '<img src="a', 'b">', "<a href=", "x>", "<!-- a", "-->", "a ||| b", "a\x00b", "dog " * 2500]


def test_no_caption_moves_or_changes_another():
    items = {k: [c, f"marker {k}"] for k, c in enumerate(ODD)}
    found = tokenize(items)
    assert all(found[k][1] == f"marker {k}" for k in items)
    assert [found[k][0] for k in range(8)] == ["", "a b", "a b c", "a b", "a b c d", "", "", "un niño corre"]
    assert len(found[len(ODD) - 1][0].split()) == 2500
    assert tokenize(dict(reversed(items.items()))) == found


@pytest.mark.parametrize("captions", [{}, {"a": [], "b": ["x"]}])
def test_nothing_stays_nothing(captions): assert tokenize(captions) == captions


def test_raw_text_is_split_at_white_space():
    assert tokenize({1: ["A dog's\n ball ."]}, "raw") == {1: ["A dog's ball ."]}
    with pytest.raises(ValueError, match="'ptb' or 'raw', not 'PTB'"): tokenize({"a": ["x"]}, "PTB")


def test_words_of_240_images_are_the_unmodified_tools(shared):
    items = read_vectors(shared)["items"]
    words = tokenize({i: [item["hypothesis"], *item["references"]] for i, item in items.items()})
    assert words == {i: [item["tokens"]["hypothesis"], *item["tokens"]["references"]] for i, item in items.items()}
