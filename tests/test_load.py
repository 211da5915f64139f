"""A captioner from its run folder, alone or as an ensemble (clipcap.decoding.load)."""
from types import SimpleNamespace

import pytest
import torch

from clipcap.core import make_config
from clipcap.decoding import load
from clipcap.decoding.load import load_ensemble, load_run, load_weights, save_weights
from clipcap.model import generate_from_embeddings, load_model
from clipcap.train import train_run


def lora(seed=42, rank=8):
    "A model with a small mapping network and adapters in GPT-2, all of it moved away from its initial values."
    model = load_model(make_config("mini", gpt2_tuning="lora", lora_rank=rank, mapping_network="linear", seed=seed, device="cpu"), 16)
    with torch.no_grad():
        for p in model.parameters(): p += 0.01*seed*p.requires_grad
    return model.eval()


def trained(model): return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def saved(tmp_path):
    "Two models, and the paths of their weights as epochs 1 and 2."
    models = [lora(seed) for seed in (1, 2)]
    for epoch, model in enumerate(models, 1): save_weights(tmp_path, model, epoch)
    return models, [tmp_path/f"checkpoints/mapping_network_epoch_{n}.pth" for n in (1, 2)]


def test_weights_of_an_epoch_come_back(saved, tmp_path):
    (one, _), paths = saved
    assert {p.name for p in (tmp_path/"checkpoints").iterdir()} == {f"{part}_epoch_{n}.pth" for part in ("gpt2", "mapping_network") for n in (1, 2)}
    load_weights(fresh := lora(), paths[:1])
    assert all(torch.equal(p, trained(one)[name]) for name, p in trained(fresh).items())


@pytest.mark.numerics
def test_several_epochs_are_averaged(saved):
    (one, two), paths = saved
    load_weights(mean := lora(), paths)
    load_weights(same := lora(), paths[1:]*3)
    for name, a in trained(one).items():
        b = trained(two)[name]
        torch.testing.assert_close(trained(mean)[name], (a + b)/2, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(trained(same)[name], b, rtol=1e-5, atol=1e-5)


def test_weights_of_other_adapters_are_named(saved):
    with pytest.raises(ValueError, match="gpt2_epoch_2.pth does not fit this GPT-2"): load_weights(lora(rank=4), saved[1])


@pytest.mark.numerics
def test_run_is_loaded_alone_and_in_an_ensemble(tiny):
    "The ensemble predicts what each of two equal runs predicts."
    for name in ("one", "two"):
        run, config = tiny(12, name, epochs=1)
        train_run(run, config)
    alone, pair = load_run("one", device="cpu"), load_ensemble(["one", "two"], device="cpu")
    assert not pair.training and len(pair.ensemble) == 1 and alone.clip is None
    embeddings = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    assert generate_from_embeddings(embeddings.double(), pair.double(), 8, 1) == generate_from_embeddings(embeddings.double(), alone.double(), 8, 1)


def test_runs_that_can_not_be_loaded_are_named(tiny, outputs):
    tiny(12, "one")
    tiny(12, "other", seed=1)
    with pytest.raises(ValueError, match="there is no run 'none' in"): load_run("none")
    with pytest.raises(ValueError, match="there is no run 'none' in"): load_ensemble(["one", "none"])
    with pytest.raises(ValueError, match="run 'other' was made from other data than run 'one', or has another split"): load_ensemble(["one", "other"])
    with pytest.raises(ValueError, match="run 'one' has no checkpoint"): load_run("one")


def test_ensemble_of_two_vocabularies_is_named(tiny, monkeypatch):
    for name in ("one", "two"): tiny(12, name)
    monkeypatch.setattr(load, "load_run", lambda name, *_: SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: {name: 0})))
    with pytest.raises(ValueError, match="run 'two' has another vocabulary than run 'one'; choose runs with the same gpt2_model"): load_ensemble(["one", "two"])
