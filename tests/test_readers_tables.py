"""Tables of photos and captions as other captioners' users have them: BLIP's JSON, imagefolder, CSV of any columns, photos with .txt."""
import csv
import io
import json
import random

import pytest
from data_files import fails, read_files

from clipcap.formats.readers import find_source, read_captions, read_table


FOUR = [("images/000.jpg", "a photo 0"), ("images/001.jpg", "a photo 1"), ("images/002.jpg", "a photo 2"), ("images/003.jpg", "a photo 3")]


# --- BLIP and LAVIS

def test_blips_json_is_read():
    one = [{"caption": text, "image": name, "image_id": f"coco_{n}"} for n, (name, text) in enumerate(FOUR[:2])]
    several = [{"image": "val2014/v.jpg", "caption": ["A man", "Two men"], "image_id": 7}]
    files = {"annotations/coco_karpathy_train.json": one, "annotations/coco_karpathy_val.json": several, "annotations/coco_karpathy_val_gt.json": {"annotations": []},
             "images/000.jpg": "x"}
    rows, left_out, source = read_files(files)
    assert rows == [(*FOUR[0], "train"), (*FOUR[1], "train"), ("val2014/v.jpg", "A man", "val"), ("val2014/v.jpg", "Two men", "val")] and not left_out
    assert read_files(files, "annotations/coco_karpathy_val.json")[0] == rows[2:]
    assert read_files({"sbu.json": one})[0] == [(*row, None) for row in FOUR[:2]]


def test_photos_of_blips_json_are_found_beside_it_or_in_images(tmp_path):
    for name in ("annotations/train.json", "images/a.jpg", "val2014/b.jpg"): (tmp_path/name).parent.mkdir(exist_ok=True)
    for name in ("images/a.jpg", "val2014/b.jpg"): (tmp_path/name).touch()
    (tmp_path/"annotations/train.json").write_text(json.dumps([{"image": "a.jpg", "caption": "A"}, {"image": "val2014/b.jpg", "caption": "B"}]))
    photos = find_source(tmp_path).photos
    assert [photos.open(name) for name in ("a.jpg", "val2014/b.jpg")] == [tmp_path/"images/a.jpg", tmp_path/"val2014/b.jpg"]


# --- imagefolder

def test_imagefolder_is_read():
    files = {"train/metadata.csv": "file_name,caption_0,caption_1\n0.jpg,a cat 0,cat 0\nsub/1.jpg,\"a cat, 1\",\n", "train/0.jpg": "x",
             "test/metadata.jsonl": '{"file_name": "0.jpg", "text": ["one", "two"]}\n\n{"file_name": "9.jpg", "text": null}\n'}
    rows, left_out, source = read_files(files)
    assert rows == [("test/0.jpg", "one", "test"), ("test/0.jpg", "two", "test"), ("train/0.jpg", "a cat 0", "train"), ("train/0.jpg", "cat 0", "train"), ("train/sub/1.jpg", "a cat, 1", "train")]
    assert left_out == {"images without a caption": 1}
    assert read_files({"metadata.jsonl": '{"file_name": "a.jpg", "caption": "A dog"}'})[0] == [("a.jpg", "A dog", None)]


# --- photos with .txt

def test_photos_with_a_txt_of_their_name_are_read():
    files = {"a.jpg": "x", "a.txt": "A dog\nTwo dogs\n\n", "10_dog/b v1.0.png": "x", "10_dog/b v1.0.txt": "A cat", "train/c.webp": "x", "train/c.txt": "\ufeffA cow",
             "d.jpg": "x", "e.txt": "nobody", "f.heic": "x", "f.txt": "no reader"}
    rows, left_out, _ = read_files(files)
    assert sorted(rows, key=str) == [("10_dog/b v1.0.png", "A cat", None), ("a.jpg", "A dog", None), ("a.jpg", "Two dogs", None), ("train/c.webp", "A cow", "train")]
    assert left_out == {"images without a caption": 1, "captions without a photo": 2, "photos of kinds that are not read (.heic)": 1}


# --- CSV

@pytest.mark.parametrize("name, content", [
    ("captions.csv", ",image,caption\n0,a.jpg,A dog\n1,a.jpg,\"Two, dogs\"\n"),  # pandas' index
    ("captions.csv", "image,caption,id\na.jpg,A dog,0\na.jpg,\"Two, dogs\",0\n"),
    ("flickr.csv", "image_name| comment_number| comment\na.jpg| 0| A dog\na.jpg| 1| Two, dogs\n"),
    ("data.tsv", "title\tfilepath\nA dog\ta.jpg\nTwo, dogs\ta.jpg\n"),
    ("data.csv", "Title;Image_Path\nA dog;a.jpg\nTwo, dogs;a.jpg\n"),
    ("captions.txt", "image_name\tcomment\na.jpg\tA dog\na.jpg\tTwo, dogs\n"),
    ("captions.csv", "image,captions\na.jpg,\"['A dog', 'Two, dogs']\"\n"),  # a list, as pandas writes it
    ("captions.csv", 'file_name,text\na.jpg,"[""A dog"", ""Two, dogs""]"\n'),
    ("captions.csv", 'filename,caption_1,caption_2\na.jpg,A dog,"Two, dogs"\n'),
    ("captions.csv", 'filename,caption,caption\na.jpg,A dog,"Two, dogs"\n'),
    ("captions.csv", "image,caption\na.jpg,A dog\na.jpg,Two, dogs\n"),  # a comma without quotes
    ("captions.csv", "image_id,caption\na.jpg,A dog\na.jpg,Two, dogs\n"),
    ("captions.tsv", "Image ID\tid\tcaption\na.jpg\t1\tA dog\na.jpg\t2\tTwo, dogs\n"),
    ("captions.csv", "image_id,id,caption,file_name\n7,1,A dog,a.jpg\n7,2,\"Two, dogs\",a.jpg\n"),  # the file's name, not its number
    ("captions.jsonl", '{"image": "a.jpg", "caption": "A dog"}\n{"image": "a.jpg", "caption": "Two, dogs"}\n')], ids=range(15))
