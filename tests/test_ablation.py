"""Recipes, the runs of a sweep, and their table (clipcap.studies.ablation)."""
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from clipcap.core import Run, make_config, preset_changes
from clipcap.runs.checkpoints import read_metrics, save_checkpoint
from clipcap.studies.ablation import (ABLATION, COLUMNS, SCALED, branch_run, change_text, fill_names, grid, group_jobs, interval, plot_ablation,
                                      plot_interaction, preset_evidence, random_search, read_results, run_name, summarize, sweep,
                                      training_key, write_results)

OTHER_WRITING = {"reference recipe", "flickr8k_plus", "self-critical", "start token given", "greedy", "nucleus", "length penalty", "no repeated trigram",
                 "minimum Bayes risk", "consensus", "regression over diverse beams", "regression and likelihood", "ensemble of three"}


def table_of(**values):
    "A table of results: recipe -> CIDEr of each seed."
    rows = [(recipe, "", seed, cider) for recipe, each in values.items() for seed, cider in enumerate(each)]
    return pd.DataFrame(rows, columns=["recipe", "change", "seed", "cider"])


# --- recipes

@pytest.mark.parametrize("recipe", ABLATION)
def test_every_recipe_is_possible(recipe): make_config("flickr8k", **{**SCALED, **fill_names(ABLATION[recipe], seed=1, grid="g")})


def test_a_change_is_written_as_on_a_command_line():
    assert change_text(ABLATION["4 batches per step"]) == "accumulate=4" and change_text({}) == "none"


def test_names_in_braces_are_filled_in():
    assert fill_names(dict(ensemble="a-{seed} b-{seed}", ema=0.5), seed=3) == dict(ensemble="a-3 b-3", ema=0.5)
    with pytest.raises(KeyError): fill_names(dict(embeddings="{grid}"), seed=3)


def test_a_grid_has_every_combination_and_a_search_draws_of_them():
    values = dict(ema=[0., 0.9], epochs=[1, 2, 3])
    every, some = grid(**values), random_search(4, 0, **values)
    assert len(every) == 6 and every["ema=0.9, epochs=2"] == dict(ema=0.9, epochs=2)
    assert len(some) == 4 and some.items() <= every.items() and some == random_search(4, 0, **values)


def test_names_of_runs_are_folders_of_their_own():
    assert run_name("ablation", "ClipCap's transformer", 3) == "ablation-clipcap-s-transformer-3"
    assert len({run_name("a", recipe, 1) for recipe in ABLATION}) == len(ABLATION)


# --- shared trainings

def test_recipes_that_only_write_otherwise_share_a_training():
    def key(recipe): return training_key("flickr8k", {**SCALED, **ABLATION[recipe], "seed": 1})
    assert {recipe for recipe in ABLATION if key(recipe) == key("reference recipe")} == OTHER_WRITING
    assert len({*map(key, ABLATION)}) == len(ABLATION) - len(OTHER_WRITING) + 1 - 3  # and three that rank what another one writes
    assert training_key("flickr8k", {**SCALED, "scst_epochs": 3, "start_token": "given"}) == training_key("flickr8k", SCALED)


def test_jobs_are_grouped_by_training_and_ensembles_come_last():
    recipes = {"both": dict(ensemble="x-{seed}"), "reference recipe": {}, "greedy": dict(num_beams=1), "deep": dict(num_layers=9), "patches": dict(embeddings="{grid}")}
    groups, failed = group_jobs(recipes, [1, 2], {("deep", 1)}, "flickr8k", dict(epochs=1), "a", {})
    assert [[job.name for job in jobs] for jobs in groups] == [
        ["a-reference-recipe-1", "a-greedy-1"], ["a-reference-recipe-2", "a-greedy-2"], ["a-deep-2"], ["a-both-1"], ["a-both-2"]]
    assert failed == dict.fromkeys(["a-patches-1", "a-patches-2"], "it wants a file of 'grid', which was not passed")
    assert groups[3][0].settings == dict(epochs=1, ensemble="x-1", seed=1)


def test_a_branch_holds_what_the_training_left(tmp_path):
    source = Run("source", tmp_path)
    source.update(stages={s: {"finished": "today"} for s in ("01_data", "03_train", "finetune/scst", "04_evaluate")})
    for n in (1, 2, 3): save_checkpoint(source.path/f"checkpoints/mapping_network_epoch_{n}.pth", {"epoch": n})
    for kind, n in (("last", 2), ("scst", 3)): save_checkpoint(source.path/f"checkpoints/{kind}.pt", {"epoch": n, "recipe": "{}"})
    (source.path/"metrics.jsonl").write_text("".join(f'{{"epoch": {n}}}\n' for n in (1, 2, 3)))
    (source.path/"scores_test.json").write_text("{}")
    taken = branch_run(source, "branch")
    assert {p.name for p in (taken.path/"checkpoints").iterdir()} == {"last.pt", "mapping_network_epoch_1.pth", "mapping_network_epoch_2.pth"}
    assert [m["epoch"] for m in read_metrics(taken.path)] == [1, 2]
    assert (set(taken.manifest["stages"]), taken.manifest["run"]) == ({"01_data", "03_train"}, "branch")
    assert not (taken.path/"scores_test.json").exists() and (source.path/"checkpoints/scst.pt").is_file()
    taken.update(mark=1)
    assert branch_run(source, "branch").manifest["mark"] == 1  # one that exists stays


# --- the table

