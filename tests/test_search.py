"""Hyperparameter search with optuna: spaces, storages, workers that share, die and resume (clipcap.studies.search)."""
import math
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pandas as pd
import pytest

from clipcap.core import open_run
from clipcap.data import load_data
from clipcap.evaluate import read_captions_json
from clipcap.runs.checkpoints import read_metrics
from clipcap.scoring.metrics import score
from clipcap.studies import search as searching
from clipcap.studies.search import (check_space, main, open_storage, open_study, parse_space, plot_search, run_trial, search, suggest, trials_table,
                                    validation_score)

optuna = pytest.importorskip("optuna")

SPACE = {"learning_rate": (1e-5, 1e-1, "log"), "num_layers": [1, 2, 3, 4]}
WORKER = """
import pathlib, sys, time
{objective}
from clipcap.studies.search import search
search({space!r}, {storage!r}, {study!r}, 10, base=dict(prefix_length=10), objective=objective, **{heartbeats!r})"""


def formula(run, settings, wanted):
    "Best at a learning rate of 1e-3 and three layers; an odd prefix length does not work."
    if settings["prefix_length"] % 2: raise ValueError("an odd prefix")
    return 1 - abs(math.log10(settings["learning_rate"]) + 3) - 0.1*abs(settings["num_layers"] - 3)


class Noted(list):
    "The formula, with the names of the runs that it was asked for."
    def __call__(self, run, settings, wanted): return (self.append(run), formula(run, settings, wanted))[1]


@pytest.fixture
def find(outputs, tmp_path):
    "A search in a journal of its own, by the formula."
    def run(study, trials, space=SPACE, objective=formula, base=None, **options):
        return search(space, options.pop("storage", tmp_path/f"{study}.journal"), study, trials, base={"prefix_length": 10, **(base or {})}, objective=objective, **options)
    return run


def start_worker(study, storage, objective, **heartbeats):
    "A worker in a process of its own; `objective` is its code."
    program = WORKER.format(objective=objective, space=SPACE, storage=str(storage), study=study, heartbeats=heartbeats)
    return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)


def until(happened, process):
    "Wait until something has happened, while a process works."
    for _ in range(2400):
        if happened(): return
        if process.poll() is not None: raise RuntimeError(process.stderr.read())
        time.sleep(0.05)
    raise TimeoutError(happened)


def test_space_is_read_from_words():
    words = ["learning_rate=1e-5..1e-3:log", "num_layers=1,2,4", "dropout=0..0.3", "mapping_network=mlp,linear", "epochs=5", "data_root=../flickr8k"]
    assert parse_space(words) == ({"learning_rate": (1e-5, 1e-3, "log"), "num_layers": [1, 2, 4], "dropout": (0, 0.3), "mapping_network": ["mlp", "linear"]},
                                  {"epochs": 5, "data_root": "../flickr8k"})
    with pytest.raises(ValueError, match="'epochs' is not of the form field=value"): parse_space(["epochs"])


@pytest.mark.parametrize("space, error, message", [
    ({"learning_rates": [1e-3]}, ValueError, "did you mean 'learning_rate'"), ({"dropout": (0, 1.5)}, ValueError, "dropout=1.5 is too large"),
    ({"dropout": (0.3, 0.1)}, ValueError, "low below high"), ({"num_layers": [1, 0]}, ValueError, "num_layers=0 is too small"),
    ({"dropout": (0, 0.3, "log")}, ValueError, "must begin above 0"), ({"num_layers": []}, ValueError, "no choices"),
    ({"seed": [1, 2]}, ValueError, "can't be searched"), ({"epochs": [1, 2]}, ValueError, "both searched and fixed"),
    ({}, ValueError, "the space is empty"), ({"num_layers": [1.5, 2]}, TypeError, "num_layers")])
def test_impossible_space_is_refused(space, error, message):
    check_space(SPACE, "flickr8k", {"epochs": 5})
    with pytest.raises(error, match=message): check_space(space, "flickr8k", {"epochs": 5})


def test_range_of_an_integer_field_gives_integers():
    trial = optuna.trial.FixedTrial({"num_layers": 3, "dropout": 0.2, "num_beams": 2})
    assert suggest(trial, {"num_layers": (1, 4), "dropout": (0, 0.3), "num_beams": [1, 2]}) == {"num_layers": 3, "dropout": 0.2, "num_beams": 2}
    assert isinstance(trial.distributions["num_layers"], optuna.distributions.IntDistribution)


