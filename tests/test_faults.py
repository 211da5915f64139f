"""Faults provoked in stages for real, and the judge of what is left (clipcap.checks.faults, .children)."""
import dataclasses
import sys

import pandas as pd
import pytest
from conftest import ROOT

from clipcap.checks.children import MODULES, stage_code
from clipcap.checks.faults import AT, FAULTS, RunStates, differences, half_written, provoke, strays
from clipcap.core import STAGES


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    "A small run, before and after its first three stages."
    made = RunStates(tmp_path_factory.mktemp("faults"), ("01_data", "02_model", "03_train"))
    yield made
    made.server.close()


@pytest.mark.skipif(sys.platform != "linux", reason="children are watched in /proc")
@pytest.mark.slow
@pytest.mark.parametrize("stage, fault", [
    ("01_data", "two runs on one cache"), ("01_data", "read-only folder"), ("01_data", "file vanishing"), ("02_model", "two runs in one folder"),
    ("02_model", "file vanishing"), ("03_train", "SIGKILL"), ("03_train", "SIGTERM"), ("03_train", "Ctrl-C"), ("03_train", "disk full"),
    ("03_train", "clock going backwards"), ("apps/pipeline", "SIGTERM"), ("apps/pipeline", "two runs in one folder")])
def test_stage_survives(states, tmp_path, monkeypatch, stage, fault):
    monkeypatch.setenv("CLIPCAP_OUTPUTS", str(tmp_path))
    outcome = provoke(states, stage, fault)
    assert outcome.ok == "yes", dataclasses.asdict(outcome)


@pytest.mark.parametrize("stage, fault", [("apps/pipeline", "disk full"), ("01_data", "out of memory in Java")])
def test_what_does_not_apply_is_said(stage, fault): assert provoke(None, stage, fault).ok == "does not apply"


def test_error_of_the_harness_is_a_fault(): assert provoke(None, "01_data", "SIGKILL").ok.startswith("NO: AttributeError")


def test_each_kind_of_damage_is_seen(tmp_path):
    for name in ("a.json", "b.csv", "c.safetensors", "d.pth", "e.png", "f.html", "g.jsonl"): (tmp_path/name).write_text('{"half')
    for name in (".run.lock", ".a.json.abcdefgh.tmp"): (tmp_path/name).touch()
    assert len(half_written(tmp_path)) == 7 and strays(tmp_path) == [".a.json.abcdefgh.tmp"]
    assert differences({"a": b"1", "b": b"2", "c": b"3"}, {"a": b"1", "c": b"4"}) == ["b", "c"]


@pytest.mark.parametrize("stage", STAGES)
def test_job_of_a_stage_is_found(stage):
    code, parameters = stage_code(stage)
    assert {"preset", "run"} <= {*parameters} and code.count("\nrun = 'demo'\n") == 1
    assert f"run.stage('{stage}'" in code and "open_run(**notebook_parameters(" in code


def test_table_has_every_stage_and_fault():
    table = pd.read_csv(ROOT/"outputs/faults.csv", keep_default_na=False)
    assert {*zip(table.stage, table.fault)} == {(stage, fault) for stage in [*STAGES, "apps/pipeline"] for fault in FAULTS}, "run: make faults"
    assert {*MODULES} == {*AT} == {*STAGES}
