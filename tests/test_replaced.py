"""What a run was trained with is replaced between two stages: each command refuses, says so, or makes it anew. No cell of the table is silent."""
import contextlib
import json
import random
import shutil

import pandas as pd
import pytest
from conftest import ROOT
from safetensors.torch import load_file

from clipcap.apps import pipeline
from clipcap.checks.replaced import CHANGES, CODE, COMMANDS, INPUTS, attempt, edit_embeddings, edit_json, edit_weights, row, rule, weights_in
from clipcap.checks.small_runs import SampleRuns, by_hand, run_pipeline, within
from clipcap.core import FIELDS, Run
from clipcap.decoding.load import load_run
from clipcap.reporting.verify import verify
from clipcap.train import train_stage, trained_so_far

WORDS = ("refused", "reported", "kept", "made anew", "trained anew", "trained further", "scored anew")
SOME = ("03_train", "make run", "load_run", "clipcap caption, continued", "clipcap verify", "reporting/compare")
FAST = ("tokenizer", "the cache of embeddings", "label of a store", "MappingNetwork.forward", "setting num_beams")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory, scenes, scene_captions):
    "Folders with a small run, made when they are needed."
    return SampleRuns(tmp_path_factory.mktemp("replaced"), scenes.photos, scene_captions)


@pytest.fixture
def world(worlds):
    "A function that copies such a folder, replaces something in it, and works there."
    with contextlib.ExitStack() as stack:
        def enter(kind="clip", what=None):
            folder = worlds.copy(kind)
            if what:
                with within(folder): CHANGES[what].replace(folder)
            stack.enter_context(within(folder))
            return folder
        yield enter


# --- the table

TABLE = pd.read_csv(ROOT/"outputs/replaced.csv", keep_default_na=False)


def test_the_table_has_every_change_and_command_and_no_cell_is_silent():
    assert [*zip(TABLE.changed, TABLE.command)] == [(what, name) for what in CHANGES for name in COMMANDS], "run: make replaced"
    assert {*TABLE.happened} <= {*WORDS} and {*TABLE.ok} == {"yes"} and (TABLE.message != "").all()


def test_every_setting_is_a_row_and_asks_for_something_else():
    assert {what.removeprefix("setting ") for what in CHANGES} >= ({*FIELDS} - {"caption_format"})
    for name in {*FIELDS} - {"caption_format"}: assert name in CHANGES[f"setting {name}"].asked


@pytest.mark.parametrize("what", CHANGES)
def test_every_cell_of_the_table_is_what_the_rule_says(what):
    for cell in TABLE[TABLE.changed == what].itertuples(): assert cell.happened in rule(what, cell.command), cell


@pytest.mark.parametrize("what", [pytest.param(what, marks=[] if what in FAST else pytest.mark.slow) for what in CHANGES])
def test_what_happens_is_what_the_table_says(worlds, what):
    names = tuple(COMMANDS) if what in {**INPUTS, **CODE} and what not in FAST else SOME
    known = TABLE[TABLE.changed == what].set_index("command").happened
    for cell in row(worlds, what, names):
        assert cell.ok == "yes", cell
        assert CHANGES[what].means == "rounding" or cell.happened == known[cell.command], cell


# --- what the table does not show

def test_after_the_pipeline_has_trained_anew_it_is_done(world):
    folder = world("clip", "weights of the language model")
    assert run_pipeline(folder)[0] == "01_data"
    load_run("r", device="cpu")  # as recorded
    assert run_pipeline(folder) == []


def test_a_refused_attempt_leaves_the_run_as_it_was(world):
    "What was refused changed nothing: the settings in `run.json` are those of the weights."
    folder = world()
    shutil.copytree(folder/"lm", folder/"other"), edit_weights(folder/"other/model.safetensors")
    before = Run("r").manifest
    for changes, text in (({"gpt2_model": "other"}, "gpt2_model was 'lm', is 'other'"), ({"gpt2_model": "none"}, "gpt2_model='none'"),
                          ({"learning_rate": 0.5}, "learning_rate was 0.001, is 0.5"), ({"seed": 7}, "seed=7, but 01_data"), ({"num_heads": 3}, "num_heads was 4, is 3")):
        with pytest.raises((OSError, ValueError), match=text): train_stage("r", **changes)
        assert Run("r").manifest == before
        load_run("r")


def test_embeddings_that_01_data_did_not_see_are_not_trained_on(world):
    folder = world("file")
    shutil.rmtree(folder/"outputs/r/checkpoints")
    edit_embeddings(folder, 0.5)
    with pytest.raises(ValueError, match="data_hash.*since 01_data"): train_stage("r")
    train_stage("r", restart=True)  # runs 01_data, too
    load_run("r")


def test_a_store_of_another_encoder_than_clip_model_has_no_clip(world):
    folder = world("store")
    with pytest.warns(UserWarning, match="made by 'one@1', and clip_model='clip.safetensors' is 'clip.safetensors@"): model = load_run("r", device="cpu")
    assert model.clip is None
    done, said, _ = attempt(folder, "clipcap caption")
    assert done == "refused" and "one@1" in said


