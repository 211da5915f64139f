"""Self-critical training (clipcap.finetune.scst)."""
import itertools
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_tiny
from transformers import GPT2Config, GPT2LMHeadModel

from clipcap.core import check_earlier, make_config, open_run
from clipcap.data import FlickrDataset, load_data
from clipcap.decoding.load import load_run
from clipcap.finetune import scst
from clipcap.finetune.scst import (CiderReward, advantages, image_batches, plot_rewards, sample_captions, sampled_losses, scst_loss, scst_run,
                                   starting_epoch, train_scst, training_stages)
from clipcap.model import ClipCapModel
from clipcap.networks.mapping import LinearMapping
from clipcap.networks.packing import pack_attention
from clipcap.runs.checkpoints import checkpoint_path, read_metrics, save_checkpoint
from clipcap.runs.files import hash_file
from clipcap.scoring.metrics import cider
from clipcap.scoring.tokenization import tokenize
from clipcap.train import train_run, trained_so_far, validation_cider

END, START, PAD = 0, 1, 2
EVERY = [[START, *c] for length in (1, 2, 3) for c in itertools.product(range(5), repeat=length)
         if END not in c[:-1] and (c[-1] == END or length == 3)]  # captions of at most four tokens
PADDED, LENGTHS = torch.tensor([c + [PAD]*(4 - len(c)) for c in EVERY]), torch.tensor([len(c) for c in EVERY])
CONFIG = make_config("mini", max_length=4, scst_samples=4)


@pytest.fixture(scope="module")
def references(scene_captions): return {n: list(c) for n, c in list(scene_captions.groupby("image").caption)[:40]}


@pytest.mark.parametrize("batch", [3, 40])
def test_reward_is_cider_of_the_whole_split_in_any_batches(references, batch):
    names = list(references)
    captions = {n: references[other][0].upper() + "  " for n, other in zip(names, names[1:] + names[:1])}  # of the next image
    whole = cider({n: words[0] for n, words in tokenize({n: [c] for n, c in captions.items()}).items()}, tokenize(references))["cider"].images
    reward = CiderReward(references)
    found = [reward(part, [[references[n][-1], captions[n]] for n in part]) for part in (names[k:k + batch] for k in range(0, 12, batch))]  # (I, 2)
    np.testing.assert_allclose(np.concatenate(found)[:12, 1], whole[:12], atol=1e-9)
    assert (np.concatenate(found) @ [1, -1] > 0).all()  # an image's own caption is worth more


def test_unknown_words_are_worth_nothing(references):
    reward = CiderReward(references)
    known = len(reward.scorer.document_frequency)
    assert not reward([*references][:1], [["", "qzxj vqqk"]]).any()
    assert len(reward.scorer.document_frequency) == known
    with pytest.raises(ValueError, match="the training split has 1, give it at least two"): CiderReward({"a": ["a dog"]})


@pytest.fixture
def toy():
    "A model with five tokens, and two images."
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=5, n_positions=8, n_embd=8, n_layer=1, n_head=2, initializer_range=0.5, bos_token_id=START, eos_token_id=END)).requires_grad_(False)
    def read(ids, skip_special_tokens=True): return [" ".join(map(str, row)) for row in ids.tolist()]
    model = ClipCapModel(pack_attention(gpt2), SimpleNamespace(bos_token_id=START, eos_token_id=END, pad_token_id=PAD, batch_decode=read), LinearMapping(3, 8, 2))
    return model.eval(), torch.randn(2, 3)


def log_probabilities(model, photo): return -sampled_losses(model, photo[None], PADDED, (torch.arange(4) < LENGTHS[:, None]).long())


