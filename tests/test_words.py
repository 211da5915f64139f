"""Plain technical English (shared rules: words): banned forms in Markdown cells, docstrings, comments, command help and README.

`python tests/test_words.py nbs/formats clipcap/formats README.md` lists those of files and folders; without arguments, all."""
import ast
import io
import json
import re
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
UNIT = (r"(?:%|nats|ms|µs|s|seconds?|minutes?|hours?|[kKMGT]i?B|(?:mega|giga|kilo)?bytes?|FLOPs?|photos?|images?|captions?|tokens|items|steps?|samples|"
        r"draws|words|times|once|twice|pairs|batches|vectors?|embeddings|parameters|candidates|references|rows|lines|errors|objects)")
EACH = (r"an? (?:second|minute|hour|day|caption|photo|image|token|step|batch|epoch|item|word|run|seed|process|GPU|node|module|machine|worker|shard|"
        r"layer|patch|trial)")
THING = r"(?:code|command|terminal|function|notebook|cell|message|error|page|table|report|protocol|file|network|model|it)"

# what is banned -> what to write. Text between backquotes and inside fences is not read; case counts: sentences begin with a capital.
BANNED = {
    r"\b(?:go(?:es|ing|ne)?|went) on(?! (?:the|a|an|to|its|top|disk|one|GPU)\b)": "continues, resumes",
    r"\b(?:refus\w+|handled|reject\w+|told|sa(?:id|ys?)|answer\w+|report\w+|stop\w*|fail\w*|end\w*|explain\w*)(?: or \w+)? in words\b":
        "raises `ValueError` that names …",
    r"\bby chance\b": "at random, sampled",
    r"\b[Tt]he original(?:'s)?\b(?! (?:file|image|photo|order|name|size|archive|paper|resolution|weights|layout|error|exception))|\b[Bb]eyond the original\b":
        "the reference recipe",
    r"\b(?:is|are|was|were|be) asked of\b": "needs, must",
    r"\b[Yy]ardsticks?\b": "baseline, control",
    rf"\b{UNIT} {EACH}\b(?! \w+s\b)": "per second, per image",
    r"\brobb(?:ed|ing)\b": "damaged, missing",
    r"\bswitched (?:off|on)\b": "disabled by default, enabled",
    r"\bin full size\b": "at full size",
    r"\bchosen among\b": "candidates are reranked",
    r"\b[Hh]ow sure\b": "confidence interval, probability",
    r"\bnetworks that write together\b": "ensemble",
    rf"\b{THING}(?: (?:itself|never|only|also|then))? (?:says?|speaks?|tells?)\b|\bmessages? that (?:says?|tells?)\b": "outputs, prints, returns, names",
    r"\bshares? of (?:the|a|its|their|all|what|each|words|images|captions|photos|tokens)\b(?<!of it)": "fraction, probability",
    r"(?<!earning )(?<!rror )\b(?:[Tt]he|twice the|scaled|higher|lower|larger|smaller) rate\b(?! (?:of|per|at|in|limit)\b)": "learning rate",
    r"\b(?:larger|bigger|smaller) steps\b": "higher learning rate, larger batches",
    r"^#+ .*\?\s*$": "a heading names its topic",
    r"^#+ (?:Whose\b|Who\b|What (?!you\b|we learned))": "a heading names its topic",
    r"(?:^|[.:;!?)] )What (?!you\b|we learned)[^.?]*(?:[.:]|$)": "no sentence whose subject is \"what\"",
    r"\b(?:The door to|Nothing is as|Nothing but the|is worth (?:what|a look)|told best|to the letter|comes at a price|no wonder|the moral)\b":
        "no aphorisms, no figures of speech",
}


def text_of_python(source):
    "Lists pairs (line, text) of a module's docstrings, comments and help texts."
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (doc := ast.get_docstring(node, clean=False)):
            found += [(node.body[0].lineno + n, line.strip()) for n, line in enumerate(doc.splitlines())]
        if isinstance(node, ast.keyword) and node.arg in ("help", "description", "epilog") and isinstance(node.value, ast.Constant):
            found += [(node.value.lineno, str(node.value.value))]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("# %%", "#|")): found.append((token.start[0], token.string.lstrip("# ")))
    return found


