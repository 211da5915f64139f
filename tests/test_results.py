"""Files of captions and references, as people have them, and ids that name the same image (clipcap.formats.results)."""
import json
import random
import re
import time
from pathlib import Path

import pytest
from data_files import read_files, write

from clipcap.apps.cli import main

# CIDEr of these captions with these references is 1.5806 (reference tool)
CAPTIONS = {"a.jpg": "a brown dog runs in the grass", "b.jpg": "two men play football", "c.jpg": "a girl in a red dress"}
PEOPLE = {"a.jpg": ["a dog running on grass", "the brown dog"], "b.jpg": ["two men are playing soccer", "men with a ball"],
          "c.jpg": ["a young girl wears a red dress", "girl"]}
RIGHT = 1.5806


def flat(people): return [(i, n, c) for i, texts in people.items() for n, c in enumerate(texts)]


def karpathy(people):
    return {"images": [{"filename": i, "imgid": n, "split": "test", "sentences": [{"raw": c, "tokens": c.split()} for c in texts]}
                       for n, (i, texts) in enumerate(people.items())], "dataset": "flickr8k"}


def coco(people):
    return {"info": {}, "images": [{"id": 70 + n, "file_name": i} for n, i in enumerate(people)],
            "annotations": [{"id": k, "image_id": 70 + list(people).index(i), "caption": c} for k, (i, _, c) in enumerate(flat(people))]}


def lines(rows, separator): return "\n".join(separator.join(map(str, row)) for row in rows) + "\n"


REFERENCES = {  # file name -> content, all of the same references
    "refs.json": PEOPLE, "Flickr8k.token.txt": lines([(f"{i}#{n}", c) for i, n, c in flat(PEOPLE)], "\t"),
    "results.csv": lines([("image_name", "comment_number", "comment"), *flat(PEOPLE)], "| "),
    "comment.csv": lines([("image_name", "comment_number", "comment"), *flat(PEOPLE)], ","),
    "captions.txt": lines([("image", "caption"), *((i, c) for i, _, c in flat(PEOPLE))], ","),
    "tabs.tsv": lines([("image", "caption"), *((i, c) for i, _, c in flat(PEOPLE))], "\t"),
    "ids.csv": lines([("image_id", "caption"), *((i, c) for i, _, c in flat(PEOPLE))], ","),
    "bare.tsv": lines([(i, c) for i, _, c in flat(PEOPLE)], "\t"),
    "dataset_flickr8k.json": karpathy(PEOPLE), "split.json": karpathy(PEOPLE), "captions_val2014.json": coco(PEOPLE), "annotations.json": coco(PEOPLE),
    "blip.json": [{"image": i, "caption": texts} for i, texts in PEOPLE.items()],
    "blip_rows.json": [{"image": i, "caption": c} for i, _, c in flat(PEOPLE)],
    "rows.json": [{"image_id": i, "caption": c} for i, _, c in flat(PEOPLE)],
    "bare_annotations.json": {"annotations": [{"image_id": i, "caption": c} for i, _, c in flat(PEOPLE)]},
    "pycoco.json": {i: [{"caption": c} for c in texts] for i, texts in PEOPLE.items()},
    "lines.jsonl": "\n".join(json.dumps({"image": i, "caption": c}) for i, _, c in flat(PEOPLE)),
    "cells.csv": 'image,caption\n' + "".join(f'{i},"{texts!r}"\n' for i, texts in PEOPLE.items()),
    "annotations_30k/flickr_annotations_30k.csv": "raw,split,filename\n" + "".join(
        '"{}",test,{}\n'.format(json.dumps(texts).replace('"', '""'), i) for i, texts in PEOPLE.items()),
}
HYPOTHESES = {
    "results.json": [{"image_id": i, "caption": c} for i, c in CAPTIONS.items()], "plain.json": CAPTIONS,
    "pycoco.json": {i: [{"caption": c}] for i, c in CAPTIONS.items()},
    "annotation_lists.json": {i: [{"image_id": i, "id": n, "caption": c}] for n, (i, c) in enumerate(CAPTIONS.items())},
    "lists.json": {i: [c] for i, c in CAPTIONS.items()}, "list_rows.json": [{"image_id": i, "caption": [c]} for i, c in CAPTIONS.items()],
    "objects.json": {i: {"caption": c} for i, c in CAPTIONS.items()},
    "predictions.json": {"model": "x", "predictions": [{"image_id": i, "caption": c} for i, c in CAPTIONS.items()]},
    "results_key.json": {"results": {i: [c] for i, c in CAPTIONS.items()}},
    "file_names.json": [{"file_name": i, "caption": c} for i, c in CAPTIONS.items()],
    "table.csv": lines([("image", "caption"), *CAPTIONS.items()], ","), "ids.csv": lines([("id", "image_id", "caption"), *((0, *c) for c in CAPTIONS.items())], ","),
    "cells.csv": lines([("image", "caption"), *((i, f'"{[c]!r}"') for i, c in CAPTIONS.items())], ","),
    "table.tsv": lines([("image", "caption"), *CAPTIONS.items()], "\t"),
    "lines.jsonl": "\n".join(json.dumps({"image": i, "caption": c}) for i, c in CAPTIONS.items()),
}


