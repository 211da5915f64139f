"""Checkpoint files and metrics.jsonl (clipcap.runs.checkpoints)."""
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from clipcap.core import Run
from clipcap.runs.checkpoints import Writer, best_epoch, checkpoint_path, checkpoint_paths, load_checkpoint, read_metrics, save_checkpoint

LINES = [{"epoch": n, "val_loss": loss, "val_cider": cider} for n, loss, cider in ((1, 3.0, 0.1), (2, 2.0, 0.3), (3, 2.5, 0.4), (4, 2.0, 0.4))]


def test_same_state_same_bytes_and_torch_reads_it(tmp_path):
    layer, fresh = nn.Linear(3, 2), nn.Linear(3, 2)
    for name in ("a.pth", "b.pth"): save_checkpoint(tmp_path/name, layer.state_dict())
    assert (tmp_path/"a.pth").read_bytes() == (tmp_path/"b.pth").read_bytes()
    fresh.load_state_dict(torch.load(tmp_path/"a.pth", weights_only=True))
    assert torch.equal(fresh.weight, layer.weight)
    load_checkpoint(tmp_path/"b.pth", again := nn.Linear(3, 2))
    assert torch.equal(again.weight, layer.weight)


def test_full_disk_is_named_and_the_file_stays(tmp_path, monkeypatch):
    def full(*_): raise RuntimeError("no space")
    save_checkpoint(tmp_path/"a.pth", {"x": torch.ones(1)})
    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=12e6))
    with pytest.raises(OSError, match=r"a.pth can't be written \(no space; 12 MB are free on its disk\)"): save_checkpoint(tmp_path/"a.pth", {})
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"] and load_checkpoint(tmp_path/"a.pth") == {"x": torch.ones(1)}


@pytest.mark.parametrize("state, error", [
    ({"weight": torch.zeros(3, 3), "bias": torch.zeros(2)}, "x.pth does not fit this Linear"), ([1], "x.pth does not fit this Linear"),
    ({"a": [{"b": torch.tensor([1., torch.nan])}]}, "x.pth: a.0.b holds NaN or infinity"), ({"w": torch.tensor(torch.inf)}, "x.pth: w holds NaN"),
    ({"x": Path("x")}, "x.pth is not a checkpoint that can be read safely")])  # a pickle that would run code
def test_file_that_is_not_this_modules_is_named(tmp_path, state, error):
    torch.save(state, tmp_path/"x.pth")
    with pytest.raises(ValueError, match=error): load_checkpoint(tmp_path/"x.pth", nn.Linear(3, 2))


def test_missing_checkpoint_stays_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError): load_checkpoint(tmp_path/"x.pth")


@pytest.mark.parametrize("cut", [b'{"epoch": 5, "val_lo', b'{"epoch": 5, "note": "caf\xc3', b"["*9999])  # the last found by `make fuzz`
def test_line_that_a_crash_cut_off_is_left_out(tmp_path, cut):
    assert read_metrics(tmp_path) == []
    (tmp_path/"metrics.jsonl").write_bytes("".join(json.dumps(m) + "\n" for m in LINES).encode() + cut)
    assert read_metrics(tmp_path) == LINES


@pytest.mark.parametrize("odd", ["[1]", "{}", '{"epoch": "1"}'])
def test_line_that_is_no_epoch_is_named(tmp_path, odd):
    (tmp_path/"metrics.jsonl").write_text(f"{json.dumps(LINES[0])}\n{odd}\n")
    with pytest.raises(ValueError, match="metrics.jsonl, line 2: expected an object with the number of an epoch"): read_metrics(tmp_path)


def test_best_epoch_is_the_first_of_the_best():
    assert (best_epoch(LINES), best_epoch(LINES, "cider")) == (2, 3)
    rewarded = [{"epoch": n, "val_cider": cider, "reward": 1.} for n, cider in ((5, 0.2), (6, 0.3))]
    assert best_epoch([*LINES, *rewarded]) == 6  # after finetune/scst, its epochs alone
    with pytest.raises(ValueError, match="best_by='cider', but metrics.jsonl has no val_cider"): best_epoch([{"epoch": 1, "val_loss": 1.}], "cider")


@pytest.fixture
def run(tmp_path):
    "A run with checkpoints of epochs 2 and 10, and metrics of ten epochs, the second the best."
    run = Run("example", tmp_path)
    for n in (2, 10): save_checkpoint(run.path/f"checkpoints/mapping_network_epoch_{n}.pth", {})
    run.update(config={"best_by": "loss"})
    (run.path/"metrics.jsonl").write_text("".join(json.dumps({"epoch": n, "val_loss": abs(n - 2.)}) + "\n" for n in range(1, 11)))
    return run


@pytest.mark.parametrize("epoch, found", [(None, [10]), ("last", [10]), (2, [2]), ("best", [2]), ("average", [2, 10])])
def test_checkpoints_are_found(run, epoch, found):
    assert [p.name for p in checkpoint_paths(run, epoch)] == [f"mapping_network_epoch_{n}.pth" for n in found]
    assert checkpoint_path(run, epoch) == checkpoint_paths(run, epoch)[-1]


def test_missing_epoch_and_missing_training_are_named(run, tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint of epoch 3; there are \[2, 10\]"): checkpoint_path(run, 3)
    with pytest.raises(ValueError, match="run 'empty' has no checkpoint; train it first: papermill nbs/03_train.ipynb"): checkpoint_path(Run("empty", tmp_path))


@pytest.mark.parametrize("beside", [False, True])
def test_a_writer_writes_in_order_what_was_there_when_it_was_asked(beside):
    written, state = [], {"w": torch.zeros(2)}
    with Writer(beside) as write:
        for n in range(4):
            write(lambda given: written.append(given["w"].tolist()), state)
            state["w"] += 1
    assert written == [[float(n)]*2 for n in range(4)]


@pytest.mark.parametrize("beside", [False, True])
def test_a_writer_raises_what_its_work_raised(beside):
    def fail(): raise OSError("the disk is full")
    with pytest.raises(OSError, match="the disk is full"), Writer(beside) as write: write(fail)
    with pytest.raises(OSError, match="the disk is full"), Writer(beside) as write: write(fail), write(print)
    with pytest.raises(KeyboardInterrupt), Writer(beside) as write:  # what was begun is finished first
        write([].append, 1)
        raise KeyboardInterrupt
