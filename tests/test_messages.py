"""What people read when something is wrong: one line that names the file, the value and the fix, and no library's advice."""
import copy
import json
import math
import os
import pickle
import random
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import ROOT

from clipcap.apps import pipeline
from clipcap.apps.cli import main as clipcap
from clipcap.core import Run, make_config
from clipcap.data import Data
from clipcap.decoding.load import load_run
from clipcap.evaluate import nan_to_none, score_split, subset_scores, write_captions
from clipcap.formats.tokenizer import load_tokenizer
from clipcap.model import load_gpt2
from clipcap.reporting.verify import check_scores
from clipcap.runs.checkpoints import load_checkpoint
from clipcap.runs.files import asset_path, write_json
from clipcap.scoring.metrics import intervals


# --- the pipeline

def message(*words, **options):
    "How the pipeline's command ends."
    with pytest.raises(SystemExit) as end: pipeline.main([*words], **options)
    return end.value.code


@pytest.mark.parametrize("words, options, text", [
    (["epochs=five"], {}, "epochs='five' is not an int"), (["epoch=5"], {}, "unknown field 'epoch'; did you mean 'epochs'?"), (["5"], {}, "'5' is not of the form field=value"),
    (["num_beams=0"], {}, "num_beams=0 is too small"), (["split=half"], {}, "split='half' is unknown; choose one of"), ([], {"preset": "coco"}, "preset='coco' is unknown"),
    ([], {"run": "a/b"}, "run='a/b' must be a plain folder name"), ([], {"seeds": "1 two"}, "seed='two' is not an int"), (["seed=-1"], {}, "seed=-1 is too small")])
def test_the_pipeline_ends_in_one_line(outputs, words, options, text):
    said = message(*words, **options)
    assert said.startswith("clipcap.pipeline: ") and text in said and "\n" not in said and not outputs.exists()


def test_the_pipeline_ends_in_one_line_whatever_the_words(outputs, monkeypatch):
    draw, names = random.Random(0), [*vars(make_config("mini")), "epoch", "", "run"]
    monkeypatch.setattr(pipeline, "_execute", lambda *_: (_ for _ in ()).throw(OSError("no stage in this test")))
    for _ in range(40):
        said = message(f"{draw.choice(names)}{draw.choice(['=', '=', '='])}{draw.choice(['', '-1', 'five', '2.5', 'nan', '1e400', '2024', 'None'])}")
        assert said.startswith("clipcap.pipeline: ") and "\n" not in said


def test_a_stage_that_fails_is_named_with_its_notebook(outputs, monkeypatch):
    from papermill.exceptions import PapermillExecutionError
    def failing(notebook, out, parameters):
        write_json(out, {"cells": []})
        if notebook.stem == "02_model": raise PapermillExecutionError(3, 5, "model = load_model()", "ValueError", "gpt2_model='nothing' can't be loaded", ["\x1b[0;31mTraceback"])
    monkeypatch.setattr(pipeline, "_execute", failing)
    said, path = message(run="failed"), outputs/"failed/notebooks/02_model.ipynb"
    assert said == f"clipcap.pipeline: 02_model: gpt2_model='nothing' can't be loaded (ValueError; the whole traceback is in {path})"


def test_a_number_that_names_a_folder_is_a_text(outputs, monkeypatch):
    monkeypatch.setattr(pipeline, "_execute", lambda *_: (_ for _ in ()).throw(OSError("no stage in this test")))
    assert message("data_root=2024", run="42") == "clipcap.pipeline: no stage in this test"
    assert Run("42").manifest["config"]["data_root"] == "2024"


@pytest.mark.slow
@pytest.mark.parametrize("words, text", [(["epochs=five"], "epochs='five' is not an int"), (["data_root=2024"], "01_data: there is no ")])
def test_status_and_last_line_of_the_command(tmp_path, words, text):
    done = subprocess.run([sys.executable, "-m", "clipcap.apps.pipeline", "--run", "new", *words], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "CLIPCAP_OUTPUTS": str(tmp_path)})
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    said = done.stderr[done.stderr.rindex("clipcap.pipeline: "):]
    assert text in said and (text[:2] != "01" or "2024: expected" in said and " (FileNotFoundError; the whole traceback is in " in said), said


# --- files of weights

class Payload:
    def __reduce__(self): return print, ("code of the file ran",)


@pytest.mark.parametrize("value", [Payload(), {"a": Payload()}, {"args": Run}])
def test_a_checkpoint_with_code_gets_no_advice_of_torch(tmp_path, capsys, value):
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save(value, tmp_path/"mapping_network_epoch_1.pth", **options)
        with pytest.raises(ValueError, match="mapping_network_epoch_1.pth") as error: load_checkpoint(tmp_path/"mapping_network_epoch_1.pth")
        assert "weights_only" not in str(error.value) and "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("write", [lambda path: torch.save({"transformer.wte.weight": Payload()}, path), lambda path: path.write_bytes(b"text"),
                                   lambda path: path.write_bytes(pickle.dumps(Payload()))], ids=["code", "text", "pickle"])
def test_a_language_model_with_code_gets_no_advice_of_torch(tmp_path, tokenizer, capsys, write):
    (tmp_path/"config.json").write_text((asset_path("mini/gpt2")/"config.json").read_text())
    write(tmp_path/"pytorch_model.bin")
    with pytest.raises(ValueError, match="gpt2_model=.*pytorch_model.bin") as error: load_gpt2(str(tmp_path), tokenizer, 0)
    said = str(error.value)
    assert "weights_only" not in said and "torch.load" not in said and "save_pretrained" in said and "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("held", [{}, {"config.json": "{}"}, {"model.safetensors": "", "README.md": ""}])