@pytest.fixture
def cider(tmp_path, capsys):
    "A function that runs `clipcap score` on two contents, or paths: status, CIDEr (None after an error), what it said."
    def run(captions, references, *words, names=("captions", "references")):
        paths = [content if isinstance(content, Path) else (write(tmp_path/"files", {f"{k}/{name}": content}), tmp_path/f"files/{k}"/name)[1]
                 for k, (name, content) in enumerate(zip(names, (captions, references)))]
        capsys.readouterr()
        try: status = main(["score", *map(str, paths), "--metrics", "cider", "--resamples", "2", "--json", str(tmp_path/"s.json"), *words])
        except SystemExit as end: status = end.code
        said = capsys.readouterr()
        found = json.loads((tmp_path/"s.json").read_text())["corpus"]["cider"] if status == 0 else None
        return status, found, said.out + said.err
    return run


# --- the same references in every form

@pytest.mark.parametrize("name", REFERENCES)
def test_references_of_every_form_score_alike(cider, name):
    status, found, said = cider(CAPTIONS, REFERENCES[name], names=("captions", name))
    assert status == 0 and round(found, 4) == RIGHT, said


@pytest.mark.parametrize("name", HYPOTHESES)
def test_captions_of_every_form_score_alike(cider, name):
    status, found, said = cider(HYPOTHESES[name], PEOPLE, names=(name, "references"))
    assert status == 0 and round(found, 4) == RIGHT and "empty" not in said, said


def test_files_of_public_reports_score_as_the_reference_tool(cider, shared):
    listed = shared/"cases/04-score-caption-in-a-list"
    others = shared/"cases/11-score-reads-less-than-training"
    pairs = [*((p, listed/"refs.json") for p in sorted(listed.glob("res_*.json"))),
             *((others/"res.json", p) for p in sorted(others.iterdir()) if p.name not in ("README", "res.json"))]
    assert len(pairs) >= 6 and {(p.name, q.name): round(cider(p, q)[1] or 0, 4) for p, q in pairs} == {(p.name, q.name): RIGHT for p, q in pairs}


@pytest.mark.parametrize("name, content", [(n, REFERENCES[n]) for n in ("Flickr8k.token.txt", "captions.txt", "results.csv", "dataset_flickr8k.json", "captions_val2014.json")] + [
    ("captions.txt", "image,caption,id\na.jpg,a dog,0\nb.jpg,a cat,1\n"), ("captions.txt", ",image,caption\n0,a.jpg,a dog\n1,b.jpg,a cat\n"),
    ("captions.txt", "image,caption\na.jpg,a dog, red\nb.jpg,a cat\n"), ("captions.txt", "image,caption\na.jpg\n"), ("captions.txt", "name,words\na.jpg,a dog\n"),
    ("captions.txt", "image_name,comment_number,comment\na.jpg,0,a dog\n"), ("captions.txt", "image,caption\na.jpg,\nb.jpg,a cat\n"),
    ("results.csv", "image_name| comment_number| comment\na.jpg, 0, a dog\n"), ("Flickr8k.token.txt", "a.jpg a dog\n")])
