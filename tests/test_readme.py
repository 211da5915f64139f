"""README is one page whose links, commands and code work; sentences of the pages it links hold for the committed tables."""
import json
import re
import shutil

import pandas as pd
import pytest
from conftest import ROOT

from clipcap.studies.ablation import ABLATION, preset_evidence, summarize

README = (ROOT/"README.md").read_text("utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M)
PROSE = re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", README, flags=re.S | re.M))  # without code
PAGES = [*sorted((ROOT/"nbs/howto").glob("*.ipynb")), *(ROOT/f"nbs/{name}.ipynb" for name in
         ("studies/results", "studies/speed", "studies/scaling", "studies/errata", "checks/trust"))]
WITHOUT_A_MODEL = ["consensus of 60 neighbours", "most common training caption"]


def cells(path): return json.loads(path.read_text("utf-8"))["cells"]


def markdown_outputs(path):
    "The Markdown that the cells of a notebook show."
    return ["".join(o["data"]["text/markdown"]) for c in cells(path) for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})]


@pytest.fixture(scope="module")
def ablation(): return pd.read_csv(ROOT/"outputs/ablation.csv")


@pytest.fixture(scope="module")
def found(ablation): return summarize(ablation)


# --- one page

def test_readme_is_one_page(): assert len(README.splitlines()) <= 250


def test_readme_has_no_html(): assert not re.findall(r"<[a-zA-Z/!][^>\n]*>", PROSE)


def test_readme_has_at_most_three_pictures_each_with_words():
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", README)
    assert len(pictures) <= 3 and all(len(words) > 10 for words, _ in pictures)
    assert {p.relative_to(ROOT).as_posix() for p in (ROOT/"outputs/readme").iterdir()} <= {path for _, path in pictures}


def test_tables_of_readme_are_short():
    tables = re.findall(r"(?:^\|.*\n)+", README, re.M)
    assert tables and max(len(table.splitlines()) - 2 for table in tables) <= 12


def test_links_lead_somewhere():
    lost = [(path.name, link) for path, text in [(ROOT/"README.md", README), *((p, text) for p in PAGES for text in markdown_outputs(p))]
            for link in re.findall(r"\]\(([^)#:\s]+)[)#]", text) if not (path.parent/link).exists()]
    assert not lost


def test_how_to_pages_and_what_left_readme_are_linked(): assert not [p for p in PAGES if p.relative_to(ROOT).as_posix() not in README]


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT/"Makefile").read_text("utf-8"), re.M))
    texts = [README, *("".join(c["source"]) for p in PAGES for c in cells(p) if c["cell_type"] == "markdown")]
    assert set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", "\n".join(texts), re.M)) <= targets


def test_commands_name_modules_notebooks_and_commands_that_exist():
    from clipcap.apps.cli import COMMANDS
    for module in re.findall(r"python -m (clipcap[\w.]*)", README): assert (ROOT/module.replace(".", "/")).with_suffix(".py").is_file(), module
    for notebook in re.findall(r"papermill (nbs/\S+)", README): assert (ROOT/notebook).is_file(), notebook
    assert {*re.findall(r"(?:^|`)clipcap ([a-z]+)", README, re.M)} <= {*COMMANDS}


def test_python_of_readme_runs(trained, scenes, tmp_path, monkeypatch):
    shutil.copy(next(iter(sorted(scenes.photos.iterdir()))), tmp_path/"photo.jpg")
    monkeypatch.chdir(tmp_path)
    codes = [code for language, code in FENCES if language == "python"]
    for code in codes: exec(code, {})
    assert codes and (tmp_path/"my-captioner/model.safetensors").is_file()


# --- pages

@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_pages_show_no_html(path): assert not [c["id"] for c in cells(path) for o in c.get("outputs", []) if "text/html" in o.get("data", {})]


def test_maps_list_every_notebook_with_its_first_line():
    whole, = markdown_outputs(ROOT/"nbs/howto/notebooks.ipynb")
    for path in (ROOT/"nbs").rglob("*.ipynb"):
        if path.stem == "index" or ".ipynb_checkpoints" in path.parts: continue
        line = next((line[2:] for line in "".join(cells(path)[0]["source"]).splitlines() if line.startswith("> ")), "")
        name = path.relative_to(ROOT/"nbs").with_suffix("").as_posix()
        assert f"| [`{name}`](../{name}.ipynb) | {line} |" in whole, f"run nbs/howto/notebooks.ipynb: {name}"
        assert "/" in name or line in README, f"run nbs/index.ipynb, then make readme: {name}"