def test_what_is_gone_is_not_compared(world):
    "A model captions new photos where its training data were deleted."
    folder = world()
    shutil.rmtree(folder/"data"), shutil.rmtree(folder/"outputs/cache")
    load_run("r", device="cpu")


def test_the_recipe_is_recorded_in_both_places(world):
    world()
    run = Run("r")
    recorded, recipe = run.manifest["trained_with"], trained_so_far(run.path)["recipe"]
    assert recorded == recipe and {"data_hash", "encoder", "gpt2", "gpt2_config", "tokenizer", "captions_hash", "photos_hash", "trained_by_code"} <= {*recipe}


@pytest.mark.slow
def test_a_refused_attempt_at_self_critical_training_is_not_recorded(world):
    "The run stays as it was, and loads."
    world("scst")
    recorded = Run("r").manifest["tuned_with"]
    assert recorded["scst_samples"] == 2 and recorded["scst_learning_rate"] == 1e-5
    with pytest.raises(ValueError, match="scst_samples was 2, is 3"): by_hand("finetune/scst", scst_samples=3)
    assert Run("r").manifest["tuned_with"] == recorded
    load_run("r")


def test_a_photo_that_vanished_is_named(world):
    folder = world("clip")
    name = sorted(p.name for p in (folder/"data/Images").iterdir())[3]
    (folder/"data/Images"/name).unlink()
    with pytest.raises(ValueError, match=rf"photos_hash was .* \(1 of 20 photos are missing: {name}\)"): load_run("r")


# --- changed code

@pytest.mark.parametrize("what, counts", [pytest.param("MappingNetwork.forward", True, marks=pytest.mark.slow), ("plotting", False)])
def test_epochs_of_changed_code_are_told_apart(world, what, counts):
    world("clip", what)
    train_stage("r", epochs=3)
    by_hand("04_evaluate"), by_hand("07_report")
    assert ("other code" in (Run("r").path/"report.html").read_text("utf-8")) == counts
    history = Run("r").manifest["trained_with"]["trained_by_code"]
    assert [first for first, _ in history] == ([1, 3] if counts else [1])
    told, = [line for line in verify("r").to_dict("records") if line["what"] == "code that trained"]
    assert (told["agrees"] is None and "epoch 1 to 2 (clipcap.model)" in told["now"]) if counts else told["agrees"] is True


def test_the_pipeline_keeps_what_other_code_made_and_force_trains_anew(world, capsys):
    folder = world("clip", "MappingNetwork.forward")
    before = weights_in("checkpoints")
    assert run_pipeline(folder)[:2] == ["03_train", "04_evaluate"] and weights_in("checkpoints") == before
    said = capsys.readouterr().err
    assert "the code has changed: clipcap.model" in said and "the weights of run 'r' were made by other code: epoch 1 to 2 (clipcap.model)" in said
    assert "other code" in pipeline.other_code(Run("r"))
    run_pipeline(folder, force=True)
    assert weights_in("checkpoints.old") == before and pipeline.other_code(Run("r")) == ""


# --- runs that were made before, and inputs beyond those named

def test_a_run_without_records_opens_and_verify_says_what_was_not_recorded(world):
    world()
    run = Run("r")
    manifest = run.manifest
    del manifest["trained_with"]
    for name in ("captions_hash", "photos_hash"): del manifest["stages"]["01_data"][name]
    (run.path/"run.json").write_text(json.dumps(manifest))
    load_run("r")
    notes = [line["what"] for line in verify("r").to_dict("records") if line["agrees"] is None]
    assert {"gpt2_config", "tokenizer", "captions_hash", "photos_hash", "code that trained"} <= {*notes}


@pytest.mark.parametrize("seed", range(4))
def test_any_changed_byte_of_any_input_is_refused(world, seed):
    "A random tensor, number or letter of a random input."
    folder, draw = world(), random.Random(seed)
    clip, lm = folder/"clip.safetensors", folder/"lm/model.safetensors"
    changes = [lambda: edit_weights(clip, draw.choice(sorted(load_file(clip)))), lambda: edit_weights(lm, draw.choice(sorted(load_file(lm)))),
               lambda: edit_json(folder/"lm/config.json", **{draw.choice(["layer_norm_epsilon", "n_inner", "scale_attn_weights"]): draw.choice([1, 2])}),
               lambda: (folder/"lm/added_tokens.json").write_text('{"<|x|>": 1280}'),
               lambda: append_caption(folder, draw)]
    draw.choice(changes)()
    with pytest.raises(ValueError, match="was trained with"): load_run("r", device="cpu")


def append_caption(folder, draw):
    path = folder/"data/captions.txt"
    image = draw.choice(path.read_text("utf-8").splitlines()[1:]).split(",")[0]
    path.write_text(path.read_text("utf-8") + f"{image},a dog {draw.random()}\n", "utf-8")
