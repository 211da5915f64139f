"""Paths, atomic writes, the run folder and its locks (clipcap.runs, clipcap.core.Run)."""
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT
from filelock import Timeout

from clipcap.core import Run, check_earlier, make_config, open_run
from clipcap.runs.files import atomic_path, clear_strays, write_json
from clipcap.runs.folder import SEAL, environment, hold_run, made_files, seal, stop_on_sigterm

HOLDER = """import sys, time
from clipcap.core import Run
from clipcap.runs.folder import hold_run
with hold_run(Run("held", sys.argv[1]), sys.argv[2] == "children"): print("in", flush=True); time.sleep(60)"""


@pytest.fixture
def config(): return make_config("mini")


def begin(run, stage, config, needs=(), error=None):
    with run.stage(stage, config, needs):
        if error: raise error


@pytest.mark.parametrize("children", ["children", "none"])
def test_second_process_is_kept_out_until_the_first_is_killed(tmp_path, monkeypatch, children):
    run = Run("held", tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path), children], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(BlockingIOError, match="run 'held' is being worked on by another process"), hold_run(run): pass
        if children == "children":  # a process that the holder started may enter
            monkeypatch.setenv("CLIPCAP_HELD", str(run.path))
            with hold_run(run): pass
            monkeypatch.delenv("CLIPCAP_HELD")
        other.kill()
    with hold_run(run): pass


def test_strays_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path):
    dead = tmp_path/"checkpoints/.dead.pt.abcdefgh.tmp"
    dead.parent.mkdir()
    dead.write_text("half")
    with atomic_path(tmp_path/"living.json") as living:
        clear_strays(tmp_path)
        assert living.exists() and not dead.exists()


def test_there_is_one_kind_of_lock():
    found = {p.name for p in (ROOT/"clipcap").rglob("*.py") if re.search(r"\bflock|fcntl|msvcrt|lockf", p.read_text("utf-8"))}
    assert not found


WRITER = """import sys, time
from clipcap.runs.files import atomic_path
with atomic_path(sys.argv[1]) as part: part.write_text("half"); print("in", flush=True); time.sleep(60)"""


