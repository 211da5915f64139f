"""What `clipcap verify` finds: one change at a time in a run of all that leaves files (clipcap.reporting.verify)."""
import json
import math
import os
import re
import shutil
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from conftest import make_tiny

from clipcap import evaluate
from clipcap.apps.cli import main as clipcap
from clipcap.core import Config, Run
from clipcap.data import load_data
from clipcap.model import gpt2_hash
from clipcap.report import make_report
from clipcap.reporting.card import write_card
from clipcap.reporting.verify import (LEFT_OUT, check_environment, check_files, check_inputs, check_manifest, check_scores, check_training, clip_is_here,
                                      compare_runs, same_number, verdict, verify)
from clipcap.runs.files import save_figure, write_json
from clipcap.runs.folder import SEAL, environment, seal
from clipcap.scoring.metrics import METRICS
from clipcap.train import plot_losses, train_run

STAGES = ("01_data", "03_train", "04_evaluate", "07_report")
COMMIT = "1234567"  # of the checkout, which may change while tests run


def make_run(outputs, captions, name):
    "Make a run of 40 images with random embeddings: one epoch, three scores, a figure, the report and the card."
    run, config = make_tiny(outputs, captions, 40, name, epochs=1, batch_size=4, caption_sampling="all", num_layers=1, max_length=12, num_beams=2, device="cpu")
    with run.stage("03_train", config, ["01_data"]) as notes:
        metrics = train_run(run, config)
        notes.update(epochs=len(metrics), final_val_loss=metrics.val_loss.iloc[-1], gpt2=gpt2_hash(config.gpt2_model))
    figure, ax = plt.subplots(figsize=(3, 2))
    plot_losses(metrics, ax), save_figure(figure, run.path/"figures/loss.png"), plt.close(figure)
    run.record("03_train", "figures/*")
    with run.stage("04_evaluate", config, ["01_data", "03_train"]) as notes:
        scores = evaluate.evaluate_run(run, config, resamples=100)
        notes.update(scores={"test": evaluate.nan_to_none(scores.corpus)}, eval_split="test", epoch=None)
    with run.stage("07_report", config, ["01_data", "04_evaluate"]): make_report(run, config), write_card(run, config)


@pytest.fixture(scope="module")
def made(tmp_path_factory, scene_captions):
    "A folder with two runs of one recipe, `small` and `again`."
    folder = tmp_path_factory.mktemp("verify")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPCAP_OUTPUTS", str(folder))
        patch.setattr("clipcap.runs.folder._git_commit", lambda: COMMIT)
        patch.setattr(evaluate, "score_split", partial(evaluate.score_split, metrics=["bleu_4", "rouge_l", "cider"]))
        for name in ("small", "again"): make_run(folder, scene_captions, name)
    return folder


@pytest.fixture
def run(made, monkeypatch):
    "The run `small`, to be read."
    monkeypatch.setenv("CLIPCAP_OUTPUTS", str(made))
    monkeypatch.setattr("clipcap.runs.folder._git_commit", lambda: COMMIT)
    return Run("small")


@pytest.fixture
def copy(run, tmp_path):
    "A copy of it, to be changed."
    shutil.copytree(run.path, tmp_path/"copy")
    return Run("copy", tmp_path)


def wrong(rows): return [row["what"] for row in rows if row["agrees"] is False]


def noted(rows): return [row["what"] for row in rows if row["agrees"] is None]


def edit(path, *pairs):
    "Replace text in a file, which must be there, once."
    text = path.read_text("utf-8")
    for old, new in pairs:
        assert old in text, (old, path.name)
        text = text.replace(old, new, 1)
    path.write_text(text, "utf-8")


def first_caption(run): return json.loads((run.path/"captions_test.json").read_text())[0]["caption"]


# --- all checks

def test_a_run_that_was_left_alone_agrees(run):
    table = verify(run)
    assert table.agrees.tolist() == [True]*len(table), verdict(table, "small")
    assert list(dict.fromkeys(table.part)) == ["files", "manifest", "environment", "numbers", "inputs", "scores"]
    assert verdict(table, "small").startswith(f"small: {len(table)} checks agree (") and ", 0 differ, 0 notes" in verdict(table, "small")
    assert verify(str(run.path)).what.tolist() == table.what.tolist()  # by its folder
    with pytest.raises(ValueError, match="there is no run 'nowhere' in"): verify("nowhere")


