"""Captions of a split and their scores, whatever the data and the model (clipcap.evaluate)."""
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from conftest import ROOT
from PIL import Image

from clipcap import evaluate as module
from clipcap.attention import read_relevance
from clipcap.core import Run, open_run
from clipcap.data import Data, load_data, prepare_data
from clipcap.decoding.load import save_weights
from clipcap.evaluate import (evaluate_run, keep_figure, nan_to_none, photo_page, pick_evenly, read_captions_json, read_scores, score_split,
                              show_captions, subset_scores, without_words, write_captions)
from clipcap.formats.embeddings import Embeddings, write_embeddings
from clipcap.model import load_model
from clipcap.scoring.clipscore import text_encoder
from clipcap.scoring.metrics import METRICS, Scores, score
from clipcap.train import train_run


def data_of(captions, split="test", embeddings=None):
    "Data without photos: captions of each image, all in one split."
    rows = [(image, text, split) for image, texts in captions.items() for text in texts]
    return Data(pd.DataFrame(rows, columns=["image", "caption", "split"]), embeddings, None)


# --- captions file

def test_captions_are_read_as_written(tmp_path):
    captions = {"a.jpg": 'A "dog", ünnëtted\\', "b": ""}
    write_captions(tmp_path/"c.json", captions)
    assert list(read_captions_json(tmp_path/"c.json").items()) == list(captions.items())


@pytest.mark.parametrize("odd", [b'[{"image": 1}]', b'[{"image_id": "a", "caption": 3}]', b"\xff", b"["*9999, b"9"*5000])
def test_damaged_captions_file_is_named(tmp_path, odd):  # found by `make fuzz`
    (tmp_path/"c.json").write_bytes(odd)
    with pytest.raises(ValueError, match="c.json is not in COCO's result format"): read_captions_json(tmp_path/"c.json")


def test_missing_captions_file_names_the_stage_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"first: papermill nbs/04_evaluate.ipynb OUT.ipynb -p run {tmp_path.name}"): read_captions_json(tmp_path/"c.json")


# --- scores

def test_subsets_are_means_over_their_images():
    scores = Scores({}, pd.DataFrame({"cider": [1., 3., 8.], "rouge_l": [0., 1., 1.]}, index=["a", "b", "c"]), {})
    table = subset_scores(scores, pd.DataFrame({"image": list("ccab"), "subset": ["unseen", "unseen", "seen", "seen"]}))
    assert (table.loc["seen"].tolist(), table.loc["unseen"].tolist()) == ([2, 2., .5], [1, 8., 1.])
    assert not len(subset_scores(scores, pd.DataFrame({"image": list("abc")})))


def test_clipscore_tells_matching_captions_from_others(trained, clip_mini):
    data, encode = load_data(*trained), text_encoder(clip_mini[0], "mini")
    first = {n: texts[0] for n, texts in data.references("train").items()}
    shifted = dict(zip(first, [*list(first.values())[1:], next(iter(first.values()))]))
    ours, others = (score_split(c, data, "train", encode, ["clipscore", "rouge_l"]) for c in (first, shifted))
    assert (list(ours.corpus), ours.protocol["split"], ours.protocol["clip"]) == (["clipscore", "rouge_l"], "train", data.embeddings.encoder)
    assert ours.per_image.rouge_l.tolist() == score(first, data.references("train"), ["rouge_l"]).per_image.rouge_l.tolist()
    assert others.corpus["clipscore"] < ours.corpus["clipscore"] - 0.1


@pytest.mark.parametrize("why, encode", [("no CLIP to read captions with", None), ("the run looks at patches", lambda texts: np.ones((len(texts), 8)))], ids=["no CLIP", "patches"])
def test_missing_clipscore_has_a_reason(tmp_path, why, encode):
    write_embeddings(tmp_path/"grid.safetensors", ["a", "b"], torch.ones(2, 4, 8), "patches")
    data = data_of({"a": ["a dog"], "b": ["a cat"]}, embeddings=Embeddings(tmp_path/"grid.safetensors"))
    with pytest.warns(UserWarning, match="refclipscore"): scores = score_split({"a": "a dog", "b": "a dog"}, data, "test", encode, ["refclipscore", "rouge_l"])
    assert why in scores.unavailable["refclipscore"] and "clip" not in scores.protocol
    assert math.isnan(scores.corpus["refclipscore"]) and scores.corpus["rouge_l"] > 0


