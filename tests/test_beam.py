"""Our beam search writes what transformers' `generate` writes, whatever else is in the batch (clipcap.decoding.beam)."""
import copy
import random
from types import SimpleNamespace

import pytest
import torch
from test_language_models import Given, quiet  # noqa: F401 (a fixture)

from clipcap.decoding.beam import beam_ids, beam_search, best_words, can_search
from clipcap.decoding.captioner import token_log_probabilities
from clipcap.model import ClipCapModel, generate_ids
from clipcap.networks.language_models import choose_loss, continue_prefix, tiny_language_model

FAMILIES = ["gpt2", "llama", "gpt_neox", "opt", "qwen2", "gemma", "phi", "mistral", "gptj", "olmo2", "starcoder2", "biogpt"]
MADE = {}


def speaker(kind, prefixes):
    "A model in float64 whose prefixes are given; captions end at a word that is often the best."
    if kind not in MADE:
        gpt2 = tiny_language_model(kind).requires_grad_(False)
        way = choose_loss(gpt2)
        MADE[kind] = gpt2.double(), way
    gpt2, way = MADE[kind]
    return ClipCapModel(gpt2, SimpleNamespace(bos_token_id=2, eos_token_id=None, pad_token_id=1), Given(prefixes)).eval(), way


def draw_search(kind, seed):
    "A model, its prefixes, and settings of a search."
    choose, draw = random.Random(seed), torch.Generator().manual_seed(seed)
    width = speaker(kind, torch.zeros(1, 1, 1))[0].gpt2.get_input_embeddings().weight
    N, P = choose.choice([1, 2, 3, 5, 9, 17, 40, 64]) if seed % 4 == 0 else choose.randint(1, 6), choose.randint(1, 4)
    prefixes = (choose.choice([1, 3, 10])*width.std()*torch.randn(N, P, width.shape[1], generator=draw, dtype=torch.float64))
    settings = dict(num_beams=choose.randint(1, 8), max_length=choose.randint(1, 40 if N < 9 or seed >= 2000 else 12),
                    length_penalty=choose.choice([1., 1., 0., 0.3, 2., -1.]))
    model, way = speaker(kind, prefixes)
    with torch.no_grad(): likely = model.gpt2(inputs_embeds=prefixes).logits[:, -1].mean(0).argsort(descending=True)
    model.tokenizer.eos_token_id = int(next(w for w in likely[choose.choice([0, 0, 1, 3, 20]):] if w not in (1, 2)))
    return model, way, prefixes, settings


def generated(model, prefixes, num_beams, max_length, length_penalty, rows=1):
    end, pad = model.tokenizer.eos_token_id, model.tokenizer.pad_token_id
    return continue_prefix(model.gpt2, prefixes, num_beams, max_new_tokens=max_length, num_beams=num_beams, num_return_sequences=rows, do_sample=False,
                           early_stopping=num_beams > 1, length_penalty=length_penalty if num_beams > 1 else None, eos_token_id=end, pad_token_id=pad)


