"""Batches, validation, the step, the loop and its optional parts (clipcap.train)."""
import dataclasses
import json
import re

import matplotlib.pyplot as plt
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

from clipcap.core import open_run
from clipcap.data import FlickrDataset, load_data, prepare_data
from clipcap.decoding.load import load_run
from clipcap.formats.embeddings import Embeddings, write_embeddings
from clipcap.formats.store import StoreWriter
from clipcap.model import generate_from_embeddings, load_model
from clipcap.optim.processes import start_accelerator
from clipcap.runs.checkpoints import checkpoint_path, load_checkpoint, read_metrics
from clipcap.scoring.metrics import score
from clipcap.reporting.watch import watch
from clipcap.train import (compute_gradient, epoch_loader, main, plot_losses, train, train_run, train_stage, validate, validation_cider,
                           validation_loss)


def trained(tiny, name, images=30, **changes):
    "A small run, trained for one epoch of one step unless told otherwise: run, metrics."
    run, config = tiny(images, name, **{"epochs": 1, "dropout": 0.0, **changes})
    return run, train_run(run, config)


def weights_of(run, epoch=None): return load_checkpoint(checkpoint_path(run, epoch))


def parameters(optimizer): return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.fixture
def make_set(tiny, tokenizer):
    "A function that makes a data set of 30 images: `make_set(part, sampling)`."
    run, config = tiny()
    data = load_data(run, config)
    return lambda part, sampling: FlickrDataset(data.split(part), data.embeddings, tokenizer, config.max_length, sampling, config.seed)


@pytest.fixture
def config(tiny): return tiny()[1]


# --- batches and validation

@pytest.mark.parametrize("sampling", ["random", "all"])
def test_an_epoch_is_known_by_its_number(make_set, config, sampling):
    items, config = make_set("train", sampling), dataclasses.replace(config, batch_size=12)
    def batches(epoch): return list(epoch_loader(items, config, epoch))
    one, again, two = batches(1), batches(1), batches(2)
    assert [b["image"] for b in one] == [b["image"] for b in again] != [b["image"] for b in two]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, again))
    assert sorted(n for b in two for n in b["image"]) == sorted(image for image, _ in items.items)  # each item once
    if sampling == "all": assert max(len(b["embedding"]) for b in one) <= 4  # 12 captions, 5 per image


@pytest.mark.numerics
def test_validation_loss_does_not_depend_on_batches(make_set, mini_model):
    val, model = make_set("val", "all"), mini_model.double()
    def loss(batch_size, part=val): return validation_loss(model, ({**b, "embedding": b["embedding"].double()} for b in DataLoader(part, batch_size, collate_fn=val.collate)))
    model.train()
    assert loss(4) == pytest.approx(loss(15), abs=1e-9) and model.training
    model.eval()
    assert loss(4) == pytest.approx(loss(15), abs=1e-9) and not model.training


def test_validation_cider_is_the_score_of_the_captions(make_set, config, mini_model):
    val, config = make_set("val", "all"), dataclasses.replace(config, num_beams=1, max_length=8, best_by="cider")
    captions = dict(zip(val.images, generate_from_embeddings(val.embeddings.stack(val.images), mini_model, 8, 1)))
    expected = score(captions, val.references, ["cider"]).corpus["cider"]
    assert validation_cider(mini_model, val, config) == pytest.approx(expected, abs=1e-9)
    assert validate(mini_model, val, config).keys() == {"val_loss", "val_cider"}


# --- one step

@pytest.mark.numerics
def test_gradient_of_several_batches_is_that_of_one_large_batch(make_set, config, mini_model):
    "Compared in float64; batches differ in size and in the length of their captions."
    model, accelerator = mini_model.double(), start_accelerator()
    def gradient(batch_size):
        batches = list(epoch_loader(make_set("train", "random"), dataclasses.replace(config, batch_size=batch_size), 1))
        for batch in batches: batch["embedding"] = batch["embedding"].double()
        model.zero_grad()
        total, tokens = compute_gradient(model, batches, accelerator)
        return len(batches), total/tokens, torch.cat([p.grad.flatten() for p in model.mapping_network.parameters()])
    (several, loss, parts), (one, expected, whole) = gradient(7), gradient(24)
    assert (several, one) == (4, 1) and loss == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(parts, whole, rtol=1e-8, atol=1e-10)


