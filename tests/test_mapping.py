"""The other mapping networks, and what is done to embeddings before them (clipcap.networks.mapping)."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import nn

from clipcap.networks.mapping import (LinearMapping, LowRankMapping, MLPMapping, TokensMapping, check_heads, fit_scaling,
                                      prepare_embeddings)
from clipcap.runs.checkpoints import checkpoint_path, load_checkpoint

MINE = '''from torch import nn


class Mine(nn.Module):
    def __init__(self, clip_dim, gpt2_dim, prefix_length, **unused):
        super().__init__()
        self.shape = (prefix_length, gpt2_dim)
        self.mine = nn.Linear(clip_dim, prefix_length*gpt2_dim)

    def forward(self, embeddings):
        return self.mine(embeddings).relu().unflatten(1, self.shape)
'''
ENTRY = ('    "lowrank": "clipcap.networks.mapping:LowRankMapping",\n', '    "mine": "clipcap.networks.mine:Mine",\n')


def normal(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.numerics
def test_linear_map_is_linear_and_cut_into_embeddings():
    linear, few = LinearMapping(32, 12, 5).double().eval(), normal(3, 32)
    assert linear(few).shape == (3, 5, 12)
    close(linear(few).flatten(1), few @ linear.layers[1].weight.T + linear.layers[1].bias)


@pytest.mark.numerics
def test_low_rank_map_has_the_rank_of_its_budget():
    lowrank, many = LowRankMapping(32, 12, 5, budget=500).double().eval(), normal(64, 32)
    moved = (lowrank(many) - lowrank(torch.zeros(1, 32).double())).flatten(1)
    assert torch.linalg.matrix_rank(moved, rtol=1e-6) == lowrank.layers[1].out_features == 5


@pytest.mark.parametrize("sizes", [(512, 768, 10), (768, 768, 10), (1280, 256, 10)])  # ViT-B/32, ViT-L/14, the embeddings of `make real`
def test_low_rank_map_has_about_100_000_parameters(sizes):
    assert 90_000 <= sum(p.numel() for p in LowRankMapping(*sizes).parameters()) <= 110_000


@pytest.mark.numerics
def test_perceptron_is_two_matrices_and_tanh():
    mlp, few = MLPMapping(32, 12, 5).double().eval(), normal(3, 32)
    (first, second), by_hand = (mlp.layers[0], mlp.layers[3]), torch.tanh(few @ mlp.layers[0].weight.T + mlp.layers[0].bias)
    assert (first.out_features, second.out_features) == (30, 60)
    close(mlp(few).flatten(1), by_hand @ second.weight.T + second.bias)


@pytest.mark.numerics
def test_transformer_with_tokens_reads_each_image_alone_and_all_of_it_learns():
    torch.manual_seed(0)
    tokens, few = TokensMapping(32, 64, 4, num_layers=2, num_heads=4, feedforward_dim=128).double().eval(), normal(3, 32)
    prefix = tokens(few)
    assert prefix.shape == (3, 4, 64) and (prefix[0] - prefix[1]).abs().max() > 1e-3
    close(tokens(few[1:2]), prefix[1:2])
    tokens.train()(few).square().sum().backward()
    assert not [n for n, p in tokens.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


@pytest.mark.parametrize("make, error", [
    (lambda: check_heads(1024, 12), "num_heads=12 does not divide GPT-2's width 1024; choose one that does, such as 8"),
    (lambda: TokensMapping(512, 64, num_heads=5), "num_heads=5"), (lambda: check_heads(768, 12), None)])
def test_heads_that_do_not_divide_the_width_are_named(make, error):
    if error is None: make()
    else:
        with pytest.raises(ValueError, match=error): make()


@pytest.mark.numerics
@pytest.mark.parametrize("shape", [(200, 6), (50, 4, 6)])  # one vector per image, four
def test_scaling_learns_mean_and_deviation_from_single_images_and_blocks(shape):
    population = 5 + normal(200, 6)*torch.tensor([1., 2, 3, 4, 5, 0])
    for embeddings in (population.reshape(shape), population.split(33)):
        scaled = prepare_embeddings(nn.Identity(), 6, "standard").double()
        fit_scaling(scaled, embeddings)
        close(scaled.embedding_mean, population.mean(0))
        close(scaled.embedding_std[:5], population.std(0, correction=0)[:5])
        assert scaled(population).isfinite().all()  # the last number never changes
        close(scaled(population)[:, :5], ((population - population.mean(0))/population.std(0, correction=0))[:, :5])
        assert set(scaled.state_dict()) == {"embedding_mean", "embedding_std"}  # a checkpoint holds them


@pytest.mark.parametrize("changes, variance, mean, zeros", [(dict(noise=0.3), 0.09, 1, 0), (dict(dropout=0.2), 0.25, 1, 0.2)])  # what dropout keeps is divided by 0.8
def test_disturbance_has_its_strength_and_only_in_training(changes, variance, mean, zeros):
    torch.manual_seed(0)
    disturbed, ones = prepare_embeddings(nn.Identity(), 500, **changes), torch.ones(1000, 500)
    seen = disturbed.train()(ones)
    for found, expected in ((seen.var(), variance), (seen.mean(), mean), ((seen == 0).float().mean(), zeros)): assert abs(found.item() - expected) < 0.01
    assert torch.equal(disturbed.eval()(ones), ones)


@pytest.mark.numerics
@pytest.mark.parametrize("shape", [(3, 6), (3, 4, 6)])
def test_unit_scaling_divides_by_the_length(shape):
    scaled, given = prepare_embeddings(nn.Identity(), 6, "unit"), normal(*shape)
    close(scaled(given), given/given.square().sum(-1, keepdim=True).sqrt())
    assert not scaled.state_dict()


def test_reference_recipe_does_nothing_to_embeddings(): assert not prepare_embeddings(nn.Identity(), 6)._forward_pre_hooks


@pytest.mark.slow
def test_new_network_of_ten_lines_and_one_entry_trains_by_papermill(tiny, outputs, tmp_path):
    "In a copy of the project: a module, a line in `MAPPING_NETWORKS`, and `papermill nbs/03_train.ipynb -p mapping_network mine`."
    run, _ = tiny(12, epochs=1)
    copy = tmp_path/"copy"
    for name in ("nbs", "clipcap"): shutil.copytree(ROOT/name, copy/name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(ROOT/"settings.ini", copy)
    (copy/"clipcap/networks/mine.py").write_text(MINE)
    for path, (line, new) in ((copy/"clipcap/core.py", ENTRY), (copy/"nbs/00_core.ipynb", [json.dumps(x)[1:-1] for x in ENTRY])):
        text = path.read_text("utf-8")
        assert text.count(line) == 1
        path.write_text(text.replace(line, line + (new if path.suffix == ".py" else f'",\n    "{new}')), "utf-8")
    papermill = [sys.executable, "-m", "papermill", "nbs/03_train.ipynb", str(tmp_path/"out.ipynb"), "-k", "python3", "-p", "run", run.name, "-p", "mapping_network", "mine"]
    done = subprocess.run(papermill, cwd=copy, env={**os.environ, "CLIPCAP_OUTPUTS": str(outputs), "PYTHONPATH": str(copy)}, capture_output=True, text=True)
    assert not done.returncode, re.sub(r"\x1b\[[0-9;]*m", "", done.stderr)[-3000:]
    assert set(load_checkpoint(checkpoint_path(run))) == {"mine.weight", "mine.bias"}
    assert run.stage_entry("03_train")["config"]["mapping_network"] == "mine"
    json.loads(Path(copy/"nbs/00_core.ipynb").read_text("utf-8"))