def test_a_folder_without_a_tokenizer_is_named_without_advice_to_install_packages(tmp_path, held):
    for name, text in held.items(): (tmp_path/name).write_text(text)
    with pytest.raises(ValueError, match="holds none of tokenizer.json, vocab.json, .*; save the model's tokenizer there") as error: load_tokenizer(str(tmp_path))
    assert "sentencepiece or tiktoken" not in str(error.value)


# --- a tuned run in bfloat16

@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_tuned_run_in_bfloat16_is_named_with_its_tuning_and_the_fix(outputs, capsys, tuning):
    config = make_config("mini", gpt2_tuning=tuning)
    write_json(outputs/"tuned/run.json", {"run": "tuned", "preset": "mini", "config": vars(config), "stages": {}})
    (outputs/"tuned/checkpoints").mkdir()
    (outputs/"tuned/checkpoints/mapping_network_epoch_1.pth").touch()
    text = f"run 'tuned' was trained with gpt2_tuning={tuning!r}, and its GPT-2 computes in float32; leave out precision='bfloat16', or give 'float32'"
    with pytest.raises(ValueError, match=text): load_run("tuned", precision="bfloat16")
    photo = outputs/"x.png"
    photo.write_bytes(b"")
    assert clipcap(["caption", str(photo), "--run", "tuned", "--precision", "bfloat16"]) == 1 and text in capsys.readouterr().err


# --- files of scores

@pytest.fixture
def scored(tmp_path, monkeypatch):
    "A run with two captions that were scored by counting words, and its data."
    table = pd.DataFrame({"image": list("aabbc"), "caption": ["a dog runs", "the dog", "two cats", "cats sit", "a man"], "split": ["test"]*4 + ["train"], "subset": ["x"]*2 + ["y"]*3})
    run, data, captions = Run("scored", tmp_path), Data(table, None, None), {"a": "a dog", "b": "two cats sit"}
    scores, variety = score_split(captions, data, "test", None, ["bleu_1", "bleu_2"], "raw"), {"words": 2.5, "novel": math.nan}
    monkeypatch.setattr("clipcap.reporting.verify.diversity", lambda *_: variety)  # it would start Java
    run.update(preset="mini", stages={"04_evaluate": {"eval_split": "test", "config": {"num_beams": 5}, "scores": {"test": scores.corpus}}})
    write_captions(run.path/"captions_test.json", captions)
    scores.per_image.to_csv(run.path/"scores_test.csv")
    write_json(run.path/"scores_test.json", {
        "corpus": scores.corpus, "intervals": nan_to_none(intervals(scores, 10)), "unavailable": {}, "diversity": nan_to_none(variety),
        "subsets": subset_scores(scores, data.split("test")).to_dict("index"), "protocol": {**scores.protocol, "interval": "95% of 10 bootstrap samples", "num_beams": 5}})
    return run, data


def rows_of(run, data):
    rows = check_scores(run, "test", data, None)
    return [f"{row['what']}: {row['now']}" for row in rows if row["agrees"] is False]


def test_scores_that_were_left_alone_agree(scored): assert rows_of(*scored) == []


def edited(key, value):
    def edit(held):
        *path, last = key.split(".")
        for name in path: held = held[name]
        if value is KeyError: del held[last]
        else: held[last] = value
    return edit


@pytest.mark.parametrize("edit", [edited("corpus", KeyError), edited("corpus", []), edited("unavailable", KeyError), edited("unavailable", [1]), edited("intervals", 5),
                                  edited("corpus.bleu_1", "0.5"), edited("corpus.bleu_1", [0.5]), edited("intervals.bleu_1", "low"), edited("subsets", [1]), edited("diversity", "many")],
                         ids=range(10))
def test_damaged_scores_are_a_row_that_names_the_file(scored, edit):
    run, data = scored
    held = json.loads((run.path/"scores_test.json").read_text())
    edit(held)
    write_json(run.path/"scores_test.json", held)
    assert any("scores_test.json" in row for row in rows_of(run, data)), rows_of(run, data)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"protocol": 3}', b'{"protocol": {"metrics": 5, "tokenization": "raw"}}', b"[" * 100_000])
def test_what_is_no_json_of_scores_is_a_row_that_names_the_file(scored, content):
    (scored[0].path/"scores_test.json").write_bytes(content)
    assert "scores_test.json" in rows_of(*scored)[0]


@pytest.mark.parametrize("content", ["image_id,bleu_1,bleu_2\na,one,1\nb,1,1\n", "image_id,bleu_1,bleu_2\na,one,two\nb,,\n"])
def test_scores_of_images_that_are_no_numbers_are_a_row_that_names_the_file(scored, content):
    (scored[0].path/"scores_test.csv").write_text(content)
    assert any("scores_test.csv" in row for row in rows_of(*scored))


def test_scores_with_any_damage_are_rows(scored):
    (run, data), draw = scored, random.Random(0)
    sound = json.loads((run.path/"scores_test.json").read_text())
    def places(value, at=()):
        yield at
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else (): yield from places(value[key], (*at, key))
    for _ in range(60):
        held = {"all": copy.deepcopy(sound)}
        *path, last = ("all", *draw.choice([*places(sound)]))
        inner = held
        for key in path: inner = inner[key]
        if draw.random() < 0.3 and path: del inner[last]
        else: inner[last] = draw.choice([None, "text", [], {}, [1], {"a": 1}, -1, 1e300, True, [[1]], {"a": {"b": "c"}}])
        write_json(run.path/"scores_test.json", held["all"])
        rows_of(run, data)
