"""Learning rates, accumulation, averaged weights, early stopping (clipcap.optim.schedules)."""
import math

import pytest
import torch
from torch import nn

from clipcap.core import make_config
from clipcap.optim.schedules import Average, group_batches, learning_rate_schedule, parameter_groups, should_stop


class Parts(nn.Module):
    def __init__(self): super().__init__(); self.mapping_network, self.gpt2 = nn.Linear(3, 2), nn.Linear(2, 2).requires_grad_(False)


def test_each_part_that_is_trained_has_its_learning_rate():
    parts, config = Parts(), make_config("mini", learning_rate=0.1, gpt2_learning_rate=0.01)
    def found(): return [(len(group["params"]), group["lr"]) for group in parameter_groups(parts, config)]
    assert found() == [(2, 0.1)]
    parts.gpt2.bias.requires_grad_(True)
    assert found() == [(2, 0.1), (1, 0.01)]


def learning_rates(finished=0, **changes):
    "The learning rate of each step of 4 epochs of 25 steps."
    config = make_config("mini", epochs=4, learning_rate=1., **changes)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], config.learning_rate)
    schedule, found = learning_rate_schedule(optimizer, config, 25, finished), []
    for _ in range(100 - 25*finished):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_reference_recipe_has_a_constant_learning_rate(): assert learning_rates() == [1.]*100


@pytest.mark.parametrize("schedule, expected", [
    ("constant", {0: 0, 9: 0.9, 10: 1, 99: 1}), ("linear", {0: 0, 5: 0.5, 10: 1, 55: 0.5}),
    ("cosine", {5: 0.5, 10: 1, 55: 0.5, 32: (1 + math.cos(math.pi*22/90))/2})])
def test_warm_up_and_decay_also_after_resuming(schedule, expected):
    curve = learning_rates(schedule=schedule, warmup=0.1)
    assert [curve[step] for step in expected] == pytest.approx(list(expected.values()))
    assert learning_rates(2, schedule=schedule, warmup=0.1) == pytest.approx(curve[50:])


@pytest.mark.parametrize("number, size, groups", [(7, 3, [[0, 1, 2], [3, 4, 5], [6]]), (2, 1, [[0], [1]]), (0, 2, [])])
def test_batches_are_grouped_by_step(number, size, groups): assert list(group_batches(range(number), size)) == groups


@pytest.mark.numerics
def test_average_is_the_unrolled_formula_and_resumes():
    layer = nn.Linear(3, 2).double()
    average, before = Average(layer, 0.9), layer.weight.detach().clone()
    for step in range(4):
        nn.init.constant_(layer.weight, step)
        average.update()
    torch.testing.assert_close(average.values["weight"], 0.9**4*before + 0.1*sum(0.9**(3 - k)*k for k in range(4)), rtol=1e-9, atol=1e-9)
    with average.in_place(): assert torch.equal(layer.weight, average.values["weight"])
    assert (layer.weight == 3).all()
    again = Average(nn.Linear(3, 2).double(), 0.9)
    again.load_state_dict(average.state_dict())
    assert torch.equal(again.values["weight"], average.values["weight"])
    with pytest.raises(KeyError): again.load_state_dict({})


def test_decay_of_0_keeps_and_swaps_nothing():
    layer = nn.Linear(3, 2)
    none, before = Average(layer, 0.), layer.weight.detach().clone()
    none.update()
    with none.in_place(): assert torch.equal(layer.weight, before)
    assert none.state_dict() == {}


LOSSES = [{"val_loss": x} for x in (3, 2, 2.5, 2.2, 1.9, 2)]
CIDERS = [{"val_loss": 1., "val_cider": x} for x in (0.1, 0.3, 0.2, 0.2)]


@pytest.mark.parametrize("changes, metrics, stops", [
    (dict(patience=2), LOSSES, [4]), (dict(), LOSSES, []), (dict(patience=2, best_by="cider"), CIDERS, [4]), (dict(patience=2, best_by="cider"), LOSSES, [])])
def test_training_stops_when_patience_is_over(changes, metrics, stops):
    assert [k for k in range(len(metrics) + 1) if should_stop(metrics[:k], make_config("mini", **changes))] == stops