def test_tables_with_other_columns_are_read(name, content, tmp_path):
    assert read_files({name: content})[0] == [("a.jpg", "A dog", None), ("a.jpg", "Two, dogs", None)]
    (tmp_path/name).write_text(content)
    assert read_captions(tmp_path/name).values.tolist() == [["a.jpg", "A dog"], ["a.jpg", "Two, dogs"]]


def test_split_of_a_table_is_a_column_or_the_files_name():
    rows = read_files({"captions.csv": "image,caption,split\na.jpg,A dog,train\nb.jpg,A cat,dev\nc.jpg,A cow,\n"})[0]
    assert [split for *_, split in rows] == ["train", "val", None]
    rows = read_files({"train.csv": "image,caption\na.jpg,A dog\n", "test.csv": "image,caption\nb.jpg,A cat\n"}, official=False)[0]
    assert sorted(rows) == [("a.jpg", "A dog", "train"), ("b.jpg", "A cat", "test")]
    with fails("holds a.csv, b.csv: several tables, and some names contain no split; name one: data_root=FILE"):
        read_files({"a.csv": "image,caption\na.jpg,A dog\n", "b.csv": "image,caption\nb.jpg,A cat\n"})


@pytest.mark.parametrize("seed", range(12))
def test_any_table_of_photos_and_captions(seed):
    "Names of columns, separators, order, further columns and quotation at random."
    draw = random.Random(seed)
    photo, text, mark = draw.choice(["image", "Image_Name", "file_name", "filepath", "img_path"]), draw.choice(["caption", "comment", "title", "TEXT", "sentence"]), draw.choice(",;\t|")
    columns = draw.sample([photo, text, "", "id", "likes"], 5)
    rows = [(f"{draw.choice('abc')} {n}.jpg", draw.choice(['say "cheese"', "A dog, a cat; two | three", "x", "[red] é 🎉", "#1 'fan'"]) + f" {n}") for n in range(9)]
    file = io.StringIO()
    writer = csv.writer(file, delimiter=mark)
    writer.writerows([columns, *([{photo: name, text: caption}.get(c, n) for c in columns] for n, (name, caption) in enumerate(rows))])
    assert read_files({"words.csv": file.getvalue()})[0] == [(*row, None) for row in rows]


@pytest.mark.parametrize("name, content, text", [
    ("captions.csv", "caption,image\nA dog\n", "captions.csv, line 2: expected 'caption,image', found 'A dog'; correct or remove the line"),
    ("captions.csv", "caption,image\nA dog, a cat,a.jpg\n", "captions.csv, line 2: expected 'caption,image', found 'A dog, a cat,a.jpg'; correct or remove the line, or put quotation marks around cells that contain ','"),
    ("captions.jsonl", '{"image": "a.jpg", "caption": "A"}\n{"caption": "B"}\n', "captions.jsonl, line 2: no image among ['caption']; expected one of ('image', "),
    ("captions.jsonl", '{"image": "a.jpg", "caption": "A"}\n{"image": \n', "captions.jsonl, line 2 is not JSON"),
    ("blip.json", '[{"image": "a.jpg", "caption": "A"}, 7]', "blip.json, row 2: 7 is no object"),
    ("blip.json", '[{"image": "a.jpg", "caption": {"raw": "A"}}]', "blip.json, row 1: a caption of a.jpg is a dict, {'raw': 'A'}; it must be text"),
    ("blip.json", '[{"image": 7, "caption": "A"}]', "blip.json, row 1: a photo is called 7; its name must be text")], ids=range(7))
def test_bad_row_of_a_table_is_named(name, content, text):
    with fails(text): read_files({name: content})


# --- which format

@pytest.mark.parametrize("files", [{"words.csv": "a,b\n1,2\n"}, {"data.json": {"a": 1}}, {"metadata.parquet": b"PAR1"}, {"a.jpg": "x"}], ids=range(4))
def test_unknown_format_says_how_to_convert(files):
    with fails("to convert others: write a CSV with the header image,caption and a row for each caption", FileNotFoundError): read_files(files)


def test_named_formats_come_before_tables():
    files = {"captions.txt": "image,caption\na.jpg,A dog\n", "other.csv": "image,caption\nb.jpg,A cat\n", "a.jpg": "x", "a.txt": "A cow"}
    assert read_files(files)[2].format == "Flickr8k"


def test_of_two_tables_one_has_to_be_named():
    files = {"other.csv": "image,caption\nb.jpg,A cat\n", "a.jpg": "x", "a.txt": "A cow"}
    with fails("holds captions in 2 formats"): read_files(files)
    assert read_files(files, "other.csv")[0] == [("b.jpg", "A cat", None)]


@pytest.mark.parametrize("folder, captions, photos", [("blip", 4, 4), ("imagefolder", 6, 3)])
def test_reported_folders_are_read(shared, folder, captions, photos):
    source = find_source(shared/"cases/17-formats-of-captioners"/folder)
    table = read_table(source)
    assert (len(table), table.image.nunique()) == (captions, photos) and not source.left_out
    for image in table.image: assert source.photos.open(image).is_file()
