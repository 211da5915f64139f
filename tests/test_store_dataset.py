"""Batches from a store, and a run on one (clipcap.formats.store_dataset)."""
import numpy as np
import pytest
import torch
from data_files import fails
from test_store import make_store, numbers, photos

from clipcap.core import make_config, open_run
from clipcap.data import FlickrDataset, load_data, prepare_data
from clipcap.formats import store_dataset as module
from clipcap.formats.embeddings import Embeddings
from clipcap.formats.readers import SPLITS, read_captions
from clipcap.formats.store import EmbeddingStore, StoreWriter, index_store
from clipcap.formats.store_dataset import Order, StoreDataset, extract, prepare_store, shuffle_quality, tokenize_store
from clipcap.formats.tokenizer import encode_captions

SMALL = {"block": 4, "window": 9}  # blocks and windows of a small store


# --- order

def test_order_visits_each_row_once_and_depends_on_seed_and_epoch():
    sizes = np.array([1024]*3 + [100])
    rows = Order(sizes, seed=1, epoch=1, window=16).rows()
    assert np.array_equal(np.sort(rows), np.arange(3*1024 + 100)) and np.array_equal(Order(sizes, 1, 1, window=16).rows(), rows)
    for seed, epoch in ((1, 2), (2, 1)): assert not np.array_equal(Order(sizes, seed, epoch, window=16).rows(), rows)
    assert [len(w) for w in Order(sizes, 1, 1, window=16).windows()] == [16]*3 + [2]


def test_shuffle_quality_is_as_arithmetic_says():
    "64 of the other 16,383 rows of a window are of the own block; of all rows, 126 lie within 63 places."
    sizes = np.array([65_536]*2)
    n = sizes.sum()
    window, permuted = shuffle_quality(Order(sizes, 1, 1).rows()), shuffle_quality(np.random.default_rng(0).permutation(n))
    assert shuffle_quality(np.arange(n))["blocks_a_batch"] == 4
    assert abs(window["neighbours"] - 63*255/16_383) < 0.15 and abs(permuted["neighbours"] - 126*255/(n - 1)) < 0.02
    assert abs(window["blocks_a_batch"] - 256*(1 - (255/256)**256)) < 2 and window["rank_correlation"] < 0.2


# --- batches

def items_of(batches, tokenizer):
    "All items of batches: (image, caption, embedding)."
    return [(name, tokenizer.decode(ids[1:mask.sum() - 1]), tuple(b["embedding"][row].tolist())) for b in batches
            for name, ids, mask, row in zip(b["image"], b["input_ids"], b["attention_mask"], b["image_of"])]


