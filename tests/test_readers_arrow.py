"""Data sets that Hugging Face's datasets saved (clipcap.formats.arrow)."""
import sys

import pytest
from data_files import fails, photo_bytes, read_files, rows_of

from clipcap.formats.readers import check_official, find_source, read_table


def cell(n, path=None): return {"bytes": photo_bytes(n), "path": path}


@pytest.fixture
def saved(tmp_path):
    "A function that saves a data set, {part: {column: values}} or one part's columns, and finds it."
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    def save(parts, name="saved"):
        def made(columns): return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        data = made(parts) if "image" in parts else datasets.DatasetDict({part: made(columns) for part, columns in parts.items()})
        data.save_to_disk(tmp_path/name)
        return find_source(tmp_path/name)
    return save


def test_lists_of_captions_and_file_names(saved):
    source = saved({"train": {"image": [cell(1, "a.jpg"), cell(2, "b.jpg")], "captions": [["A  dog", "Two dogs"], []]},
                    "validation": {"image": [cell(3, "c.jpg")], "captions": [["A cat\n"]]}, "test": {"image": [cell(4, "d.jpg")], "captions": [["A cow", "1", "2"]]}})
    table = read_table(source)
    check_official(table, source)
    assert rows_of(source) == [("a.jpg", "A dog", "train"), ("a.jpg", "Two dogs", "train"), ("c.jpg", "A cat", "val"),
                               ("d.jpg", "A cow", "test"), ("d.jpg", "1", "test"), ("d.jpg", "2", "test")]
    assert source.photos.open("c.jpg").read() == photo_bytes(3) and source.left_out == {"images without a caption": 1}
    with fails("z.jpg is not in the Arrow files of", FileNotFoundError): source.photos.open("z.jpg")


def test_photos_without_names_are_named_by_their_first_row(saved):
    source = saved({"train": {"image": [cell(1), cell(1), cell(2)], "text": ["A dog", "Two dogs", "A cat"]}, "test": {"image": [cell(3)], "text": ["A cow"]}})
    assert rows_of(source) == [("train/00000000", "A dog", "train"), ("train/00000000", "Two dogs", "train"), ("train/00000002", "A cat", "train"), ("test/00000000", "A cow", "test")]
    assert [source.photos.open(name).read() for name in ("train/00000002", "test/00000000")] == [photo_bytes(2), photo_bytes(3)]
    with pytest.raises(FileNotFoundError): source.photos.open("train/00000003")
    with fails("finds no image for val in"): check_official(read_table(source), source)


@pytest.mark.parametrize("columns, rows", [
    ({"train": {"image": [cell(1, "0.jpg")], "caption": ["A dog"]}, "test": {"image": [cell(2, "0.jpg")], "caption": ["A cow"]}},  # a name for two photos
     [("train/00000000", "A dog", "train"), ("test/00000000", "A cow", "test")]),
    ({"image": [cell(1, "a.jpg"), cell(1, "a.jpg"), cell(2, "b.jpg")], "caption": ["A dog", "Two dogs", "A cat"]},  # a photo in two rows
     [("a.jpg", "A dog", None), ("a.jpg", "Two dogs", None), ("b.jpg", "A cat", None)]),
    # Flickr30k's copy: everything in one part called test, the splits in a column
    ({"test": {"image": [cell(1, "x"), cell(2, "y")], "caption": [["A dog"], ["A cat"]], "split": ["train", "val"], "filename": ["1.jpg", "2.jpg"]}},
     [("1.jpg", "A dog", "train"), ("2.jpg", "A cat", "val")]),
    ({"image": [cell(1, "a.jpg")], "sentences": [[{"raw": "A dog", "tokens": ["a", "dog"]}, {"raw": "Two", "tokens": ["two"]}]]}, [("a.jpg", "A dog", None), ("a.jpg", "Two", None)]),
    ({"image": [cell(1, "a.jpg")], "sentences": [{"raw": "A dog", "tokens": ["a", "dog"]}]}, [("a.jpg", "A dog", None)]),
    ({"image": [cell(1, "a.jpg")], "caption_0": ["A dog"], "caption_1": [None], "caption_2": ["Two"], "label": [3]}, [("a.jpg", "A dog", None), ("a.jpg", "Two", None)])],
    ids=["same name", "row per caption", "split column", "Karpathy's sentences", "one sentence", "numbered columns"])
def test_layouts_of_columns(saved, columns, rows): assert rows_of(saved(columns)) == rows


def test_missing_photo_is_noticed_when_it_is_opened(saved):
    source = saved({"image": [None, cell(2, "b.jpg")], "caption": ["A dog", "A cat"]})
    assert rows_of(source) == [("all/00000000", "A dog", None), ("all/00000001", "A cat", None)]
    with pytest.raises(FileNotFoundError): source.photos.open("all/00000000")


def test_stamp_changes_with_the_arrow_files(saved):
    assert len({saved({"image": [cell(n, "a.jpg")], "caption": ["A dog"]}, f"saved{n}").photos.stamp("a.jpg") for n in (1, 2)}) == 2


@pytest.mark.parametrize("columns, text", [
    ({"image": [cell(1)], "words": ["A dog"]}, "all has no column of captions among ['image', 'words']: expected one of ('caption', 'captions'"),
    ({"image": [cell(1)], "caption": [3]}, "a caption of all/00000000 is a int, '3'; it must be text")])
def test_bad_columns_are_named(saved, columns, text):
    with fails(text): rows_of(saved(columns))


def test_data_set_without_photos_is_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"photo": ["a.jpg"], "caption": ["A dog"]}).save_to_disk(tmp_path)
    with fails("all has 0 columns of type Image among ['photo', 'caption']; there must be one"): rows_of(find_source(tmp_path))


def test_folder_that_cannot_be_loaded_is_named():
    pytest.importorskip("datasets")
    with fails("can't be loaded ("): read_files({"dataset_dict.json": {"splits": ["train"]}})


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with fails("which Hugging Face's datasets saved, needs datasets, which is not installed here: pip install 'clipcap[datasets]'", ImportError): read_files({"dataset_dict.json": {"splits": ["train"]}})