def test_loss_that_is_not_finite_is_named_and_its_step_is_not_taken(tiny):
    run, metrics = trained(tiny, "wild")
    config = open_run("wild", epochs=2)[1]
    data, model, before = load_data(run, config), load_model(config, 16), (run.path/"checkpoints/last.pt").read_bytes()
    rows = data.split("train")
    write_embeddings(run.path/"huge.safetensors", rows.image.unique().tolist(), torch.full((rows.image.nunique(), 16), 3e38), "random")
    huge = FlickrDataset(rows, Embeddings(run.path/"huge.safetensors"), model.tokenizer)
    recipe = json.loads(load_checkpoint(run.path/"checkpoints/last.pt")["recipe"])
    with pytest.raises(FloatingPointError, match="the loss is not finite in epoch 2, in the batch of .* …: all are listed in"):
        train(model, huge, huge, config, run.path, recipe)
    listed = json.loads((run.path/"nonfinite_batch.json").read_text())
    assert listed["epoch"] == 2 and {row["image"] for row in listed["batch"]} == set(rows.image) and {row["loss"] for row in listed["batch"]} == {"nan"}
    assert (run.path/"checkpoints/last.pt").read_bytes() == before and len(read_metrics(run.path)) == 1


# --- the loop

@pytest.mark.numerics
def test_four_captions_are_learned_nearly_by_heart(tiny, scene_captions):
    run, config = tiny(10, dropout=0.0)
    model = load_model(config, 16)
    four = FlickrDataset(scene_captions.groupby("image").head(1)[:4], load_data(run, config).embeddings, model.tokenizer)
    curve = train(model, four, four, dataclasses.replace(config, epochs=12, batch_size=1), run.path, {})
    assert curve.val_loss.iloc[-1] < curve.train_loss.iloc[0]/2 and curve.epoch.tolist() == list(range(1, 13))
    # one step per epoch: an epoch begins with the loss that the one before ended with
    steps = train(load_model(config, 16), four, four, dataclasses.replace(config, epochs=4, batch_size=4), run.path/"steps", {})
    assert steps.train_loss[1:].tolist() == pytest.approx(steps.val_loss[:-1].tolist(), abs=1e-4)


def test_accumulation_takes_fewer_steps_and_the_schedule_ends_with_the_last(tiny):
    steps = []
    hook = register_optimizer_step_pre_hook(lambda *_: steps.append(1))
    _, curve = trained(tiny, "twice", batch_size=7, accumulate=2, schedule="linear", epochs=2)  # 24 images: 2 + 2 batches per epoch, the last small
    hook.remove()
    assert len(steps) == 2*2 and curve.learning_rate.iloc[-1] == pytest.approx(0, abs=1e-12)


def test_gradient_is_clipped_to_its_norm(tiny):
    norms = {}
    for norm in (0., 0.01):
        def look(optimizer, *_): norms[norm] = torch.cat([p.grad.flatten() for p in parameters(optimizer)]).norm().item()
        hook = register_optimizer_step_pre_hook(look)
        trained(tiny, f"clipped-{norm}", clip_norm=norm)
        hook.remove()
    assert norms[0.] > 0.02 and norms[0.01] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.numerics
def test_average_is_kept_and_training_continues_from_the_weights(tiny):
    steps = []
    def remember(optimizer, *_): steps.append([p.detach().clone() for p in parameters(optimizer)])
    averaged, _ = trained(tiny, "averaged", ema=0.9, batch_size=8, epochs=2)
    hooks = [register(remember) for register in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook)]
    plain, _ = trained(tiny, "plain", batch_size=8, epochs=2)
    for hook in hooks: hook.remove()
    assert len(steps) == 2*2*3  # before and after 2 epochs of 3 steps
    by_hand = steps[0]
    for after in steps[1::2]: by_hand = [0.9*a + 0.1*b for a, b in zip(by_hand, after)]
    state, kept = load_checkpoint(averaged.path/"checkpoints/last.pt"), weights_of(averaged)
    for mean, weight in zip(by_hand, load_run("averaged").mapping_network.parameters()): torch.testing.assert_close(weight, mean, rtol=1e-4, atol=1e-5)
    for name, weight in weights_of(plain).items():
        assert torch.equal(kept[name], state["average"][f"mapping_network.{name}"]) and torch.equal(state["mapping_network"][name], weight)
    assert any((kept[name] - weight).abs().max() > 1e-4 for name, weight in weights_of(plain).items())


@pytest.mark.numerics
def test_label_smoothing_is_in_the_training_loss_alone(tiny):
    (_, smooth), (_, sharp) = (trained(tiny, f"smooth-{s}", label_smoothing=s, learning_rate=0.) for s in (0.2, 0.))
    assert smooth.val_loss[0] == pytest.approx(sharp.val_loss[0], abs=1e-5) and abs(smooth.train_loss[0] - sharp.train_loss[0]) > 0.01