@pytest.mark.parametrize("name, content, message", [
    ("trials.csv", None, "neither a path that ends in .journal or .log nor the address"),
    ("torn.journal", '{"op_code": 0}\n{"op_co{"op_code": 4}\n{"op_code": 4}\n', "torn.journal, line 2"),
    ("words.log", "Monday: nothing.\n", "words.log, line 1: b'Monday: nothing.")])
def test_what_is_no_storage_is_refused(tmp_path, name, content, message):
    if content: (tmp_path/name).write_text(content)
    with pytest.raises(ValueError, match=message): open_storage(tmp_path/name)


def test_missing_optuna_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'clipcap\[search\]'"): open_storage(tmp_path/"a.journal")


def test_search_learns_where_to_look(find, outputs):
    table = find("alone", 25)
    assert sorted(table.index) == list(range(25)) and table.value.is_monotonic_decreasing and table.learning_rate.between(1e-5, 1e-1).all()
    settings = table[["learning_rate", "num_layers"]].to_dict("records")
    assert table.value.tolist() == pytest.approx([formula("", {**row, "prefix_length": 10}, None) for row in settings])
    scores = table.sort_index().value
    assert scores[10:].mean() > scores[:10].mean()  # the first ten are random
    assert pd.read_csv(outputs/"alone/trials.csv").number.tolist() == table.index.tolist()


def test_search_resumes_and_repeats_itself(find):
    noted = Noted()
    alone = find("alone", 12)
    assert find("alone", 12, objective=noted).index.tolist() == alone.index.tolist() and noted == []
    for number in (5, 12): parts = find("parts", number, objective=noted)
    assert noted == [f"parts-{n}" for n in range(12)]
    assert parts.sort_index().learning_rate.tolist() == alone.sort_index().learning_rate.tolist()


def test_study_of_another_space_is_refused(find):
    find("alone", 1)
    with pytest.raises(ValueError, match="study 'alone' was begun with base={'prefix_length': 10}, and now it is {'prefix_length': 20}"):
        find("alone", 3, base={"prefix_length": 20})
    with pytest.raises(ValueError, match="num_layers=0 is too small"): find("alone", 3, {"num_layers": [0, 1]})
    with pytest.raises(ValueError, match="trials=0 is too small"): find("alone", 0)
    with pytest.raises(ValueError, match="metric='bleu' is unknown"): find("alone", 1, metric="bleu")


def test_repeated_combination_gets_the_score_of_the_first(find):
    noted = Noted()
    table = find("few", 12, {"num_layers": [1, 2], "num_beams": [1, 2]}, noted, {"learning_rate": 1e-3})
    computed = table[table.same_as.isna()]
    assert (len(table), len(noted), len(computed), computed.duplicated(["num_layers", "num_beams"]).any()) == (12, 4, 4, False)
    for row in table[table.same_as.notna()].itertuples():
        assert (row.value, row.num_layers, row.num_beams) == tuple(table.loc[row.same_as, ["value", "num_layers", "num_beams"]])


def test_impossible_combination_counts_and_three_in_a_row_stop(outputs):
    base = {"num_layers": 1, "learning_rate": 1e-3}
    def search_prefixes(study, choices): return search({"prefix_length": choices}, outputs/f"{study}.journal", study, 12, base=base, objective=formula)
    table = search_prefixes("some", [1, 2, 4, 6, 8])
    failed = table[table.prefix_length == 1]
    assert (len(table), {*failed.error}, {*failed.state}) == (12, {"ValueError: an odd prefix"}, {"fail"})
    with pytest.raises(RuntimeError, match="three trials in a row failed; the last: ValueError: an odd prefix"): search_prefixes("none", [1, 3, 5])