@pytest.mark.parametrize("sampling, of_each", [("random", 1), ("all", 2)])
def test_an_epoch_has_every_image_or_caption_once(tmp_path, tokenizer, sampling, of_each):
    store, items = make_store(tmp_path, val=0.1), []
    for part in SPLITS:
        dataset = StoreDataset(store, part, tokenizer, caption_sampling=sampling, **SMALL)
        batches = list(dataset.batches(8, epoch=1))
        assert [len(b["image"]) for b in batches[:-1]] == [8]*(len(batches) - 1) and len(batches) == -(-len(dataset)//8)
        items += items_of(batches, tokenizer)
    assert sorted(name for name, *_ in items) == sorted(photos(0, 100)*of_each) and len({item[:2] for item in items}) == len(items)
    rows = numbers(100, 8)
    for name, caption, embedding in items:
        n = int(name[:5])
        assert caption.strip() in (f"a photo of {n}", f"number {n}, again") and embedding == tuple(rows[n].tolist())


def test_one_caption_is_drawn_anew_in_each_epoch(tmp_path, tokenizer):
    dataset = StoreDataset(make_store(tmp_path, 400, shard_rows=150), "train", tokenizer, block=16, window=10)
    first, second, again = (items_of(dataset.batches(32, epoch), tokenizer) for epoch in (1, 2, 1))
    assert first == again and [n for n, *_ in first] != [n for n, *_ in second]
    assert abs(np.mean([caption.strip().endswith("again") for _, caption, _ in first]) - 0.5) < 0.1
    assert abs(len({*first} & {*second})/len(first) - 0.5) < 0.1


@pytest.mark.parametrize("sampling", ["random", "all"])
@pytest.mark.parametrize("world", [2, 7])
def test_processes_divide_the_same_batches(tmp_path, tokenizer, sampling, world):
    dataset = StoreDataset(make_store(tmp_path), "train", tokenizer, caption_sampling=sampling, **SMALL)
    for batch, *parts in zip(dataset.batches(10, 3), *(dataset.batches(10, 3, rank, world) for rank in range(world)), strict=True):
        assert [item for part in parts if part["part"].weight for item in items_of([part], tokenizer)] == items_of([batch], tokenizer)
        for part in parts: assert torch.equal(batch["embedding"][part["part"].image_rows], part["embedding"])
        assert {part["part"].all_images for part in parts} == {len(batch["embedding"])}


def test_kept_token_ids_make_the_same_batches(tmp_path, tokenizer, monkeypatch):
    store = make_store(tmp_path)
    def batches(store): return list(StoreDataset(store, "train", tokenizer, caption_sampling="all", **SMALL).batches(10, 3))
    by_text = batches(store)
    tokenize_store(store, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_tokenize", None)  # nothing twice
        tokenize_store(store, tokenizer)
        by_ids = batches(store)
    for a, b in zip(by_text, by_ids, strict=True):
        assert a["image"] == b["image"]
        for field in {*a} - {"part", "image"}: assert torch.equal(a[field], b[field])
    index_store(tmp_path, lambda name: [f"{name} is new"])  # the ids of other captions are not used
    assert all("is new" in caption for _, caption, _ in items_of(batches(EmbeddingStore(tmp_path)), tokenizer))
    tokenize_store(EmbeddingStore(tmp_path), tokenizer)
    assert len(list(tmp_path.glob("*.tokens-*"))) == 4  # one for each shard


def test_images_without_captions_are_left_out(tmp_path, tokenizer):
    store = make_store(tmp_path, captions=lambda n: ["x"]*(n % 3), split=lambda n: "train" if n < 50 else "test")
    assert [len(StoreDataset(store, "train", tokenizer, caption_sampling=s)) for s in ("random", "all")] == [33, 49]  # of 0 to 49: 17 have none
    with fails("no image of the split 'val'"): StoreDataset(store, "val", tokenizer)
    few = StoreDataset(store, "train", tokenizer, block=4, window=3)
    assert [len(b["image"]) for b in few.batches(32, 1)] == [32, 1]
    assert torch.equal(torch.cat([*few.rows(at_once=7)]), numbers(100, 8)[:50])


def test_long_captions_keep_their_end(tmp_path, tokenizer):
    caption = "a dog runs over green grass and on"
    dataset = StoreDataset(make_store(tmp_path, 1, captions=lambda n: [caption], split=lambda n: "train"), "train", tokenizer, max_length=6)
    assert next(dataset.batches(1, 1))["input_ids"].tolist() == encode_captions(tokenizer, [caption], 6)


def test_row_that_went_bad_is_named(tmp_path, tokenizer):
    store = make_store(tmp_path, split=lambda n: "train")
    rows = np.memmap(store.file(1), np.float32, "r+", store.shards[1]["offset"], (30, 8))
    rows[23, 4] = np.inf
    rows.flush()
    with fails("00001.safetensors: the embedding of 00053.jpg holds NaN or infinity"): list(StoreDataset(store, "train", tokenizer).batches(32, 1))


def test_half_precision_patches_become_float32(tmp_path, tokenizer):
    with StoreWriter(tmp_path, "eye") as writer: writer.add(photos(0, 20), numbers(20, 12).view(20, 3, 4), [["x"]]*20, ["train"]*20)
    store = EmbeddingStore(tmp_path)
    batch = next(StoreDataset(store, "train", tokenizer).batches(20, 1))
    assert (store.tokens, store.dim, batch["embedding"].dtype) == (3, 4, torch.float32)
    assert torch.equal(batch["embedding"][np.argsort(batch["image"])], numbers(20, 12).half().float().view(20, 3, 4))


@pytest.mark.parametrize("sampling", ["random", "all"])
def test_batch_is_what_flickrdataset_makes_of_the_same_items(tmp_path, tokenizer, mini_model, sampling):
    "And so is the model's loss."
    store = make_store(tmp_path, 60, 16, val=0.1)
    embeddings = tmp_path/"train.safetensors"
    table = extract(store, "train", embeddings)
    in_memory = FlickrDataset(table, Embeddings(embeddings), tokenizer, caption_sampling="all")
    number = {(image, tuple(in_memory.tokens[image][k])): n for n, (image, k) in enumerate(in_memory.items)}
    dataset = StoreDataset(store, "train", tokenizer, caption_sampling=sampling)
    assert len(dataset) == len(FlickrDataset(table, Embeddings(embeddings), tokenizer, caption_sampling=sampling))
    batch = next(dataset.batches(32, epoch=1))
    same = in_memory.collate([in_memory[number[image, tuple(ids[:mask.sum()].tolist())]] for image, ids, mask in zip(batch["image"], batch["input_ids"], batch["attention_mask"])])
    assert {*batch} - {"part"} == {*same} and batch["image"] == same["image"]
    for field in {*same} - {"image"}: assert torch.equal(batch[field], same[field])
    losses = [mini_model(*(b[k] for k in ("embedding", "input_ids", "attention_mask", "image_of"))).sum().item() for b in (batch, same)]
    assert losses[0] == losses[1]


def test_real_photos_and_captions(tmp_path, tokenizer, shared):
    seen, said = Embeddings(shared/"real/photos.safetensors"), read_captions(shared/"flickr8k/captions.txt").groupby("image").caption.apply(list)
    names = [name for name in seen.names if name in said]
    with StoreWriter(tmp_path, seen.encoder, torch.float32, shard_rows=400) as writer:
        writer.add(names, seen.stack(names), [said[name] for name in names])
    store = EmbeddingStore(tmp_path, val=0.1, test=0.1)
    store.verify()
    count = dict.fromkeys(names, 0)
    for batch in StoreDataset(store, "train", tokenizer, caption_sampling="all").batches(64, 1):
        assert torch.equal(batch["embedding"], seen.stack(dict.fromkeys(batch["image"])))
        for name in batch["image"]: count[name] += 1
    assert all(n in (0, len(said[name])) for name, n in count.items()) and abs(np.mean([n > 0 for n in count.values()]) - 0.8) < 0.04


# --- small splits, and a run

def test_a_split_is_extracted_whole_or_in_part(tmp_path, tokenizer):
    store, file = make_store(tmp_path/"store", val=0.3, dtype=torch.float16), tmp_path/"val.safetensors"
    table = extract(store, "val", file)
    whole = StoreDataset(store, "val", tokenizer, caption_sampling="all")
    assert sorted(table.image) == sorted(name for b in whole.batches(32, 1) for name in b["image"])
    assert table.caption.tolist() == [c for name in table.image.unique() for c in (f"a photo of {int(name[:5])}", f"number {int(name[:5])}, again")]
    names = list(table.image.unique())
    assert torch.equal(Embeddings(file).stack(names), numbers(100, 8)[[int(n[:5]) for n in names]].half().float())
    few = extract(store, "val", file, limit=5)
    assert few.image.nunique() == 5 and {*few.image} < {*names}
    with fails("is in the split 'val' and has a caption"): extract(EmbeddingStore(store.path, val=0.), "val", file)


def test_a_run_reads_a_store(tmp_path, outputs):
    store = make_store(tmp_path/"store", 300, captions=lambda n: [f"photo {n}"])
    run, config = open_run("from-store", "mini", data_root=str(store.path))
    with run.stage("01_data", config) as notes: notes.update(prepare_data(run, config))
    entry, data = run.stage_entry("01_data"), load_data(run, config)
    assert (entry["format"], entry["rows"], entry["embedding_dim"], data.photos) == ("store", 300, 8, None)
    store = EmbeddingStore(store.path, config.seed)
    split = {name: list(SPLITS)[k] for name, k in zip(photos(0, 300), np.concatenate([store.splits(k) for k in range(len(store.shards))]))}
    assert dict(zip(data.captions.image, data.captions.split)) == split  # a small store goes into the table whole
    assert torch.equal(data.embeddings["00007.jpg"], numbers(300, 8)[7])


@pytest.mark.parametrize("setting", [{"embeddings": "x.safetensors"}, {"features": "grid"}])
def test_settings_that_a_store_cannot_follow_are_named(tmp_path, outputs, setting):
    run, _ = open_run("from-store", "mini")
    with fails(f"{[*setting][0]}="): prepare_store(run, make_config("mini", data_root=str(make_store(tmp_path/"store").path), **setting))


def test_unknown_way_of_sampling_captions_is_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="caption_sampling='al' is unknown; choose one of"): StoreDataset(make_store(tmp_path), "train", tokenizer, caption_sampling="al")
