"""What a run was trained with is replaced between two stages: each command refuses, says so, or makes it anew. No cell of the table is silent."""
import json
import os
import random
import shutil
import warnings
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from clipcap import evaluate
from clipcap.apps import cli, pipeline
from clipcap.core import Run, open_run
from clipcap.data import prepare_data
from clipcap.decoding.load import load_ensemble, load_run
from clipcap.evaluate import evaluate_run
from clipcap.finetune.scst import scst_run
from clipcap.formats.embeddings import Embeddings, write_embeddings
from clipcap.formats.store import StoreWriter
from clipcap.report import make_report
from clipcap.reporting.verify import verify
from clipcap.runs.files import asset_path, hash_file
from clipcap.train import train_run, train_stage, trained_so_far

SETTINGS = dict(data_root="data", split="random", clip_model="clip.safetensors", gpt2_model="lm", epochs=1, num_layers=1, max_length=8, num_beams=1,
                mapping_network="linear", prefix_length=2, device="cpu", precision="float32", start_token="given")


def some(names, *fast): return [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in names]


def make_stages(stages, **changes):
    "Run some stages as their notebooks do."
    run, config = open_run("r", "mini", **changes)
    if "01_data" in stages:
        with run.stage("01_data", config) as notes: notes.update(prepare_data(run, config))
    if "03_train" in stages:
        with run.stage("03_train", config, ["01_data"]) as notes:
            metrics = train_run(run, config, stages["03_train"])
            notes.update(epochs=len(metrics), final_val_loss=metrics.val_loss.iloc[-1])
    if "04_evaluate" in stages:
        with run.stage("04_evaluate", config, ["01_data", "03_train"]) as notes:
            evaluate_run(run, config, resamples=10)
            notes.update(eval_split="test", epoch=None)
    if "07_report" in stages:
        with run.stage("07_report", config, ["01_data", "04_evaluate"]): make_report(run, config)
    return run, config


def enter(patch, folder):
    "Work in a folder, and score by one metric."
    patch.chdir(folder)
    patch.setenv("CLIPCAP_OUTPUTS", str(folder/"outputs"))
    patch.setattr(evaluate, "score_split", partial(evaluate.score_split, metrics=["rouge_l"]))


ROAD = {"01_data": None, "03_train": False, "04_evaluate": None, "07_report": None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, scenes, scene_captions):
    "A folder with photos, captions, CLIP, a language model and a run `r` of them, for each source of embeddings."
    made = tmp_path_factory.mktemp("replaced")
    names = sorted(scene_captions.image.unique())[:20]
    def make(kind):
        folder = made/kind
        (folder/"data/Images").mkdir(parents=True)
        for name in names: shutil.copy(scenes.photos/name, folder/"data/Images"/name)
        scene_captions[scene_captions.image.isin(names)].to_csv(folder/"data/captions.txt", index=False)
        weights = load_file(asset_path("mini/clip.safetensors"))
        sizes = {"input_resolution": 64, "context_length": len(weights["positional_embedding"]), "vocab_size": len(weights["token_embedding.weight"])}
        save_file(weights | {name: torch.tensor(size) for name, size in sizes.items()}, folder/"clip.safetensors")  # as OpenAI publishes it
        shutil.copytree(asset_path("mini/gpt2"), folder/"lm")
        rows = torch.randn(20, 128, generator=torch.Generator().manual_seed(0))
        if kind == "file": write_embeddings(folder/"seen.safetensors", names, rows, "one@1")
        if kind == "store":
            with StoreWriter(folder/"store", "one@1", torch.float32) as writer:
                writer.add(names, rows, [scene_captions[scene_captions.image == n].caption.tolist() for n in names], ["train"]*14 + ["val"]*3 + ["test"]*3)
        with pytest.MonkeyPatch.context() as patch:
            enter(patch, folder)
            make_stages(ROAD, **{**SETTINGS, **{"file": {"embeddings": "seen.safetensors"}, "store": {"data_root": "store"}}.get(kind, {})})
        return folder
    kept = {}
    return lambda kind: kept.get(kind) or kept.setdefault(kind, make(kind))


@pytest.fixture
def world(folders, tmp_path, monkeypatch):
    "A function that copies such a folder and works there."
    def copy(kind="clip"):
        shutil.copytree(folders(kind), tmp_path/"world")
        enter(monkeypatch, tmp_path/"world")
        return tmp_path/"world"
    return copy


# --- what is replaced