# --- sentences of studies/results, studies/scaling and checks/trust

def test_every_recipe_of_the_ablation_is_in_the_table(found): assert set(ABLATION) <= set(found.index) and found.seeds.min() >= 3


def test_presets_beat_the_reference_recipe_and_consensus(found):
    reference, plus, tuned, crowd = (found.loc[r] for r in ("reference recipe", "flickr8k_plus", "flickr8k_tuned", "consensus of 60 neighbours"))
    assert plus.cider >= 2*reference.cider and plus.low > reference.high and plus.cider >= 0.26
    assert plus.low > crowd.high and tuned.low > crowd.high and tuned.cider > plus.cider
    assert plus.seeds == crowd.seeds == reference.seeds == 8 and tuned.seeds >= 6


def test_everything_together_is_no_better_than_the_presets(found):
    everything, plus, tuned = (found.loc[r] for r in ("everything, plain beams", "flickr8k_plus", "flickr8k_tuned"))
    assert everything.difference_low < 0 < everything.difference and abs(found.cider["everything"] - plus.cider) < 0.01
    assert found.cider.idxmax() == "everything, GPT-2 tuned" and found.low.iloc[0] < tuned.high


def test_changes_that_help_or_hurt_alone(found):
    alone = found.drop([r for r in found.index if r.startswith(("flickr8k", "everything")) or r in ("reference recipe", *WITHOUT_A_MODEL)])
    assert set(alone.index[alone.difference_low > 0]) == {"regression over diverse beams", "regression and likelihood", "consensus", "GPT-2 tuned", "LoRA"}
    assert set(alone.index[alone.difference_high < 0]) == {"4 batches per step", "nucleus", "learning rate 1e-3", "8 layers", "reference recipe, unscaled"}


def test_the_reference_recipe_is_not_starved(found):
    longer, plus = found.loc["20 epochs"], found.loc["flickr8k_plus"]
    assert longer.difference_low < 0 < longer.difference and plus.low > longer.high and plus.cider >= 1.25*longer.cider
    for name in ("learning rate 6e-4", "learning rate 1e-4"): assert found.difference_low[name] < 0 < found.difference_high[name]
    assert 0.04 < found.cider["reference recipe, unscaled"] < 0.05 and found.cider["8 layers"] < 0.05 and found.cider["learning rate 1e-3"] < 0.05


def test_order_of_the_mapping_networks(found):
    networks = found.cider[["ClipCap's transformer", "linear", "mlp", "lowrank", "reference recipe", "patches"]]
    assert list(networks) == sorted(networks, reverse=True) and found.difference_low["lowrank"] < 0


def test_every_line_of_a_preset_has_its_evidence(ablation): assert set(preset_evidence("flickr8k_tuned", ablation).helps.dropna()) == {"yes"}


def test_real_photos():
    real = pd.read_csv(ROOT/"outputs/real.csv")
    assert real.columns.tolist() == ["seed", "cider", "cider_shuffled", "cider_mean", "cider_retrieval"]
    mean = real.mean()
    assert mean.cider >= 0.16 and mean.cider_shuffled <= 0.6*mean.cider and mean.cider_shuffled < mean.cider < mean.cider_retrieval


def test_memory_of_a_store_does_not_grow_with_its_rows():
    peak = pd.read_csv(ROOT/"outputs/store.csv").pivot(index="dtype", columns="rows", values="peak_mib")
    assert (peak[2_000_000] < 1.2*peak[20_000]).all()


def test_two_processes_on_two_cores_are_slower_than_one():
    scaling = pd.read_csv(ROOT/"outputs/scaling.csv")
    for _, rows in scaling[scaling.cores == 2].groupby("what"):
        rate = rows.set_index("processes").rate
        assert rate[1].max() > rate[2].max()


def test_faults_are_survived(): assert set(pd.read_csv(ROOT/"outputs/faults.csv", keep_default_na=False).ok) == {"yes", "does not apply"}


def test_faults_put_into_the_code_are_noticed():
    table = pd.read_csv(ROOT/"outputs/mutation.csv", keep_default_na=False)
    assert (table.noticed_by != "").mean() >= 0.9
    assert table.explained[table.noticed_by == ""].all()
