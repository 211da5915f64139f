"""Settings, presets, opening a run, the seed (clipcap.core)."""
import dataclasses
import json
import random
import re
import typing
from inspect import signature

import pytest
import torch
from conftest import ROOT

from clipcap.core import (DECODING, FIELDS, MAPPING_NETWORKS, PRESETS, REMOVED, RENAMED, RERANKERS, STAGES, Config, Run, current_settings, make_config,
                          notebook_parameters, open_run, parse_changes, pick_device, preset_changes, registered, seed_everything, settings_table,
                          stage_config)

REFERENCE = dict(clip_model="ViT-B/32", gpt2_model="gpt2", split="random", caption_sampling="random",
                 prefix_length=10, num_layers=8, num_heads=8, feedforward_dim=2048, dropout=0.1,
                 epochs=30, batch_size=32, learning_rate=1e-5, weight_decay=1e-5, max_length=40, num_beams=5)
DISABLED = dict(mapping_network="transformer", embedding_scaling="none", embedding_noise=0, embedding_dropout=0, schedule="constant", warmup=0,
                accumulate=1, clip_norm=0, label_smoothing=0, ema=0, patience=0, checkpoint="last", start_token="free", length_penalty=1,
                no_repeat_ngram=0, temperature=0, top_p=1, rerank="none", samples=0, beam_groups=1, likelihood_weight=0,
                features="embedding", gpt2_tuning="none", caption_format="marked", scst_epochs=0, ensemble="")
NO_EFFECT = {"data_root", "on_bad_image", "embeddings", "seed", "keep", "best_by", "eval_batch_size", "device", "precision", "track",  # on what is learned
             "lora_rank", "gpt2_learning_rate", "scst_learning_rate", "scst_samples", "neighbours", "ridge", "diversity_penalty"}  # of what is disabled

SMALLEST = {name: 0 for name in FIELDS if type(getattr(Config, name)) in (int, float)} | {"max_length": 3, "scst_samples": 2} | dict.fromkeys(
    ("lora_rank", "prefix_length", "num_layers", "num_heads", "feedforward_dim", "epochs", "batch_size", "accumulate", "num_beams", "beam_groups",
     "neighbours", "eval_batch_size"), 1)
FRACTIONS = ("dropout", "embedding_dropout", "warmup", "label_smoothing", "ema")


@pytest.mark.parametrize("changes, error, text", [
    (dict(num_beams=0), ValueError, "num_beams=0 is too small; it must be at least 1"),
    (dict(epochs="five"), TypeError, "epochs='five' is a str; it must be int"),
    (dict(split="rnd"), ValueError, "split='rnd' is unknown; choose one of ('random', 'official')"),
    (dict(learning_rate=float("nan")), ValueError, "learning_rate=nan is not a finite number"),
    (dict(epochs=True), TypeError, "is a bool"),
    (dict(epochs=2.5), TypeError, "is a float"),
    (dict(dropout=1.0), ValueError, "dropout=1.0 is too large; it must be below 1"),
    (dict(ema=1), ValueError, "ema=1 is too large; it must be below 1"),
    (dict(data_root=None), TypeError, "data_root=None"),
    (dict(data_root="a\0b"), ValueError, "holds a character that no text file can"),
    (dict(max_length=2), ValueError, "at least 3"),
    (dict(scst_epochs=2), ValueError, "set start_token=given"),
    (dict(rerank="mbr", beam_groups=3), ValueError, "choose a multiple, such as 6"),
    (dict(beam_groups=5), ValueError, "set rerank"),
    (dict(rerank="regression", ridge=0), ValueError, "ridge=0 leaves"),
])
def test_impossible_settings_are_named(changes, error, text):
    with pytest.raises(error, match=re.escape(text)): Config(**changes)


@pytest.mark.parametrize("name", SMALLEST)
def test_numbers_have_a_smallest_value(name):
    with pytest.raises(ValueError, match=f"{name}=.* is too small; it must be at least {SMALLEST[name]}"): Config(**{name: SMALLEST[name] - 1})


@pytest.mark.parametrize("name", FRACTIONS)
def test_fractions_are_below_1(name):
    assert getattr(Config(**{name: 0.99}), name) == 0.99
    with pytest.raises(ValueError, match="too large"): Config(**{name: 1})


def test_an_integer_is_a_number(): assert Config(learning_rate=1).learning_rate == 1


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError): Config().epochs = 1