def test_unknown_metric_is_named():
    with pytest.raises(ValueError, match=r"got \['clipsource'\]"): score_split({"a": "a"}, data_of({"a": ["a"]}), "test", None, ["clipsource"])


def test_images_whose_references_have_no_word_are_left_out():
    references = {"a": ["a dog"], "b": ["...", "🎉"], "c": ["!", "5"], "d": ["狗"], "e": ["$"]}
    assert without_words(references) == ["b"]
    captions = dict.fromkeys(references, "a dog")
    with pytest.warns(UserWarning, match="1 images have no reference with a word in it and are not scored: b"):
        scores = score_split(captions, data_of(references), "test", None, ["rouge_l"])
    assert (list(scores.per_image.index), scores.protocol["not_scored"]) == (["a", "c", "d", "e"], 1)
    with pytest.raises(ValueError, match="no image of the split 'test' has a reference with a word"):
        score_split({"b": "a dog"}, data_of({"b": ["..."]}), "test", None, ["rouge_l"])


def test_nan_becomes_none():
    assert nan_to_none({"a": 0.5, "b": math.nan, "c": (math.nan, 1.0)}) == {"a": 0.5, "b": None, "c": [None, 1.0]}


def test_images_may_have_names_that_pandas_takes_for_missing(tmp_path):
    table = pd.DataFrame({"cider": [0.5, math.nan, 1], "copied": [True, False, True]}, pd.Index(["NA", "null", "007"], name="image_id"))
    table.to_csv(tmp_path/"scores.csv")
    pd.testing.assert_frame_equal(read_scores(tmp_path/"scores.csv"), table, check_index_type=False)


# --- the stage

def stop_at(monkeypatch, name):
    "Replace a function that `evaluate_run` calls; the arguments come with the error."
    class Reached(Exception): pass
    def stop(*given): raise Reached(given)
    monkeypatch.setattr(module, name, stop)
    return Reached


def test_training_images_are_not_ranked_by_their_own_captions(outputs, monkeypatch):
    run, config = open_run("new")
    reached = stop_at(monkeypatch, "load_data")
    for split, rerank in (("test", "regression"), ("val", "consensus"), ("train", "none"), ("train", "mbr")):
        with pytest.raises(reached): evaluate_run(run, replace(config, rerank=rerank), split)
    for rerank in ("consensus", "regression"):
        with pytest.raises(ValueError, match="their own captions; choose eval_split"): evaluate_run(run, replace(config, rerank=rerank), "train")


@pytest.mark.parametrize("epoch, used", [(2, 2), ("best", "best"), (None, "average")])
def test_checkpoint_and_ensemble_are_those_asked_for(outputs, monkeypatch, epoch, used):
    run, config = open_run("new")
    monkeypatch.setattr(module, "load_data", lambda *_: None)
    reached = stop_at(monkeypatch, "load_ensemble")
    with pytest.raises(reached) as error: evaluate_run(run, replace(config, checkpoint="average", ensemble="other another"), epoch=epoch)
    assert error.value.args[0] == (["new", "other", "another"], used, config.device)


def test_epoch_zero_is_not_the_last(trained):
    with pytest.raises(ValueError, match=r"no checkpoint of epoch 0; there are \["): evaluate_run(*trained, epoch=0)


def test_what_is_written_is_what_was_measured(trained):
    run, config = trained
    data, captions = load_data(run, config), read_captions_json(run.path/"captions_test.json")
    written = json.loads((run.path/"scores_test.json").read_text())
    cider = pd.read_csv(run.path/"scores_test.csv", index_col="image_id", dtype={"image_id": str}).cider
    assert list(captions) == sorted(data.split("test").image.unique()) == list(cider.index)
    assert not any(mark in text for text in captions.values() for mark in ("<|", "[PAD]"))
    assert abs(cider.mean() - written["corpus"]["cider"]) < 1e-9  # the mean over images
    assert set(written["unavailable"]) == {n for n, value in written["corpus"].items() if value is None}
    assert all(low <= high for low, high in written["intervals"].values() if low is not None)
    protocol = written["protocol"]
    assert (protocol["interval"], protocol["split"]) == ("95% of 1000 bootstrap samples of the images", "test")
    assert (protocol["checkpoint"], protocol["num_beams"]) == ("mapping_network_epoch_3.pth", 2)
    assert protocol["data_hash"] == run.stage_entry("01_data")["data_hash"][:12]


