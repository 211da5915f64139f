"""When stages run and when they don't, what the pipeline prints and collects (clipcap.apps.pipeline)."""
import ast
import json
import shutil
import subprocess
import sys
import textwrap

import nbformat
import pandas as pd
import pytest
from conftest import ROOT

from clipcap.apps import pipeline
from clipcap.apps.pipeline import (depends_on, imported_names, main, module_hashes, plain_code, run_stages, stage_code, stage_statements, summary, why_run,
                                   write_extremes, write_seed_table)
from clipcap.core import MAPPING_NETWORKS, STAGES, Config, Run, make_config, stage_config
from clipcap.runs.files import write_json

# --- what the code of a stage is


@pytest.mark.parametrize("source", ["def f(a):  # of nothing\n    'Return one.'\n    return (a +\n            1)", '"""A module."""\ndef f(a): return a + 1'])
def test_comments_docstrings_and_formatting_are_left_out(source):
    assert plain_code(ast.parse(source)) == "def f(a):\n    return a + 1"


@pytest.mark.parametrize("source, package, names", [
    ("import a.b, c", "clipcap", {"a.b", "c"}),
    ("from .core import Run", "clipcap", {"clipcap.core", "clipcap.core.Run"}),
    ("def f():\n    from ..core import Run", "clipcap.sub", {"clipcap.core", "clipcap.core.Run"}),
    ("from . import other", "clipcap.sub", {"clipcap.sub", "clipcap.sub.other"}),
    ("x = ['clipcap.a.b:C', 'clipcap.a', 'see clipcap.a:B']", "clipcap", {"clipcap.a.b"}),
])
def test_imports_become_absolute_names(source, package, names): assert imported_names(ast.parse(source), package) == names


def test_addresses_can_be_left_out(): assert imported_names(ast.parse("x = 'clipcap.a:B'"), "clipcap", addresses=False) == set()


def test_imports_are_followed_through_packages_and_functions(tmp_path):
    for name, text in {"__init__": "", "a": "def f():\n    from .sub import c", "sub/__init__": "from . import b", "sub/b": "import torch", "sub/c": "from ..d import x",
                       "d": "from clipcap import a", "unused": "", "assets/d": ""}.items():
        file = tmp_path/f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    (tmp_path/"assets/c.html.jinja").write_text("<p>")
    assert set(module_hashes({"clipcap.a", "clipcap.a.f", "torch.nn"}, tmp_path)) == {"clipcap.a", "clipcap.sub", "clipcap.sub.b", "clipcap.sub.c", "clipcap.d",
                                                                         "assets/c.html.jinja", "assets/d.py"}


def test_public_names_lead_to_their_modules(): assert "clipcap.formats.readers" in module_hashes({"clipcap.read_captions"}, ROOT/"clipcap")


def notebook(path, *cells):
    "Write a notebook: code, with the tag `parameters` in the first cell; Markdown begins with #."
    made = [nbformat.v4.new_markdown_cell(c) if c.startswith("# ") else nbformat.v4.new_code_cell(textwrap.dedent(c)) for c in cells]
    made[0].metadata["tags"] = ["parameters"]
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=kernel), path)
    return path


JOB = 'with run.stage("01_data", config) as notes:\n    for name in names: notes[name] = size(name, scale)\n    notes |= sizes'


@pytest.mark.parametrize("cells, kept", [
    (['x = size(1, 2)\nprint(x)', 'notes = {}', '# text'], []),                                   # demonstrations; the stage sets `notes` itself
    (["names = ['a']", "scale = 1\nscale"], ["names = ['a']", "scale = 1"]),
    (["scale = 1", "scale = base", "base = 3"], ["scale = base"]),                                # the last value counts, and only what came before
    (["scale = 1", "scale += 2", "if fast:\n    scale = 3"], ["scale = 1", "scale += 2", "if fast:\n    scale = 3"]),
    (["sizes = {}", "for k in range(3):\n    sizes[k] = k"], ["sizes = {}", "for k in range(3):\n    sizes[k] = k"]),
    (["def size(n, k):\n    'Return a size.'\n    names = k\n    return names", "names = [k for k in 'ab']"],
     ["def size(n, k):\n    names = k\n    return names", "names = [k for k in 'ab']"]),
    (["#| export\nscale = 1", "import numpy as names", "%matplotlib inline\nscale = 2", "scale = ("], ["scale = 2"]),
    (["def tiny():\n    with run.stage('03_train', config): pass", "run.update_stage('01_data', a=1)"], ["run.update_stage('01_data', a=1)"]),
])
def test_of_a_notebook_counts_what_the_stage_works_with(tmp_path, cells, kept):
    found = stage_statements(notebook(tmp_path/"a.ipynb", "preset = None  # of the run", *cells, JOB, "scale = 9"), "01_data")
    assert found == "\n".join(["preset = None", *kept, plain_code(ast.parse(JOB))])


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_notebook_has_its_job(stage): assert f"run.stage('{stage}'" in stage_statements(ROOT/f"nbs/{stage}.ipynb", stage)