def compare(kind, seed):
    model, way, prefixes, settings = draw_search(kind, seed)
    if way != "packed": pytest.skip(f"{kind} is {way}")
    wanted = generated(model, prefixes, **settings)
    for searches in (None, *{1, len(prefixes)//2 or 1}):
        found = beam_ids(model, prefixes, searches=searches, **settings)
        assert found.tolist() == wanted.tolist(), (kind, seed, searches, settings)
    return wanted


@pytest.mark.numerics
@pytest.mark.parametrize("seed", range(50))
def test_ids_are_those_of_generate(seed): compare("gpt2" if seed % 2 else FAMILIES[seed//2 % len(FAMILIES)], seed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_ids_are_those_of_generate_for_each_family(kind):
    for seed in range(1000, 1025): compare(kind, seed)


@pytest.mark.soak
def test_two_thousand_searches():
    for seed in range(2000, 4000):
        kind = FAMILIES[seed % len(FAMILIES)]
        if speaker(kind, torch.zeros(1, 1, 1))[1] == "packed": compare(kind, seed)


def test_searches_end_at_different_steps_and_some_at_once():
    "What the other tests rely on."
    lengths = set()
    for seed in range(1, 30, 2):
        wanted = compare("gpt2", seed)
        lengths |= {*(wanted != 1).sum(1).tolist()}
    assert {1, 2, 3} <= lengths and max(lengths) > 10


@pytest.mark.numerics
def test_several_captions_of_a_photo_are_the_best_beams():
    model, _, prefixes, settings = draw_search("gpt2", 3)
    settings.update(num_beams=5, max_length=9)
    found = beam_ids(model, prefixes, num_return_sequences=3, **settings)
    assert found.tolist() == generated(model, prefixes, **settings, rows=3).tolist()


@pytest.mark.numerics
@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_given_first_word_begins_every_caption_and_its_probability_counts(num_beams):
    model, _, prefixes, _ = draw_search("gpt2", 5)
    wanted = generate_ids(torch.arange(len(prefixes))[:, None], model, 9, num_beams, start_token="given", processors=(lambda written, scores: scores,))
    found = beam_ids(model, prefixes, 9, num_beams, start_token=2)
    assert found.tolist() == wanted.tolist() and {*found[:, 0].tolist()} == {2}


@pytest.mark.parametrize("n, V, k", [(1, 10, 3), (3, 5_000, 10), (2, 4_999, 8), (1, 50_259, 16), (4, 2_560, 10)])
def test_best_words_are_those_of_topk(n, V, k):
    logits = torch.randn(n, V, generator=torch.Generator().manual_seed(V), dtype=torch.float64)
    logits[:, -1] = 9
    for a, b in zip(best_words(logits, k), logits.topk(k)): assert torch.equal(a, b)


@pytest.mark.numerics
@pytest.mark.parametrize("seed", range(60, 72))
def test_no_ngram_is_repeated_as_with_generate(seed):
    model, _, prefixes, settings = draw_search("gpt2", seed)
    settings |= {"max_length": 14, "num_beams": 1 + seed % 4}
    embeddings, plain, n = torch.arange(len(prefixes))[:, None], (lambda written, scores: scores,), 1 + seed % 3
    settings["length_penalty"] = settings["length_penalty"] if settings["num_beams"] > 1 else 1.
    wanted = generate_ids(embeddings, model, **settings, no_repeat_ngram_size=n, processors=plain)
    assert beam_ids(model, prefixes, **settings, no_repeat_ngram_size=n).tolist() == wanted.tolist()
    assert n > 1 or all(len({*row}) == len(row) for row in ([i for i in row if i != 1] for row in wanted.tolist()))


@pytest.mark.numerics
@pytest.mark.parametrize("seed", range(80, 88))
def test_an_ensemble_writes_as_with_generate(seed):
    "Members have prefixes of other lengths."
    model, _, prefixes, settings = draw_search("gpt2", seed)
    settings |= {"max_length": min(settings["max_length"], 10), "length_penalty": 1.}
    others = [prefixes.flip(1).repeat(1, 2, 1), -prefixes[:, :1]]
    model.ensemble.extend([ClipCapModel(model.gpt2, model.tokenizer, Given(other)).eval() for other in others])
    embeddings = torch.arange(len(prefixes))[:, None]
    wanted = generate_ids(embeddings, model, **settings, processors=(lambda written, scores: scores,))
    found, told = beam_search(model, [prefixes, *others], **settings)
    assert can_search(model, 30) and found.tolist() == wanted.tolist() == generate_ids(embeddings, model, **settings).tolist()
    mask = (told != 0).long()
    torch.testing.assert_close(told, token_log_probabilities(model, embeddings, found, mask).double(), rtol=0, atol=1e-5)


@pytest.mark.numerics
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_log_probability_of_each_token_is_that_of_the_loss(kind):
    model, way, prefixes, settings = draw_search(kind, 7)
    if way != "packed": pytest.skip(f"{kind} is {way}")
    found, told = beam_search(model, prefixes, **settings)
    mask = (told != 0).long()
    losses = model(torch.arange(len(prefixes))[:, None], found, mask, per_token=True)
    torch.testing.assert_close(told, -losses, rtol=1e-9, atol=1e-9)


def test_what_it_can_not_search_is_known():
    model = draw_search("gpt2", 1)[0]
    assert can_search(model, 30)
    model.ensemble.append(copy.deepcopy(model))
    assert can_search(model, 30)
    model.ensemble[0].gpt2.searches = False
    assert not can_search(model, 30)