def test_race_for_the_last_trial(find, tmp_path, monkeypatch):
    "Between a worker's look and its grip, another takes the last trial: it has one too many then, and gives it back."
    find("both", 3)
    other, optimize, taken = open_study(tmp_path/"both.journal", "both"), optuna.study.Study.optimize, []
    def raced(self, *args, **kwargs):
        if not taken: taken.append(other.tell(other.ask(), 0.5).number)
        return optimize(self, *args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(optuna.study.Study, "optimize", raced)
        table = find("both", 4, objective=lambda *_: 1/0)
    assert (taken, sorted(table.index), [t.state.name for t in other.trials[3:]]) == ([3], [0, 1, 2, 3], ["COMPLETE", "PRUNED"])
    assert sorted(find("both", 5).index) == [0, 1, 2, 3, 5]


def test_ctrl_c_puts_the_trial_back(find):
    def stopped(run, settings, wanted): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): find("stopped", 2, objective=stopped)
    noted = Noted()
    assert len(find("stopped", 2, objective=noted)) == 2
    assert sorted(noted) == ["stopped-0", "stopped-2"]  # trial 1 is the copy of trial 0


def test_trial_of_a_worker_that_was_believed_dead_is_not_taken(find, tmp_path):
    runs = Noted()
    def slow(run, settings, wanted):
        value = runs(run, settings, wanted)
        if runs != ["slept-0"]: return value
        other = open_study(tmp_path/"slept.journal", "slept")
        assert wanted()
        other.tell(0, state=optuna.trial.TrialState.FAIL)
        searching._put_back(other, 0)
        assert not wanted()
        return 99.
    table = find("slept", 3, objective=slow)
    assert (runs.count("slept-0"), len(table), {*table.state}) == (2, 3, {"complete"}) and table.value.max() < 2


def test_figure_shows_the_best_so_far_and_what_matters(find, tmp_path):
    table = find("plotted", 25)
    left, right = plot_search(open_study(tmp_path/"plotted.journal", "plotted")).axes
    assert left.lines[1].get_ydata().tolist() == table.sort_index().value.cummax().tolist()
    assert sum(bar.get_width() for bar in right.patches) == pytest.approx(1)
    assert right.get_title(loc="left") == "learning_rate matters most"  # by the formula it ranges over 2, the layers over 0.2
    find("short", 1)
    assert "from ten trials on" in plot_search(open_study(tmp_path/"short.journal", "short")).axes[1].get_title(loc="left")


def test_command_prints_the_best_and_how_to_train_it(find, outputs, tmp_path, monkeypatch, capsys):
    find("told", 3)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    main(["learning_rate=1e-5..1e-1:log", "num_layers=1,2,3,4", "prefix_length=10"], storage=str(tmp_path/"told.journal"), study="told", trials=3)
    best, printed = open_study(tmp_path/"told.journal", "told").best_trial, capsys.readouterr().out
    assert f"num_layers={best.params['num_layers']}\"" in printed and "RUN=told-best PRESET=mini" in printed
    assert (outputs/"told/search.png").is_file()
    assert searching._worker_command(["a=1,2"], trials=3)[1:] == ["-m", "clipcap.studies.search", "a=1,2", "--trials", "3"]


@pytest.mark.slow
def test_two_workers_share_the_trials(outputs, tmp_path):
    "Each waits with its first trial until the other has begun one."
    objective = f"""
import os
done = pathlib.Path({str(tmp_path/"done.txt")!r})
def objective(run, settings, wanted):
    with open(done, "a") as file: file.write(f"{{os.getpid()}} {{run}}\\n")
    while len({{line.split()[0] for line in done.read_text().splitlines()}}) < 2: time.sleep(0.05)
    return 1.0"""
    workers = [start_worker("both", tmp_path/"both.journal", objective, heartbeat=6) for _ in range(2)]
    assert [process.wait(240) for process in workers] == [0, 0]
    assert sorted(line.split()[1] for line in (tmp_path/"done.txt").read_text().splitlines()) == sorted(f"both-{n}" for n in range(10))
    table = trials_table(open_study(tmp_path/"both.journal", "both"))
    assert (len(table), {*table.state}, table.worker.nunique()) == (10, {"complete"}, 2)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["{}/killed.journal", "sqlite:///{}/killed.db"])
