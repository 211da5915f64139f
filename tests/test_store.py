"""The store of embeddings: shards, index, writer, reading (clipcap.formats.store)."""
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from data_files import fails

from clipcap.formats import store as module
from clipcap.formats.embeddings import Embeddings, write_embeddings
from clipcap.formats.store import INDEX, EmbeddingStore, KnownNames, Ragged, StoreWriter, deal, index_store, name_hashes, write_captions, write_shard


def numbers(n, dim=4, seed=0): return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def photos(start, stop): return [f"{n:05d}.jpg" for n in range(start, stop)]


def make_store(path, n=100, dim=8, dtype=torch.float32, shard_rows=30, captions=None, split=None, **options):
    "A store of random rows, with two captions for each, or what `captions` and `split` make of a number."
    captions = captions or (lambda n: [f"a photo of {n}", f"number {n}, again"])
    with StoreWriter(path, "eye", dtype, shard_rows) as writer:
        writer.add(photos(0, n), numbers(n, dim), [captions(i) for i in range(n)], split and [split(i) for i in range(n)])
    return EmbeddingStore(path, **options)


# --- arrays of different lengths

def test_texts_of_any_language_come_back():
    texts = Ragged.of_texts(["a dog", "", "zwei Hündchen"])
    assert texts.texts() == ["a dog", "", "zwei Hündchen"] and len(texts) == 3
    assert Ragged.join([texts, Ragged.of_texts([]), Ragged.of_texts(["東京"])]).texts() == ["a dog", "", "zwei Hündchen", "東京"]
    assert texts.take([2, 0]).texts() == ["zwei Hündchen", "a dog"]


def test_lists_of_numbers_are_selected():
    chosen = Ragged.of_lists([[5, 6, 7], [], [8]]).take([2, 0, 1, 0])
    assert (chosen.values.tolist(), chosen.bounds.tolist()) == ([8, 5, 6, 7, 5, 6, 7], [0, 1, 4, 4, 7])


def test_known_names_are_merged():
    names, known = photos(0, 70_000), KnownNames(name_hashes(photos(0, 10)))
    assert known.has(photos(8, 12)) == [True, True, False, False]
    known.add(name_hashes(names[10:]))
    assert not known._recent and all(known.has(names[::1000])) and not any(known.has(["a", "b"]))


# --- shards and index

def test_shards_of_several_workers_become_a_store(tmp_path, monkeypatch):
    write_shard(tmp_path/"worker1-0.safetensors", photos(0, 5), numbers(5), "eye", [["a dog", "  two\ndogs "], [], ["x"], ["y", ""], ["z"]], ["val", None, None, None, None])
    write_embeddings(tmp_path/"worker2-0.safetensors", photos(5, 8), numbers(3, seed=1), "eye")  # an ordinary file, without captions
    index = index_store(tmp_path)
    assert index["row"] == {"encoder": "eye", "shape": [4], "dtype": "float32"}
    assert [(s["file"], s["rows"], s["captions"]) for s in index["shards"]] == [("worker1-0.safetensors", 5, 5), ("worker2-0.safetensors", 3, 0)]
    assert len(Embeddings(tmp_path)) == 8
    with monkeypatch.context() as patch:
        patch.setattr(module, "_hash_from", None)  # nothing is read twice
        assert index_store(tmp_path) == index
    index_store(tmp_path, lambda name: [f"photo {name}"])  # captions that came later
    assert [s["captions"] for s in index_store(tmp_path)["shards"]] == [5, 3] and EmbeddingStore(tmp_path, val=0., test=0.).splits(0).tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("change, text", [
    (lambda p: write_shard(p/"1.safetensors", photos(3, 4), numbers(1), "eye"), "00003.jpg has an embedding in"),
    (lambda p: write_shard(p/"1.safetensors", photos(5, 6), numbers(1), "ear"), "'encoder': 'ear'"),
    (lambda p: write_shard(p/"1.safetensors", photos(5, 6), numbers(1, 3), "eye"), "'shape': [3]"),
    (lambda p: write_shard(p/"1.safetensors", photos(5, 6), numbers(1).half(), "eye"), "'dtype': 'float16'"),
    (lambda p: write_shard(p/"1.safetensors", photos(5, 6), numbers(1).bfloat16(), "eye"), "1.safetensors: rows are BF16; a store has float32 or float16"),
    (lambda p: (p/"1.safetensors").write_bytes(b"half of it"), "1.safetensors is not an embeddings file"),
    (lambda p: write_captions(p/"0.safetensors", photos(1, 6)), "0.captions is of other rows than 0.safetensors"),
    (lambda p: (p/"0.captions").write_bytes(b"half of it"), "0.captions can't be read")], ids=range(8))