def test_every_setting_is_declared_once_with_its_meaning():
    assert list(FIELDS) == [f.name for f in dataclasses.fields(Config)]
    assert all(f["help"] and f["stage"] in (*STAGES, None) for f in FIELDS.values())
    assert not {*REMOVED, *RENAMED} & {*FIELDS} and set(RENAMED.values()) <= {*FIELDS}
    assert set(DECODING) <= {*FIELDS}


def test_preset_flickr8k_is_the_reference_recipe_and_nothing_else():
    values = dataclasses.asdict(PRESETS["flickr8k"])
    assert {k: values[k] for k in REFERENCE} == REFERENCE
    assert {k: values[k] for k in DISABLED} == DISABLED
    assert set(values) - set(REFERENCE) - set(DISABLED) == NO_EFFECT
    layer = signature(torch.nn.TransformerDecoderLayer).parameters
    assert (layer["dim_feedforward"].default, layer["dropout"].default, layer["norm_first"].default) == (2048, 0.1, False)


def test_presets_differ_in_what_they_say():
    assert preset_changes("flickr8k") == {}
    assert set(preset_changes("flickr8k_tuned", "flickr8k_plus")) == {"gpt2_tuning", "epochs"}


def test_make_config_names_unknown_presets_and_settings():
    assert make_config("flickr8k", epochs=5, split=None) == Config(epochs=5)
    with pytest.raises(ValueError, match="unknown field 'epoch'; did you mean 'epochs'?"): make_config("mini", epoch=5)
    with pytest.raises(ValueError, match="preset='coco' is unknown; choose one of \\('flickr8k', "): make_config("coco")


def test_changes_of_a_command_line():
    assert parse_changes(["epochs=5", "learning_rate=1e-3", "data_root=../x=y"]) == {"epochs": 5, "learning_rate": 1e-3, "data_root": "../x=y"}
    with pytest.raises(ValueError, match="'epochs' is not of the form field=value"): parse_changes(["epochs", "5"])


@pytest.mark.parametrize("words, changes", [
    (["data_root=2024"], {"data_root": "2024"}), (["data_root=007"], {"data_root": "007"}), (["ensemble=1e3"], {"ensemble": "1e3"}), (["embeddings=5"], {"embeddings": "5"}),
    (["dropout=0"], {"dropout": 0.}), (["seed=7", "gpt2_model=12.0"], {"seed": 7, "gpt2_model": "12.0"})])
def test_words_become_what_the_setting_is(words, changes):
    assert parse_changes(words) == changes and [type(v) for v in parse_changes(words).values()] == [type(v) for v in changes.values()]
    make_config("mini", **changes)


@pytest.mark.parametrize("word, text", [("epochs=five", "epochs='five' is not an int"), ("epochs=2.5", "epochs='2.5' is not an int"), ("epochs=", "epochs='' is not an int"),
                                        ("dropout=none", "dropout='none' is not a float"), ("seed=1e3", "seed='1e3' is not an int")])
def test_words_that_are_no_number_are_named(word, text):
    with pytest.raises(ValueError, match=re.escape(text)): parse_changes([word])


def test_any_words_for_a_text_stay_as_they_are_and_others_are_numbers_or_named():
    draw, kinds = random.Random(0), typing.get_type_hints(Config)
    for _ in range(300):
        name, value = draw.choice([*kinds]), "".join(draw.choices("0123456789.e-+_ aN=", k=draw.randint(0, 6)))
        if str in (typing.get_args(kinds[name]) or (kinds[name],)): assert parse_changes([f"{name}={value}"]) == {name: value}
        else:
            try: assert type(parse_changes([f"{name}={value}"])[name]) is kinds[name]
            except ValueError as error: assert f"{name}={value!r} is not a" in str(error)


@pytest.mark.parametrize("name, value", [("data_root", 2024), ("gpt2_model", 7.5), ("embeddings", 1)])
def test_a_number_that_papermill_made_of_a_text_is_named_with_the_way_to_pass_it(outputs, name, value):
    with pytest.raises(TypeError, match=re.escape(f"with papermill: -r {name} {value}")): open_run("new", **{name: value})


@pytest.mark.parametrize("run", [42, 7.0])
def test_a_run_called_by_a_number_is_named(outputs, run):
    with pytest.raises(TypeError, match=re.escape(f"run={run} is a {type(run).__name__}; it must be text (with papermill: -r run {run})")): open_run(run)


