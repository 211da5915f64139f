"""The training step that a GPU records: on the CPU the same function, without recording."""
import dataclasses
import json

import pytest
import torch
from test_train import config, make_set, trained  # noqa: F401

from clipcap import train as training
from clipcap.core import open_run
from clipcap.networks.graphs import Recorded
from clipcap.optim.captured import CapturedGradient, NotFinite, can_capture, pad_batch
from clipcap.optim.processes import start_accelerator
from clipcap.runs.checkpoints import read_metrics
from clipcap.runs.files import hash_file
from clipcap.train import compute_gradient, epoch_loader, train_run


def gradients(model): return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.numerics
@pytest.mark.parametrize("sampling, smoothing, size, group", [("random", 0., 7, 1), ("random", 0.1, 5, 2), ("all", 0., 9, 1), ("all", 0.1, 7, 3)])
def test_the_gradient_is_that_of_the_plain_loop(make_set, config, mini_model, sampling, smoothing, size, group):
    "Compared in float64: batches of several sizes, of which the last is not full, one or several to a step."
    model, accelerator = mini_model.double(), start_accelerator()
    batches = list(epoch_loader(make_set("train", sampling), dataclasses.replace(config, batch_size=size), 1))
    for batch in batches: batch["embedding"] = batch["embedding"].double()
    captured = CapturedGradient(model, size, config.max_length, smoothing)
    for start in range(0, len(batches), group):
        step = batches[start:start + group]
        model.zero_grad()
        total, tokens = compute_gradient(model, step, accelerator, smoothing)
        wanted = {name: None if g is None else g.clone() for name, g in gradients(model).items()}
        model.zero_grad()
        found, count = captured(step)
        assert count == tokens and found.item() == pytest.approx(total, rel=1e-9)
        for name, gradient in gradients(model).items():
            if wanted[name] is None: assert gradient is None
            else: torch.testing.assert_close(gradient, wanted[name], rtol=1e-8, atol=1e-10)
    assert len({len(b["input_ids"]) for b in batches}) == 2  # the last is smaller


def test_batches_have_few_shapes(make_set, config):
    for sampling in ("random", "all"):
        made = [pad_batch(b, 8, 40) for b in epoch_loader(make_set("train", sampling), dataclasses.replace(config, batch_size=8), 1)]
        assert {b["input_ids"].shape[0] for b in made} == {8} and all(b["input_ids"].shape[1] % 8 == 0 and len(b["embedding"]) == 8 for b in made)
    short = {**made[0], **{name: made[0][name][:, :9] for name in ("input_ids", "attention_mask")}}
    assert pad_batch(short, 8, 13)["input_ids"].shape[1] == 13  # not more than the positions that there are


def test_a_loss_that_is_not_finite_is_found_later_and_its_batch_named(make_set, config, mini_model):
    batches = list(epoch_loader(make_set("train", "random"), dataclasses.replace(config, batch_size=4), 1))
    batches[2]["embedding"][1] = torch.nan
    captured = CapturedGradient(mini_model, 4, config.max_length, every=4)
    for batch in batches[:3]: captured([batch])
    with pytest.raises(NotFinite) as found: captured([batches[3]])
    assert found.value.batch["image"] == batches[2]["image"] and found.value.losses.isfinite().tolist() == [True, False, True, True]
    captured(batches[:1])
    captured.check()



def test_the_plain_loop_is_kept_where_there_is_nothing_to_gain(mini_model, config):
    assert not can_capture(mini_model, config, 1)  # a CPU


def test_a_run_resumes_to_the_same_bytes(tiny, monkeypatch):
    "As a GPU trains it, here without recording."
    monkeypatch.setattr(training, "can_capture", lambda *of: True)
    whole, _ = trained(tiny, "whole", epochs=3)
    halves, _ = trained(tiny, "halves", epochs=1)
    train_run(*open_run("halves", epochs=3))
    def weights(run): return [hash_file(run.path/f"checkpoints/mapping_network_epoch_{n}.pth") for n in (3,)]
    assert weights(whole) == weights(halves)


def test_a_run_that_is_not_finite_stops_at_the_end_of_its_epoch_and_lists_the_batch(tiny, monkeypatch):
    monkeypatch.setattr(training, "can_capture", lambda *of: True)
    run, _ = trained(tiny, "wild", epochs=1)
    with pytest.raises(FloatingPointError, match="not finite in epoch 2"):
        monkeypatch.setattr(training, "epoch_loader", lambda *of: ({**b, "embedding": b["embedding"]*torch.inf} for b in epoch_loader(*of)))
        train_run(*open_run("wild", epochs=2))
    assert json.loads((run.path/"nonfinite_batch.json").read_text())["epoch"] == 2 and len(read_metrics(run.path)) == 1


def test_what_can_not_be_recorded_runs_without():
    "Here there is no GPU to record on."
    double = Recorded(lambda x: 2*x, torch.device("cpu"))
    double.records, double._to_device = True, lambda tensor: tensor
    with pytest.warns(UserWarning, match="can't be recorded as a CUDA graph"): assert double(x=torch.ones(2)).tolist() == [2, 2]
    assert double(x=torch.zeros(2)).tolist() == [0, 0]  # and says so once
