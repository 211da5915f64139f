"""Files of embeddings (clipcap.formats.embeddings)."""
import pytest
import torch
from data_files import fails

from clipcap.formats.embeddings import Embeddings, data_hash, write_embeddings

ROWS = torch.arange(20.).view(5, 4)


@pytest.fixture
def folder(tmp_path):
    "Two files of one store: float32 and float16."
    write_embeddings(tmp_path/"0.safetensors", ["a", "b"], ROWS[:2], "test")
    write_embeddings(tmp_path/"1.safetensors", ["c", "d", "e"], ROWS[2:].half(), "test")
    return tmp_path


def test_folder_of_files_is_one_store(folder):
    store = Embeddings(folder)
    assert (len(store), store.dim, store.tokens, store.encoder, store.names) == (5, 4, None, "test", list("abcde"))
    assert torch.equal(store["b"], ROWS[1]) and torch.equal(store.stack(["d", "a"]), ROWS[[3, 0]]) and torch.equal(store.pooled("ab"), ROWS[:2])
    assert "e" in store and "f" not in store


def test_files_may_be_given_one_by_one(folder):
    both = Embeddings(folder/"0.safetensors", folder/"1.safetensors")
    assert both.names == list("abcde") and both.digest() == Embeddings(folder).digest() != Embeddings(folder/"0.safetensors").digest()


def test_digest_and_data_hash_change_with_the_rows(folder):
    (folder/"table.csv").write_text("image,caption,split\na,A dog,train\n")
    before = Embeddings(folder).digest(), data_hash(folder/"table.csv", Embeddings(folder))
    assert before == (Embeddings(folder).digest(), data_hash(folder/"table.csv", Embeddings(folder)))
    write_embeddings(folder/"0.safetensors", ["a", "b"], ROWS[:2] + 1e-3, "test")
    changed = Embeddings(folder).digest(), data_hash(folder/"table.csv", Embeddings(folder))
    assert changed[0] != before[0] and changed[1] != before[1]
    (folder/"table.csv").write_text("image,caption,split\na,A cat,train\n")
    assert data_hash(folder/"table.csv", Embeddings(folder)) != changed[1]


@pytest.mark.numerics
def test_several_vectors_per_image(tmp_path):
    parts = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    write_embeddings(tmp_path/"parts.safetensors", ["a", "b"], parts, "test")
    store = Embeddings(tmp_path/"parts.safetensors")
    assert (store.dim, store.tokens) == (4, 3) and torch.equal(store["b"], parts[1]) and torch.equal(store.stack("ba"), parts.flip(0))
    torch.testing.assert_close(store.pooled("ab"), parts.mean(1), rtol=1e-4, atol=1e-4)  # the mean of all


@pytest.mark.parametrize("files, text", [
    ({"x": (["a", "b"], ROWS[:1])}, "2 names for a tensor of shape (1, 4); there must be one row per name"),
    ({"x": (["a"], ROWS[0])}, "1 names for a tensor of shape (4,); there must be one row per name"),
    ({"x": (["a", "a"], ROWS[:2])}, "a has two embeddings"),
    ({"x": (["a"], ROWS[:1]), "y": (["a"], ROWS[:1])}, "y.safetensors: a has two embeddings"),
    ({"x": (["a"], ROWS[:1]), "y": (["b"], ROWS[:1, :2].clone())}, "embeddings have the sizes 2, 4; they must have one"),
    ({"x": (["a"], ROWS[:1]), "y": (["b"], ROWS[:1, None])}, "embeddings have the sizes 1×4, 4; they must have one"),
    ({"x": ([], ROWS[:0])}, "embeddings have the sizes of none"),
    ({"x": (["a"], torch.full((1, 4), float("nan")))}, "the embedding of a holds NaN or infinity"),
    ({"x": ([["a"]], ROWS[:1])}, "x.safetensors is not an embeddings file (TypeError: names are no list of text)")], ids=range(9))  # the last: found by `make fuzz`
def test_bad_file_is_named(tmp_path, files, text):
    for name, (names, rows) in files.items(): write_embeddings(tmp_path/f"{name}.safetensors", names, rows, "test")
    with fails(text):
        store = Embeddings(tmp_path)
        store.stack(store.names)


def test_files_of_two_encoders_are_named(folder):
    write_embeddings(folder/"2.safetensors", ["f"], ROWS[:1], "other")
    with pytest.raises(ValueError, match="holds embeddings of several encoders: test in 0.safetensors, other in 2.safetensors; use those of one"): Embeddings(folder)


def test_other_and_missing_files_are_named(tmp_path):
    (tmp_path/"x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="x.safetensors is not an embeddings file"): Embeddings(tmp_path)
    with pytest.raises(FileNotFoundError, match="no embeddings at no/such/file.safetensors"): Embeddings("no/such/file.safetensors")
