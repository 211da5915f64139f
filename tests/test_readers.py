"""Text files, places of photos, splits, recognising a format, and Flickr8k (clipcap.formats.readers)."""
import csv
import io

import pytest
from data_files import fails, read_files, write

from clipcap.formats.readers import (READERS, SPLITS, Folders, Reader, as_photos, find_layout, find_source, official_split, random_split,
                                     read_captions, split_of)
from clipcap.formats.tables import read_json, read_lines, read_text


def file_of(folder, content, name="x.txt"):
    "A file with this content."
    (folder/name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder/name


# --- text

def test_text_is_utf8_with_or_without_byte_order_mark(tmp_path):
    path = file_of(tmp_path, "\ufeffone\r\n\r\ntwo\u2028three\n")
    assert list(read_lines(path)) == [(1, "one"), (3, "two\u2028three")]
    assert read_text(path).startswith("one\r\n")
    assert read_json(file_of(tmp_path, '\ufeff{"a": 1}'), "") == {"a": 1}


@pytest.mark.parametrize("content, read, text", [
    (b"a\nb\ncaf\xe9\n", lambda path: list(read_lines(path)), "is not UTF-8 (line 3: "),
    ("a".encode("utf-16"), read_text, "is not UTF-8 (byte 0"),  # as Excel saves it
    ('{"a": [1, 2', lambda path: read_json(path, "an object"), "x.txt is not JSON (Expecting ',' delimiter"),
    ("["*9999, lambda path: read_json(path, "an object"), "x.txt is not JSON ("),
    ("9"*5000, lambda path: read_json(path, "an object"), "x.txt is not JSON (")], ids=["line", "utf-16", "cut", "deep", "digits"])
def test_damaged_text_is_named(tmp_path, content, read, text):
    with fails(text): read(file_of(tmp_path, content))


# --- photos

def test_photos_in_several_folders(tmp_path):
    write(tmp_path, {name: name for name in ("val2014/b.jpg", "train2014/a.jpg", "train2014/deep/c.jpg")})
    photos = Folders(tmp_path, "train2014", "val2014", "test2014", ".")
    assert [str(photos.open(n).relative_to(tmp_path)) for n in ("a.jpg", "b.jpg", "deep/c.jpg", "val2014/b.jpg")] == \
        ["train2014/a.jpg", "val2014/b.jpg", "train2014/deep/c.jpg", "val2014/b.jpg"]
    with fails(f"z.jpg is not in {tmp_path/'train2014'} and {tmp_path/'val2014'} and", FileNotFoundError): photos.open("z.jpg")
    assert as_photos(tmp_path/"val2014").open("b.jpg") == tmp_path/"val2014/b.jpg"
    before = photos.stamp("a.jpg")
    (tmp_path/"train2014/a.jpg").write_text("another")
    assert photos.stamp("a.jpg") != before


@pytest.mark.parametrize("name", ["z.jpg", "a.jpg/z.jpg", "a\0.jpg", "x"*300, "../secret.jpg", "/etc/passwd"])
def test_photo_that_is_not_in_the_folder_is_missing(tmp_path, name):
    write(tmp_path, {"secret.jpg": "", "photos/a.jpg": ""})
    photos = Folders(tmp_path/"photos")
    assert photos.stamp(name) is None
    with pytest.raises(FileNotFoundError): photos.open(name)


# --- splits

def test_random_split_depends_on_names_and_seed_alone():
    names = [f"{i}.jpg" for i in range(8091)]
    split = random_split(names, seed=42)
    assert [list(split.values()).count(part) for part in SPLITS] == [6472, 809, 810]
    assert random_split(names[::-1] + names[:9], seed=42) == split != random_split(names, seed=43)


@pytest.mark.parametrize("text, split", [
    ("restval", "train"), ("captions_val2017", "val"), ("Train_GCC-training", "train"), ("dev", "val"), ("validation", "val"),
    ("cc3m-test-0001.tar", "test"), ("00000", None), ("contrast", None), ("trainval", None)])
def test_split_of_a_name(text, split): assert split_of(text) == split


# --- Flickr8k

AWKWARD = ['A dog , "Rex" , runs .', "Player #7  in  red", " two men", 'say "cheese" , #1 fans , please']


def csv_text(*rows):
    "A CSV as Kaggle writes it."
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue()


def test_captions_are_the_same_in_each_layout(tmp_path):
    name = "2258277193_586949ec62.jpg"
    token = file_of(tmp_path, "\ufeff" + "".join(f"{name}.1#{k}\t{c}\r\n" for k, c in enumerate(AWKWARD)), "Flickr8k.token.txt")
    kaggle = file_of(tmp_path, csv_text(("image", "caption"), *((name, c) for c in AWKWARD)), "captions.txt")
    thirty = file_of(tmp_path, csv_text(("image_name", "comment_number", "comment"), *((name, k, c) for k, c in enumerate(AWKWARD))), "captions30.txt")
    read = read_captions(token)
    assert read.caption.tolist() == ['A dog , "Rex" , runs .', "Player #7 in red", "two men", 'say "cheese" , #1 fans , please'] and set(read.image) == {name}
    assert read_captions(kaggle).equals(read) and read_captions(thirty).equals(read)


@pytest.mark.parametrize("name, content, captions", [
    ("captions.txt", "image,caption\na.jpg,A dog , a cat .\na.jpg,  \n", ["A dog , a cat ."]),  # a comma without quotes; a caption without text
    ("Flickr8k.token.txt", "a.jpg#0\tA\u2028dog\n", ["A dog"]), ("captions.txt", "image,caption\na.jpg,A\u2028dog\n", ["A dog"])])  # no end of a row
def test_odd_rows_are_read(tmp_path, name, content, captions): assert read_captions(file_of(tmp_path, content, name)).caption.tolist() == captions


@pytest.mark.parametrize("name, content, text", [
    ("Flickr8k.token.txt", "a.jpg#0\tA dog\na.jpg no tab\n", "Flickr8k.token.txt, line 2: expected 'photo.jpg#0<TAB>caption'"),
    ("captions.txt", "who,what\na.jpg,A dog\n", "captions.txt, line 1: expected the header 'image,caption'"),
    ("captions.txt", "image,caption\na.jpg\n", "captions.txt, line 2"),
    ("captions.txt", "image_name,comment_number,comment\na.jpg,A dog\n", "line 2: expected 'image_name,comment_number,comment', found 'a.jpg,A dog'"),
    ("captions.txt", 'image,caption\na.jpg,"A dog\nb.jpg,A cat\nc.jpg,A cow\n', "a caption spans several lines; close its quotation mark"),
    ("captions.txt", 'image,caption\na.jpg,"A dog\n' + "b.jpg,A cat\n"*20_000, "field larger than field limit (131072); is a quotation mark left open?"),
    ("captions.txt", b"image,caption\na.jpg,caf\xe9\n", "is not UTF-8 (byte 23"),
    ("captions.txt", "image,caption\n", "holds no captions")], ids=range(8))
def test_bad_row_is_named(tmp_path, name, content, text):
    with fails(text): read_captions(file_of(tmp_path, content, name))


def test_folder_without_captions_is_named():
    with fails("Flickr8k.token.txt (in it or in Flickr8k_text/) or Kaggle's captions.txt; put one there or pass data_root", FileNotFoundError): find_layout("no/such/folder")


def test_real_files_hold_the_same_captions(shared):
    original, kaggle = read_captions(shared/"flickr8k/Flickr8k_text/Flickr8k.token.txt"), read_captions(shared/"flickr8k/captions.txt")
    odd = original.image == "2258277193_586949ec62.jpg"  # which Kaggle lacks
    assert set(original[~odd].itertuples(index=False)) == set(kaggle.itertuples(index=False))
    assert (odd.sum(), kaggle.image.nunique(), len(kaggle)) == (5, 7991, 5*7991)
    source = find_source(shared/"flickr8k/captions.txt")
    assert (source.format, source.files[0].name) == ("Flickr8k", "captions.txt")


def test_official_lists(tmp_path):
    def write_lists(**lists): write(tmp_path, {SPLITS[part]: "\r\n".join(images) + "\r\n" for part, images in lists.items()})
    with fails("put the list there or use split='random'", FileNotFoundError): official_split(tmp_path)
    write_lists(train=["a.jpg", "b.jpg"], val=["c.jpg"], test=["d.jpg"])
    assert official_split(tmp_path) == {"a.jpg": "train", "b.jpg": "train", "c.jpg": "val", "d.jpg": "test"}
    write_lists(test=["d.jpg", "b.jpg"])
    with fails("b.jpg is in Flickr_8k.trainImages.txt and in Flickr_8k.testImages.txt"): official_split(tmp_path)


FLICKR8K = {"Flickr8k_text/Flickr8k.token.txt": "a.jpg#0\tA dog .\na.jpg#1\tTwo  dogs .\nb.jpg#0\tA cat .\nc.jpg#0\t \n",
            "Flickr8k_text/Flickr_8k.trainImages.txt": "a.jpg\n", "Flickr8k_text/Flickr_8k.devImages.txt": "b.jpg\n"}


@pytest.mark.parametrize("at", ["", "Flickr8k_text/Flickr8k.token.txt"])
def test_flickr8k_is_read_from_its_folder_or_file(at):
    rows, left_out, source = read_files(FLICKR8K, at)
    assert rows == [("a.jpg", "A dog .", "train"), ("a.jpg", "Two dogs .", "train"), ("b.jpg", "A cat .", "val")]
    assert (source.format, source.photos, str(source)) == ("Flickr8k", None, "Flickr8k_text/Flickr8k.token.txt") and left_out == {"images without a caption": 1}


def test_captions_txt_may_have_a_column_split_and_lists_come_first():
    table = {"captions.txt": "image,split,caption\na.jpg,train,A dog\nb.jpg,validation,A cat\nc.jpg,,A cow\nd.jpg,train,A duck\n"}
    assert [split for _, _, split in read_files(table)[0]] == ["train", "val", None, "train"]
    assert [split for _, _, split in read_files(table | {"Flickr_8k.testImages.txt": "d.jpg\n"})[0]] == ["train", "val", None, "test"]


def test_kaggles_copy_has_no_split(): assert read_files({"captions.txt": "image,caption\na.jpg,A dog\n"})[0] == [("a.jpg", "A dog", None)]


@pytest.mark.parametrize("text", ["split='official' finds no image for test in ", "it is read from Flickr_8k.trainImages.txt, Flickr_8k.devImages.txt, "
                                  "Flickr_8k.testImages.txt, or from a column split of captions.txt; put the lists beside the captions, or add the column; or use split='random'"])
def test_absent_official_split_is_named(text):
    with fails(text): read_files(FLICKR8K, official=True)


def test_name_that_leads_out_of_the_folder_is_refused():
    with fails("'../a.jpg' is outside of the data set's folder"): read_files({"captions.txt": "image,caption\n../a.jpg,A dog\n"})


def test_long_captions_are_left_out_and_control_characters_become_spaces():
    rows, left_out, _ = read_files({"captions.txt": f"image,caption\na.jpg,{'x'*10_001}\na.jpg,A\x1b[31m dog\n"})
    assert rows == [("a.jpg", "A [31m dog", None)] and left_out == {"captions of more than 10000 characters": 1}


def test_reader_that_meets_odd_values_says_what_was_expected(monkeypatch):
    def read(root, files, left_out): return lambda: iter([("a.jpg", "A dog", "train")*files[0].stat().st_mode["odd"]]), root
    monkeypatch.setitem(READERS, "odd", Reader(("odd.txt",), "odd.txt", "even values", "", read))
    with fails("odd.txt can't be read (TypeError: 'int' object is not subscriptable): expected even values"): read_files({"odd.txt": ""})


# --- which format

TWO = {"captions.txt": "image,caption\na.jpg,A dog\n",
       "dataset_flickr8k.json": {"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "A dog"}]}]}}


@pytest.mark.parametrize("files, at, text", [
    ({"words.csv": "a,b\n"}, "none", "none: expected the files of one of these formats"),
    ({"words.csv": "a,b\n"}, "", "  COCO: captions_train2014.json or another captions_….json, in it or in annotations/ (JSON with images, each with id and file_name"),
    ({"words.csv": "a,b\n"}, "words.csv", "words.csv is no captions file: expected the files of one of these formats")])
def test_unknown_format_lists_what_is_known(files, at, text):
    with fails(text, FileNotFoundError): read_files(files, at)


def test_of_two_formats_one_has_to_be_named():
    with fails("holds captions in 2 formats:\n  Flickr8k: captions.txt\n  Karpathy's split: dataset_flickr8k.json\nname the one you mean: data_root=FILE"): read_files(TWO)
    assert [read_files(TWO, name)[2].format for name in TWO] == ["Flickr8k", "Karpathy's split"]
