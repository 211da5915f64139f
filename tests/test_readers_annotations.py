"""Flickr30k, Karpathy's split and COCO (clipcap.formats.annotations)."""
import json
import zipfile
from pathlib import Path

import pycocoevalcap
import pytest
from data_files import fails, read_files, write
from test_readers import csv_text

from clipcap.formats.readers import check_official, find_source, read_table


# --- Flickr30k

BARS = ('image_name| comment_number| comment\r\n1000092795.jpg| 0| Two young guys with a | on "shirts" .\r\n'
        "2199200615.jpg| 3| A  small dog runs .\r\n2199200615.jpg| 4   A dog runs across the grass .\r\n")


def annotations(*rows): return csv_text(("raw", "sentids", "split", "filename", "img_id"), *rows)


@pytest.mark.parametrize("text, photos, at", [
    ("results.csv", "flickr30k_images", ""), ("flickr30k_images/results.csv", "flickr30k_images/flickr30k_images", ""),  # Kaggle's folder in a folder
    ("flickr30k_images/results.csv", "flickr30k_images/flickr30k_images", "flickr30k_images")])
def test_bars_and_the_row_that_lacks_one(text, photos, at):
    rows, _, source = read_files({text: BARS, f"{photos}/1000092795.jpg": ""}, at)
    assert rows == [("1000092795.jpg", 'Two young guys with a | on "shirts" .', None), ("2199200615.jpg", "A small dog runs .", None),
                    ("2199200615.jpg", "A dog runs across the grass .", None)]
    assert source.format == "Flickr30k" and source.photos.name == "flickr30k_images" and str(source.photos).endswith(photos)


def test_token_file_is_like_flickr8ks():
    rows = read_files({"results_20130124.token": "1000092795.jpg#0\tTwo young guys .\n1000092795.jpg#1\tTwo men .\n"})[0]
    assert rows == [("1000092795.jpg", "Two young guys .", None), ("1000092795.jpg", "Two men .", None)]


def test_annotations_with_the_split_are_preferred():
    rows, left_out, _ = read_files({"results.csv": BARS, "flickr_annotations_30k.csv": annotations(
        ('["Two young guys, \\"shaggy\\".", "Two men"]', "[0, 1]", "train", "1000092795.jpg", 0), ('["A dog"]', "[2]", "val", "b.jpg", 1), ("[]", "[]", "test", "c.jpg", 2))})
    assert rows == [("1000092795.jpg", 'Two young guys, "shaggy".', "train"), ("1000092795.jpg", "Two men", "train"), ("b.jpg", "A dog", "val")]
    assert left_out == {"images without a caption": 1}


@pytest.mark.parametrize("name, content, text", [
    ("results.csv", "image,caption\na.jpg,A dog\n", "results.csv, line 1: expected the header 'image_name| comment_number| comment', found 'image,caption'"),
    ("results.csv", BARS + "a.jpg, 0, A dog\n", "results.csv, line 5: expected 'photo.jpg| 0| caption', found 'a.jpg, 0, A dog'; correct or remove"),
    ("flickr_annotations_30k.csv", "raw,filename\n", "the columns ['split'] are missing from the header 'raw,filename'"),
    ("flickr_annotations_30k.csv", annotations(("['A dog']", "[0]", "train", "a.jpg", 0)), "flickr_annotations_30k.csv, line 2: the column raw is not a JSON list"),
    ("flickr_annotations_30k.csv", annotations(('"A dog"', "[0]", "train", "a.jpg", 0)), "is not a JSON list of captions (it is a str)"),
    ("flickr_annotations_30k.csv", annotations(('["A dog"]',)), "a photo is called None; its name must be text"),
    ("results.csv", BARS, "results.csv and results_20130124.token have no splits; use flickr_annotations_30k.csv or dataset_flickr30k.json; or use split='random'")],
    ids=range(7))
def test_bad_flickr30k_file_is_named(name, content, text):
    with fails(text): read_files({name: content}, official=True)


# --- Karpathy's split

def karpathy(*images):
    "As published: (filename, split, captions), COCO's with a folder."
    return {"images": [{"filename": name, "imgid": n, "split": split, "sentences": [{"raw": c, "tokens": c.lower().split(), "imgid": n} for c in captions],
                        **({"filepath": name[5:].split("_")[0]} if name.startswith("COCO") else {})} for n, (name, split, captions) in enumerate(images)]}


CHILD = karpathy(("1000268201_693b08cb0e.jpg", "train", ["A child"]))