def edit_weights(path, name=None):
    "Change one tensor of a file, whose size and time stay."
    before, weights = path.stat(), load_file(path)
    name = name or max(weights, key=lambda n: weights[n].numel())
    save_file({n: w + 0.05 if n == name else w for n, w in weights.items()}, path, {"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def edit_json(path, **values): path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}), "utf-8")


def edit_tokenizer(folder):
    "Exchange two words of the vocabulary."
    state = json.loads((folder/"tokenizer.json").read_text("utf-8"))
    vocab = state["model"]["vocab"]
    one, two = [*vocab][300:302]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (folder/"tokenizer.json").write_text(json.dumps(state), "utf-8")


def edit_caption(folder):
    path = folder/"data/captions.txt"
    path.write_text(path.read_text("utf-8").replace(" a ", " one ", 1), "utf-8")


def edit_photo(folder):
    from PIL import Image, ImageOps
    path = sorted((folder/"data/Images").iterdir())[3]
    with Image.open(path) as photo: ImageOps.invert(photo.convert("RGB")).rotate(30).save(path)


def edit_embeddings(folder, by=0.5, encoder=None):
    found = Embeddings(folder/"seen.safetensors")
    names, rows, label = found.names, found.stack(found.names), found.encoder
    write_embeddings(folder/"seen.safetensors", names, rows + by, encoder or label)


def edit_store(folder, encoder):
    "Write the same store by another encoder."
    old = Path("store")
    captions = pd.read_csv("outputs/r/captions_table.csv", dtype=str)
    names = sorted(captions.image.unique())
    shutil.rmtree(old)
    with StoreWriter(folder/"store", encoder, torch.float32) as writer:
        writer.add(names, torch.randn(20, 128, generator=torch.Generator().manual_seed(int(encoder[-1]) - 1)),
                   [captions[captions.image == n].caption.tolist() for n in names], ["train"]*14 + ["val"]*3 + ["test"]*3)


def prepare_again(folder):
    "Change the captions, and run `01_data` by hand."
    edit_caption(folder)
    make_stages({"01_data": None})


def edit_setting(folder):
    manifest = json.loads((folder/"outputs/r/run.json").read_text("utf-8"))
    for part in (manifest, manifest["stages"]["03_train"], manifest["stages"]["04_evaluate"]): part["config"]["batch_size"] = 7
    (folder/"outputs/r/run.json").write_text(json.dumps(manifest), "utf-8")


REPLACED = {  # what -> kind of folder, how it is replaced, words that must be named
    "CLIP": ("clip", lambda f: edit_weights(f/"clip.safetensors", "visual.proj"), ["encoder", "clip.safetensors@"]),
    "weights of the language model": ("clip", lambda f: edit_weights(f/"lm/model.safetensors"), ["gpt2 was 'lm@"]),
    "config.json of the language model": ("clip", lambda f: edit_json(f/"lm/config.json", layer_norm_epsilon=1e-3), ["gpt2_config"]),
    "tokenizer": ("clip", lambda f: edit_tokenizer(f/"lm"), ["tokenizer"]),
    "captions": ("clip", edit_caption, ["captions_hash"]),
    "a photo": ("clip", edit_photo, ["photos_hash"]),
    "captions, and 01_data by hand": ("clip", prepare_again, ["data_hash"]),
    "a training setting": ("clip", edit_setting, ["batch_size was 32, is 7"]),
    "embeddings": ("file", edit_embeddings, ["data_hash"]),
    "label of the embeddings": ("file", lambda f: edit_embeddings(f, 0., "two@2"), ["encoder was 'one@1', is 'two@2'"]),
    "a store": ("store", lambda f: edit_store(f, "one@2"), ["encoder was 'one@1', is 'one@2'"]),
    "label of a store": ("store", lambda f: edit_store(f, "two@1"), ["encoder was 'one@1', is 'two@1'"]),
}


# --- what happens: "refused", with the words of the message; "done"; for the pipeline "anew" or "kept"

def caption_command(folder):
    photo = str(sorted((folder/"data/Images").iterdir())[0])
    if cli.main(["caption", photo, "--run", "r", "--out", str(folder/"out.jsonl"), "--device", "cpu"]): raise ValueError("status 1")
    return json.loads((folder/"out.jsonl").read_text().splitlines()[-1])["caption"]


BY_HAND = {  # command -> what it does
    "load_run": lambda folder: load_run("r", device="cpu"), "load_ensemble": lambda folder: load_ensemble(["r"], device="cpu"),
    "clipcap caption": caption_command, "07_report": lambda folder: make_stages({"07_report": None}),
    "finetune/scst": lambda folder: scst_run(*open_run("r", scst_epochs=1)), "04_evaluate": lambda folder: make_stages({"04_evaluate": None}),
    "python -m clipcap.train": lambda folder: train_stage("r", epochs=2),
}


def outcome(command, folder, capsys):
    "Run a command; return what happened and all that was said."
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try: BY_HAND[command](folder)
        except ValueError as error: what = f"refused: {error}"
        else: what = "done: "
    said = capsys.readouterr()
    return what + said.out + said.err + "".join(str(w.message) for w in told)


def checkpoints(run, folder="checkpoints"): return {p.name: hash_file(p) for p in sorted((run.path/folder).glob("*.pt*"))}


def execute_here(source, out, parameters):
    "Do the job of a stage notebook in this process, in place of papermill."
    make_stages({source.stem: parameters.get("restart", False)})


def run_pipeline(monkeypatch, **changes):
    monkeypatch.setattr(pipeline, "_execute", execute_here)
    kind = {"embeddings": "seen.safetensors"} if Path("seen.safetensors").is_file() else {"data_root": "store"} if Path("store").is_dir() else {}
    return pipeline.run_stages("r", "mini", notebooks=ROOT/"nbs", stages=("01_data", "03_train", "04_evaluate"), **{**SETTINGS, **kind, **changes})


@pytest.mark.parametrize("what", REPLACED)
def test_by_hand_every_command_refuses_what_was_replaced_by_name(world, capsys, what):
    kind, replace, words = REPLACED[what]
    folder = world(kind)
    commands = [c for c in BY_HAND if not (kind != "clip" and c == "clipcap caption")]
    before = checkpoints(Run("r"))
    replace(folder)
    for command in commands:
        if what == "a training setting" and command == "07_report": continue  # it reads `run.json` as it is; `verify` says so
        said = outcome(command, folder, capsys)
        assert said.startswith("refused") and all(word in said for word in words), (command, said)
        assert "train" in said
    assert checkpoints(Run("r")) == before


@pytest.mark.parametrize("what", some(REPLACED, "tokenizer", "label of a store"))
def test_verify_names_what_was_replaced(world, what):
    kind, replace, words = REPLACED[what]
    replace(world(kind))
    rows = verify("r").to_dict("records")
    wrong = " ".join(f"{row['what']} {row['recorded']} {row['now']}" for row in rows if row["agrees"] is False)
    key = {"gpt2 was 'lm@": "GPT-2", "batch_size was 32, is 7": "batch_size", "encoder": "CLIP"}.get(words[0], words[0].split(" ")[0])
    assert key in wrong, wrong


@pytest.mark.parametrize("what", some([name for name in REPLACED if name not in ("a training setting", "captions, and 01_data by hand")],
                                      "weights of the language model", "embeddings"))
def test_the_pipeline_trains_anew_and_says_why(world, capsys, monkeypatch, what):
    kind, replace, words = REPLACED[what]
    folder = world(kind)
    run_pipeline(monkeypatch)
    run, before = Run("r"), checkpoints(Run("r"))
    replace(folder)
    assert "03_train" in run_pipeline(monkeypatch)
    assert checkpoints(run, "checkpoints.old") == before and checkpoints(run) != before
    said = capsys.readouterr().err
    assert "set aside" in said and all(word in said for word in words[-1:]) or "data_hash" in said, said
    load_run("r", device="cpu")  # as recorded
    assert run_pipeline(monkeypatch) == []


@pytest.mark.parametrize("changes, ran", [pytest.param({"batch_size": 7}, ["03_train", "04_evaluate"], marks=pytest.mark.slow), ({"num_beams": 2}, ["04_evaluate"])])
def test_changed_settings_make_anew_what_they_matter_to(world, capsys, monkeypatch, changes, ran):
    world()
    run_pipeline(monkeypatch)
    before = checkpoints(Run("r"))
    assert run_pipeline(monkeypatch, **changes) == ran
    assert (checkpoints(Run("r")) == before) == ("num_beams" in changes)


@pytest.mark.slow
def test_times_alone_change_nothing(world, monkeypatch):
    folder = world()
    run_pipeline(monkeypatch)
    before = checkpoints(Run("r"))
    for path in (*folder.glob("data/**/*"), *folder.glob("lm/*"), folder/"clip.safetensors"): os.utime(path, (1, 1))
    load_run("r", device="cpu")
    assert run_pipeline(monkeypatch) and checkpoints(Run("r")) == before


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
    edit_embeddings(folder)
    with pytest.raises(ValueError, match="data_hash.*since 01_data"): train_stage("r")
    train_stage("r", restart=True)  # runs 01_data, too
    load_run("r")


def test_a_store_of_another_encoder_than_clip_model_has_no_clip(world, capsys):
    folder = world("store")
    with pytest.warns(UserWarning, match="made by 'one@1', and clip_model='clip.safetensors' is 'clip.safetensors@"): model = load_run("r", device="cpu")
    assert model.clip is None
    said = outcome("clipcap caption", folder, capsys)
    assert said.startswith("refused") and "one@1" in said


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


# --- changed code

CHANGED = {"prose": ("model", lambda text: text.replace('"Translate image embeddings into prefixes."', '"Translate."  # more'), False),
           "MappingNetwork.forward": ("model", lambda text: text.replace("return self.decoder(queries, memory)", "return 3*self.decoder(queries, memory)"), True),
           "a reader": ("formats/readers", lambda text: text + "\ndef more(): return 1\n", True),
           "plotting": ("analysis", lambda text: text + "\ndef more(): return 1\n", False),
           "the command line": ("apps/cli", lambda text: text + "\ndef more(): return 1\n", False)}


@pytest.fixture
def package(tmp_path, monkeypatch):
    "A function that changes a copy of the package, which is hashed in place of the package."
    from clipcap.runs import hashes
    shutil.copytree(ROOT/"clipcap", tmp_path/"clipcap", ignore=shutil.ignore_patterns("__pycache__", "mini"))
    for module in (hashes, pipeline): monkeypatch.setattr(module, "asset_path", lambda name: tmp_path/"clipcap/assets"/name)
    def change(name, edit):
        path = tmp_path/f"clipcap/{name}.py"
        before = path.read_text("utf-8")
        path.write_text(edit(before), "utf-8")
        assert path.read_text("utf-8") != before
    return change


@pytest.mark.parametrize("what", some(CHANGED, "prose", "MappingNetwork.forward"))
def test_changed_code_keeps_the_weights_and_is_told_everywhere(world, package, capsys, what):
    folder, (name, edit, counts) = world(), CHANGED[what]
    package(name, edit)
    module, before = f"clipcap.{name.replace('/', '.')}", checkpoints(Run("r"))
    for command in ("load_run", "load_ensemble", "clipcap caption", "04_evaluate", "python -m clipcap.train"):
        said = outcome(command, folder, capsys)
        assert said.startswith("done") and ("other code" in said and module in said) == counts, (command, said)
        if command == "04_evaluate": assert checkpoints(Run("r")) == before
    make_stages({"03_train": "if changed", "04_evaluate": None, "07_report": None})
    assert ("other code" in (Run("r").path/"report.html").read_text("utf-8")) == counts
    history = Run("r").manifest["trained_with"]["trained_by_code"]  # of two epochs: one by each
    assert [first for first, _ in history] == ([1, 2] if counts else [1])
    row, = [row for row in verify("r").to_dict("records") if row["what"] == "code that trained"]
    assert (row["agrees"] is None and module in row["now"]) if counts else row["agrees"] is True


def test_the_pipeline_keeps_what_other_code_made_and_force_trains_anew(world, package, capsys, monkeypatch):
    world()
    run_pipeline(monkeypatch)
    before = checkpoints(Run("r"))
    package("model", CHANGED["MappingNetwork.forward"][1])
    assert run_pipeline(monkeypatch) == ["03_train", "04_evaluate"] and checkpoints(Run("r")) == before
    said = capsys.readouterr().err
    assert "the code has changed: clipcap.model" in said and "the weights of run 'r' were made by other code: epoch 1 (clipcap.model)" in said
    assert "other code" in pipeline.other_code(Run("r"))
    run_pipeline(monkeypatch, force=True)
    assert checkpoints(Run("r"), "checkpoints.old") == before and pipeline.other_code(Run("r")) == ""


# --- runs that were made before, and inputs beyond those named

def test_a_run_without_records_opens_and_verify_says_what_was_not_recorded(world):
    world()
    run = Run("r")
    manifest = run.manifest
    del manifest["trained_with"]
    for name in ("captions_hash", "photos_hash"): del manifest["stages"]["01_data"][name]
    (run.path/"run.json").write_text(json.dumps(manifest))
    load_run("r")
    notes = [row["what"] for row in verify("r").to_dict("records") if row["agrees"] is None]
    assert {"GPT-2", "gpt2_config", "tokenizer", "captions_hash", "photos_hash", "code that trained"} <= {*notes}


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
