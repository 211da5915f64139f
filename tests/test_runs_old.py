"""Runs that version 0.1 made, before the notebooks moved, still open. `old_run` was made by its last commit, 6ffd58d."""
import json
import shutil

import pytest

from clipcap.core import Run

from conftest import link_spice


@pytest.fixture
def old(outputs, request, spice_files):
    "A copy of the run that version 0.1 made."
    shutil.copytree(request.path.parent/"old_run/outputs", outputs)
    link_spice(outputs, spice_files)
    return Run("old")


def test_settings_open(old):
    config = old.config()
    assert (config.mapping_network, config.ensemble, config.epochs) == ("linear", "", 2)


def test_weights_load_and_caption(old, request):
    from clipcap import generate_caption, load_run
    photo = sorted((request.path.parent/"old_run/photos/Images").iterdir())[0]
    assert generate_caption(photo, load_run("old"), max_length=4, num_beams=1)


def test_removed_setting_with_its_default_is_dropped_and_another_value_is_named(old):
    manifest = json.loads((old.path/"run.json").read_text())
    assert manifest["config"]["views"] == 0  # removed since
    manifest["config"]["views"] = 4
    (old.path/"run.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="doesn't know views"): old.config()


def test_renamed_stage_is_found(old):
    manifest = json.loads((old.path/"run.json").read_text())
    manifest["stages"]["10_report"] = {"finished": "then"}
    (old.path/"run.json").write_text(json.dumps(manifest))
    assert old.stage_entry("07_report") == old.stage_entry("10_report") == {"finished": "then"}


def test_verify_agrees(old):
    from clipcap.reporting.verify import verify
    table = verify(old)
    assert not (table.agrees == False).any(), table[table.agrees == False]  # noqa: E712


def test_command_captions(old, request, capsys):
    from clipcap.apps.cli import main
    photo = sorted((request.path.parent/"old_run/photos/Images").iterdir())[0]
    out = old.path.parent/"captions.jsonl"
    main(["caption", str(photo), "--run", "old", "--out", str(out)])
    assert json.loads(out.read_text().splitlines()[-1])["caption"]
