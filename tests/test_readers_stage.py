"""Every format through `01_data`: the same photos give the same table, splits and embeddings."""
import json
import os
import re
import shutil
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from data_files import tar_bytes
from test_readers import csv_text

from clipcap.core import open_run
from clipcap.data import load_data, prepare_data
from clipcap.formats.readers import READERS, SPLITS, Reader, find_source, read_captions, split_of
from clipcap.formats.tables import read_text

# all but some: COCO has no official test split, and where photos have other names the random split is another
OTHER_NAMES = ("img2dataset", "Hugging Face imagefolder", "photos with .txt")
CASES = [(format, split) for format in ("Flickr8k", "Flickr30k", "Karpathy's split", "COCO", "BLIP", "table", *OTHER_NAMES, "Hugging Face datasets")
         for split in ("official", "random") if (format, split) != ("COCO", "official") and (format not in OTHER_NAMES or split == "official")]


class Writer:
    "Writes some photos and their captions in any format; `write(format)` returns `data_root`, and what the format calls each photo."

    def __init__(self, folder, photos, captions):
        "A data set of 12 photos, with a split that nobody drew."
        self.folder, self.photos = folder, photos
        self.names = sorted(n for n in captions.image.unique() if (photos/n).is_file())[:12]
        self.captions = captions[captions.image.isin(self.names)].groupby("image").caption.apply(list).to_dict()
        self.split = {n: ("train", "val", "train", "test")[k % 4] for k, n in enumerate(self.names)}

    def of(self, *parts): return [n for n in self.names if self.split[n] in parts]

    def text(self, place, content):
        (self.folder/place).parent.mkdir(parents=True, exist_ok=True)
        (self.folder/place).write_text(content)

    def copy(self, place, names=None):
        (self.folder/place).mkdir(parents=True, exist_ok=True)
        for name in names or self.names: shutil.copy(self.photos/name, self.folder/place/name)

    def write(self, format):
        called = getattr(self, re.sub(r"\W", "_", format.lower()))() or {name: name for name in self.names}
        return self.folder, called

    def flickr8k(self):
        self.copy("Images")
        self.text("Flickr8k.token.txt", "".join(f"{n}#{k}\t{c}\n" for n in self.names for k, c in enumerate(self.captions[n])))
        for part, file in SPLITS.items(): self.text(file, "\n".join(self.of(part)))

    def flickr30k(self):
        self.copy("flickr30k-images")
        self.text("flickr_annotations_30k.csv", csv_text(("raw", "sentids", "split", "filename"), *((json.dumps(self.captions[n]), "[]", self.split[n], n) for n in self.names)))

    def karpathy_s_split(self):
        self.copy("Images")
        self.text("dataset_flickr8k.json", json.dumps({"images": [
            {"filename": n, "split": self.split[n].replace("train", "restval"), "sentences": [{"raw": c + "\n"} for c in self.captions[n]]} for n in self.names]}))

    def coco(self):
        for part, names in (("train", self.of("train")), ("val", self.of("val", "test"))):
            self.copy(f"{part}2014", names)
            self.text(f"annotations/captions_{part}2014.json", json.dumps({"images": [{"id": self.names.index(n), "file_name": n} for n in names],
                      "annotations": [{"image_id": self.names.index(n), "caption": c + " "} for n in names for c in self.captions[n]]}))

    def img2dataset(self):
        called = {}
        for shard, part in enumerate(SPLITS):
            files = {}
            for k, n in enumerate(self.of(part)):
                key, suffix = f"{shard:05d}{k:04d}", os.path.splitext(n)[1]
                called[n] = f"{part}/{shard:05d}/{key}{suffix}"
                files |= {f"{key}{suffix}": (self.photos/n).read_bytes(), f"{key}.json": json.dumps({"caption": self.captions[n], "status": "success"}).encode()}
            (self.folder/part).mkdir(parents=True)
            (self.folder/f"{part}/{shard:05d}.tar").write_bytes(tar_bytes(files))
        return called

    def blip(self):
        self.copy("images")
        for part in SPLITS: self.text(f"annotations/coco_karpathy_{part}.json", json.dumps([{"image": n, "caption": self.captions[n], "image_id": n} for n in self.of(part)]))

    def table(self):
        self.copy("photos")
        self.text("mine.csv", csv_text(("", "title", "img_path", "split"), *((k, c, n, self.split[n]) for n in self.names for k, c in enumerate(self.captions[n]))))

    def hugging_face_imagefolder(self):
        for part in SPLITS:
            self.copy(part, self.of(part))
            self.text(f"{part}/metadata.jsonl", "".join(json.dumps({"file_name": n, "text": self.captions[n]}) + "\n" for n in self.of(part)))
        return {n: f"{part}/{n}" for n, part in self.split.items()}

    def photos_with__txt(self):
        for part in SPLITS: self.copy(part, self.of(part))
        for n, part in self.split.items(): self.text(f"{part}/{os.path.splitext(n)[0]}.txt", "\n".join(self.captions[n]))
        return {n: f"{part}/{n}" for n, part in self.split.items()}

    def hugging_face_datasets(self):
        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        parts = {part: datasets.Dataset.from_dict({"image": [{"bytes": (self.photos/n).read_bytes(), "path": n} for n in self.of(part)],
                 "captions": [self.captions[n] for n in self.of(part)]}).cast_column("image", datasets.Image()) for part in SPLITS}
        datasets.DatasetDict({"train": parts["train"], "validation": parts["val"], "test": parts["test"]}).save_to_disk(self.folder)


