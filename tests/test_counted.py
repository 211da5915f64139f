"""What is lost is counted (issue 23, kind 4): shard members, photos of other kinds, captions that are cut, parameters, rows without captions."""
import io
import json
import random
import string
import tarfile

import numpy as np
import pandas as pd
import pytest
import torch
from data_files import fails, photo_bytes, read_files, tar_bytes, write
from PIL import Image
from test_store import make_store

from clipcap.core import notebook_parameters, open_run
from clipcap.data import FlickrDataset, load_data, prepare_data
from clipcap.decoding.stream import find_photos
from clipcap.formats.embeddings import Embeddings, write_embeddings
from clipcap.formats.photos import read_photo
from clipcap.formats.readers import find_source, read_table
from clipcap.formats.store import EmbeddingStore
from clipcap.formats.store_dataset import StoreDataset, extract, tokenize_store
from clipcap.formats.tokenizer import encode_captions, load_tokenizer
from clipcap.scale.sources import find_units, read_tar


# --- samples of shards

def shard(*names): return {"shard-000.tar": tar_bytes({name: name.encode() if name.endswith(".txt") else b"photo" for name in names})}


@pytest.mark.parametrize("names, captions, left_out", [
    (("photo v1.0.jpg", "photo v1.0.txt", "photo v2.0.jpg", "photo v2.0.txt", "plain.jpg", "plain.txt"), 3, {}),
    (("photo v1.0.jpg", "photo v1.0.txt", "plain.jpg", "plain.txt"), 2, {}),
    (("a.1.jpg", "a.1.txt", "a.2.jpg", "a.2.txt"), 2, {}),  # one key for WebDataset
    (("a.jpg", "a.seg.png", "a.txt", "a.cls"), 1, {"further photos of a sample": 1}),  # WebDataset's several members
    (("a.in.jpg", "a.out.jpg", "a.txt"), 1, {"further photos of a sample": 1}),
    (("a.jpg", "a.png", "a.txt"), 1, {"further photos of a sample": 1}),
    (("a.jpg", "a.txt", "b.txt", "c.npy"), 1, {"captions without a photo": 1}),
    (("a.jpg", "a.txt", "b.heic", "b.txt"), 1, {"photos of kinds that are not read (.heic)": 1, "captions without a photo": 1}),
    (("a.bmp", "a.txt", "b.tif", "b.txt", "c.avif", "c.txt", "d.jfif", "d.txt"), 4, {})], ids=range(9))
def test_every_sample_of_a_shard_is_read_or_counted(names, captions, left_out):
    rows, counted, _ = read_files(shard(*names))
    assert (len(rows), counted) == (captions, left_out)


def test_dots_of_folders_are_no_part_of_a_key(): assert len(read_files(shard("x.y/a.jpg", "x.y/a.txt", "x.z/a.jpg", "x.z/a.txt"))[0]) == 2


def test_members_of_a_sample_may_lie_apart():
    names = [f"{n:03d}" for n in range(9)]
    rows, left_out, source = read_files(shard(*(f"{n}.jpg" for n in names), *(f"{n}.txt" for n in reversed(names))))
    assert rows == [(f"shard-000/{n}.jpg", f"{n}.txt", None) for n in names] and not left_out