def test_karpathys_coco_is_read_whole(tmp_path):
    write(tmp_path, {"annotations/dataset_coco.json": karpathy(
        ("COCO_val2014_000000391895.jpg", "test", ["A man with a red helmet. ", "A man\nrides.", "3", "4", "5", "6"]), ("COCO_val2014_000000000042.jpg", "restval", ["A dog"]),
        ("COCO_train2014_000000000009.jpg", "train", ["Food"]), ("COCO_val2014_000000000073.jpg", "val", ["A bike"]), ("COCO_val2014_000000000074.jpg", "val", [])),
        "train2014/COCO_train2014_000000000009.jpg": "t", "val2014/COCO_val2014_000000391895.jpg": "v"})
    source = find_source(tmp_path)
    assert [source.photos.open(f"COCO_{n}.jpg").parent.name for n in ("train2014_000000000009", "val2014_000000391895")] == ["train2014", "val2014"]
    table = read_table(source)
    check_official(table, source)
    assert table.caption.tolist() == ["A man with a red helmet.", "A man rides.", "3", "4", "5", "6", "A dog", "Food", "A bike"]
    assert table.drop_duplicates("image").split.tolist() == ["test", "train", "train", "val"] and source.left_out == {"images without a caption": 1}
    assert find_source(tmp_path/"annotations/dataset_coco.json").root == source.root


def test_photos_may_lie_beside_the_file(tmp_path):
    write(tmp_path, {"karpathy/dataset_flickr8k.json": CHILD, "karpathy/Images/a.jpg": ""})
    assert find_source(tmp_path/"karpathy/dataset_flickr8k.json").photos.open("a.jpg") == tmp_path/"karpathy/Images/a.jpg"


def test_one_of_karpathys_files_is_read():
    both, expected = {"dataset_flickr8k.json": CHILD, "dataset_coco.json": CHILD}, [("1000268201_693b08cb0e.jpg", "A child", "train")]
    assert read_files({"dataset_flickr8k.json": CHILD})[0] == read_files(both, "dataset_flickr8k.json")[0] == expected
    with fails("holds dataset_coco.json, dataset_flickr8k.json: each is a data set of its own; name one: data_root=FILE"): read_files(both)