def run_stage(root, split, **changes):
    "What the stage records and leaves of a data set."
    run, config = open_run("formats", "mini", data_root=str(root), split=split, **changes)
    with run.stage("01_data", config) as notes: notes.update(prepare_data(run, config))
    return run.stage_entry("01_data"), load_data(run, config)


@pytest.fixture(scope="module", params=["scenes", "real"])
def base(request, tmp_path_factory):
    "Photos and captions, and what the stage makes of them in Flickr8k's layout, in both splits."
    folder = tmp_path_factory.mktemp("formats")
    if request.param == "scenes":
        layout = request.getfixturevalue("scenes")
        photos, captions = layout.photos, read_captions(layout.captions)
    else:
        shared = request.getfixturevalue("shared")
        photos, captions = shared/"flickr8k/Images", read_captions(shared/"flickr8k/captions.txt")
    writer = Writer(folder/"data", photos, captions)
    root, _ = writer.write("Flickr8k")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPCAP_OUTPUTS", str(folder/"outputs"))
        return SimpleNamespace(photos=photos, captions=captions, split=writer.split, made={split: run_stage(root, split) for split in ("official", "random")})


@pytest.mark.numerics
@pytest.mark.parametrize("format, split", CASES)
def test_each_format_gives_the_same_data(format, split, base, outputs, tmp_path):
    _, expected = base.made[split]
    writer = Writer(tmp_path/"data", base.photos, base.captions)
    root, called = writer.write(format)
    entry, data = run_stage(root, split)
    assert (entry["format"], entry["bad_images"], entry["left_out"], data.photo("none.jpg")) == (format, {}, {}, None)
    ours = {theirs: name for name, theirs in called.items()}
    table = data.captions.assign(image=data.captions.image.map(ours))
    assert sorted(table.itertuples(index=False)) == sorted(expected.captions.itertuples(index=False))
    if split == "official": assert dict(zip(table.image, table.split)) == base.split
    a, b = data.embeddings.stack([called[n] for n in writer.names]), expected.embeddings.stack(writer.names)
    assert (a - b).abs().max() < 1e-3*b.abs().max()
    name = writer.names[3]
    assert np.array_equal(np.asarray(data.photo(called[name])), np.asarray(expected.photo(name)))


def test_coco_has_no_official_split(outputs, tmp_path, scenes, scene_captions):
    root, _ = Writer(tmp_path/"data", scenes.photos, scene_captions).write("COCO")
    with pytest.raises(ValueError, match="finds no image for test in"): run_stage(root, "official")


def test_photos_in_an_archive_are_cached_until_it_changes(outputs, tmp_path, scenes, scene_captions):
    root, _ = Writer(tmp_path/"data", scenes.photos, scene_captions).write("img2dataset")
    def shards(): return {p.name: p.stat().st_mtime_ns for p in (outputs/"cache").glob("embeddings-*/*")}
    entry, data = run_stage(root, "official")
    kept, archive = shards(), next((root/"train").glob("*.tar"))
    again, _ = run_stage(root, "official")
    assert (shards(), again["data_hash"]) == (kept, entry["data_hash"])
    os.utime(archive, (0, 0))
    run_stage(root, "official")
    assert shards() != kept
    name, content = data.split("train").image.iloc[0], archive.read_bytes()
    archive.write_bytes(content.replace(b"\x89PNG\r\n\x1a\n", b"nothing!", 1))
    with pytest.raises(OSError, match=f"{name} in the archives of {root} can't be read as a photo"): run_stage(root, "official")
    skipped, _ = run_stage(root, "official", on_bad_image="skip")
    assert (list(skipped["bad_images"]), sum(skipped["images"].values())) == ([name], 11)


def test_a_new_format_is_one_line(monkeypatch, outputs, tmp_path, scenes, scene_captions):
    def read_marks(root, files, left_out):
        def rows():
            for file in files:
                try: photo = ElementTree.fromstring(read_text(file))
                except ElementTree.ParseError as error: raise ValueError(f"{file} is not XML ({error})") from None
                for caption in photo.iter("says"): yield photo.get("file"), caption.text, split_of(photo.get("part"))
        return rows, root/"pictures"

    monkeypatch.setitem(READERS, "marks", Reader(("marks/*.xml",), "a folder marks/ of .xml", "<photo file= part=><says>caption", "each photo has an attribute part", read_marks))
    writer = Writer(tmp_path, scenes.photos, scene_captions)
    writer.copy("pictures")
    for name in writer.names:
        photo = ElementTree.Element("photo", file=name, part=writer.split[name].replace("val", "dev"))
        for caption in ("", *writer.captions[name]): ElementTree.SubElement(photo, "says").text = caption
        writer.text(f"marks/{name}.xml", ElementTree.tostring(photo, "unicode"))
    writer.text("marks/blank.xml", "<photo file='blank.jpg' part='train'><says/></photo>")
    entry, data = run_stage(tmp_path, "official")
    assert (entry["format"], entry["left_out"], data.photo(writer.names[0]).size) == ("marks", {"images without a caption": 1}, data.photo(writer.names[1]).size)
    assert dict(zip(data.captions.image, data.captions.split)) == writer.split
    assert data.captions.groupby("image").caption.apply(list).to_dict() == {n: [" ".join(c.split()) for c in texts] for n, texts in writer.captions.items()}
    writer.text("marks/blank.xml", "a dog")
    with pytest.raises(ValueError, match="blank.xml is not XML"): list(find_source(tmp_path).rows())