@pytest.mark.numerics
def test_captions_are_sampled_as_often_as_the_model_says(toy):
    model, photos = toy
    with torch.no_grad(): p = torch.stack([log_probabilities(model, photo) for photo in photos]).exp()  # (2, 85)
    assert len(EVERY) == 1 + 4 + 4*4*5 and torch.allclose(p.sum(1), torch.ones(2), atol=1e-4)
    torch.manual_seed(1)
    ids, mask = sample_captions(model, photos, replace(CONFIG, scst_samples=20_000))
    place = {tuple(c): k for k, c in enumerate(PADDED.tolist())}
    which = torch.tensor([place[tuple(c)] for c in ids.tolist()]).view(2, -1)
    frequency = torch.stack([row.bincount(minlength=len(EVERY)) for row in which])/20_000
    assert (frequency - p).abs().sum(1).max()/2 < 0.03  # total variation; about 0.01 is expected
    assert mask.sum(1).equal(LENGTHS[which.flatten()])
    sampled = [c for c, n in zip(EVERY, frequency.sum(0)) if n]  # a [PAD] that was sampled counts, and no end token is needed
    assert any(PAD in c for c in sampled) and any(len(c) < 4 for c in sampled) and any(END not in c for c in sampled)


@pytest.fixture
def worth(): return torch.rand(2, len(EVERY), dtype=torch.float64, generator=torch.Generator().manual_seed(2))**3


def reward_of(worth):
    "The reward function of the two images, which take turns."
    value = [{" ".join(map(str, c)): w for c, w in zip(PADDED.tolist(), row)} for row in worth.tolist()]
    def filled(text): return " ".join((text.split() + [str(PAD)]*4)[:4])
    return lambda captions: np.array([[value[n % 2][filled(c)] for c in texts] for n, texts in enumerate(captions)])


def expected_rewards(model, photos, worth): return torch.stack([(log_probabilities(model, photo).exp()*row).sum() for photo, row in zip(photos, worth)])


def gradient(model):
    found = torch.cat([p.grad.flatten() for p in model.mapping_network.parameters()])
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.numerics
def test_gradient_is_that_of_the_expected_reward(toy, worth):
    model, photos = toy
    expected = expected_rewards(model, photos, worth).mean()
    (-expected).backward()
    exact, means = gradient(model), []
    torch.manual_seed(3)
    for _ in range(10):
        loss, mean = scst_loss(model, photos.repeat(1000, 1), reward_of(worth), CONFIG)
        (loss/10).backward()
        means.append(mean)
    assert all(p.grad is None for p in model.gpt2.parameters())
    estimate = gradient(model)
    assert torch.nn.functional.cosine_similarity(exact, estimate, dim=0) > 0.98
    assert 0.93 < estimate.norm()/exact.norm() < 1.07 and abs(np.mean(means) - expected.item()) < 0.005


def test_equal_rewards_change_nothing(toy):
    model, photos = toy
    loss, mean = scst_loss(model, photos, lambda captions: np.full((2, 4), 0.3), CONFIG)
    loss.backward()
    assert not gradient(model).any() and mean == pytest.approx(0.3)
    assert advantages(torch.tensor([[1., 2., 6.]])).tolist() == [[1 - 4, 2 - 3.5, 6 - 1.5]]


@pytest.mark.numerics
def test_expected_reward_rises(toy, worth):
    (model, photos), reward = toy, reward_of(worth)
    with torch.no_grad(): start = expected_rewards(model, photos, worth)
    optimizer = torch.optim.AdamW(model.mapping_network.parameters(), 0.03)
    torch.manual_seed(4)
    for _ in range(60):
        scst_loss(model, photos.repeat(8, 1), reward, CONFIG)[0].backward()
        optimizer.step(); optimizer.zero_grad()
    with torch.no_grad(): assert (expected_rewards(model, photos, worth) > start + 0.1).all()


# --- a run

SETTINGS = dict(images=20, epochs=2, keep="all", best_by="cider", num_beams=1, max_length=12, start_token="given", num_layers=1, learning_rate=3e-3,
                batch_size=6, scst_learning_rate=1e-3, scst_samples=2, device="cpu")