@pytest.mark.filterwarnings("ignore:references")
def test_score_reads_what_training_reads_and_refuses_what_it_refuses(tmp_path, name, content):
    from clipcap.formats.results import read_references
    def outcome(read):
        try: return read()
        except (ValueError, FileNotFoundError): return "refused"
    def by_image(rows): return {i: [c for j, c, _ in rows if j == i] for i, _, _ in rows}
    write(tmp_path, {name: content})
    trained = outcome(lambda: by_image(read_files({name: content})[0]))
    assert outcome(lambda: read_references(tmp_path/name, {})[0]) == trained


def test_references_may_be_a_folder_that_training_reads(cider, tmp_path):
    write(tmp_path/"data", {"captions.txt": REFERENCES["captions.txt"]})
    assert round(cider(CAPTIONS, tmp_path/"data")[1] or 0, 4) == RIGHT


@pytest.mark.parametrize("content, found", [
    ("image,caption\n7,A dog , red\n\n8,\n", {"7": "A dog , red", "8": ""}),  # a comma that was not quoted; an empty caption
    ('{"image": "a.png", "caption": "A dog ."}\n', {"a.png": "A dog ."}),  # of one photo
    ('{"run": "demo"}\n{"image": "a.png", "caption": "A dog ."}\n{"image": "b.png", "error": "damaged"}', {"a.png": "A dog .", "b.png": ""}),
    ([{"image_id": 1, "caption": "x"}, {"image_id": None, "caption": "y"}, {"image_id": 1, "caption": "x"}, {"image_id": "1", "caption": "z"}], {"1": "x"}),
    ("\ufeffimage,caption\r\n7,\"Say \"\"cheese\"\"\"\r\n", {"7": 'Say "cheese"'}), ({"7": None, "8": [], "9": "Un niño\ncorre"}, {"7": "", "8": "", "9": "Un niño\ncorre"})])
@pytest.mark.filterwarnings("ignore")
def test_unusual_files_are_read(tmp_path, content, found):
    from clipcap.formats.results import read_hypotheses
    write(tmp_path, {"file": content})
    assert read_hypotheses(tmp_path/"file", {}) == found


def test_odd_captions_are_counted_and_the_others_scored(tmp_path):
    from clipcap.formats.results import match, read_hypotheses
    notes = {}
    rows = [(1, "A dog"), (2, ""), (3, None), (None, "A cat"), (1, "A dog"), ("1", "Two dogs"), (4, ["A"]), (5, "x")]
    write(tmp_path, {"file": [{"image_id": i, "caption": c} for i, c in rows]})
    with pytest.warns(UserWarning) as told:
        captions = read_hypotheses(tmp_path/"file", notes)
        captions, people = match(captions, {"1": ["A dog"], "2": ["A cat"], "4.jpg": ["One"], "9": ["Two cows"]}, notes)
    assert captions == {"1": "A dog", "2": "", "4": "A"} and people == {"1": ["A dog"], "2": ["A cat"], "4": ["One"]}
    assert notes == {"captions without an image id, left out": 1, "empty captions, scored 0": 2, "images with several captions, the first is scored": 1,
                     "captions whose references have another spelling of the id": 1, "captions without references, left out": 2,
                     "images with references but without a caption, left out": 1}
    assert [str(w.message) for w in told][:2] == ["captions without an image id, left out: 1 (number 4)", "empty captions, scored 0: 2 (2, 3)"]
    with pytest.raises(ValueError, match="the captions are of a.png, the references of a.jpg; write ids the same way"): match({"a.png": "x"}, {"a.jpg": ["x"]}, {})


# --- what is no caption