def test_settings_belong_to_their_stage_and_all_later_ones():
    assert set(stage_config(Config(), STAGES[-1])) == set(FIELDS) - {"device", "precision", "track"}
    slow, fast = Config(num_beams=5), Config(num_beams=1)
    assert stage_config(slow, "03_train") == stage_config(fast, "03_train")
    assert stage_config(slow, "04_evaluate") != stage_config(fast, "04_evaluate")
    assert "scst_epochs" in stage_config(slow, "04_evaluate") and "scst_epochs" not in stage_config(slow, "03_train")


def test_table_of_settings_is_markdown():
    table = settings_table("03_train")
    assert "`learning_rate`" in table and "num_beams" not in table and "<" not in table


def test_settings_of_older_runs_are_translated():
    assert current_settings({"members": "a b", "views": 0, "epochs": 3}) == {"ensemble": "a b", "epochs": 3}
    assert current_settings({"token_dropout": 0.1}) == {"token_dropout": 0.1}  # unknown: `Run.config` names it


@pytest.mark.parametrize("registry", [MAPPING_NETWORKS, RERANKERS])
def test_every_registered_part_exists(registry):
    for name in registry: assert registry[name] is None or callable(registered(registry, name))


def test_a_new_line_is_a_new_value(monkeypatch):
    with pytest.raises(ValueError): Config(mapping_network="mine")
    monkeypatch.setitem(MAPPING_NETWORKS, "mine", dict)
    assert Config(mapping_network="mine").mapping_network == "mine" and registered(MAPPING_NETWORKS, "mine") is dict


def test_seed_decides_every_generator():
    def draw(seed, stream): seed_everything(seed, stream); return torch.rand(3).tolist() + [random.random()]
    assert draw(1, 2) == draw(1, 2)
    assert draw(1, 2) != draw(1, 3) != draw(2, 1)


def test_absent_device_is_named():
    assert pick_device("cpu") == "cpu" and pick_device("auto") in ("cpu", "cuda", "mps")
    absent = next(d for d in ("mps", "cuda") if not {"mps": torch.backends.mps, "cuda": torch.cuda}[d].is_available())
    with pytest.raises(ValueError, match=f"device='{absent}' is not available here"): pick_device(absent)


def test_a_run_is_opened_with_what_it_had(outputs):
    namespace = {"__name__": "x", "In": [], "torch": torch, "run": "night", "preset": "mini", "epochs": 5, "split": None}
    run, config = open_run(**notebook_parameters(namespace))
    assert (config.epochs, config.split) == (5, "official")
    assert open_run("night", num_beams=1)[1] == make_config("mini", epochs=5, num_beams=1)
    with pytest.raises(ValueError, match="run 'night' began with preset 'mini', not 'flickr8k'"): open_run("night", "flickr8k")
    namespace.update(run=run, epochs=7, captions=["a dog"])  # in JupyterLab: the cell is run again, now that there are other variables
    assert open_run(**notebook_parameters(namespace))[1].epochs == 7
    fresh = {k: v for k, v in namespace.items() if k not in ("_parameters", "captions")}
    with pytest.raises(ValueError, match="did you mean 'epochs'?"): open_run(**notebook_parameters({**fresh, "epoch": 3}))


def test_settings_of_a_later_version_are_named_with_their_writer(outputs):
    run, _ = open_run("night")
    manifest = run.manifest
    run.update(config={**manifest["config"], "telepathy": 1}, stages={"01_data": {"packages": {"clipcap": "9.9"}}})
    with pytest.raises(ValueError, match="doesn't know telepathy; it was written by clipcap 9.9: use that one"): Run("night").config()


def stage_notebooks(): return [(stage, ROOT/f"nbs/{stage}.ipynb") for stage in STAGES]


@pytest.mark.parametrize("stage, path", stage_notebooks())
def test_stage_notebook_has_a_parameter_for_each_of_its_settings(stage, path):
    cell, = (c for c in json.loads(path.read_text("utf-8"))["cells"] if "parameters" in c["metadata"].get("tags", []))
    names = {line.split(" = ")[0].strip() for line in "".join(cell["source"]).splitlines() if " = " in line and not line.startswith("#")}
    assert {"run", "preset"} <= names
    missing = {name for name, f in FIELDS.items() if f["stage"] == stage} - names
    assert not missing, f"{path.name}: no parameter for {sorted(missing)}"