def test_shard_that_does_not_belong_leaves_the_index(tmp_path, change, text):
    write_shard(tmp_path/"0.safetensors", photos(0, 5), numbers(5), "eye")
    index_store(tmp_path)
    before = (tmp_path/INDEX).read_bytes()
    change(tmp_path)
    with fails(text): index_store(tmp_path)
    assert (tmp_path/INDEX).read_bytes() == before


def test_folder_without_shards_is_named():
    with fails("no shards in", FileNotFoundError): index_store("no/such/folder")


@pytest.mark.parametrize("rows, captions, split, text", [
    (torch.tensor([[0., 1], [0, float("nan")]]), None, None, "the embedding of 00001.jpg holds NaN"),
    (numbers(2), [["one"]], None, "2 names, 2 rows, 1 lists of captions, 2 splits"),
    (numbers(2), None, ["dev", None], "split 'dev' is unknown; choose one of ('train', 'val', 'test')")], ids=range(3))
def test_bad_shard_is_not_written(tmp_path, rows, captions, split, text):
    with fails(text): write_shard(tmp_path/"0.safetensors", photos(0, 2), rows, "eye", captions, split)
    assert not [*tmp_path.iterdir()]


# --- the writer

def test_store_grows_shard_by_shard(tmp_path):
    path = tmp_path/"store"
    with StoreWriter(path, "eye", torch.float32, shard_rows=10) as writer:
        for start in range(0, 24, 8): writer.add(photos(start, start + 8), numbers(24)[start:start + 8], [[f"photo {n}"] for n in range(start, start + 8)])
    assert [s["rows"] for s in index_store(path)["shards"]] == [10, 10, 4]
    assert torch.equal(Embeddings(path).stack(photos(0, 24)), numbers(24)) and Embeddings(path/"00001.safetensors").names == photos(10, 20)
    with StoreWriter(path, "eye", torch.float32, shard_rows=10) as writer:  # another day
        assert writer.missing(photos(20, 26)) == photos(24, 26)
        writer.add(photos(24, 26), numbers(2))
        assert writer.missing(photos(20, 26)) == []
        with fails("another process is writing", RuntimeError): StoreWriter(path, "eye").__enter__()
    assert [s["rows"] for s in index_store(path)["shards"]] == [10, 10, 4, 2]


@pytest.mark.parametrize("names, rows, split, text", [
    (photos(3, 4), torch.full((1, 4), 1e6), None, "the embedding of 00003.jpg holds NaN or infinity"),  # in float16
    (photos(2, 4), numbers(2), None, "00002.jpg has an embedding in"), (["a.jpg", "a.jpg"], numbers(2), None, "a.jpg has an embedding in"),
    (photos(3, 4), numbers(1, 5), None, "'shape': [5]"), (photos(3, 5), numbers(1), None, "2 names, 1 rows"),
    (photos(3, 4), numbers(1), ["dev"], "split 'dev' is unknown")], ids=range(6))
@pytest.mark.parametrize("again", [False, True], ids=["held", "written"])
def test_rows_that_are_refused_leave_those_before(tmp_path, names, rows, split, text, again):
    if again:
        with StoreWriter(tmp_path, "eye") as writer: writer.add(photos(0, 3), numbers(3))
    with StoreWriter(tmp_path, "eye") as writer:
        if not again: writer.add(photos(0, 3), numbers(3))
        with fails(text): writer.add(names, rows, None, split)
    assert Embeddings(tmp_path).names == photos(0, 3)