@pytest.mark.parametrize("content, text", [
    ({"a.jpg": ["a dog", "a cat"], "b.jpg": "x"}, "a.jpg has a list of 2 captions"), ({"a.jpg": 7, "b.jpg": "x"}, "the caption of a.jpg is a number (7)"),
    ([{"image_id": "a.jpg", "caption": {"en": "a dog"}}], "the caption of a.jpg is an object ({'en': 'a dog'})"),
    ([{"image_id": "a.jpg", "caption": [["a dog", 7]]}], "the caption of a.jpg is a list"), ({"a.jpg": [{"text": "a dog"}]}, "the caption of a.jpg is a list ([{'text'"),
    ([{"image_id": "a.jpg", "prediction": "a dog"}], "number 1 has no caption, but the keys image_id, prediction"),
    ([{"caption": "a dog"}], "number 1 has no image_id"), ([{"image_id": ["a.jpg"], "caption": "a dog"}], "number 1 has a list for an image_id"),
    ({"predictions": [{"image_id": 1, "caption": "x"}], "results": [{"image_id": 1, "caption": "y"}]}, "predictions and results"),
    ("image,caption\na.jpg,\"['a dog', 'a cat']\"\n", "a.jpg has a list of 2 captions"), ("image,caption\na.jpg,\"['a dog' 'a cat']\"\n", "looks like a list"),
    ([1, 2], "is JSON, but not captions"), ("[{", "is broken JSON"), ("["*9999, "is broken JSON"), ('{"a": ' + "9"*5000 + "}", "is broken JSON"), ("", "expected the header"),
    ("name,text\n7,A dog\n", "'name,text'"), (b"image,caption\n7,caf\xe9\n", "is not UTF-8 (byte 19"), ('{"image": "7", "caption": "x"}\n[7]', "is JSON, but not captions"),
    ('image,caption\n7,"A dog\n' + "8,A cat\n"*20_000, "captions, line"), ({"7": "A dog"*3000}, "a caption of '7' has 15000 characters; more than 10000 are no caption"), ({"a.jpg": True}, "the caption of a.jpg is")], ids=range(22))
def test_what_is_no_caption_is_refused_by_name(cider, content, text):
    status, _, said = cider(content, PEOPLE)
    assert status == 1 and text in said and "captions" in said and "empty captions" not in said, said


def test_list_in_a_cell_that_is_none_is_refused_for_training_too():
    with pytest.raises(ValueError, match="looks like a list"): read_files({"captions.txt": "image,caption\na.jpg,\"['a dog' 'a cat']\"\nb.jpg,a cat\n"})


def test_list_in_a_cell_is_its_captions_for_training_and_score(tmp_path):
    from clipcap.formats.results import read_references
    rng, texts = random.Random(0), ["a dog's ball", 'he says "hi"', "both ' and \"", "a, b", "tab\\t", "un niño", "狗", "[a]", "back \\ slash", "😀 x"]
    people = {f"{n}.jpg": rng.sample(texts, rng.randint(1, 4)) for n in range(40)}
    for dump in (repr, json.dumps, lambda t: json.dumps(t, ensure_ascii=False), lambda t: str(tuple(t)), lambda t: repr(t).replace("', '", "' ,\n '")):
        content = "image,caption\n" + "".join('{},"{}"\n'.format(i, dump(t).replace('"', '""')) for i, t in people.items() if "\n" not in dump(t))
        wanted = {i: t for i, t in people.items() if "\n" not in dump(t)}
        write(tmp_path, {"captions.txt": content})
        assert read_references(tmp_path/"captions.txt", {})[0] == wanted
        assert read_files({"captions.txt": content})[0] == [(i, c, None) for i, t in wanted.items() for c in t]


def test_caption_in_brackets_that_is_no_list_stays(tmp_path):
    from clipcap.formats.results import read_references
    write(tmp_path, {"c.csv": 'image,caption\na.jpg,[dog] runs\nb.jpg,"(a ""red"" dog)"\nc.jpg,[ a dog ]\n'})
    assert read_references(tmp_path/"c.csv", {})[0] == {"a.jpg": ["[dog] runs"], "b.jpg": ['(a "red" dog)'], "c.jpg": ["[ a dog ]"]}