def test_strays_of_a_killed_process_go_once_it_is_dead(tmp_path):
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path/"sub/x.json")], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        clear_strays(tmp_path)
        assert [p.read_text() for p in tmp_path.rglob(".*.tmp")] == ["half"]
        other.kill()
    clear_strays(tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_full_disk_and_read_only_folder_are_explained(tmp_path, monkeypatch):
    def write(error):
        def fail(*_, **__): raise error
        monkeypatch.setattr("clipcap.runs.files.os.replace", fail)
        write_json(tmp_path/"x.json", 1)
    with pytest.raises(OSError, match="x.json can't be written: its disk is full; make room"): write(OSError(28, "No space left on device"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(PermissionError): write(PermissionError(13, "no"))
    monkeypatch.setattr("clipcap.runs.files.Path.touch", lambda _: (_ for _ in ()).throw(OSError(30, "read-only")))
    with pytest.raises(OSError, match="x.json can't be written .*; make its folder writable, or choose another for all runs: CLIPCAP_OUTPUTS=FOLDER"):
        write_json(tmp_path/"x.json", 1)


def test_sigterm_ends_a_stage_like_ctrl_c():
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"), stop_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with stop_on_sigterm(), ThreadPoolExecutor(1) as pool: pool.submit(lambda: stop_on_sigterm().__enter__()).result()  # no error in a thread


def test_made_files_are_those_of_the_stage_and_the_split(tmp_path):
    for name in ("last.pt", ".last.pt.x1", "mapping_network_epoch_2.pth", "gpt2_epoch_2.pth", "mine.txt"): write_json(tmp_path/"checkpoints"/name, 0)
    for name in ("captions_val.json", "captions_test.json"): write_json(tmp_path/name, 0)
    assert made_files(tmp_path, "03_train") == [f"checkpoints/{name}" for name in ("gpt2_epoch_2.pth", "last.pt", "mapping_network_epoch_2.pth")]
    assert made_files(tmp_path, "04_evaluate", "val") == ["captions_val.json"]


@pytest.mark.parametrize("name", ["../escape", "a/b", "", "..", "a\nb"])
def test_run_name_must_be_a_folder_name(name):
    with pytest.raises(ValueError, match="must be a plain folder name"): Run(name)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"["*9999, b"9"*5000, b"[1]", b'{"stages": 1}', b'{"config": [1]}', b'{"stages": {"01_data": "done"}}'])
def test_damaged_manifest_is_named(tmp_path, content):
    run = Run("broken", tmp_path)
    run.path.mkdir()
    (run.path/"run.json").write_bytes(content)
    with pytest.raises(ValueError, match="run.json"): run.manifest


def test_stage_without_settings_is_not_finished(tmp_path, config):
    run = Run("broken", tmp_path)
    write_json(run.path/"run.json", {"stages": {"01_data": {"finished": "now"}}})
    with pytest.raises(ValueError, match="01_data, which is not finished"): check_earlier(run, "03_train", config, ("01_data",))


def test_stage_records_what_it_was_built_on(tmp_path, config):
    run = Run("example", tmp_path)
    with pytest.raises(ValueError, match="papermill nbs/01_data.ipynb OUT.ipynb -p run example"): begin(run, "03_train", config, ["01_data"])
    begin(run, "01_data", config)
    begin(run, "03_train", config, ["01_data"])
    assert run.manifest["config"]["epochs"] == config.epochs
    assert run.stage_entry("03_train")["built_on"] == {"01_data": run.stage_entry("01_data")["started"]}


def test_changed_setting_of_an_earlier_stage_is_named_with_both_values(tmp_path, config):
    run = Run("example", tmp_path)
    begin(run, "01_data", config)
    with pytest.raises(ValueError, match="split='random', but 01_data of run 'example' was made with 'official'"):
        begin(run, "03_train", make_config("mini", split="random"), ["01_data"])
    older = {k: v for k, v in run.stage_entry("01_data")["config"].items() if k != "on_bad_image"}  # from before there was such a setting
    run.update_stage("01_data", config=older)
    begin(run, "03_train", config, ["01_data"])


def test_failed_stage_is_not_finished_and_says_why(tmp_path, config):
    run = Run("example", tmp_path)
    with pytest.raises(ZeroDivisionError): begin(run, "03_train", config, error=ZeroDivisionError("epoch 3"))
    assert run.stage_entry("03_train")["error"] == "ZeroDivisionError: epoch 3"
    assert "finished" not in run.stage_entry("03_train")


def test_refused_stage_that_changed_nothing_leaves_its_entry(tmp_path, config):
    run, other = Run("example", tmp_path), make_config("mini", num_beams=1)
    with run.stage("04_evaluate", config) as notes:
        write_json(run.path/"captions_val.json", "a dog")
        notes["eval_split"] = "val"
    before = run.manifest
    for error in (ValueError("another recipe"), FileNotFoundError("no weights"), TypeError("no number")):
        with pytest.raises(type(error)): begin(run, "04_evaluate", other, error=error)
        assert run.manifest == before
    for error in (FloatingPointError("not finite"), KeyboardInterrupt("SIGTERM")):
        with pytest.raises(type(error)): begin(run, "04_evaluate", other, error=error)
        assert run.stage_entry("04_evaluate")["error"] == f"{type(error).__name__}: {error}"
    with pytest.raises(ValueError): begin(run, "04_evaluate", config, error=ValueError("again"))
    assert run.stage_entry("04_evaluate")["error"] == "ValueError: again"  # the attempt before it failed, too


def test_refused_stage_that_changed_a_file_is_not_finished(tmp_path, config):
    run = Run("example", tmp_path)
    begin(run, "04_evaluate", config)
    with pytest.raises(ValueError), run.stage("04_evaluate", config):
        write_json(run.path/"captions_val.json", "a cat")
        raise ValueError("no score")
    assert "finished" not in run.stage_entry("04_evaluate")


def test_hashes_of_made_files(tmp_path, config):
    run = Run("example", tmp_path)
    def evaluate(split, text):
        with run.stage("04_evaluate", config) as notes:
            write_json(run.path/f"captions_{split}.json", text)
            notes["eval_split"] = split
    def made(): return run.stage_entry("04_evaluate")["made"]
    evaluate("test", "a dog")
    first = made()
    assert first == {"captions_test.json": hashlib.sha256(b'"a dog"\n').hexdigest()}
    write_json(run.path/"captions_test.json", "a cat")  # changed by hand: a later stage keeps the recorded hash
    evaluate("val", "a bird")
    assert made()["captions_test.json"] == first["captions_test.json"]
    write_json(run.path/"figures/captions_val.png", 0)
    (run.path/"captions_test.json").unlink()
    run.record("04_evaluate", "figures/*")
    assert list(made()) == ["captions_val.json", "figures/captions_val.png"]
    entry = run.stage_entry("04_evaluate")
    assert entry[SEAL] == seal(entry)
    run.update_stage("04_evaluate", note=3)
    assert run.stage_entry("04_evaluate")[SEAL] != entry[SEAL]


@pytest.mark.parametrize("held", [{"preset": []}, {"preset": "mini", "config": {"epochs": "5"}}, {"preset": "mini", "config": {"epochs": -1}},
                                  {"preset": "mini", "config": {"color": "red"}}])
def test_impossible_settings_in_a_manifest_name_the_file(tmp_path, held):
    odd = Run("odd", tmp_path)
    write_json(odd.path/"run.json", held)
    with pytest.raises(ValueError, match="run.json: "): open_run(odd)


def test_impossible_setting_of_the_caller_does_not_blame_the_file(tmp_path):
    odd = Run("odd", tmp_path)
    write_json(odd.path/"run.json", {"preset": "mini"})
    with pytest.raises(TypeError, match="^epochs='5' is a str"): open_run(odd, epochs="5")


def test_outputs_follow_the_environment_and_paths_the_project(monkeypatch, tmp_path):
    from clipcap.runs.files import outputs_dir, project_root, resolve_path
    monkeypatch.setenv("CLIPCAP_OUTPUTS", str(tmp_path))
    assert outputs_dir() == tmp_path
    monkeypatch.chdir(project_root()/"nbs")
    assert resolve_path("outputs") == (project_root()/"outputs").resolve() and project_root() != Path.cwd()
    monkeypatch.chdir(tmp_path)  # no checkout
    assert project_root() == tmp_path


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr("clipcap.runs.folder._PACKAGES", ("filelock", "a-package-that-nobody-has"))
    versions = environment()["packages"]
    assert versions["filelock"] and versions["a-package-that-nobody-has"] is None


def test_a_lock_in_a_read_only_folder_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr("clipcap.runs.folder.FileLock.acquire", lambda _: (_ for _ in ()).throw(OSError(30, "read-only")))
    with pytest.raises(OSError, match="can't be written .*; make its folder writable"), hold_run(Run("r", tmp_path)): pass


@pytest.mark.parametrize("children", [False, True])
def test_a_run_is_held_for_children_where_that_is_asked_for(tmp_path, children):
    with hold_run(Run("r", tmp_path), **{"children": True} if children else {}): assert ("CLIPCAP_HELD" in os.environ) == children
    assert "CLIPCAP_HELD" not in os.environ


def test_without_git_no_commit_is_recorded(monkeypatch):
    monkeypatch.setattr("clipcap.runs.folder.subprocess.run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError("git")))
    assert environment()["git_commit"] is None


def test_a_busy_run_names_the_stage_that_began_last(tmp_path, monkeypatch):
    run = Run("r", tmp_path)
    write_json(run.path/"run.json", {"stages": {name: {"started": "2026-11-26T18:00:00", "process": "7 on here"} for name in ("01_data", "03_train")}})
    monkeypatch.setattr("clipcap.runs.folder.FileLock.acquire", lambda _: (_ for _ in ()).throw(Timeout("run")))
    with pytest.raises(BlockingIOError, match=r"another process \(03_train since 2026-11-26T18:00, process 7 on here\);"), hold_run(run): pass