def test_results_stay_but_those_of_a_recipe_that_has_changed(tmp_path):
    recipes = {"reference recipe": {}, "greedy": dict(num_beams=1)}
    rows = [dict.fromkeys(COLUMNS, 0.123456) | dict(recipe=recipe, change=change, seed=seed) for recipe, change, seed in
            (("removed", "views=4", 1), ("greedy", "num_beams=1", 2), ("greedy", "num_beams=3", 1), ("reference recipe", "none", 1))]
    write_results(tmp_path/"table.csv", rows, recipes)
    found = read_results(tmp_path/"table.csv", recipes)
    assert [(row["recipe"], row["seed"], row["cider"]) for row in found] == [("reference recipe", 1, 0.1235), ("greedy", 2, 0.1235), ("removed", 1, 0.1235)]
    assert read_results(tmp_path/"none.csv", recipes) == []


@pytest.mark.slow
def test_a_sweep_runs_what_is_missing_and_names_what_fails(outputs, spice, tiny, tmp_path):
    _, config = tiny()
    recipes = {"reference recipe": {}, "greedy": dict(num_beams=1), "impossible": dict(num_heads=3), "elsewhere": dict(embeddings="{nowhere}")}
    base = dict(epochs=1, max_length=24, data_root=config.data_root, embeddings=config.embeddings, split="random")
    results, failed = sweep(recipes, [1], tmp_path/"table.csv", "mini", base, "a")
    assert sorted(failed) == ["a-elsewhere-1", "a-impossible-1"], failed
    assert results.change.tolist().count("no model") == 2 and {"reference recipe", "greedy"} <= {*results.recipe} and len(results) == 4
    assert "it wants a file of 'nowhere'" in failed["a-elsewhere-1"]
    assert "num_heads=3 does not divide" in failed["a-impossible-1"]
    weights = [(Run(name).path/"checkpoints/mapping_network_epoch_1.pth").read_bytes() for name in ("a-reference-recipe-1", "a-greedy-1")]
    assert weights[0] == weights[1] and Run("a-greedy-1").manifest["config"]["num_beams"] == 1
    cider = json.loads((Run("a-greedy-1").path/"scores_test.json").read_text())["corpus"]["cider"]
    assert results.set_index("recipe").cider["greedy"] == pytest.approx(cider, abs=1e-4)
    before = (tmp_path/"table.csv").read_bytes()
    again, _ = sweep({name: recipes[name] for name in ("reference recipe", "greedy")}, [1], tmp_path/"table.csv", "mini", base, "a")
    assert (tmp_path/"table.csv").read_bytes() == before and len(again) == 4


# --- what came of it

def test_an_interval_by_students_t():
    assert interval([1., 2, 3]) == pytest.approx((2, 2 - 4.302653/3**.5, 2 + 4.302653/3**.5))
    assert interval([1.])[0] == 1 and all(map(pd.isna, interval([1.])[1:]))


@pytest.mark.parametrize("freedom, quantile", [(1, 12.706205), (2, 4.302653), (4, 2.776445), (9, 2.262157), (10, 2.228139), (19, 2.093024), (30, 2.042272), (100, 1.983972), (1000, 1.962339)])
def test_half_an_interval_is_the_quantile_of_students_t(freedom, quantile):  # quantiles of a printed table
    values = np.arange(freedom + 1.)
    assert (interval(values)[2] - values.mean())/(values.std(ddof=1)/len(values)**.5) == pytest.approx(quantile, abs=1e-6)


def test_differences_are_taken_seed_by_seed():
    found = summarize(table_of(**{"reference recipe": [1., 2, 3]}, better=[1.5, 2.6, 3.4]))
    assert found.index.tolist() == ["better", "reference recipe"] and found.difference["better"] == pytest.approx(0.5)
    assert found.difference_low["better"] > 0 and found.low["better"] < found.cider["reference recipe"]  # the seeds' own luck is gone


def test_a_preset_cites_the_row_of_each_change():
    results = table_of(**{"reference recipe": [1., 2, 3], "GPT-2 tuned": [1.5, 2.6, 3.4], "flickr8k_plus": [0.5, 3, 4]})
    evidence = preset_evidence("flickr8k_tuned", results)
    assert set(evidence.index) == set(preset_changes("flickr8k_tuned"))
    assert evidence.loc["gpt2_tuning", ["row", "flickr8k", "flickr8k_tuned", "helps"]].tolist() == ["GPT-2 tuned", "none", "full", "yes"]
    assert evidence.difference["gpt2_tuning"] == pytest.approx(0.5)
    assert evidence.loc["rerank", ["row", "helps"]].tolist() == ["flickr8k_plus", "not significantly"]  # 0.5 on average, within the noise
    assert evidence.row["epochs"] == "(scaled to the data)"


def test_an_interaction_is_drawn_without_the_baselines():
    both = grid(epochs=[1, 2], ema=[0., 0.9])
    scores = {recipe: [0.1*c["epochs"] + c["ema"]*0.05 + 0.01*seed for seed in range(3)] for recipe, c in both.items()}
    results = table_of(**scores, **{"consensus of 60 neighbours": [0.2]})
    figure = plot_interaction(results, both, "epochs", "ema")
    assert [len(line.get_xdata()) for line in figure.axes[0].lines if line.get_marker() == "o"] == [2, 2]
    plt.close(figure)


def test_recipes_are_drawn_with_their_seeds_and_baselines():
    figure = plot_ablation(table_of(**{"reference recipe": [1., 2, 3]}, better=[1.5, 2.6, 3.4]), baselines={"no model": 0.3})
    ax, = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["reference recipe", "better"] and "no model: 0.30" in [t.get_text() for t in ax.texts]
    plt.close(figure)