@pytest.mark.parametrize("text", ["['a'" + " "*10**5 + "x]", "['" + "\\\\"*10**5 + "]", "[" + "'a', "*10**4 + "x]", "(" + "'a', "*10**4 + "x)", "[" + " "*10**5 + "'a'"], ids=range(5))
def test_hostile_cells_take_no_time(text):
    from clipcap.formats.tables import caption_list
    before = time.perf_counter()
    try: assert caption_list(text) is None
    except ValueError: pass
    assert time.perf_counter() - before < 2


# --- ids

def numbers(spelling): return {spelling(n): c for n, c in enumerate(CAPTIONS.values(), 1)}, {spelling(n): t for n, t in enumerate(PEOPLE.values(), 1)}


SPELLINGS = {"1": str, "1.0": lambda n: f"{n}.0", "000000000001": "{:012}".format, "name": "COCO_val2014_{:012}.jpg".format, "stem": "COCO_val2014_{:012}".format,
             "path": "/data/coco/val2014/COCO_val2014_{:012}.jpg".format, "file": "{}.jpg".format, "windows": "C:\\data\\{:012}.jpg".format}


@pytest.mark.parametrize("ours, theirs", [(a, b) for a in SPELLINGS for b in SPELLINGS if a != b])
def test_ids_that_name_the_same_image_meet(cider, ours, theirs):
    status, found, said = cider(numbers(SPELLINGS[ours])[0], numbers(SPELLINGS[theirs])[1])
    assert status == 0 and round(found, 4) == RIGHT and said.count("another spelling") == 2, said  # a warning, and the protocol


def test_ids_written_alike_meet_without_a_word(cider):
    for spell in SPELLINGS.values():
        status, found, said = cider(numbers(spell)[0], numbers(spell)[1])
        assert status == 0 and round(found, 4) == RIGHT and "another spelling" not in said, said


@pytest.mark.parametrize("spell", [lambda i: i[:-4], lambda i: f"Images/{i}", lambda i: f"/d/{i}", lambda i: f"../{i}", lambda i: f"./x/{i[:-4]}.JPG"],
                         ids=["stem", "folder", "absolute", "up", "capital"])
def test_file_names_meet_with_and_without_folder_and_ending(cider, spell):
    assert round(cider({spell(i): c for i, c in CAPTIONS.items()}, PEOPLE)[1] or 0, 4) == RIGHT
    assert round(cider(CAPTIONS, {spell(i): t for i, t in PEOPLE.items()})[1] or 0, 4) == RIGHT


def test_ids_of_annotations_meet_by_their_images(cider):
    turned = {"images": [{"id": 3 - n, "file_name": f"{n + 1}.jpg"} for n in range(3)],  # id 3 is 1.jpg: the list decides, not the digits
              "annotations": [{"image_id": 3 - n, "caption": c} for n, texts in enumerate(PEOPLE.values()) for c in texts]}
    for spell in (str, float, "{:012}".format):
        status, found, said = cider([{"image_id": spell(3 - n), "caption": c} for n, c in enumerate(CAPTIONS.values())], turned)
        assert status == 0 and round(found, 4) == RIGHT and "another spelling" in said, said
    assert round(cider([{"image_id": f"{n + 1}.jpg", "caption": c} for n, c in enumerate(CAPTIONS.values())], turned)[1] or 0, 4) == RIGHT
    by_number = [{"image_id": n, "caption": c} for n, c in enumerate(CAPTIONS.values())]
    assert round(cider(by_number, karpathy(PEOPLE))[1] or 0, 4) == RIGHT  # imgid


@pytest.mark.parametrize("captions, references", [
    (["1"], ["cat/1.jpg", "dog/1.jpg"]), (["x/1.jpg", "y/1.jpg"], ["1.jpg"]), (["1"], ["1.jpg", "1.png"]), (["a/1", "b/1"], ["c/1", "d/1"]),
    (["1"], ["COCO_val2014_000000000001", "COCO_train2014_000000000001"]), (["1.0", "001"], ["1"])])
