"""README's sentences hold for the committed tables that it shows; its links lead somewhere and its commands exist."""
import re

import pandas as pd
import pytest
from conftest import ROOT

from clipcap.studies.ablation import ABLATION, preset_evidence, summarize

README = (ROOT/"README.md").read_text("utf-8")
WITHOUT_A_MODEL = ["consensus of 60 neighbours", "most common training caption"]


@pytest.fixture(scope="module")
def ablation(): return pd.read_csv(ROOT/"outputs/ablation.csv")


@pytest.fixture(scope="module")
def found(ablation): return summarize(ablation)


def test_links_lead_somewhere():
    lost = [link for link in re.findall(r"(?:\]\(|src=\")([^)\"#:]+)[)\"]", README) if not link.startswith("data") and not (ROOT/link).exists()]
    assert not lost


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT/"Makefile").read_text("utf-8"), re.M))
    assert set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", README, re.M)) <= targets


def test_commands_name_modules_and_notebooks_that_exist():
    for module in re.findall(r"python -m (clipcap[\w.]*)", README): assert (ROOT/module.replace(".", "/")).with_suffix(".py").is_file(), module
    for notebook in re.findall(r"papermill (nbs/\S+)", README): assert (ROOT/notebook).is_file(), notebook


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