def text_of(path):
    "Lists pairs (place, text) of what people read in a file: lines of Markdown, or what a module or code cell tells."
    if path.suffix == ".py": return text_of_python(path.read_text("utf-8"))
    if path.suffix == ".ipynb":
        cells = [(cell["cell_type"], cell.get("id", n), "".join(cell["source"])) for n, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"])]
    else: cells = [("markdown", "", path.read_text("utf-8"))]
    found = []
    for kind, place, source in cells:
        if kind == "markdown":
            source = re.sub(r"^```.*?^```", lambda m: "\n"*m[0].count("\n"), source, flags=re.S | re.M)
            found += [(f"{place}:{n}", line) for n, line in enumerate(source.splitlines(), 1)]
        elif "#| export" not in source and not re.search(r"^[%!]", source, re.M): found += [(place, text) for _, text in text_of_python(source)]
    return found


def finds(text):
    "Lists pairs (found, what to write) of a line."
    plain = re.sub(r"\]\([^)\s]*\)", "]", re.sub(r"`[^`]*`", "`x`", text))
    return [(m[0].strip(), instead) for form, instead in BANNED.items() for m in re.finditer(form, plain)]


def files(*folders):
    "Lists the notebooks, modules and pages of files and folders."
    for folder in map(Path, folders or (ROOT/"nbs", ROOT/"clipcap", ROOT/"README.md")):
        for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
            if path.suffix in (".ipynb", ".py", ".md", ".jinja") and path.name != "_modidx.py" and ".ipynb_checkpoints" not in path.parts: yield path


def listing(*folders):
    "Lists the banned forms of files and folders, each with its place and what to write."
    return [f"{path}:{place}: {found!r}: write {instead}" for path in files(*folders) for place, text in text_of(path) for found, instead in finds(text)]


@pytest.mark.parametrize("part", sorted({path.relative_to(ROOT).parent.as_posix() for path in files()}))
def test_no_banned_form_is_left(part):
    found = listing(*[path for path in files() if path.relative_to(ROOT).parent.as_posix() == part])
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize("text", [
    "The same command goes on with the rest.", "Damaged runs are refused or handled in words.", "Words taken by chance.", "The original's mapping network.",
    "More is asked of a run.", "| yardstick | CIDEr |", "It writes 12 photos a second.", "1.2 ms a token on 2 cores.", "The run was robbed of its photos.",
    "It is switched off.", "Runs in full size.", "A caption chosen among many.", "How sure is it?", "The message says which file.",
    "The share of the words hidden.", "Twice the rate helps.", "## Is that true?", "## Whose part?", "# What a run survives", "What is there is kept."])
def test_planted_forms_are_found(text): assert finds(text)


@pytest.mark.parametrize("text", [
    "The learning rate falls to zero; the error rate of nouns, a rate of 5 per second.", "`share` is the key; captions share a prefix.",
    "## What you will learn", "CLIP looks, a mapping network translates, GPT-2 speaks", "It goes on the GPU. Lengths are counted in words.",
    "A caption of a photo takes a second.", "The original photo is kept.", "The images an epoch reads. 3 seconds per image.", "`goes on with`",
    "See [it](what.md)."])
def test_honest_uses_pass(text): assert not finds(text)


def test_all_that_people_read_is_read(tmp_path):
    module = 'def f(\n    x, # 5 photos a second\n):\n    "Words taken by chance."\n    p.add_argument("x", help="goes on with it")\n'
    (tmp_path/"m.py").write_text(module)
    cells = [{"cell_type": "markdown", "id": "a", "source": ["Fine.\n", "A yardstick.\n", "```\n", "in full size\n", "```\n"]},
             {"cell_type": "code", "id": "b", "source": ["1  # robbed"]}]
    (tmp_path/"n.ipynb").write_text(json.dumps({"cells": cells}))
    (tmp_path/"README.md").write_text("## Whose part?\n")
    assert len(listing(tmp_path/"m.py")) == 3 and len(listing(tmp_path/"n.ipynb")) == 2 and len(listing(tmp_path)) == 7  # a question and "Whose" are two


if __name__ == "__main__": print("\n".join(listing(*sys.argv[1:])) or "none found")