def test_ids_that_could_name_two_images_are_refused(captions, references):
    from clipcap.formats.results import meet
    for own, people in ((captions, references), (references, captions)):
        with pytest.raises(ValueError, match="could be"): meet(own, people)


def test_listed_ids_decide_and_must_name_one_image():
    from clipcap.formats.results import meet
    assert meet(["1", "01"], ["x.jpg", "y.jpg"], {"1": "x.jpg", "01": "y.jpg"}) == {"1": "x.jpg", "01": "y.jpg"}
    assert meet(["2", "x.jpg"], ["x.jpg", "2.jpg"], {"2": "z.jpg"}) == {"x.jpg": "x.jpg"}  # an image of the list without references, not 2.jpg
    for captions in (["1.0"], ["1", "x.jpg"]):
        with pytest.raises(ValueError, match="could be"): meet(captions, ["x.jpg", "y.jpg"], {"1": "x.jpg", "01": "y.jpg"})


@pytest.mark.parametrize("captions, references, pairs", [
    (["/r/cat/1.jpg", "/r/dog/1.jpg"], ["cat/1.jpg", "dog/1.jpg"], {"/r/cat/1.jpg": "cat/1.jpg", "/r/dog/1.jpg": "dog/1.jpg"}),
    (["/r/cat/1.jpg", "/r/bird/1.jpg"], ["cat/1.jpg", "dog/1.jpg"], {"/r/cat/1.jpg": "cat/1.jpg"}),
    (["1.jpg", "2.jpg"], ["1.jpg", "2.jpg", "001.jpg"], {"1.jpg": "1.jpg", "2.jpg": "2.jpg"}), (["a.png"], ["a.jpg"], {}), (["a.v1"], ["a.v2"], {}),
    (["cafe\u0301.jpg"], ["caf\u00e9.jpg"], {"cafe\u0301.jpg": "caf\u00e9.jpg"}), (["2", "q"], ["2.jpg", "r"], {"2": "2.jpg"}), ([""], ["", "a"], {"": ""})])
def test_folders_and_endings_decide_where_names_repeat(captions, references, pairs):
    from clipcap.formats.results import meet
    assert meet(captions, references) == pairs


def test_drawn_spellings_meet_and_never_cross():
    from clipcap.formats.results import meet
    rng = random.Random(1)
    for _ in range(60):
        drawn = rng.sample(range(1, 500), rng.randint(1, 30))
        ours, theirs = rng.choice(list(SPELLINGS.values())), rng.choice(list(SPELLINGS.values()))
        captions, people = drawn[:rng.randint(1, len(drawn))], rng.sample(drawn, len(drawn))
        assert meet(map(ours, captions), map(theirs, people)) == {ours(n): theirs(n) for n in captions}
    many = [f"{n % 7}/image.jpg" if n % 2 else f"{n}/{n}.jpg" for n in range(7)]
    assert meet([f"/root/{m}" for m in many], many) == {f"/root/{m}": m for m in many}


def test_many_images_of_one_name_are_no_work():
    from clipcap.formats.results import meet
    assert len(meet([f"/r/{n}/image.jpg" for n in range(20_000)], [f"{n}/image.jpg" for n in range(20_000)])) == 20_000


# --- drawn files

FORMS = {"coco": coco, "karpathy": karpathy, "blip": lambda p: [{"image": i, "caption": t} for i, t in p.items()], "plain": lambda p: p,
         "pycoco": lambda p: {i: [{"caption": c} for c in t] for i, t in p.items()}, "token": lambda p: lines([(f"{i}#{n}", c) for i, n, c in flat(p)], "\t"),
         "bars": lambda p: lines([("image_name", "comment_number", "comment"), *flat(p)], "| "), "tsv": lambda p: lines([("image", "caption"), *((i, c) for i, _, c in flat(p))], "\t"),
         "csv": lambda p: lines([("image", "caption"), *((i, c) for i, _, c in flat(p))], ",")}