def test_only_the_chosen_part_of_a_registry_counts(monkeypatch):
    monkeypatch.setitem(MAPPING_NETWORKS, "drawn", "clipcap.mini.scenes:draw")
    def counts(stage, name): return "clipcap.mini.scenes" in stage_code(stage, make_config("mini", mapping_network=name), ROOT/"nbs", ROOT/"clipcap")
    assert [counts(stage, "drawn") for stage in ("01_data", "02_model", "04_evaluate")] == [False, True, True]
    assert not counts("02_model", "transformer")


# --- which change makes which stage stale

@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    "A copy of what stages are made of."
    folder = tmp_path_factory.mktemp("checkout")
    for stage in STAGES:
        (folder/"nbs"/stage).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/f"nbs/{stage}.ipynb", folder/f"nbs/{stage}.ipynb")
    shutil.copytree(ROOT/"clipcap", folder/"clipcap", ignore=shutil.ignore_patterns("__pycache__", "mini"))
    shutil.copytree(ROOT/"tests", folder/"tests", ignore=shutil.ignore_patterns("old_run", "__pycache__"))
    return folder


def change_cells(path, edit):
    content = json.loads(path.read_text("utf-8"))
    edit(content["cells"])
    path.write_text(json.dumps(content), "utf-8")


def append(path, text): path.write_text(path.read_text("utf-8") + text, "utf-8")


def edit_markdown(cells): next(c for c in cells if c["cell_type"] == "markdown")["source"] += ["\nMore."]


def add_example(cells): cells.insert(-3, {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, "id": "x", "source": "example = 1\nassert example"})


def comment_job(cells):
    job = next(c for c in cells if "with run.stage(" in "".join(c["source"]) and c["cell_type"] == "code")
    job["source"] = "# a comment\n" + "".join(job["source"])


def edit_job(cells):
    job = next(c for c in cells if 'run.stage("05_error_analysis"' in "".join(c["source"]) and c["cell_type"] == "code")
    job["source"] = "".join(job["source"]) + "\nextra = 1"


LATER = {stage: set(STAGES[k:]) for k, stage in enumerate(STAGES)}


@pytest.mark.parametrize("file, edit, stale", [
    ("nbs/03_train.ipynb", lambda path: change_cells(path, edit_markdown), set()),
    ("nbs/03_train.ipynb", lambda path: change_cells(path, add_example), set()),
    ("nbs/01_data.ipynb", lambda path: change_cells(path, comment_job), set()),
    ("nbs/05_error_analysis.ipynb", lambda path: change_cells(path, edit_job), {"05_error_analysis"}),
    ("tests/test_pipeline.py", lambda path: append(path, "\nx = 1\n"), set()),
    ("clipcap/train.py", lambda path: append(path, "\n# a comment\n"), set()),
    ("clipcap/train.py", lambda path: path.write_text(path.read_text("utf-8").replace('"""', '"""More: ', 1), "utf-8"), set()),
    ("clipcap/train.py", lambda path: append(path, "\ndef more(): return 1\n"), LATER["03_train"]),
    ("clipcap/runs/files.py", lambda path: append(path, "\nx = 1\n"), LATER["01_data"]),
    ("clipcap/apps/cli.py", lambda path: append(path, "\nx = 1\n"), set()),
    ("clipcap/report.py", lambda path: append(path, "\nx = 1\n"), {"07_report"}),
    ("clipcap/assets/report.html.jinja", lambda path: append(path, "<p>"), {"07_report"}),
])
def test_a_change_makes_stale_what_uses_it(checkout, outputs, file, edit, stale):
    def now(): return {stage: depends_on(stage, make_config("mini"), checkout/"nbs", checkout/"clipcap") for stage in STAGES}
    before, original = now(), (checkout/file).read_bytes()
    try:
        edit(checkout/file)
        assert {stage for stage, found in now().items() if found != before[stage]} == stale
    finally: (checkout/file).write_bytes(original)


