"""The comparison of our beam search with transformers' `generate` (clipcap.studies.search_speed)."""
import random

import pytest
import torch

from clipcap.core import make_config
from clipcap.decoding.beam import beam_ids
from clipcap.model import load_model
from clipcap.studies.flops import REFERENCE_SIZES, step_flops
from clipcap.studies.search_speed import caption_flops, countdown_model, library_ids, search_report

LENGTHS = [2, 40, 7, 13, 13, 29, 3]


@pytest.fixture(scope="module")
def model(): return load_model(make_config("mini", device="cpu"), clip_dim=16).eval()


def test_captions_have_the_lengths_that_were_asked_for_in_both_ways(model):
    before = {name: weight.clone() for name, weight in model.gpt2.state_dict().items()}
    counting, prefixes = countdown_model(model, LENGTHS)
    report = search_report(counting, prefixes, 40, rounds=1, batches=(2, 7))
    assert report["lengths"] == LENGTHS and report["same"] == "7 of 7"
    assert report["ratio"]["median"] == pytest.approx(report["captions_per_second"]["ours"]["median"]/report["captions_per_second"]["generate"]["median"])
    assert all(torch.equal(weight, before[name]) for name, weight in model.gpt2.state_dict().items())


def test_the_library_pads_its_batches_to_one_length(model):
    counting, prefixes = countdown_model(model, [3, 9])
    ids = library_ids(counting, prefixes, 40, 2, batch_size=1)
    assert ids.shape == (2, 9) and {*ids[0, 3:].tolist()} == {model.tokenizer.pad_token_id}


def test_operations_of_a_greedy_caption_are_the_forward_part_of_a_training_step():
    s, length = REFERENCE_SIZES, 12
    needed = step_flops(s, [length])["needed"]
    pairs, pair = s.prefix*(s.prefix + 1)//2 + sum(s.prefix + t for t in range(1, length)), 4*s.layers*s.width
    assert caption_flops(s, [length], 1) == (needed["GPT-2"] - 3*pair*pairs)//2 + pair*pairs + needed["logits"]//2


def test_a_step_of_five_beams_needs_five_times_as_much():
    prefix, two, three = (caption_flops(REFERENCE_SIZES, [n], 5) for n in (1, 2, 3))
    one = [caption_flops(REFERENCE_SIZES, [n], 1) for n in (1, 2, 3)]
    assert prefix == one[0] and (two - prefix, three - two) == (5*(one[1] - one[0]), 5*(one[2] - one[1]))


@pytest.mark.parametrize("lengths, searches", [
    ([12] + [11]*31 + [25]*40, 32),  # the first is finished for a while before another photo takes its place
    (random.Random(1).choices(range(2, 41), [1]*8 + [8]*8 + [1]*23, k=150), 48),
    (sorted(random.Random(2).choices(range(2, 41), k=120)), 40),
    (sorted(random.Random(3).choices(range(2, 41), k=120))[::-1], 33)], ids=["one", "drawn", "rising", "falling"])
def test_many_captions_of_any_lengths_in_any_order(model, lengths, searches):
    counting, prefixes = countdown_model(model, lengths)
    found = beam_ids(counting, prefixes, 40, 5, searches=searches)
    assert [row.index(model.stop_id) + 1 for row in found.tolist()] == lengths
    assert found.tolist() == library_ids(counting, prefixes, 40, 5, 50).tolist()