def test_trial_of_a_killed_worker_is_repeated_in_its_run(find, tmp_path, storage):
    "Killed in the middle of its first trial, with a signal that no program can catch."
    storage, began = storage.format(tmp_path), tmp_path/"killed-0.began"
    objective = f"""
def objective(run, settings, wanted):
    pathlib.Path({str(tmp_path)!r}, run + ".began").write_text(str(settings["learning_rate"]))
    time.sleep(600)"""
    def heartbeat():
        if "sqlite" not in storage: return (tmp_path/"killed.journal.alive/0").is_file()
        return sqlite3.connect(tmp_path/"killed.db").execute("select count(*) from trial_heartbeats").fetchone()[0]
    victim = start_worker("killed", storage, objective, heartbeat=1, grace=2)
    until(lambda: began.is_file() and heartbeat(), victim)
    victim.kill()
    victim.wait()
    noted = Noted()
    table = find("killed", 3, objective=noted, storage=storage, heartbeat=1, grace=2)
    assert (noted.count("killed-0"), len(table), {*table.state}) == (1, 3, {"complete"})
    assert str(table[table.run == "killed-0"].learning_rate.iloc[0]) == began.read_text()  # the same parameters
    assert [(t.number, t.state.name) for t in open_study(storage, "killed").get_trials() if t.state.name != "COMPLETE"] == [(0, "FAIL")]


@pytest.fixture
def base(tiny):
    "Settings of a run on 30 scenes with random embeddings."
    _, config = tiny(images=30)
    return dict(data_root=config.data_root, embeddings=config.embeddings, split="random", epochs=20, max_length=16, num_layers=1)


@pytest.mark.slow
def test_search_that_trains_resumes_a_killed_training(base, outputs, tmp_path):
    "The training ends with its worker; the next worker resumes it; a trial that differs in its beams alone begins as a copy of it."
    import psutil
    options = dict(space={"num_beams": [1, 2, 3]}, storage=str(tmp_path/"real.journal"), study="real", trials=2, base=base, seed=2, threads=1, heartbeat=1, grace=2)
    victim = subprocess.Popen([sys.executable, "-c", f"from clipcap.studies.search import search; search(**{options!r})"], stderr=subprocess.PIPE, text=True)
    until(lambda: len(read_metrics(outputs/"real-0")) > 2, victim)
    training = psutil.Process(victim.pid).children(recursive=True)
    victim.kill()
    victim.wait()
    assert training and psutil.wait_procs(training, 60)[1] == []
    before = read_metrics(outputs/"real-0")
    assert 2 < len(before) < 20
    time.sleep(3)  # longer than `grace`
    found = search(**options)
    assert (sorted(found.index), {*found.state}, sorted(found.run), found.num_beams.nunique()) == ([1, 2], {"complete"}, ["real-0", "real-2"], 2)
    after, known = read_metrics(outputs/"real-0"), len(before) - 1  # the last line is written before its weights: that epoch may be trained again
    assert ([m["epoch"] for m in after], after[:known]) == (list(range(1, 21)), before[:known])
    assert [after[known][loss] for loss in ("train_loss", "val_loss")] == [before[known][loss] for loss in ("train_loss", "val_loss")]
    first, second = ((outputs/f"real-{n}/checkpoints/mapping_network_epoch_20.pth").read_bytes() for n in (0, 2))
    assert first == second and read_metrics(outputs/"real-2") == after
    for row in found.itertuples():
        run, config = open_run(row.run)
        data, written = load_data(run, config), read_captions_json(run.path/"captions_val.json")
        assert (config.num_beams, {*written}) == (row.num_beams, {*data.split("val").image})
        assert row.value == pytest.approx(score(written, data.references("val"), ["cider"]).corpus["cider"], abs=1e-9)
        assert validation_score(run, config, "loss") == min(m["val_loss"] for m in after)
    assert not [*outputs.rglob("*_test*")]  # nothing is written of the test split


@pytest.mark.slow
def test_trial_that_is_stopped_stops_its_worker(base):
    import psutil
    def stop_training():
        while not (started := [p for p in psutil.Process().children() if "train_and_score" in " ".join(p.cmdline())]): time.sleep(0.05)
        started[0].terminate()
    threading.Thread(target=stop_training, daemon=True).start()
    with pytest.raises(KeyboardInterrupt, match="run 'halted' was stopped"): run_trial("halted", "mini", base)


@pytest.mark.slow
def test_error_of_a_trial_comes_with_its_last_words(base):
    with pytest.raises(RuntimeError, match="(?s)run 'wrong' failed, see wrong.log: .*num_heads=3 does not divide"): run_trial("wrong", "mini", {**base, "num_heads": 3}, "loss")
