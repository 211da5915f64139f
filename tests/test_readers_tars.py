"""Shards of photos and captions, by img2dataset and others (clipcap.formats.tars)."""
import gzip
import io
import json
import tarfile

import pytest
from data_files import fails, photo_bytes, read_files, tar_bytes, write
from PIL import Image

from clipcap.formats import tars
from clipcap.formats.readers import file_stamp, find_source
from clipcap.formats.tars import read_url_captions


# --- the table of URLs

PAIRS = [("http://a.org/1.jpg", 'a "dog" runs'), ("https://b.org/2.jpg?w=3", "two men")]


@pytest.mark.parametrize("header, line", [("", "{1}\t{0}\n"), ("", "{0}\t{1}\r\n"), ("\ufeffid\tTEXT\tURL\n", "7\t{1}\t{0}\n")], ids=["Conceptual Captions", "CC12M", "header"])
def test_table_of_urls_in_any_order(tmp_path, header, line):
    (tmp_path/"cc.tsv").write_text(header + "".join(line.format(*pair) for pair in PAIRS), newline="")
    assert list(read_url_captions(tmp_path/"cc.tsv")) == PAIRS


@pytest.mark.parametrize("content, text", [
    ("a dog\ttwo men\n", "cc.tsv, line 1: expected a URL and a caption with a tab between them, or a header with one of ('url'"),
    ("a dog,http://a.org/1.jpg\n", "found 'a dog,http://a.org/1.jpg'"),
    ("a dog\thttp://a.org/1.jpg\na cat\tthe web\n", "cc.tsv, line 2: expected 2 columns with a URL in column 2, found 'a cat\\tthe web'; correct or remove")], ids=range(3))
def test_bad_line_of_urls_is_named(tmp_path, content, text):
    (tmp_path/"cc.tsv").write_text(content)
    with fails(text): list(read_url_captions(tmp_path/"cc.tsv"))


# --- img2dataset's shards

def img2dataset(form, captions, shard="00000", first=0, with_captions=True):
    "A shard as img2dataset writes it: {name: bytes}; a caption None is a photo that could not be fetched."
    files = {}
    for n, (url, caption) in enumerate(captions, first):
        if caption is None: continue
        key, metadata = f"{shard[-5:]}{n:04d}", {"url": url, "key": f"{n:09d}", "status": "success", "error_message": None, "width": 24}
        files[f"{key}.jpg"] = photo_bytes(n*20)
        if with_captions: files[f"{key}.txt"] = caption.encode(); metadata["caption"] = caption
        files[f"{key}.json"] = json.dumps(metadata, indent=4).encode()
    stats = {f"{shard}_stats.json": {"count": len(captions), "successes": sum(c is not None for _, c in captions), "failed_to_download": 1}, f"{shard}.parquet": b"PAR1"}
    if form == "files": return {**{f"{shard}/{name}": content for name, content in files.items()}, **stats}
    return {f"{shard}.tar": tar_bytes(files), **stats}


FETCHED = [("http://a.org/1.jpg", "a  dog"), ("http://a.org/2.jpg", None), ("http://a.org/3.jpg", "two men\n"), ("http://a.org/1.jpg", "a pet"), ("http://a.org/5.jpg", "")]
BARE = img2dataset("webdataset", FETCHED, with_captions=False)
TABLE = "caption\turl\n" + "".join(f"{c}\thttp://a.org/{n}.jpg\n" for c, n in (("a dog", 1), ("a cat", 2), ("two men", 3), ("a pet", 1), ("nobody", 5)))
FROM_TABLE = [("00000/000000000.jpg", "a dog"), ("00000/000000000.jpg", "a pet"), ("00000/000000002.jpg", "two men"), ("00000/000000004.jpg", "nobody")]


@pytest.mark.parametrize("form", ["webdataset", "files"])
def test_photo_fetched_twice_is_taken_once_with_all_captions(form):
    rows, left_out, _ = read_files(img2dataset(form, FETCHED))
    assert rows == [("00000/000000000.jpg", "a dog", None), ("00000/000000002.jpg", "two men", None), ("00000/000000000.jpg", "a pet", None)]
    assert left_out == {"photos fetched twice": 1, "photos that could not be fetched": 1, "images without a caption": 1}


def test_shards_without_captions_use_the_table_beside_them():
    rows, left_out, _ = read_files({**BARE, "Train_GCC-training.tsv": TABLE})
    assert rows == [(*row, "train") for row in FROM_TABLE] and left_out == {"photos fetched twice": 1, "photos that could not be fetched": 1}


def test_table_may_be_named_with_shards_in_a_folder_of_its_name():
    rows, _, source = read_files({**{f"cc/{name}": content for name, content in BARE.items()}, "cc.tsv": TABLE}, "cc.tsv")
    assert rows == [(f"cc/{image}", caption, None) for image, caption in FROM_TABLE] and (source.format, str(source)) == ("img2dataset", "cc.tsv")


def test_table_that_is_named_chooses_photos_and_captions():
    rows, left_out, _ = read_files({**img2dataset("files", FETCHED), "some.tsv": "http://a.org/3.jpg\tother words\n"}, "some.tsv")
    assert (rows, left_out["photos that the table lacks"]) == ([("00000/000000002.jpg", "other words", None)], 3)


def test_folders_are_the_official_split():
    files = {f"{part}/{name}": content for part in ("train", "val", "test") for name, content in img2dataset("webdataset", FETCHED[:1]).items()}
    assert read_files(files, official=True)[0] == [(f"{part}/00000/000000000.jpg", "a dog", part) for part in ("test", "train", "val")]


