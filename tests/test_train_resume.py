"""Stopped at any moment and resumed: the same bytes (clipcap.train)."""
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from clipcap import train as module
from clipcap.core import open_run
from clipcap.data import prepare_data
from clipcap.decoding.load import load_run
from clipcap.formats.embeddings import Embeddings, write_embeddings
from clipcap.formats.store import StoreWriter
from clipcap.model import trained_weights
from clipcap.runs.checkpoints import best_epoch, checkpoint_path, load_checkpoint, read_metrics, save_checkpoint
from clipcap.runs.files import hash_file
from clipcap.reporting.watch import watch
from clipcap.train import forget_later, recipe_changes, train_run, trained_so_far

EVERYTHING = dict(epochs=3, schedule="cosine", warmup=0.2, ema=0.9, accumulate=2, batch_size=6, clip_norm=1., label_smoothing=0.1,
                  embedding_noise=0.1, embedding_dropout=0.1, embedding_scaling="standard", dropout=0.1, mapping_network="mlp", gpt2_tuning="lora")


def checkpoints(run, folder="checkpoints"):
    "Hash of each file in the run's checkpoint folder."
    return {p.name: hash_file(p) for p in sorted((run.path/folder).glob("*.pt*"))}


def files_of(*epochs): return {"last.pt", *(f"mapping_network_epoch_{n}.pth" for n in epochs)}


def replace(config, **changes): return dataclasses.replace(config, **changes)


@pytest.fixture
def whole(tiny):
    "A run of three epochs: run, configuration."
    run, config = tiny(name="whole", epochs=3)
    train_run(run, config)
    return run, config


# --- the same bytes

def test_two_epochs_and_one_more_are_three(whole, tiny):
    parts, config = tiny(name="parts", epochs=2)
    train_run(parts, config)
    curve = train_run(parts, replace(config, epochs=3))
    assert checkpoints(parts) == checkpoints(whole[0]) and curve.epoch.tolist() == [1, 2, 3]
    assert {*checkpoints(parts)} == files_of(best_epoch(read_metrics(parts.path)), 3)


def test_another_seed_is_another_run(whole, tiny):
    other, config = tiny(name="other", epochs=3, seed=7)
    train_run(other, config)
    name = "mapping_network_epoch_3.pth"
    assert checkpoints(other)[name] != checkpoints(whole[0])[name]


def test_keeping_all_checkpoints_changes_no_weight(whole, tiny):
    every, config = tiny(name="every", epochs=3, keep="all")
    train_run(every, config)
    assert {*checkpoints(every)} == files_of(1, 2, 3) and checkpoints(whole[0]).items() <= checkpoints(every).items()


def make_grid(tiny, outputs, name):
    "A run whose photos have five vectors each: run, configuration."
    names = Embeddings(tiny()[1].embeddings).names
    write_embeddings(outputs/"grid.safetensors", names, torch.randn(30, 5, 16, generator=torch.Generator().manual_seed(0)), "random")
    return tiny(name=name, embeddings=str(outputs/"grid.safetensors"), mapping_network="grid", embedding_scaling="standard")


def make_store(tiny, outputs, name):
    "A run that reads its training photos from a store: run, configuration."
    if not (outputs/"store").is_dir():
        with StoreWriter(outputs/"store", "random", torch.float32, shard_rows=25) as writer:
            names = [f"photo-{n:02}" for n in range(40)]
            writer.add(names, torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), [[f"photo {n} of a dog", "a cat"] for n in range(40)],
                       ["train"]*32 + ["val"]*4 + ["test"]*4)
    run, config = open_run(name, "mini", data_root=str(outputs/"store"), caption_sampling="all", embedding_scaling="standard")
    with run.stage("01_data", config) as notes: notes.update(prepare_data(run, config))
    return run, config


@pytest.mark.parametrize("make", [make_grid, make_store])
def test_patches_and_a_store_resume_like_any_other(tiny, outputs, make):
    (whole, config), (parts, _) = (make(tiny, outputs, name) for name in ("whole", "parts"))
    train_run(whole, replace(config, epochs=2))
    for epochs in (1, 2): train_run(parts, replace(config, epochs=epochs))
    assert checkpoints(parts) == checkpoints(whole)


