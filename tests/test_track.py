"""Trackers: what they are given, and that they change nothing (clipcap.reporting.track)."""
import dataclasses
import json
import sys

import pytest
from accelerate import tracking as theirs
from accelerate.utils import LoggerType

from clipcap.reporting import track
from clipcap.reporting.track import tracker_names
from clipcap.runs.checkpoints import read_metrics
from clipcap.runs.extras import MissingExtra
from clipcap.train import train_run


@pytest.fixture
def recorder(monkeypatch):
    "A tracker in the place of one that is not installed: what it was told."
    told = []
    class Recorder(theirs.GeneralTracker):
        name, requires_logging_directory = "aim", True
        tracker = property(lambda self: told)

        def __init__(self, run_name, logging_dir=None, **more):
            super().__init__()
            told.append(("start", run_name, logging_dir))

        def start(self): pass
        def store_init_configuration(self, values): told.append(("config", values))
        def log(self, values, step=None, **more): told.append(("log", step, values))
        def log_images(self, values, step=None, **more): told.append(("images", step, values))
        def finish(self): told.append(("finish",))
    monkeypatch.setitem(theirs.LOGGER_TYPE_TO_CLASS, "aim", Recorder)
    monkeypatch.setattr(theirs, "_available_trackers", [LoggerType.AIM])
    monkeypatch.setitem(track._PICTURES, "aim", {})
    return told


def weights(run): return {p.name: p.read_bytes() for p in (run.path/"checkpoints").glob("*.p*")}


def lines(run): return [{k: v for k, v in m.items() if k not in ("seconds", "captions_per_second")} for m in read_metrics(run.path)]


def test_tracked_run_trains_the_same_bytes_and_is_logged(tiny, recorder):
    settings = dict(epochs=2, keep="all", temperature=0.9, num_beams=1, max_length=8, ema=0.9)  # captions are sampled
    plain, config = tiny(90, "plain", **settings)
    train_run(plain, config)
    assert not recorder and not (plain.path/"track").exists()
    run, tracked = tiny(90, "tracked", track="aim", **settings)
    train_run(run, tracked)
    assert weights(run) == weights(plain) and lines(run) == lines(plain)
    assert recorder[:2] == [("start", "clipcap", str(run.path/"track")), ("config", dataclasses.asdict(tracked))] and recorder[-1] == ("finish",)
    numbers, texts = [[row for row in recorder if row[0] == "log"][k::2] for k in (0, 1)]
    for metrics, (_, step, found), (_, same, captions) in zip(read_metrics(run.path), numbers, texts, strict=True):
        assert step == same == metrics.pop("epoch") and found.pop("val_cider") >= 0
        assert found == {k: v for k, v in metrics.items() if k != "precision"}
        assert captions.keys() == texts[0][2].keys() and len(captions) == 8 and all(isinstance(text, str) for text in captions.values())
    assert not [row for row in recorder if row[0] == "images"]  # there are embeddings alone


def test_tracking_makes_no_checkpoint_stale(tiny, recorder):
    run, config = tiny(epochs=1, max_length=8)
    train_run(run, config)
    before = weights(run)
    (run.path/"track").mkdir()
    (run.path/"track/events").touch()
    assert len(train_run(run, dataclasses.replace(config, track="aim"))) == 1 and weights(run) == before
    assert not [row for row in recorder if row[0] == "log"]
    train_run(run, config, restart=True)
    assert (run.path/"checkpoints.old/track/events").is_file() and not (run.path/"track").exists()


@pytest.mark.parametrize("name, hidden, error, text", [
    ("tensorbord", (), ValueError, "accelerate knows no tracker 'tensorbord'; choose out of .*tensorboard, "),
    ("aim comet_ml", (), MissingExtra, "needs the package of comet_ml, which is not installed here: pip install comet-ml"),
    ("tensorboard", ("tensorboard",), MissingExtra, r"pip install 'clipcap\[track\]'"),
    ("aim", ("jpype",), MissingExtra, r"CIDEr, needs jpype, .*pip install 'clipcap\[metrics\]'"),
])
def test_what_is_missing_is_named_before_training(tiny, recorder, monkeypatch, name, hidden, error, text):
    for module in hidden: monkeypatch.setitem(sys.modules, module, None)
    run, config = tiny(track=name)
    with pytest.raises(error, match=text): train_run(run, config)
    assert not (run.path/"metrics.jsonl").exists()


def test_names_are_separated_by_spaces_and_all_are_those_that_are_installed(recorder):
    assert [tracker_names(words) for words in ("none", "", "aim aim", "all")] == [[], [], ["aim"], ["aim"]]


def test_run_with_one_validation_photo_is_logged(tiny, recorder, scene_captions):
    run, config = tiny(10, track="aim", epochs=1, max_length=6, best_by="loss")
    with pytest.warns(UserWarning, match="only one image"): train_run(run, config)
    numbers, captions = [row[2] for row in recorder if row[0] == "log"]
    assert "val_cider" not in numbers and numbers["val_loss"] > 0 and len(captions) == 1


def test_photos_are_logged_as_one_page(trained_copy, recorder):
    run, config = trained_copy
    train_run(run, dataclasses.replace(config, epochs=4, track="aim"))
    (_, step, pictures), = [row for row in recorder if row[0] == "images"]
    page = pictures["captions"]
    assert step == 4 and page.ndim == 4 and page.shape[::3] == (1, 3) and page.dtype == "uint8" and page.std() > 20


def test_tensorboard_shows_numbers_captions_and_photos(trained_copy):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run, config = trained_copy
    config = dataclasses.replace(config, epochs=4, track="tensorboard")
    train_run(run, config)
    events = EventAccumulator(str(run.path/"track/clipcap")).Reload()
    assert {"train_loss", "val_loss", "val_cider", "learning_rate"} <= {*events.Tags()["scalars"]} and events.Tags()["images"] == ["captions"]
    event, = events.Scalars("val_loss")
    assert event.step == 4 and event.value == pytest.approx(json.loads((run.path/"metrics.jsonl").read_text().splitlines()[-1])["val_loss"], rel=1e-6)
    texts = [events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"] if tag.startswith("caption of ")]
    assert len(texts) == 6 and all(text.endswith(".") for text in texts)  # 6 of 60 photos are for validation