def test_photos_beside_a_captions_file_are_inputs(tmp_path, outputs):
    captions, photo = tmp_path/"captions.txt", tmp_path/"Images/a.jpg"
    captions.write_text("image,caption\na.jpg,a dog\n")
    def inputs(): return depends_on("01_data", make_config("mini", data_root=str(captions)), ROOT/"nbs")["inputs"]
    before = inputs()
    photo.parent.mkdir(), photo.write_bytes(b"")
    assert inputs() != before


@pytest.mark.parametrize("name", ["weights.json", "open_clip_config.json"])
def test_configuration_beside_a_clip_is_an_input(tmp_path, outputs, name):
    (tmp_path/"weights.pt").write_bytes(b"weights")
    def inputs(): return depends_on("01_data", make_config("mini", clip_model=str(tmp_path/"weights.pt")), ROOT/"nbs")["inputs"]
    found = [inputs()]
    for text in ('{"quick_gelu": true}', '{"quick_gelu": false}'):
        (tmp_path/name).write_text(text)
        found.append(inputs())
    (tmp_path/name).unlink(), (tmp_path/"other.json").touch()
    assert len({*found}) == 3 and inputs() == found[0]


def test_checkpoints_of_an_ensemble_are_inputs_of_what_decodes(tmp_path, outputs):
    def inputs(): return [depends_on(stage, make_config("mini", ensemble="other"), ROOT/"nbs")["inputs"] for stage in STAGES]
    before = inputs()
    write_json(outputs/"other/checkpoints/last.pt", [])
    assert [a != b for a, b in zip(inputs(), before)] == [stage in LATER["04_evaluate"] for stage in STAGES]


@pytest.mark.parametrize("epoch, why", [(None, ""), ("last", ""), (3, "it was run by hand with other settings"), ("best", "it was run by hand with other settings")])
def test_a_stage_with_another_checkpoint_was_run_by_hand(tmp_path, epoch, why):
    run, config = Run("shown", tmp_path), make_config("mini")
    now = {"config": stage_config(config, "06_attention"), "code": {}, "inputs": ""}
    run.update(pipeline={"06_attention": {**now, "complete": True}})
    with run.stage("06_attention", config) as notes: notes["epoch"] = epoch
    (run.path/"relevance_test.safetensors").touch()
    assert why_run(run, "06_attention", now) == why


@pytest.mark.parametrize("before, now, why", [
    ("1a2b", {}, "the run is of an earlier version"),
    ({"clipcap.a": "1", "clipcap.b": "1"}, {"clipcap.b": "2", "clipcap.c": "1"}, "clipcap.a, clipcap.b, clipcap.c"),
    ({}, dict.fromkeys("abcde", "1"), "a, b, c and 2 more"),
])
def test_changed_code_is_named(tmp_path, before, now, why):
    run = Run("a", tmp_path)
    run.update(pipeline={"01_data": {"config": {}, "code": before, "inputs": "", "complete": True}})
    assert why_run(run, "01_data", {"config": {}, "code": now, "inputs": ""}) == f"the code has changed: {why}"


# --- a toy road of two stages, and `finetune/scst`

TOY = """
from clipcap.core import open_run
from clipcap.runs.files import resolve_path, write_json
run, config = open_run(run, preset)
with run.stage("{stage}", config, needs={needs}):
    for name in {makes}: write_json(run.path/name, dict(restart=restart, epochs=config.epochs))
    resolve_path(config.data_root).mkdir(parents=True, exist_ok=True)
if resolve_path(config.data_root).with_name("full").exists(): raise OSError("disk full")
"""
MAKES = {"01_data": ["captions_table.csv"], "03_train": ["checkpoints/last.pt", "metrics.jsonl"], "finetune/scst": ["checkpoints/scst.pt"]}
PUT_AWAY = 'if not config.scst_epochs: (run.path/"checkpoints/scst.pt").unlink()'


def write_toy(folder, stage, needs=(), extra=""):
    return notebook(folder/f"{stage}.ipynb", "run, preset, restart = 'demo', None, False", TOY.format(stage=stage, makes=MAKES[stage], needs=needs) + extra)