def test_shard_of_which_nothing_came_is_read():
    assert read_files({**img2dataset("webdataset", FETCHED[:1]), **img2dataset("webdataset", [], "00001")})[0] == [("00000/000000000.jpg", "a dog", None)]


def tarred(**files): return {"cc3m-train-0007.tar": tar_bytes(files)}


def test_shards_of_others_are_read():
    "Keys with folders, another suffix, captions in the JSON, one or several, a URL that is none."
    rows, _, _ = read_files(tarred(**{"./a/x.PNG": b"1", "./a/x.json": b'{"caption": ["one", "two"]}', "./._a": b"litter",
                                      "./b/x.jpg": b"2", "./b/x.cls": b"3", "./b/x.json": b'{"caption": "three", "url": [1]}'}))
    assert rows == [(f"cc3m-train-0007/{name}", caption, "train") for name, caption in (("a/x.PNG", "one"), ("a/x.PNG", "two"), ("b/x.jpg", "three"))]


@pytest.mark.parametrize("files, at, text", [
    (BARE, "", "00000.tar: 000000000 has no caption: neither in a 000000000.txt or 000000000.json in the same shard, nor is its URL in a .tsv of"),
    ({"cc.tsv": TABLE}, "", "cc.tsv: no photos beside it: expected shards such as 00000.tar or 00000/"),
    ({"cc.tsv": TABLE}, "cc.tsv", "--url_col url --caption_col caption"),
    ({"00000.parquet": b"PAR1"}, "", "00000.parquet: no photos beside it"),
    ({"00000.tar": b""}, "", "00000.tar is not a whole, uncompressed tar archive (empty file)"),
    ({"00000.tar": gzip.compress(BARE["00000.tar"])}, "", "is not a whole, uncompressed tar archive"),
    (tarred(**{"a.jpg": b"1", "a.txt": b"caf\xe9"}), "", "cc3m-train-0007.tar: a has a damaged .txt or .json ('utf-8' codec can't decode"),
    (tarred(**{"a.jpg": b"1", "a.json": b"[]"}), "", "a has a damaged .txt or .json (no object)"),
    (tarred(**{"a.jpg": b"1", "a.json": b"["*9999}), "", "a has a damaged .txt or .json (maximum recursion depth"),
    (tarred(**{"a.jpg": b"1", "a.json": b'{"caption": [3]}'}), "", "a caption of cc3m-train-0007/a.jpg is a int, '3'; it must be text"),
    (tarred(**{"a.jpg": b"1", "a.json": b'{"caption": 3}'}), "", "a caption of cc3m-train-0007/a.jpg is a int, '3'; it must be text"),
    ({**img2dataset("webdataset", FETCHED[:1]), "00000_stats.json": [1]}, "", "00000_stats.json has no counts; expected what img2dataset writes"),
    ({**img2dataset("webdataset", FETCHED[:1]), "00000_stats.json": {"count": "9"}}, "", "00000_stats.json has no counts; expected what img2dataset writes"),
    (img2dataset("webdataset", FETCHED), "", "shards have one where they lie in folders train, val and test; or use split='random'")], ids=range(14))
def test_bad_shard_is_named(files, at, text):
    with fails(text): read_files(files, at, official=True)


@pytest.mark.parametrize("blocks", range(1, 8))
def test_archive_that_breaks_off_is_named(blocks):
    whole = img2dataset("webdataset", FETCHED)["00000.tar"]
    with fails("00000.tar is not a whole, uncompressed tar archive ("): read_files({"00000.tar": whole[:512*blocks + 200*(blocks % 2)]})


# --- photos in archives

def test_photos_are_read_in_place_and_a_changed_archive_is_noticed(tmp_path):
    write(tmp_path, {**img2dataset("webdataset", FETCHED), **img2dataset("webdataset", FETCHED, "00001", 7)})
    photos = find_source(tmp_path).photos
    assert photos.open("00001/000010009.jpg").read() == photo_bytes(180) and Image.open(photos.open("00000/000000002.jpg")).size == (24, 16)
    for absent in ("00000/000000001.jpg", "00002/000000000.jpg", "x.jpg"):
        with fails(f"{absent} is not in the archives of", FileNotFoundError): photos.open(absent)
    assert (photos.stamp("00000/000000002.jpg"), photos.stamp("00002/0.jpg")) == (file_stamp(tmp_path/"00000.tar"), None)
    write(tmp_path, img2dataset("webdataset", FETCHED[:1], "00001", 9))
    assert photos.open("00001/000010009.jpg").read() == photo_bytes(180)
    with pytest.raises(FileNotFoundError): photos.open("00001/000010007.jpg")


@pytest.mark.parametrize("limit, name, text", [
    ("MOST_TEXT", "a.txt", "'a.txt' has 2000 bytes of text"), ("MOST_PHOTO", "a.jpg", "a.jpg in the archives of"), ("MOST_TEXT", "x"*200 + ".jpg", "a header of")])
def test_member_that_is_too_large_is_named(tmp_path, monkeypatch, limit, name, text):
    monkeypatch.setattr(tars, limit, 100)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        entry = tarfile.TarInfo(name)
        entry.size = 2000
        archive.addfile(entry, io.BytesIO(bytes(2000)))
    write(tmp_path, {"00000.tar": file.getvalue()})
    source = find_source(tmp_path)
    with fails(text, (OSError, ValueError)): source.photos.open(f"00000/{name}") if name.endswith(".jpg") else list(source.rows())