@pytest.mark.parametrize("form", FORMS)
def test_drawn_references_are_read_alike(tmp_path, form):
    from clipcap.formats.results import read_references
    rng = random.Random(form)
    for n in range(15):
        words = ["a", "dog's", "“red”", "niño", "狗", "#1", "a|b" if form != "bars" else "ab", "x,y", "50%", "in", "(blue)", "'t"]
        people = {f"{rng.choice('ab')}{k}{rng.choice(['.jpg', '.png', '_x.jpeg'])}": [" ".join(rng.choices(words, k=rng.randint(1, 9))).strip("\"'")
                  for _ in range(rng.randint(1, 5))] for k in range(rng.randint(1, 12))}
        write(tmp_path, {f"f{n}": FORMS[form](people)})
        assert read_references(tmp_path/f"f{n}", {})[0] == people


def test_no_file_is_scored_without_a_caption_in_silence(cider):
    "Whatever nesting holds the captions: read with their right score, or refused naming the file."
    rng, wraps = random.Random(3), [lambda v: [v], lambda v: {"caption": v}, lambda v: {"text": v}, lambda v: [v, v], lambda v: v]
    for _ in range(40):
        deep = [rng.choice(wraps) for _ in range(rng.randint(1, 3))]
        def wrap(text):
            for layer in deep: text = layer(text)
            return text
        shape = rng.choice([lambda c: {i: wrap(t) for i, t in c.items()}, lambda c: [{"image_id": i, "caption": wrap(t)} for i, t in c.items()],
                            lambda c: {"predictions": [{"image_id": i, "caption": wrap(t)} for i, t in c.items()]}])
        status, found, said = cider(shape(CAPTIONS), PEOPLE)
        assert status == 1 and re.search(r"captions: |captions,", said) or round(found or 0, 4) == RIGHT, (shape(CAPTIONS), said)


# --- options

@pytest.mark.parametrize("words, text", [
    (["--resamples", "0"], "resamples=0"), (["--resamples", "-5"], "resamples=-5"), (["--seed", "-1"], "seed=-1"), (["--csv", "{folder}"], "{folder} is a folder"),
    (["--json", "{folder}/captions/s.json"], "captions is a file"), (["--csv", "{folder}/captions"], "would overwrite"), (["--csv", "{folder}/x", "--json", "{folder}/x"], "same file"),
    (["--csv", "/proc/none/x.csv"], "/proc/none/x.csv can't be written"), (["--metrics", "cidre"], "cidre"), (["--tokenization", "spacy"], "spacy")])
def test_wrong_options_are_named_before_anything_is_read(tmp_path, capsys, monkeypatch, words, text):
    from clipcap.formats import results
    monkeypatch.setattr(results, "read_hypotheses", lambda *_: pytest.fail("it read"))
    write(tmp_path, {"captions": CAPTIONS, "references": PEOPLE})
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    status = main(["score", str(tmp_path/"captions"), str(tmp_path/"references"), *(w.format(folder=tmp_path) for w in words)])
    said = capsys.readouterr().err
    assert status == 1 and text.format(folder=tmp_path) in said and "Traceback" not in said, said
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("words", [["狗在草地上跑", "一个人在海边"], ["犬が走っている", "海辺の男の人"], ["สุนัขวิ่งบนหญ้า", "ผู้ชายที่ชายหาด"]], ids=["Chinese", "Japanese", "Thai"])
def test_captions_without_spaces_are_warned_of(cider, words):
    captions, people = dict(zip("ab", words)), {i: [w, w[:-1]] for i, w in zip("ab", words)}
    status, _, said = cider(captions, people)
    assert status == 0 and "--tokenization characters" in said, said
    status, found, said = cider(captions, people, "--tokenization", "characters")
    assert status == 0 and found > 1 and "without spaces" not in said and "tokenization: characters" in said, said