def execute_here(source, out, parameters):
    "Run a toy notebook in this process, in place of papermill."
    cells = nbformat.read(source, 4).cells
    exec("\n".join(cell.source for cell in cells[1:]), dict(parameters={}, restart=False) | parameters)
    nbformat.write(nbformat.read(source, 4), out.parent.mkdir(parents=True, exist_ok=True) or out)


@pytest.fixture
def road(tmp_path, outputs, monkeypatch):
    "A function that runs the toy road, which needs no papermill; it returns the stages that ran."
    monkeypatch.setattr(pipeline, "_execute", execute_here)
    (tmp_path/"data").mkdir()
    (tmp_path/"data/captions.txt").write_text("one")
    write_toy(tmp_path, "01_data")
    write_toy(tmp_path, "03_train", ("01_data",))
    write_toy(tmp_path, "finetune/scst", ("01_data", "03_train"), PUT_AWAY)
    def go(**more):
        return run_stages("toy", "mini", notebooks=tmp_path, **{"stages": ("01_data", "03_train", "finetune/scst"), "data_root": str(tmp_path/"data"), **more})
    return go


def trained(outputs, name="last.pt"): return json.loads((outputs/"toy/checkpoints"/name).read_text())


def test_everything_runs_once_and_then_nothing(road, outputs, capsys):
    assert road() == ["01_data", "03_train"] and trained(outputs) == {"restart": "if changed", "epochs": 30}
    assert capsys.readouterr().err.splitlines() == ["01_data: it is new", "03_train: it is new"]
    assert road() == [] and capsys.readouterr().err == ""
    assert road(force=True) == ["01_data", "03_train"] and trained(outputs)["restart"] is True


def test_settings_make_stale_what_they_matter_to(road, outputs, capsys):
    road()
    assert road(epochs=40) == ["03_train"] and trained(outputs)["epochs"] == 40
    assert "03_train: epochs was 30, is 40" in capsys.readouterr().err
    assert road(epochs=40, num_beams=1) == []  # no stage here decodes
    assert road() == ["03_train"]              # back to the preset


def test_lost_files_new_inputs_and_new_code_make_stale(road, tmp_path, outputs, capsys):
    road()
    (outputs/"toy/captions_table.csv").unlink()
    assert road() == ["01_data", "03_train"]
    assert capsys.readouterr().err.splitlines()[-2:] == ["01_data: captions_table.csv is missing", "03_train: 01_data has run since"]
    (tmp_path/"data/captions.txt").write_text("one more")
    assert road() == ["01_data", "03_train"]
    write_toy(tmp_path, "03_train", ("01_data",), "assert True")
    assert road() == ["03_train"] and "the code has changed: 03_train.ipynb" in capsys.readouterr().err