@pytest.mark.numerics
@pytest.mark.parametrize("shape, network", [((16,), "transformer"), ((5, 16), "grid")])
def test_scaling_is_of_the_training_photos_and_in_the_checkpoint(tiny, outputs, shape, network):
    tiny()
    names = Embeddings(outputs/"tiny-30.safetensors").names
    write_embeddings(outputs/"seen.safetensors", names, torch.randn(len(names), *shape, generator=torch.Generator().manual_seed(0)), "random")
    run, config = tiny(name="scaled", embeddings=str(outputs/"seen.safetensors"), embedding_scaling="standard", mapping_network=network, epochs=1)
    train_run(run, config)
    data = load_data(run, config)
    rows = data.embeddings.stack(data.split("train").image.unique()).flatten(0, -2)  # (N, 16), or (N*5, 16)
    torch.testing.assert_close(weights_of(run)["embedding_mean"], rows.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(load_run("scaled").mapping_network.embedding_std.cpu(), rows.std(0, correction=0), rtol=1e-4, atol=1e-4)


def test_cider_of_a_single_validation_photo_is_refused(tiny):
    with pytest.raises(ValueError, match="best_by='cider' needs at least 2 validation photos, and run 'tiny' has 1; use best_by='loss'"):
        train_run(*tiny(12, best_by="cider"))


@pytest.mark.parametrize("shape, network, fix", [((16,), "grid", "use features='grid'"), ((5, 16), "transformer", "use mapping_network='grid'")])
def test_embeddings_that_do_not_fit_the_network_are_named(tiny, outputs, shape, network, fix):
    tiny()
    names = Embeddings(outputs/"tiny-30.safetensors").names
    write_embeddings(outputs/"seen.safetensors", names, torch.zeros(len(names), *shape), "random")
    misfit = tiny(name="misfit", embeddings=str(outputs/"seen.safetensors"), mapping_network=network)
    with pytest.raises(ValueError, match=fix): train_run(*misfit)


def test_training_stops_when_two_epochs_have_not_helped(tiny):
    "Random embeddings teach nothing about other photos, so the validation loss soon rises."
    _, curve = trained(tiny, "patient", 12, epochs=6, batch_size=4, learning_rate=3e-3, caption_sampling="all", patience=2)
    assert len(curve) < 6 and curve.val_loss.idxmin() == len(curve) - 3


@pytest.mark.numerics
def test_store_is_the_same_data_in_another_order(tiny, outputs):
    "Without learning and dropout, an epoch over all captions has the same losses, however it is ordered and read."
    changes = dict(caption_sampling="all", embedding_scaling="standard", learning_rate=0.)
    table, expected = trained(tiny, "table", 60, **changes)
    data, root = load_data(*open_run("table")), outputs/"store"
    with StoreWriter(root, "random", torch.float32, shard_rows=25) as writer:
        names, captions, split = zip(*((name, rows.caption.tolist(), rows.split.iloc[0]) for name, rows in data.captions.groupby("image")))
        writer.add(list(names), data.embeddings.stack(names), list(captions), list(split))
    run, config = open_run("store", "mini", data_root=str(root), epochs=1, dropout=0.0, **changes)
    with run.stage("01_data", config) as notes: notes.update(prepare_data(run, config))
    curve = train_run(run, config)
    for column in ("train_loss", "val_loss"): assert curve[column][0] == pytest.approx(expected[column][0], abs=1e-4)
    for statistic in ("embedding_mean", "embedding_std"): torch.testing.assert_close(weights_of(run)[statistic], weights_of(table)[statistic], rtol=1e-4, atol=1e-4)


# --- around the loop

def test_losses_are_plotted_and_a_finished_run_is_watched_no_longer(tiny):
    run, metrics = trained(tiny, "watched", epochs=2)
    figure, ax = plt.subplots()
    plot_losses(metrics, ax)
    assert re.match(r"Validation loss is lowest after epoch \d: \d\.\d\d nats per token", ax.get_title())
    assert watch(run, every=60).epoch.tolist() == [1, 2]
    plt.close(figure)


def test_command_prints_a_line_per_epoch_and_names_mistakes(tiny, capsys):
    tiny(12, "made")
    main(["epochs=2", "keep=all"], run="made")
    assert re.findall(r"^\d+ ", capsys.readouterr().out, re.M) == ["1 ", "2 "]
    assert open_run("made")[0].stage_entry("03_train")["processes"] == 1
    with pytest.raises(SystemExit, match="clipcap.train: unknown field 'epoch'; did you mean 'epochs'"): main(["epoch=2"], run="made")


def test_command_that_does_not_find_the_other_processes_ends_in_one_line(outputs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="^clipcap.train: 2 processes were started .WORLD_SIZE.*; use torchrun with one process per GPU, or device=cpu$"):
        main(["device=cpu"], run="new")
    assert not outputs.exists()


def test_the_stage_records_epochs_and_the_last_validation_loss(tiny):
    run, config = tiny(epochs=3, num_layers=1)
    metrics = train_stage(run.name)
    entry = run.stage_entry("03_train")
    assert (entry["epochs"], entry["processes"]) == (3, 1) and entry["final_val_loss"] == metrics.val_loss.iloc[-1] != metrics.val_loss.iloc[0]