def test_member_that_stands_twice_is_counted(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in (("a.jpg", b"1"), ("a.txt", b"old"), ("a.jpg", b"2"), ("a.txt", b"new")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    rows, left_out, _ = read_files({"00000.tar": file.getvalue()})
    assert (rows, left_out) == ([("00000/a.jpg", "new", None)], {"members whose name stands again later": 2})


@pytest.mark.parametrize("form", ["tar", "folder"])
@pytest.mark.parametrize("seed", range(10))
def test_samples_with_any_names_in_any_order(form, seed):
    "Names of words, dots, spaces and digits; members shuffled."
    draw = random.Random(seed)
    keys = sorted({"".join(draw.choices(string.ascii_letters + string.digits + "...  é-_", k=draw.randint(1, 12))).strip(" .") or "x" for _ in range(20)})
    files = [(f"{key}{suffix}", f"caption of {key}".encode()) for key in keys for suffix in (".jpg", ".txt")]
    draw.shuffle(files)
    holds = {"00007.tar": tar_bytes(dict(files))} if form == "tar" else {f"00007/{name}": content for name, content in files}
    rows, left_out, source = read_files(holds)
    wanted = {f"00007/{key}.jpg": " ".join(f"caption of {key}".split()) for key in keys}
    assert {image: caption for image, caption, _ in rows} == wanted and len(rows) == len(keys) and not left_out


def test_caption_that_is_missing_is_named_as_what_it_is():
    with fails("000 has no caption: neither in a 000.txt or 000.json in the same shard"): read_files({"00000.tar": tar_bytes({"000.jpg": b"1"})})
    with fails("run img2dataset with --caption_col"): read_files({"00000.tar": tar_bytes({"000.jpg": b"1", "000.json": b'{"url": "http://a.org/1.jpg"}'})})


@pytest.mark.parametrize("case, captions", [("07-shards-with-dots-in-names/dots", 3), ("18-members-not-side-by-side", 3)])
def test_reported_shards_are_read_whole(shared, case, captions):
    source = find_source(shared/"cases"/case)
    assert len(read_table(source)) == captions and not source.left_out


# --- photos in folders

def test_photos_of_all_kinds_are_found_and_others_counted(tmp_path):
    names = ("a.jpg", "b.JPE", "c.jfif", "d.avif", "e.jp2", "f.tiff", "g.heic", "h.HEIC", "i.cr2", "notes.txt", ".k.heic")
    write(tmp_path, dict.fromkeys(names, ""))
    with pytest.warns(UserWarning, match=r"3 photos of kinds that are not read \(.cr2, .heic\); convert them to JPEG"):
        assert [p.rpartition("/")[2] for p in find_photos([str(tmp_path)])] == list(names[:6])


def test_photos_passed_over_at_an_address_and_in_a_tar_are_counted(tmp_path):
    write(tmp_path, {"photos/a.jfif": "", "photos/b.heic": "", "x.tar": tar_bytes({"a.avif": b"", "b.heic": b"", "c.nef": b"", "d.txt": b""})})
    with pytest.warns(UserWarning, match=r"1 photos of kinds that are not read \(.heic\)"): units = find_units([f"file://{tmp_path}/photos"])
    assert [name.rpartition("/")[2] for unit in units for name, _ in unit.files] == ["a.jfif"]
    with pytest.warns(UserWarning, match=r"x.tar: 2 photos of kinds that are not read \(.heic, .nef\)"):
        assert [photo.name for photo in read_tar("x.tar", str(tmp_path/"x.tar"))] == ["x.tar/a.avif"]


def test_reported_photos_are_found(shared):
    with pytest.warns(UserWarning, match=r"1 photos .*\.heic"): found = find_photos([str(shared/"cases/16-photos-passed-over")])
    assert [p[-6:] for p in found] == ["/a.jpg", "c.jfif", "/d.jpe", "e.avif"] and {read_photo(p).mode for p in found} == {"RGB"}


# --- photos of more than 8 bits

def saved(pixels, format):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return io.BytesIO(file.getvalue())


@pytest.mark.parametrize("format", ["PNG", "TIFF", "big-endian TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("seed", range(4))
def test_photo_of_16_bits_is_its_8_bit_version(format, seed):
    grey = np.random.default_rng(seed).integers(0, 256, (9 + seed, 16), np.uint8) if seed else np.tile(np.arange(256, dtype=np.uint8), (8, 1))
    deep = grey.astype(">u2" if "big" in format else "<u2")*257
    assert np.array_equal(np.asarray(read_photo(saved(deep, format.split()[-1]))), grey[..., None].repeat(3, 2))


def test_photo_of_16_bits_is_turned_as_its_exif_says():
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.full((20, 40), 128*257, np.uint16)).save(file, "PNG", exif=exif)
    photo = read_photo(io.BytesIO(file.getvalue()))
    assert photo.size == (20, 40) and photo.getextrema() == ((128, 128),)*3


@pytest.mark.parametrize("pixels, mode", [(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8), "F"), (np.arange(64, dtype=np.int32).reshape(8, 8)*1000, "I")])
def test_photo_whose_range_is_unknown_is_refused_by_its_mode(pixels, mode):
    with fails(f"x.tif can't be read as a photo (mode {mode} ", OSError): read_photo(saved(pixels, "TIFF"), "x.tif")


def test_transparency_is_what_clips_own_preprocess_makes_of_it():
    line = np.zeros((8, 8, 4), np.uint8)
    line[4] = 0, 0, 0, 255
    assert read_photo(saved(line, "PNG")).getextrema() == ((0, 0),)*3


def test_reported_16_bits_are_right(shared):
    grey8, grey16 = (np.asarray(read_photo(shared/f"cases/08-sixteen-bits/grey{bits}.png")) for bits in (8, 16))
    assert np.array_equal(grey8, grey16) and abs(grey16.mean() - 127.7) < 0.1


# --- captions that are cut

@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory):
    "A byte-level BPE without merges: each character of a script outside ASCII is several tokens."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({c: n for n, c in enumerate(alphabet)}, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>").save_pretrained(folder)
    return load_tokenizer(str(folder))


def words(draw): return " ".join("".join(draw.choices("abcé一个🎉ü한\ufffd\u0301", k=draw.randint(1, 9))) for _ in range(draw.randint(1, 9)))


def longest_whole(caption, room):
    "The longest beginning of a caption that has at most `room` bytes."
    return next(caption[:n] for n in range(len(caption), -1, -1) if len(caption[:n].encode()) <= room)


@pytest.mark.parametrize("max_length", [3, 5, 8, 12, 21, 40])
def test_captions_are_cut_between_characters(bytes_tokenizer, max_length):
    draw = random.Random(max_length)
    captions = [words(draw) for _ in range(30)]
    for caption, ids in zip(captions, encode_captions(bytes_tokenizer, captions, max_length), strict=True):
        assert (ids[0], ids[-1]) == (bytes_tokenizer.bos_token_id, bytes_tokenizer.eos_token_id)
        assert bytes_tokenizer.decode(ids[1:-1], clean_up_tokenization_spaces=False) == longest_whole(caption, max_length - 2)


@pytest.mark.parametrize("kept", [False, True], ids=["text", "token ids"])
def test_captions_of_a_store_are_cut_alike_and_counted(tmp_path, bytes_tokenizer, kept):
    draw = random.Random(1)
    said = {n: [words(draw) for _ in range(n % 3 + 1)] for n in range(24)}
    store = make_store(tmp_path, 24, captions=lambda n: said[n], split=lambda n: "train")
    if kept: tokenize_store(store, bytes_tokenizer)
    dataset = StoreDataset(store, "train", bytes_tokenizer, max_length=20, caption_sampling="all", block=4, window=3)
    batch = next(dataset.batches(1000, 1))
    texts = [" ".join(text.split()) for captions in said.values() for text in captions]
    made = [tuple(ids[:mask.sum()].tolist()) for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
    assert sorted(made) == sorted(map(tuple, encode_captions(bytes_tokenizer, texts, 20)))
    assert dataset.count_cut() == (sum(len(text.encode()) > 18 for text in texts), len(texts))
    assert kept or dataset.count_cut(5)[1] == 5


def test_captions_that_are_cut_are_counted(tmp_path, tokenizer):
    write_embeddings(tmp_path/"x.safetensors", ["a", "b"], torch.zeros(2, 4), "made")
    table = pd.DataFrame({"image": list("aab"), "caption": ["a dog", "a dog runs on the snow and on", "a dog runs over the grass and on"]})
    def cut(length): return FlickrDataset(table, Embeddings(tmp_path/"x.safetensors"), tokenizer, length).count_cut()
    assert (cut(40), cut(6), cut(3)) == ((0, 3), (2, 3), (3, 3))


def test_a_run_records_and_prints_how_many_captions_are_cut(tiny, capsys, monkeypatch):
    from clipcap import train
    monkeypatch.setattr(train, "train", lambda *_: None)
    run, config = tiny(max_length=6)
    with run.stage("03_train", config, ["01_data"]): train.train_run(run, config)
    counted, data = run.stage_entry("03_train")["captions_cut"], load_data(run, config)
    assert {part: n["of"] for part, n in counted.items()} == {part: len(data.split(part)) for part in ("train", "val")} and counted["train"]["cut"] > 0
    assert f"{counted['train']['cut']} of {counted['train']['of']} captions of train are longer than max_length=6 tokens and are cut" in capsys.readouterr().err


def test_reported_captions_end_in_whole_characters(shared):
    tokenizer = load_tokenizer(str(shared/"gpt2_tokenizer"))
    lines = (shared/"cases/15-cut-in-half-a-character/captions.txt").read_text("utf-8").splitlines()[1:]
    for caption in (line.partition(",")[2] for line in lines):
        ids, = encode_captions(tokenizer, [caption], 40)
        assert len(ids) > 35 and caption.startswith(tokenizer.decode(ids[1:-1], clean_up_tokenization_spaces=False)) and ids[-1] == tokenizer.eos_token_id


# --- parameters of notebooks

@pytest.mark.parametrize("name, meant", [("Seed", "seed"), ("SEED", "seed"), ("Learning_Rate", "learning_rate"), ("Epoch", "epochs"), ("EPOCHS", "epochs"), ("Run", "run"),
                                         ("Restart", "restart"), ("maxLength", "max_length"), ("BATCH_SIZE", "batch_size")])
def test_parameter_that_is_no_setting_is_refused_with_what_was_meant(outputs, name, meant):
    with fails(f"unknown field {name!r}; did you mean {meant!r}?"):
        open_run(**notebook_parameters({"__name__": "x", "In": [], "STAGES": (1, 2), "run": "r", "preset": "mini", "seed": None, name: 7}, ("restart",)))


@pytest.mark.parametrize("seed", range(5))
def test_setting_in_any_other_case_is_refused(outputs, seed):
    from clipcap.core import FIELDS
    draw = random.Random(seed)
    for setting in draw.sample(sorted(FIELDS), 8):
        name = "".join(c.upper() if draw.random() < 0.5 else c for c in setting[:-1]) + setting[-1].upper()
        with fails(f"unknown field {name!r}; did you mean {setting!r}?"): open_run(**notebook_parameters({"run": "r", "preset": "mini", name: 1}))


@pytest.mark.parametrize("name, value, text", [("FOO", 7, "fields are ['data_root'"), ("N", [1], "fields are ['data_root'"), ("EVALSPLIT", "val", "did you mean 'eval_split'?"),
                                               ("numbeam", {"a": 1}, "did you mean 'num_beams'?"), ("_hidden", None, "fields are"), ("json", 5, "fields are")])
def test_unknown_parameter_of_papermill_is_refused_whatever_its_name_and_value(name, value, text):
    imported = {"STAGES": (1, 2), "FLICKR8K_URL": "https://", "json": json, "run": "r", "preset": "mini", "eval_split": "test"}
    notebook_parameters({**imported, "In": ["", "import json", "# Parameters\nrun = \"r\"\neval_split = \"val\"\n"]}, ("eval_split",))
    with fails(f"unknown field {name!r}; {text}"):
        notebook_parameters({**imported, name: value, "In": ["", f"# Parameters\nrun = \"r\"\n{name} = {value!r}\n"]}, ("eval_split",))


@pytest.mark.slow
def test_unknown_parameter_ends_a_notebook_of_papermill(tmp_path):
    import nbformat
    import papermill
    cells = ["from clipcap.core import STAGES, notebook_parameters", "run = 'r'\nseed = None", "found = notebook_parameters(globals())"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells], metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}})
    notebook.cells[1].metadata.tags = ["parameters"]
    nbformat.write(notebook, tmp_path/"in.ipynb")
    def execute(**parameters): papermill.execute_notebook(str(tmp_path/"in.ipynb"), str(tmp_path/"out.ipynb"), parameters, progress_bar=False)
    execute(seed=7, run="night")
    with pytest.raises(Exception, match="unknown field 'FOO'; fields are"): execute(seed=7, FOO=7)