def test_an_impossible_setting_and_a_changed_caption_are_named(copy):
    edit(copy.path/"captions_test.json", (json.dumps(first_caption(copy)), '"a dog"'))
    edit(copy.path/"run.json", ('"split": "random"', '"split": "by hand"'), ('"split": "random"', '"split": "by hand"'))
    found = verify(copy).to_dict("records")
    assert {"captions_test.json", "entry of 01_data", "config"} <= set(wrong(found))
    assert "DIFFERS  files: captions_test.json: " in verdict(pd.DataFrame(found, dtype=object), "a copy")


# --- files and manifest

def test_every_file_is_checked(run):
    rows = check_files(run)
    assert (wrong(rows), noted(rows), len(rows)) == ([], [], sum(p.is_file() for p in run.path.rglob("[!.]*")) - 1)  # all but run.json and locks


def test_a_changed_bit_and_a_missing_file_differ(copy):
    weights = copy.path/"checkpoints/mapping_network_epoch_1.pth"
    content = bytearray(weights.read_bytes())
    content[-5000] ^= 1
    weights.write_bytes(content), (copy.path/"figures/loss.png").unlink()
    assert wrong(check_files(copy)) == ["checkpoints/mapping_network_epoch_1.pth", "figures/loss.png"]


def test_a_run_older_than_hashes_gets_notes(copy):
    manifest = copy.manifest
    for entry in manifest["stages"].values(): del entry["made"], entry[SEAL]
    write_json(copy.path/"run.json", manifest)
    assert (wrong(check_files(copy)), noted(check_files(copy))) == ([], [f"files of {s}" for s in STAGES])


def train_again(run, error=None):
    with suppress(FloatingPointError), run.stage("03_train", run.config(), ["01_data"]):
        if error: raise FloatingPointError(error)


def change_recipe(run):
    "Record everywhere a recipe that was never trained, and seal it again."
    manifest = json.loads((run.path/"run.json").read_text().replace('"learning_rate": 0.001', '"learning_rate": 0.002'))
    for entry in manifest["stages"].values(): entry[SEAL] = seal(entry)
    write_json(run.path/"run.json", manifest)


@pytest.mark.parametrize("change, differs", [
    (lambda run: None, []), (lambda run: edit(run.path/"run.json", ('"gpt2": "mini@', '"gpt2": "maxi@')), ["entry of 03_train"]),
    (lambda run: edit(run.path/"run.json", ('"seed": 42', '"seed": 43')), ["seed", *(f"seed of {s}" for s in STAGES)]),
    (lambda run: os.truncate(run.path/"checkpoints/last.pt", 9999), ["recipe in checkpoints/last.pt"]), (change_recipe, ["recipe in checkpoints/last.pt"]),
    (train_again, ["03_train that 04_evaluate is built on"]),
    (partial(train_again, error="the loss is not finite"), ["03_train finished", "03_train that 04_evaluate is built on"]),
])
def test_the_manifest_is_checked_against_itself_and_the_checkpoint(copy, change, differs):
    change(copy)
    assert sorted(wrong(check_manifest(copy))) == sorted(differs)
    if change is change_recipe: assert [row["recorded"] for row in check_manifest(copy) if row["agrees"] is False] == ["learning_rate was 0.001, is 0.002"]


# --- inputs, environment, training

def test_data_and_embeddings_are_checked(copy, tmp_path):
    store = shutil.copy(copy.config().embeddings, tmp_path/"seen.safetensors")
    (copy.path/"run.json").write_text((copy.path/"run.json").read_text().replace(copy.config().embeddings, str(store)))
    config = copy.config()
    def inputs(data=None): return check_inputs(copy, config, data or load_data(copy, config), None)
    assert (wrong(inputs()), noted(inputs())) == ([], [])
    missing = inputs(FileNotFoundError("no embeddings"))
    assert (wrong(missing), noted(missing)) == ([], ["data_hash", "encoder of the embeddings"])
    content = store.read_bytes()
    store.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # a number of one embedding
    assert wrong(inputs()) == ["data_hash"]
    store.write_bytes(content), edit(copy.path/"captions_table.csv", ("train", "test"))
    assert wrong(inputs()) == ["data_hash"]