def few_photos(folder, photos):
    "A run of 10 photos with one caption each, `01_data` finished: run, configuration. Without `photos` it is given embeddings."
    names = [f"{n}.png" for n in range(10)]
    (folder/"data/Images").mkdir(parents=True)
    if photos:
        for n, name in enumerate(names): Image.new("RGB", (80, 60), (25*n, 90, 255 - 25*n)).save(folder/"data/Images"/name)
    pd.DataFrame({"image": names, "caption": [f"a puppy in field number {n}" for n in range(10)]}).to_csv(folder/"data/captions.txt", index=False)
    write_embeddings(folder/"e.safetensors", names, torch.randn(10, 16, generator=torch.Generator().manual_seed(0)), "random")
    given = {} if photos else {"embeddings": str(folder/"e.safetensors")}
    run, config = open_run("few", "mini", data_root=str(folder/"data"), split="random", num_beams=1, epochs=1, **given)
    with run.stage("01_data", config) as notes: notes.update(prepare_data(run, config))
    return run, config


@pytest.fixture(scope="module")
def few_outputs(tmp_path_factory):
    "A folder of runs with a run of few photos that are not here, and an untrained network."
    folder = tmp_path_factory.mktemp("few")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPCAP_OUTPUTS", str(folder/"outputs"))
        run, config = few_photos(folder, photos=False)
        save_weights(run.path, load_model(config, 16), 1)
    return folder/"outputs"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("split, text", [("test", ""), ("test", "dog"), ("train", ""), ("train", "dog"), ("train", None)])
def test_any_split_and_any_caption_can_be_evaluated(few_outputs, monkeypatch, split, text):
    monkeypatch.setenv("CLIPCAP_OUTPUTS", str(few_outputs))
    for name in [n for n in METRICS if n.startswith("spice")]: monkeypatch.delitem(METRICS, name)
    monkeypatch.setattr(module, "MEANS", {})
    monkeypatch.setattr("clipcap.scoring.metrics.MEANS", {})
    if text is not None: monkeypatch.setattr(module, "caption_images", lambda model, embeddings, names, *_: dict.fromkeys(names, text))
    run, config = open_run("few")
    scores = evaluate_run(run, config, split, resamples=20)
    assert len(scores.per_image) == {"test": 1, "train": 8}[split]  # one photo has no CIDEr
    assert {"clipscore", "refclipscore", *(["cider"] if split == "test" else [])} <= set(scores.unavailable)
    written = json.loads((run.path/f"scores_{split}.json").read_text())
    assert written["corpus"] == nan_to_none(scores.corpus) and written["protocol"]["images"] == len(scores.per_image)
    figure = show_captions(load_data(run, config), read_captions_json(run.path/f"captions_{split}.json"), scores.per_image.cider, pick_evenly(list(scores.per_image.index)), "All")
    keep_figure(figure, run, f"captions_{split}", show=False)
    assert (run.path/f"figures/captions_{split}.png").stat().st_size and not plt.fignum_exists(figure.number)