def test_inputs_that_a_stage_downloaded_are_not_new(road, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # `data/flickr8k` lies here
    assert road(data_root=Config.data_root) == ["01_data", "03_train"] and (tmp_path/Config.data_root).is_dir()
    assert road(data_root=Config.data_root) == []


def test_a_stage_that_failed_runs_again(road, tmp_path):
    (tmp_path/"full").touch()
    with pytest.raises(OSError, match="disk full"): road()
    (tmp_path/"full").unlink()
    assert road() == ["01_data", "03_train"] and road() == []


def test_scst_runs_where_it_is_asked_for_and_once_more_to_put_away_what_it_made(road, outputs):
    assert road(start_token="given", scst_epochs=2) == ["01_data", "03_train", "finetune/scst"]
    assert [road(start_token="given", scst_epochs=n) for n in (2, 3, 0, 0)] == [[], ["finetune/scst"], ["finetune/scst"], []]
    assert road(start_token="given", scst_epochs=2, epochs=40) == ["03_train", "finetune/scst"]
    assert trained(outputs, "scst.pt")["restart"] == "if changed"
    assert (outputs/"toy/notebooks/scst.ipynb").is_file()


def test_another_preset_is_refused(road):
    road()
    with pytest.raises(ValueError, match="run 'toy' began with preset 'mini', not 'flickr8k'"): run_stages("toy", "flickr8k")


@pytest.mark.slow
def test_papermill_runs_the_road_and_keeps_the_notebook_of_a_failure(road, tmp_path, outputs, monkeypatch):
    import papermill
    monkeypatch.undo()
    monkeypatch.setenv("CLIPCAP_OUTPUTS", str(outputs))
    monkeypatch.chdir(ROOT)
    assert road() == ["01_data", "03_train"] and trained(outputs)["restart"] == "if changed"
    assert road() == []
    (tmp_path/"full").touch()
    with pytest.raises(papermill.PapermillExecutionError, match="disk full"): road(epochs=40)
    kept = nbformat.read(outputs/"toy/notebooks/03_train.ipynb", 4)
    assert "disk full" in str(kept.cells) and not list(outputs.rglob("*.running.ipynb"))


# --- the command, and what it prints

@pytest.mark.parametrize("words, text", [(["epoch=5", "seed=1"], "unknown field 'epoch'; did you mean 'epochs'?"),
                                         (["epochs=5", "num_beams=0"], "num_beams=0 is too small; it must be at least 1")])
def test_wrong_words_end_before_anything_runs(outputs, words, text):
    with pytest.raises(SystemExit) as end: main(words, run="new")
    assert end.value.code == f"clipcap.pipeline: {text}" and not outputs.exists()


def test_without_a_checkout_the_command_names_what_works(tmp_path):
    done = subprocess.run([sys.executable, "-m", "clipcap.apps.pipeline", "--run", "new"], capture_output=True, text=True, cwd=tmp_path,
                          env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert done.returncode == 1 and "nbs has no 01_data.ipynb, " in done.stderr and "python -m clipcap.train" in done.stderr
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.fixture
def evaluated(tmp_path):
    "Two runs with a few scores and captions."
    runs = [Run(f"r-{seed}", tmp_path) for seed in (1, 2)]
    for seed, run in enumerate(runs, 1):
        run.update(seed=seed)
        pd.DataFrame({"cider": [0.2*seed, 0.1, 0.05, 0.15]}, ["model", "shuffled images", "mean embedding", "nearest training photo"]).to_csv(run.path/"controls_test.csv")
        pd.DataFrame({"image_id": list("abc"), "cider": [1., 3., 2.]}).to_csv(run.path/"scores_test.csv", index=False)
        write_json(run.path/"captions_test.json", [{"image_id": i, "caption": f"model {i}"} for i in "abc"])
        pd.DataFrame({"image": list("aabbcc"), "caption": [f"human {k}" for k in range(6)]}).to_csv(run.path/"captions_table.csv", index=False)
        write_json(run.path/"scores_test.json", {"corpus": {"cider": 0.2*seed, "spice": None}, "intervals": {"cider": [0.1, 0.5]}, "subsets": {"seen": {"images": 2}},
                                                 "unavailable": {"spice": "no jars", "spider": "no jars"}, "protocol": {"seed": seed, "metrics": ["cider"]}})
    return runs


def test_tables_of_seeds_and_of_captions(evaluated, tmp_path):
    write_seed_table(evaluated, tmp_path/"table.csv")
    table = pd.read_csv(tmp_path/"table.csv")
    assert table.columns.tolist() == ["seed", "cider", "cider_shuffled", "cider_mean", "cider_retrieval"] and table.cider.tolist() == [0.2, 0.4]
    write_extremes(evaluated[1], tmp_path/"words.csv", number=1)
    assert pd.read_csv(tmp_path/"words.csv").values.tolist() == [["b", "model b", "human 2", 3.], ["a", "model a", "human 0", 1.]]


def test_summary_shows_scores_controls_captions_and_what_is_missing(evaluated):
    text = summary(evaluated[0])
    for part in ("cider   0.2  0.1   0.5", "spice, spider: no jars", "shuffled images", "seen", "  model: model a\n  human: human 0", "protocol: seed 1"): assert part in text, text


def test_several_seeds_make_several_runs_and_a_table(evaluated, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLIPCAP_OUTPUTS", str(tmp_path))
    calls = []
    monkeypatch.setattr(pipeline, "run_stages", lambda *words, **changes: calls.append((*words, changes)) or [])
    main(["epochs=3"], run="r", seeds="1 2", table=str(tmp_path/"table.csv"))
    assert calls == [("r-1", "mini", False, {"epochs": 3, "seed": 1}), ("r-2", "mini", False, {"epochs": 3, "seed": 2})]
    shown = capsys.readouterr()
    assert "every stage is up to date" in shown.err and "1,0.2,0.1,0.05,0.15" in shown.out and (tmp_path/"table_captions.csv").is_file()


def test_ctrl_c_has_its_own_status(monkeypatch, capsys):
    def stopped(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr(pipeline, "run_stages", stopped)
    with pytest.raises(SystemExit) as end: main([], run="r")
    assert end.value.code == 130 and "the same command resumes it" in capsys.readouterr().err