@pytest.mark.parametrize("run", [42, 7.5, True])
def test_run_whose_name_papermill_took_for_a_number_is_named(run):
    with fails(f"run={run!r} must be text: -r run {run}", TypeError): notebook_parameters({"run": run, "preset": "mini"})


# --- a store's sample

def test_sample_of_a_store_has_only_rows_with_captions(tmp_path, outputs, capsys):
    store = make_store(tmp_path/"store", 300, captions=lambda n: [f"photo {n}"]*(n % 4 == 0), split=lambda n: ("train", "val", "test")[n % 3])
    table = extract(EmbeddingStore(store.path), "train", tmp_path/"x.safetensors", limit=20)
    assert table.image.nunique() == 20 == len(Embeddings(tmp_path/"x.safetensors"))
    run, config = open_run("store", "mini", data_root=str(store.path))
    with run.stage("01_data", config) as notes: notes.update(prepare_data(run, config))
    entry = run.stage_entry("01_data")
    assert (entry["images"], entry["left_out"]) == ({"test": 25, "train": 25, "val": 25}, {"images without a caption": 225})
    assert "left out: 225 images without a caption" in capsys.readouterr().err


def test_what_a_reader_leaves_out_is_recorded_and_printed(tmp_path, outputs, capsys):
    names = [f"{n}.jpg" for n in range(20)]
    write(tmp_path, {**{name: photo_bytes(n) for n, name in enumerate(names)}, **{f"{n}.txt": f"photo {n}" for n in range(18)}, "x.heic": "", "y.txt": "nobody"})
    write_embeddings(tmp_path/"e.safetensors", names, torch.zeros(20, 4), "made")
    run, config = open_run("texts", "mini", data_root=str(tmp_path), embeddings=str(tmp_path/"e.safetensors"), split="random")
    with run.stage("01_data", config) as notes: notes.update(prepare_data(run, config))
    left_out, said = run.stage_entry("01_data")["left_out"], capsys.readouterr().err
    assert left_out == {"images without a caption": 2, "captions without a photo": 1, "photos of kinds that are not read (.heic)": 1}
    for what, number in left_out.items(): assert f"left out: {number} {what}" in said


# --- names

@pytest.mark.parametrize("files, names", [
    ({"captions.txt": "image,caption\nx.jpg.1,A dog\nx.jpg,A cat\n"}, ["x.jpg.1", "x.jpg"]),
    ({"Flickr8k.token.txt": "x.jpg.1#0\tA dog\n2258277193_586949ec62.jpg.1#0\tA cat\n"}, ["x.jpg.1", "2258277193_586949ec62.jpg"]),
    ({"results_20130124.token": "x.png.12#0\tA dog\n"}, ["x.png.12"])])
def test_only_flickr8ks_one_odd_name_is_changed(files, names): assert [image for image, *_ in read_files(files)[0]] == names