def test_killed_writer_leaves_whole_shards(tmp_path):
    code = f"""
import torch
from clipcap.formats.store import StoreWriter
with StoreWriter({str(tmp_path)!r}, "eye", shard_rows=50) as writer:
    for n in range(10**6):
        writer.add([f"{{n:05d}}.jpg"], torch.ones(1, 4))
        if n % 70 == 0: print(n, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while int(process.stdout.readline()) < 350: pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = Embeddings(tmp_path).names
    assert len(kept) >= 350 and kept == photos(0, len(kept)) and len(kept) % 50 == 0
    assert sum(s["rows"] for s in json.loads((tmp_path/INDEX).read_text())["shards"]) in (len(kept), len(kept) - 50)  # the index comes last
    with StoreWriter(tmp_path, "eye", shard_rows=50) as writer: writer.add(writer.missing(photos(0, len(kept) + 9)), torch.zeros(9, 4))
    assert Embeddings(tmp_path).names == photos(0, len(kept) + 9)


# --- reading

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_read_or_mapped(tmp_path, dtype):
    store = make_store(tmp_path, dtype=dtype)
    out = np.empty((5, 8), store.dtype)
    store.read(1, 7, out)
    assert torch.equal(torch.from_numpy(out), numbers(100, 8)[37:42].to(dtype)) and np.array_equal(store.map(1)[7:12], out)
    store.verify()
    assert "100 rows (8,)" in repr(store) and (len(store), store.dim, store.tokens) == (100, 8, None)


def test_rows_are_dealt_by_name_and_seed():
    names = [f"{n}.jpg" for n in range(100_000)]
    split = deal(name_hashes(names), seed=1, val=0.1, test=0.05)
    assert np.abs(np.bincount(split)/1000 - [85, 10, 5]).max() < 0.3
    assert np.array_equal(deal(name_hashes(names[::-1]), 1, 0.1, 0.05)[::-1], split)  # each alone: order and growth don't matter
    other = deal(name_hashes(names), 2, 0.1, 0.05)
    assert abs(np.mean(split == other) - (0.85**2 + 0.1**2 + 0.05**2)) < 0.01  # another seed is independent


def test_stored_split_comes_first(tmp_path):
    store = make_store(tmp_path, 300, shard_rows=300, split=lambda n: "test" if n < 9 else None, val=0.2, test=0.)
    assert store.splits(0)[:9].tolist() == [2]*9 and abs((store.splits(0)[9:] == 1).mean() - 0.2) < 0.07
    assert np.array_equal(store.splits(0, 5, 50), store.splits(0)[5:50])


def cut(path): path.write_bytes(path.read_bytes()[:-7])
def flip(path): path.write_bytes((whole := path.read_bytes())[:-1] + bytes([whole[-1] ^ 1]))


@pytest.mark.parametrize("change, name, text, exc", [
    (lambda p: p.unlink(), "00001.safetensors", "00001.safetensors is missing; put it back", FileNotFoundError),
    (lambda p: p.unlink(), "00002.captions", "00002.captions is missing", FileNotFoundError),
    (cut, "00001.safetensors", "bytes, its index says", ValueError), (cut, "00001.captions", "its index says", ValueError),
    (flip, "00001.safetensors", "00001.safetensors has changed since it was indexed", ValueError),
    (lambda p: p.unlink(), INDEX, "is not a store: it has no index.json", FileNotFoundError), (cut, INDEX, "is not JSON", ValueError)], ids=range(7))
def test_damaged_store_is_named(tmp_path, change, name, text, exc):
    make_store(tmp_path)
    change(tmp_path/name)
    with fails(text, exc): EmbeddingStore(tmp_path).verify()


def test_shard_cut_while_it_is_open_is_named(tmp_path):
    store = make_store(tmp_path)
    cut(tmp_path/"00001.safetensors")
    with fails("00001.safetensors ends before row 30"): store.read(1, 20, np.empty((10, 8), np.float32))


def test_digest_is_of_the_content(tmp_path):
    a, b, c = (make_store(tmp_path/name, n) for name, n in (("a", 100), ("b", 100), ("c", 99)))
    assert a.digest() == b.digest() != c.digest()