@pytest.fixture(scope="module")
def trained_tiny(tmp_path_factory, scene_captions):
    "A folder of runs with the run `tiny`, trained for two epochs."
    folder = tmp_path_factory.mktemp("scst")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPCAP_OUTPUTS", str(folder/"outputs"))
        run, config = make_tiny(folder/"outputs", scene_captions, **SETTINGS)
        with run.stage("03_train", config, ["01_data"]): train_run(run, config)
    return folder/"outputs"


@pytest.fixture
def run(trained_tiny, outputs):
    "A copy of that run."
    shutil.copytree(trained_tiny, outputs)
    return open_run("tiny")[0]


@pytest.fixture
def config(run): return replace(run.config(), scst_epochs=2)


def files(run): return {p.name: hash_file(p) for p in sorted((run.path/"checkpoints").iterdir())}


def epochs_of(run): return [m["epoch"] for m in read_metrics(run.path)]


def test_epochs_are_numbered_on_and_earlier_checkpoints_stay(run, config):
    before = files(run)
    config = replace(config, scst_epochs=3, keep="best")
    data, model = load_data(run, config), load_run("tiny", device="cpu")
    train_set, val_set = (FlickrDataset(data.split(part), data.embeddings, model.tokenizer, 12, "all") for part in ("train", "val"))
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    curve = train_scst(model, train_set, val_set, config, run.path, {})
    best = curve.epoch[curve.val_cider.idxmax()]
    assert curve.epoch.tolist() == [3, 4, 5] and curve.reward.between(0, 10).all() and curve.train_loss.isna().all()
    assert set(files(run)) == {*before, "scst.pt", *(f"mapping_network_epoch_{n}.pth" for n in {5, best})}
    assert before.items() <= files(run).items()
    assert set(read_metrics(run.path)[-1]) - {"reward"} == set(read_metrics(run.path)[0])
    assert checkpoint_path(run, "best").name == f"mapping_network_epoch_{best}.pth" and checkpoint_path(run).name == "mapping_network_epoch_5.pth"
    assert curve.val_cider.iloc[-1] == validation_cider(model, val_set, config)
    assert all(p.equal(frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert any(p.requires_grad for p in model.parameters()) and files(run)["mapping_network_epoch_5.pth"] != before["mapping_network_epoch_2.pth"]
    order = [[n for batch in image_batches(train_set, config, epoch) for n in batch] for epoch in (2, 2, 3)]
    assert order[0] == order[1] != order[2] and sorted(order[0]) == train_set.images


def test_stopped_run_resumes_to_the_same_bytes(run, config, outputs):
    shutil.copytree(outputs/"tiny", outputs/"whole")
    whole = open_run("whole")[0]
    assert scst_run(whole, config).epoch.tolist() == [3, 4]
    scst_run(run, replace(config, scst_epochs=1))
    (run.path/"checkpoints/mapping_network_epoch_3.pth").unlink()  # lost: written again
    scst_run(run, config)
    assert files(run) == files(whole) and epochs_of(run) == epochs_of(whole) == [1, 2, 3, 4]
    scst_run(run, config, restart="if changed")
    train_run(run, config)  # nothing is left to train
    assert files(run) == files(whole)


def test_without_scst_epochs_nothing_happens(run, config):
    before, off = files(run), replace(config, scst_epochs=0)
    save_checkpoint(run.path/"checkpoints/mapping_network_epoch_3.pth", {})  # killed before `scst.pt` was written
    assert scst_run(run, off).empty and files(run) == before
    assert training_stages(run, off) == ["03_train"]
    with pytest.raises(ValueError, match="run 'tiny' has scst_epochs=2, but is not trained for CIDEr"): training_stages(run, config)


@pytest.mark.parametrize("changes, epoch, text", [
    (dict(scst_learning_rate=0.5), None, "scst.pt was trained with another recipe (scst_learning_rate was 0.001, is 0.5)"),
    (dict(scst_epochs=1), None, "run 'tiny' is trained for CIDEr for 2 epochs, more than scst_epochs=1"),
    (dict(scst_epochs=0), None, "more than scst_epochs=0"),
    (dict(), 1, "(begin was 2, is 1)"),
    (dict(), 3, "epoch=3 is not one of 03_train's, which trained run 'tiny' for 2; choose an earlier one"),
])
def test_another_recipe_is_refused_and_nothing_is_lost(run, config, changes, epoch, text):
    scst_run(run, config)
    before = files(run)
    with pytest.raises(ValueError, match=re.escape(text)): scst_run(run, replace(config, **changes), epoch)
    assert files(run) == before
    assert training_stages(run, config) == ["03_train", "finetune/scst"]
    with pytest.raises(ValueError, match="needs finetune/scst, which is not finished"): check_earlier(run, "04_evaluate", config, training_stages(run, config))


@pytest.mark.parametrize("restart", [True, "if changed"])
def test_restart_puts_away_what_was_made_before(run, config, restart):
    trained = files(run)
    scst_run(run, replace(config, scst_epochs=1))
    assert scst_run(run, replace(config, scst_epochs=1, scst_learning_rate=2e-3), restart=restart).epoch.tolist() == [3]
    assert epochs_of(run) == [1, 2, 3]
    old = run.path/"checkpoints.old"  # the weights of before are set aside
    assert trained_so_far(run.path, "scst.pt")["recipe"]["scst_learning_rate"] == 2e-3
    assert json.loads(torch.load(old/"scst.pt", weights_only=True)["recipe"])["scst_learning_rate"] == config.scst_learning_rate and (old/"mapping_network_epoch_3.pth").is_file()
    scst_run(run, replace(config, scst_epochs=0), restart=restart)
    assert files(run) == trained and epochs_of(run) == [1, 2]


def test_it_begins_from_the_epoch_that_is_asked_for(run, config):
    best = max(read_metrics(run.path), key=lambda m: m["val_cider"])["epoch"]
    assert [starting_epoch(run, config, 2, epoch) for epoch in (None, 1, "best")] == [2, 1, best]
    scst_run(run, replace(config, scst_epochs=1), "best")
    assert trained_so_far(run.path, "scst.pt")["recipe"]["begin"] == best
    assert starting_epoch(run, config, 2, "best") == best  # not of its own epochs


def test_further_training_removes_what_was_made_of_the_old_weights(run, config):
    scst_run(run, config)
    assert train_run(run, replace(config, epochs=3)).epoch.tolist() == epochs_of(run) == [1, 2, 3]
    assert "scst.pt" not in files(run) and checkpoint_path(run).name == "mapping_network_epoch_3.pth"


def test_loss_that_is_not_finite_is_named(run, config, monkeypatch):
    monkeypatch.setattr(scst, "scst_loss", lambda *_: (torch.tensor(float("nan")), 0.))
    with pytest.raises(FloatingPointError, match="not finite in epoch 3, in the batch of scene_.* lower scst_learning_rate"): scst_run(run, config)
    assert epochs_of(run) == [1, 2]


def test_several_processes_are_refused(run, config, monkeypatch):
    monkeypatch.setattr(scst, "PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match="started in 2 processes and trains in one; start it without torchrun"): scst_run(run, config)


def test_figure_starts_with_the_value_before():
    figure, ax = plt.subplots()
    plot_rewards(pd.DataFrame({"epoch": [3, 4], "reward": [0.1, 0.2], "val_cider": [0.5, 0.6]}), 0.4, ax)
    assert [list(line.get_xdata()) for line in ax.lines] == [[3, 4], [2, 3, 4]]
    assert ax.get_title() == "Trained for CIDEr: 0.40 → 0.60 on the validation images"
    plt.close(figure)