@pytest.mark.slow
@pytest.mark.parametrize("photos", [True, False], ids=["photos", "embeddings"])
def test_stages_run_to_the_end_on_few_photos(spice, outputs, tmp_path, photos):
    run, config = few_photos(tmp_path, photos)
    with run.stage("03_train", config, ["01_data"]): train_run(run, config)
    stages = ("04_evaluate", "05_error_analysis", "06_attention")
    for stage in stages:
        papermill.execute_notebook(ROOT/f"nbs/{stage}.ipynb", tmp_path/"out.ipynb", {"run": "few"}, kernel_name="python3", progress_bar=False, cwd=ROOT)
    assert all("finished" in run.stage_entry(stage) and "error" not in run.stage_entry(stage) for stage in stages)
    name, = read_captions_json(run.path/"captions_test.json")  # one photo
    def table(kind, **options): return pd.read_csv(run.path/f"{kind}_test.csv", **options)
    assert table("controls", index_col=0).index.tolist() == ["model", "shuffled images", "mean embedding", "nearest training photo"]
    assert list(table("errors")) == ["image_id", "kind", "what"]
    assert list(table("analysis")) == ["image_id", "difficulty", "words", "human_words", "rarity", "copied"] and len(table("analysis")) == 1
    assert f"words/{name}" in read_relevance(run.path/"relevance_test.safetensors")[0]
    figures = {path.stem for path in (run.path/"figures").iterdir()}
    assert {f"{kind}_test" for kind in ("captions", "controls", "best", "worst", "errors", "score_by", "copied", "never_said", "confusion",
                                        "attention_prefix", "attention_mapping", "word_shares")} <= figures
    assert ("attention_photo_test" in figures) == photos


# --- the page

def test_page_holds_caption_score_and_a_human_caption():
    data, captions = data_of({"a": ["A dog.", "x"], "b": ["Costs $5 and $6"], "c": ["z"]}), {"a": "one", "b": "", "c": "$x_$ $"}
    figure = show_captions(data, captions, pd.Series({"a": 1.234, "b": math.nan, "c": 0}), ["b", "a", "c"], "All of $it_$", columns=2)
    assert figure.axes[0].get_subplotspec().get_gridspec().ncols == 2
    texts = [ax.texts[0].get_text() for ax in figure.axes[:3]]
    assert texts == ["(nothing)  [no CIDEr]\nhuman: Costs $5 and $6", "one  [1.23]\nhuman: A dog.", "$x_$ $  [0.00]\nhuman: z"]
    figure.canvas.draw()
    plt.close(figure)


def test_page_without_images_is_a_note():
    figure = show_captions(data_of({"a": ["A dog."]}), {}, pd.Series(dtype=float), [], "None")
    assert figure.axes[0].texts[0].get_text() == "no image"
    plt.close(figure)


def test_items_are_picked_from_best_to_worst():
    assert pick_evenly(list(range(111))) == list(range(0, 111, 10))
    assert (pick_evenly([7]), pick_evenly([1, 2, 3]), pick_evenly([])) == ([7], [1, 2, 3], [])


def test_a_page_without_images_says_so_inside_of_its_axes():
    figure = photo_page(None, [], [], "The worst captions")
    figure.canvas.draw()
    ax, = figure.axes
    assert [text.get_text() for text in ax.texts] == ["no image"]
    note = ax.texts[0].get_window_extent()
    assert ax.bbox.x0 < note.x0 < note.x1 < ax.bbox.x1 and ax.bbox.y0 < note.y0 < note.y1 < ax.bbox.y1 and ax.bbox.height > 5*note.height
    plt.close(figure)


@pytest.mark.parametrize("options, shown", [({}, 1), ({"show": False}, 0)])
def test_a_figure_is_kept_and_shown_unless_it_must_not_be(tmp_path, monkeypatch, options, shown):
    calls = []
    monkeypatch.setattr(plt, "show", lambda: calls.append(plt.gcf()))
    keep_figure(plt.figure(), Run("r", tmp_path), "empty", **options)
    assert len(calls) == shown and (tmp_path/"r/figures/empty.png").is_file()


@pytest.mark.parametrize("rerank, landmarks, said", [("regression", 47, "in the span of 47 of 48 training images, drawn at random"), ("regression", 48, None), ("consensus", 10, None)])
def test_protocol_names_a_regression_on_some_of_the_training_images(trained, monkeypatch, rerank, landmarks, said):
    run, config = trained
    monkeypatch.setattr(module, "LANDMARKS", landmarks)
    protocol = module._protocol(run, replace(config, rerank=rerank), "last", SimpleNamespace(protocol={}), "float32", 10)
    assert protocol.get("regression") == said and protocol["rerank"] == rerank