@pytest.fixture
def interrupted(tiny, monkeypatch):
    "A run with all options, stopped in its second epoch, and the same run not stopped: stopped, whole, configuration."
    whole, config = tiny(name="whole-recipe", **EVERYTHING)
    train_run(whole, config)
    parts, config = tiny(name="parts-recipe", **EVERYTHING)
    real = module.finish_epoch
    def stop(*args, **more): real(*args, **more); raise KeyboardInterrupt
    monkeypatch.setattr(module, "finish_epoch", stop)
    with pytest.raises(KeyboardInterrupt): train_run(parts, config)
    monkeypatch.setattr(module, "finish_epoch", real)
    return parts, whole, config


def test_all_options_at_once_resume_and_lost_weights_are_written_again(interrupted, monkeypatch):
    parts, whole, config = interrupted
    later, seen, real = parts.path/"checkpoints/mapping_network_epoch_2.pth", [], module.finish_epoch
    shutil.copy(parts.path/"checkpoints/mapping_network_epoch_1.pth", later)  # of an epoch that did not end
    def look(*args, **more): seen.append(later.is_file()); real(*args, **more)
    monkeypatch.setattr(module, "finish_epoch", look)
    train_run(parts, config)
    assert seen == [False, True] and checkpoints(parts) == checkpoints(whole)
    (parts.path/"checkpoints/mapping_network_epoch_3.pth").unlink()
    train_run(parts, config)
    assert checkpoints(parts) == checkpoints(whole)


def test_what_is_tuned_of_gpt2_comes_back_with_the_run(interrupted):
    _, whole, _ = interrupted
    last, tuned = trained_so_far(whole.path), trained_weights(load_run("whole-recipe", device="cpu").gpt2)
    assert all(torch.equal(weight, last["average"][f"gpt2.{name}"]) for name, weight in tuned.items())
    assert all(weight.abs().max() > 0 for name, weight in tuned.items() if "lora_B" in name)
    assert {n.replace("gpt2", "mapping_network") for n in checkpoints(whole) if "gpt2" in n} == {n for n in checkpoints(whole) if "mapping" in n}


def test_damaged_last_checkpoint_and_another_number_of_epochs_are_named(interrupted):
    parts, _, config = interrupted
    state, path = trained_so_far(parts.path), parts.path/"checkpoints/last.pt"
    for part in ("mapping_network", "gpt2", "average", "optimizer"):  # a tensor in place of many
        save_checkpoint(path, {**state, "recipe": json.dumps(state["recipe"]), part: torch.zeros(2)})
        with pytest.raises(ValueError, match=r"last.pt does not fit this model \("): train_run(parts, config)
    for recipe in ("x", "[1]"):
        save_checkpoint(path, {**state, "recipe": recipe})
        with pytest.raises(ValueError, match=r"last.pt is not a file that a run can resume from \("): train_run(parts, config)
    save_checkpoint(path, {**state, "recipe": json.dumps(state["recipe"])})
    with pytest.raises(ValueError, match="epochs was 3, is 4"): train_run(parts, replace(config, epochs=4))  # the learning rate depends on it


# --- another recipe

def test_changed_recipe_is_refused_and_restart_begins_anew(whole):
    (run, config), first = whole, checkpoints(whole[0])
    changed, shorter = replace(config, learning_rate=0.5), replace(config, epochs=1)
    with pytest.raises(ValueError, match="learning_rate was 0.001, is 0.5"): train_run(run, changed)
    with pytest.raises(ValueError, match="is trained for 3 epochs, more than epochs=1"): train_run(run, shorter)
    assert len(train_run(run, config, restart="if changed")) == 3 and checkpoints(run) == first  # nothing has changed
    assert train_run(run, replace(changed, epochs=1), restart="if changed").epoch.tolist() == [1]
    assert checkpoints(run, "checkpoints.old") == first  # set aside, not lost
    assert train_run(run, shorter, restart=True).epoch.tolist() == [1]


def test_setting_that_is_newer_than_the_run_has_its_default():
    assert recipe_changes({"seed": 1}, {"seed": 1, "ema": 0.}) == []
    assert recipe_changes({"seed": 1}, {"seed": 2, "ema": 0.9}) == ["seed was 1, is 2", "ema was 0.0, is 0.9"]


# --- which checkpoints are kept

@pytest.mark.parametrize("by, images", [("loss", 12), ("cider", 20)])
def test_best_epoch_is_kept_beside_the_last(tiny, by, images):
    "On a few random embeddings there is nothing to learn for others, so more training only makes it worse."
    run, config = tiny(images, epochs=4, batch_size=4, learning_rate=3e-3, caption_sampling="all", best_by=by, num_beams=1, max_length=12)
    curve = train_run(run, config)
    best = curve.val_loss.idxmin() + 1 if by == "loss" else curve.val_cider.idxmax() + 1
    assert {*checkpoints(run)} == files_of(best, 4) and checkpoint_path(run, "best").name == f"mapping_network_epoch_{best}.pth"
    if by == "loss": assert best < 4
    constants = load_checkpoint(checkpoint_path(run, "best"))["prefix_constants"]
    assert torch.equal(load_run(run.name, "best", device="cpu").mapping_network.prefix_constants, constants)