@pytest.mark.parametrize("recorded, here, agrees", [("mini@1", "mini@1", True), ("mini@0", "mini@1", False), ("mini@1", None, None), (None, "mini@1", None)])
def test_clip_is_checked_where_it_is_here(recorded, here, agrees):
    run = SimpleNamespace(stage_entry=lambda stage: {"encoder": recorded} if recorded and stage == "01_data" else {}, manifest={}, path=None)
    assert [row["agrees"] for row in check_inputs(run, Config(clip_model="mini"), OSError("gone"), here) if row["what"] == "CLIP"] == [agrees]
    assert (clip_is_here("mini"), clip_is_here("ViT-Z/1")) == (True, False)


def test_another_environment_is_a_note(run):
    here = environment()
    elsewhere = {**here, "packages": {**here["packages"], "torch": "1.0"}, "hardware": {**here["hardware"], "cpu": "abacus"}}
    rows = check_environment(run, elsewhere)
    assert noted(check_environment(run, here)) == [] and (wrong(rows), noted(rows)) == ([], ["torch", "cpu"])


def test_numbers_of_training_are_checked(copy):
    assert [row["what"] for row in check_training(copy)] == ["epochs", "final_val_loss"] and wrong(check_training(copy)) == []
    edit(copy.path/"metrics.jsonl", ('"val_loss": ', '"val_loss": 1'))
    assert wrong(check_training(copy)) == ["final_val_loss"]
    (copy.path/"metrics.jsonl").unlink()
    assert wrong(check_training(copy)) == ["epochs", "final_val_loss"]


# --- scores

def rescored(run, data=None): return check_scores(run, "test", data or load_data(run, run.config()), None)


def references(run): return load_data(run, run.config()).references("test")


def test_scores_are_computed_again(run):
    rows = rescored(run)
    assert (wrong(rows), noted(rows)) == ([], [])
    assert [row["what"] for row in rows][:7] == [f"{what} of test" for what in ("bleu_4", "rouge_l", "cider", "intervals", "diversity", "subsets", "images")]


def improve_score(run, files=("scores_test.json",)):
    value = json.loads((run.path/"scores_test.json").read_text())["corpus"]["rouge_l"]
    for name in files: edit(run.path/name, (repr(value), repr(value + 1e-6)))


def improve_image(run, more=1e-6, first=0):
    table = pd.read_csv(run.path/"scores_test.csv", index_col="image_id", float_precision="round_trip")
    table.iloc[2, 1] += more
    table.iloc[first:].to_csv(run.path/"scores_test.csv")


def change_protocol(run):
    low = json.loads((run.path/"scores_test.json").read_text())["intervals"]["cider"][0]
    edit(run.path/"scores_test.json", (repr(low), repr(low + 1e-6)), ('"vocabulary": ', '"vocabulary": 1'), ('"num_beams": 2', '"num_beams": 5'))


@pytest.mark.parametrize("change, differs", [
    (improve_score, ["rouge_l of test", "scores of test in run.json"]),
    (partial(improve_score, files=("scores_test.json", "run.json")), ["rouge_l of test"]),
    (improve_image, ["images of test"]), (partial(improve_image, more=0, first=1), ["images of test"]),
    (change_protocol, ["intervals of test", "diversity of test", "protocol of test: num_beams"]),
    (lambda run: (run.path/"captions_test.json").write_text('[{"image_id": "other.jpg", "caption": "a dog"}]'), ["scores_test.json, from captions_test.json"]),
    (lambda run: (run.path/"captions_test.json").unlink(), ["scores_test.json, from captions_test.json"]),
    (lambda run: (run.path/"scores_test.csv").unlink(), ["scores_test.csv"]),
])
def test_a_changed_score_is_named(copy, change, differs):
    change(copy)
    rows = rescored(copy)
    assert wrong(rows) == differs
    if change is improve_image: assert next(row["now"] for row in rows if row["agrees"] is False).startswith(f"rouge_l, {list(references(copy))[2]}:")