def image(**changes): return {"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "A dog"}], **changes}]}


@pytest.mark.parametrize("content, row", [(image(sentences=[{"tokens": ["a", "dog"]}]), ("a.jpg", "a dog", "train")), (image(split=None), ("a.jpg", "A dog", None))])
def test_karpathys_file_without_raw_text_or_split_is_read(content, row): assert read_files({"dataset_x.json": content})[0] == [row]


@pytest.mark.parametrize("content, text", [
    ({"info": 1, "annotations": []}, "dataset_x.json: expected JSON with images, each with filename, split and sentences[].raw; found an object with the keys ['annotations', 'info']"),
    ([1], "found a list"),
    ({"images": [{"filename": "a.jpg", "split": "train"}]}, "dataset_x.json: images[0] has no 'sentences'; expected"),
    (image(sentences=["A dog"]), "dataset_x.json: a sentence of a.jpg has neither raw nor tokens; expected"),
    (image(filename=7), "a photo is called 7; its name must be text"),
    (image(sentences=[{"raw": ["A"]}]), "a caption of a.jpg is a list, \"['A']\"; it must be text"),
    ('{"images": [{"filename"', "dataset_x.json is not JSON"),
    ({"images": []}, "dataset_x.json holds no captions: expected JSON with images"),
    (CHILD, "finds no image for val and test"),
    (karpathy(("a", "train", "x"), ("b", "val", "x"), ("a", "test", "x")), "1 images are in several splits, such as a in train and test; keep each in one, or use split='random'"),
    # found by `make fuzz`
    (image(filename=["a.jpg"]), "dataset_x.json: filename of images[0] is a list; expected JSON"),
    (image(split=[]), "dataset_x.json: split of images[0] is a list; expected JSON"),
    (image(sentences=7), "dataset_x.json: a sentence of a.jpg has neither raw nor tokens"),
    (image(sentences=[{"raw": "A \ud800 dog"}]), "or a caption of it is not Unicode"),
    (image(filename="\udcff.jpg"), "or a caption of it is not Unicode")], ids=range(15))
def test_bad_karpathy_file_is_named(content, text):
    with fails(text): read_files({"dataset_x.json": content}, official=True)


# --- COCO

def coco(images, captions):
    "As published: images as {id: file_name}, captions as (image_id, caption)."
    return {"info": {"year": 2014}, "images": [{"id": i, "file_name": n, "height": 480} for i, n in images.items()],
            "annotations": [{"image_id": i, "id": k, "caption": c} for k, (i, c) in enumerate(captions)]}


A, B, C, D = (f"COCO_{part}2014_0000000{n}.jpg" for part, n in (("train", "00009"), ("train", "57870"), ("train", "00007"), ("val", "00042")))
YEAR = {"annotations/captions_train2014.json": coco({57870: B, 9: A, 7: C}, [(9, "Closeup of bins of food. "), (57870, "A restaurant\nhas tables."), (9, "Food.")]),
        "annotations/captions_val2014.json": coco({42: D}, [(42, "Shoes and sandals")]), "annotations/instances_val2014.json": {},
        "annotations/._captions_val2014.json": b"\0litter", f"train2014/{A}": "t", f"val2014/{D}": "v"}
BOTH_YEARS = {**YEAR, "annotations/captions_val2017.json": coco({42: "000000000042.jpg"}, [(42, "Shoes")]), "val2017/000000000042.jpg": "v"}


def test_a_year_of_coco_is_read():
    rows, left_out, source = read_files(YEAR)
    assert rows == [(A, "Closeup of bins of food.", "train"), (B, "A restaurant has tables.", "train"), (A, "Food.", "train"), (D, "Shoes and sandals", "val")]
    assert left_out == {"images without a caption": 1} and [f.name for f in source.photos.folders[:2]] == ["train2014", "val2014"]
    assert len(read_files(YEAR, "annotations/captions_train2014.json")[0]) == 3  # one file alone


def test_one_year_of_coco_is_read():
    with fails("captions_val2014.json, captions_val2017.json: several years, which share photos; name one: data_root=FILE"): read_files(BOTH_YEARS)
    rows, _, source = read_files(BOTH_YEARS, "annotations/captions_val2017.json")
    assert (rows, source.photos.folders[0].name) == ([("000000000042.jpg", "Shoes", "val")], "val2017")


@pytest.mark.parametrize("text", ["finds no image for test in ", "COCO publishes no captions of its test images; use Karpathy's dataset_coco.json; or use split='random'"])
def test_coco_has_no_official_test_split(text):
    with fails(text): read_files(YEAR, official=True)


@pytest.mark.parametrize("content, text", [
    ({"images": [{"id": 42, "file_name": "a.jpg"}], "annotations": [{"image_id": 42, "bbox": []}]}, "captions_val2014.json: annotations[0] has no 'caption'; expected JSON with images"),
    ([{"image_id": 42, "caption": "A"}], "captions_val2014.json: expected JSON with images, each with id and file_name, and annotations, each with image_id and caption; found a list"),
    (coco({1: "a.jpg"}, [(2, "A dog")]), "annotations[0] is of image 2, which is not in images"),
    (coco({1: "a.jpg", 2: "a.jpg"}, [(2, "A dog")]), "a.jpg is the file_name of several images"),
    # found by `make fuzz`
    ({"images": [{"id": [1], "file_name": "a.jpg"}], "annotations": []}, "captions_val2014.json: id of images[0] is a list"),
    ({"images": [{"id": 1, "file_name": {}}], "annotations": []}, "captions_val2014.json: file_name of images[0] is a dict"),
    ({"images": [], "annotations": [{"image_id": [1], "caption": ""}]}, "captions_val2014.json: image_id of annotations[0] is a list")], ids=range(7))
def test_bad_coco_file_is_named(content, text):
    with fails(text): read_files({"captions_val2014.json": content})


def test_ids_of_several_types_are_counted():
    assert read_files({"captions_val2014.json": coco({1: "1.jpg", "2": "2.jpg", 3: "3.jpg"}, [(3, "A dog")])})[1] == {"images without a caption": 2}


def test_published_coco_captions_are_read_whole(tmp_path):
    "They come with pycocoevalcap, inside SPICE's archive."
    with zipfile.ZipFile(Path(list(pycocoevalcap.__path__)[0])/"spice/spice-1.0.jar") as jar: jar.extract("coco/annotations/captions_val2014.json", tmp_path)
    table = read_table(find_source(tmp_path/"coco"))
    typed = json.loads((tmp_path/"coco/annotations/captions_val2014.json").read_bytes())["annotations"]
    assert (len(table), table.image.nunique(), set(table.split)) == (202654, 40504, {"val"})
    assert table.caption.tolist() == [" ".join(entry["caption"].split()) for entry in typed]