def test_what_a_later_stage_made_of_the_weights_is_removed(tmp_path):
    (tmp_path/"checkpoints").mkdir()
    (tmp_path/"metrics.jsonl").write_text("".join(f'{{"epoch": {n}}}\n' for n in (1, 2, 3)))
    for name in (*files_of(1, 2, 3), "scst.pt"): (tmp_path/"checkpoints"/name).touch()
    forget_later(tmp_path, 2)
    assert {p.name for p in (tmp_path/"checkpoints").iterdir()} == files_of(1, 2) and [m["epoch"] for m in read_metrics(tmp_path)] == [1, 2]


# --- killed, interrupted, out of room

def trainer(name, folder):
    "Start a process that trains run `name`."
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
    code += f"from clipcap.core import open_run; from clipcap.train import train_run; train_run(*open_run({name!r}))"
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "CLIPCAP_OUTPUTS": str(folder)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for(process, run, epochs):
    "Wait until a process has finished a number of epochs."
    while len(read_metrics(run.path)) < epochs:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.2, 0.8])  # of an epoch
def test_killed_and_interrupted_processes_leave_a_run_that_resumes(tiny, outputs, moment):
    whole, config = tiny(200, "whole", epochs=6)
    train_run(whole, config)
    killed, config = tiny(200, "killed", epochs=6)
    process = trainer("killed", outputs)
    wait_for(process, killed, 2)
    time.sleep(moment*read_metrics(killed.path)[-1]["seconds"])
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and 2 <= len(read_metrics(killed.path)) < 6
    process = trainer("killed", outputs)
    wait_for(process, killed, len(read_metrics(killed.path)) + 1)
    process.send_signal(signal.SIGINT)  # Ctrl-C
    assert process.wait() and b"KeyboardInterrupt" in process.stderr.read()
    process = trainer("killed", outputs)
    assert watch(killed, every=0.2).epoch.tolist() == [1, 2, 3, 4, 5, 6]
    assert process.wait() == 0, process.stderr.read().decode()
    assert checkpoints(killed) == checkpoints(whole)


ON_A_SMALL_DISK = """
import json
from clipcap.core import open_run
from clipcap.runs.files import hash_file, outputs_dir
from clipcap.train import train_run, trained_so_far
run, config = open_run("full")
files = lambda: {p.name: hash_file(p) for p in sorted((run.path/"checkpoints").iterdir())}
try: train_run(run, config)
except OSError as error: failed = str(error)
left, finished = files(), trained_so_far(run.path)["epoch"]
(outputs_dir()/"ballast").unlink()
train_run(run, config)
print(json.dumps([failed, left, finished, files()]))
"""
MOUNTED = 'mount -t tmpfs -o size=64m tmpfs disk && cp -r outputs/. disk && head -c $1 /dev/zero > disk/ballast && CLIPCAP_OUTPUTS=$PWD/disk exec $0 -c "$2"'


@pytest.mark.slow
def test_full_disk_stops_a_run_that_resumes_once_there_is_room(tiny, outputs):
    "The run is put on a small disk of its own, a tmpfs in a mount namespace, where a file leaves room for half of the checkpoints."
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode: pytest.skip("no mount namespaces here")
    run, config = tiny(epochs=6, keep="all", name="full")
    train_run(run, config)
    whole, sizes = checkpoints(run), [p.stat().st_size for p in (run.path/"checkpoints").iterdir()]
    shutil.rmtree(run.path/"checkpoints")
    (run.path/"metrics.jsonl").unlink()
    (outputs.parent/"disk").mkdir()
    room = sum(sizes) - max(sizes)//2
    done = subprocess.run(["unshare", "-rm", "sh", "-c", MOUNTED, sys.executable, str((64 << 20) - room), ON_A_SMALL_DISK],
                          cwd=outputs.parent, env={**os.environ, "PYTHONPATH": str(Path.cwd())}, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    failed, left, finished, resumed = json.loads(done.stdout.splitlines()[-1])
    assert 1 <= finished < 6 and "can't be written" in failed and "make room, and run the same again" in failed
    assert files_of(*range(1, finished + 1)) <= {*left} < {*whole} and resumed == whole