def test_a_changed_caption_changes_its_scores(copy):
    edit(copy.path/"captions_test.json", (json.dumps(first_caption(copy)), json.dumps(next(iter(references(copy).values()))[0])))
    assert {"cider of test", "rouge_l of test", "intervals of test", "images of test"} <= set(wrong(rescored(copy)))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_score_without_its_tool_is_a_note(run, monkeypatch):
    def no_tool(*_): raise OSError("no tool")
    monkeypatch.setattr("clipcap.scoring.metrics.cider", no_tool)
    monkeypatch.setitem(METRICS, "cider", no_tool)
    rows = rescored(run)
    assert (wrong(rows), noted(rows)) == ([], ["cider of test"]) and "no tool" in next(row["now"] for row in rows if row["agrees"] is None)


def test_a_score_that_the_run_did_not_have_is_no_difference(copy):
    written = json.loads((copy.path/"scores_test.json").read_text())
    written["corpus"]["clipscore"], written["unavailable"]["clipscore"] = None, "there was no CLIP"
    written["protocol"]["metrics"].append("clipscore")
    write_json(copy.path/"scores_test.json", written)
    assert (wrong(rows := rescored(copy)), noted(rows)) == ([], [])
    assert wrong(rescored(copy, OSError("the embeddings are gone"))) == []


@pytest.mark.parametrize("a, b, same", [(1, 1 + 1e-10, True), (1, 1 + 1e-8, False), (None, math.nan, True), (None, 1, False), (0, None, False)])
def test_numbers_are_the_same_within_what_is_allowed(a, b, same): assert same_number(a, b, 1e-9) is same


# --- two runs of one recipe

def differing(run, other):
    found = compare_runs(run, other)
    return [what.split(",")[0] for what in found[found.agrees == False].what]  # noqa: E712


def test_two_runs_of_one_recipe_leave_the_same_bytes(run):
    assert differing(run, "again") == [] and len(compare_runs(run, "again")) >= 11
    for name in LEFT_OUT: assert (run.path/name).read_bytes() != Run("again").path.joinpath(name).read_bytes()  # they hold times or names


DAMAGES = {
    "cut": lambda b, n: b[:len(b)*n//9 - 1], "a byte that is not UTF-8": lambda b, n: b[:9*n] + b"\xff" + b[9*n:], "another kind of line": lambda b, n: b + b'"five"\n[1]\n',
    "zeros": lambda b, n: bytes(len(b)), "nested too deep": lambda b, n: b + b"["*100_000*n, "a blank line": lambda b, n: b + b"\n\n" + b, "no JSON": lambda b, n: b"epoch 1\n",
    "nothing": lambda b, n: b"", "no loss": lambda b, n: b'{"epoch": 1}\n', "swapped bytes": lambda b, n: b[:11*n] + b[11*n:20*n][::-1] + b[20*n:]}


@pytest.mark.parametrize("n", [1, 4, 8])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["metrics.jsonl", "report.html"])
def test_damaged_file_is_named_and_ends_in_no_traceback(run, copy, capsys, name, damage, n):
    (copy.path/name).write_bytes(DAMAGES[damage]((run.path/name).read_bytes(), n))
    for pair in ((run, copy), (copy, run)):
        with pytest.raises(SystemExit): clipcap(["verify", str(pair[0].path), "--against", str(pair[1].path)])
        assert re.search(f"^DIFFERS  files: {name}", capsys.readouterr().out, re.M)
    table = compare_runs(copy, copy)
    bad = table[table.agrees == False]  # noqa: E712
    assert len(bad) <= 1 and all(f"damaged, {copy.path/name}: " in value for value in bad.now)
    if damage in ("cut", "zeros", "a byte that is not UTF-8", "nested too deep", "no JSON") and name == "metrics.jsonl": assert len(bad) == 1
    if name == "metrics.jsonl":
        with suppress(ValueError): check_training(copy)


def test_what_differs_between_two_runs_is_named(run, copy):
    edit(copy.path/"run.json", (f"{os.getpid()} on", "1 on"))  # another process may have made it
    assert differing(run, copy) == []
    edit(copy.path/"captions_test.json", (json.dumps(first_caption(copy)), '"a dog"'))
    edit(copy.path/"metrics.jsonl", ('"epoch": 1', '"epoch": 2'))
    edit(copy.path/"run.json", ('"num_beams": 2', '"num_beams": 3'))
    edit(copy.path/"report.html", ("</main>", " </main>"))
    (copy.path/"figures/loss.png").unlink()
    assert differing(run, copy) == ["captions_test.json", "figures/loss.png", "metrics.jsonl", "report.html", "run.json"]
