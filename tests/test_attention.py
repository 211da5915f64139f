"""What each word rests on: recorded attention, relevance, explanations of a split (clipcap.attention)."""
import json
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from clip.model import CLIP
from PIL import Image
from torch import nn

from clipcap import attention as module
from clipcap.attention import (NoAttention, _attention_weights, _memory_relevance, _write_relevance, crop_photo, explain, explain_split, model_inputs,
                               plot_mapping, plot_photo_words, plot_prefix_words, plot_word_shares, read_relevance, read_words,
                               record_attention, rollout, word_scores, word_shares, words_after)
from clipcap.core import make_config, open_run
from clipcap.data import load_data
from clipcap.decoding.load import load_run
from clipcap.model import ClipCapModel, GridMapping, load_model
from clipcap.networks.language_models import choose_loss, tiny_language_model
from clipcap.networks.mapping import LinearMapping
from clipcap.report import pack_relevance

CAPTIONS = ["A dog runs .", "Unbelievable", ""]
SDPA = F.scaled_dot_product_attention


@pytest.fixture(scope="module")
def captioner():
    "An untrained model of the preset `mini`, with CLIP."
    return load_model(make_config("mini")).eval()


def pictures(number=1): return torch.randn(number, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def embeddings(number): return torch.randn(number, 128, generator=torch.Generator().manual_seed(0))


def close(a, b, tolerance): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance, atol=tolerance)


# --- recording

@pytest.mark.numerics
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": "bool"}, {"attn_mask": "float"}, {"scale": 0.3}, {"enable_gqa": True}], ids=str)
def test_recorded_attention_is_the_same_function(options):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 6, 8, dtype=torch.double)
    if options.get("enable_gqa"): k, v = k[:, :2], v[:, :2]
    if "attn_mask" in options: options = {"attn_mask": torch.eye(6).bool() | (torch.rand(6, 6) < 0.7) if options["attn_mask"] == "bool" else torch.randn(6, 6).double()}
    with record_attention() as seen: ours = F.scaled_dot_product_attention(q, k, v, **options)
    close(ours, SDPA(q, k, v, **options), 1e-10)
    close(seen[0].sum(-1), torch.ones(2, 4, 6).double(), 1e-10)


@pytest.mark.numerics
def test_recorded_weights_are_those_that_pytorch_returns():
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True).double().eval(), torch.randn(1, 5, 8).double()
    with record_attention() as seen: layer(x, x, x, need_weights=False)
    close(seen[0], layer(x, x, x, average_attn_weights=False)[1], 1e-10)


def test_pytorchs_function_comes_back_also_after_an_error():
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyError), record_attention(): raise KeyError
    assert F.scaled_dot_product_attention is SDPA and torch.backends.mha.get_fastpath_enabled() == fast


# --- words and their scores

def test_each_token_belongs_to_one_word(tokenizer):
    words = read_words(tokenizer, CAPTIONS)
    assert words.texts == [["A", "dog", "runs", "."], ["Unbelievable"], []]
    special = torch.tensor([tokenizer.bos_token_id, tokenizer.eos_token_id])
    assert torch.equal(words.member.sum(1), (words.mask.bool() & ~torch.isin(words.ids, special)).float())
    assert tokenizer.decode(words.ids[1][words.member[1, 0].bool()]) == "Unbelievable"
    assert read_words(tokenizer, ["", "  "]).member.shape[1] == 0
    assert read_words(tokenizer, ["A dog runs ."], longest=4).member[0].sum(1).tolist() == [1, 1, 0, 0]  # start, A, dog, end


@pytest.mark.numerics
def test_word_scores_add_up_to_the_captions_likelihood(captioner):
    words = read_words(captioner.tokenizer, CAPTIONS[:2])
    given = embeddings(2)
    special = torch.isin(words.ids, torch.tensor(captioner.tokenizer.all_special_ids))
    ends = replace(words, member=(special*words.mask)[:, None].float())  # start and end as one word
    with torch.no_grad():
        prefix = captioner.prefix(given)
        log_p, odds = (word_scores(captioner, prefix, words, log_odds=kind) for kind in (False, True))
        close(log_p.sum(1) + word_scores(captioner, prefix, ends, log_odds=False)[:, 0], -captioner(given, words.ids, words.mask), 1e-3)
    alone = (words.member.sum(2) == 1) & (log_p < -1e-2)
    close(odds[alone], (log_p - (-log_p.expm1()).log())[alone], 1e-2)
    assert alone.any() and not odds[1, 1:].any()  # 0 where a caption has no such word


# --- relevance

@pytest.mark.numerics
def test_rollout_is_the_papers_with_whole_matrices():
    torch.manual_seed(0)
    weights, gradients = torch.rand(4, 1, 2, 5, 5).double().softmax(-1), torch.randn(4, 1, 2, 5, 5).double()
    R = torch.eye(5).double()
    for a, g in zip(weights, gradients): R = R + (a*g).clamp(min=0).mean(1)[0] @ R
    row = torch.eye(5).double()[[0]]
    close(rollout(row, list(weights), list(gradients))[0], (R - torch.eye(5))[0], 1e-10)
    pooled = rollout(row, [weights[0, :, :, :1]], [gradients[0, :, :, :1]])  # one query alone: CLIP's ResNets
    close(pooled[0], (weights[0]*gradients[0]).clamp(min=0).mean(1)[0, 0], 1e-10)


def test_relevance_of_patches_sums_what_speaks_for_the_word():
    looks, slopes = torch.tensor([[[[0.5, 0.5, 0.], [0.25, 0.25, 0.5]]]]), torch.tensor([[[[1., -1., 1.], [1., 2., 1.]]]])
    assert _memory_relevance([looks, looks], [slopes, slopes])[0].tolist() == [0, 1.5, 1, 1]


@pytest.mark.numerics
def test_gradients_are_those_of_finite_differences(captioner, monkeypatch):
    words, P = read_words(captioner.tokenizer, ["A dog runs ."]), 10
    prefix = captioner.prefix(embeddings(1)).detach()
    with record_attention() as weights: score = word_scores(captioner, prefix.clone().requires_grad_(), words)[0, 1]
    gradient = torch.autograd.grad(score, weights)[0][0, :, P]  # first layer, the position that chooses the word
    head, key = divmod(int(gradient.abs().argmax()), gradient.shape[1])

    def score_with(change):
        calls = []
        def attend(*args, **options):
            weights, values = _attention_weights(*args, **options)
            if not calls: weights[0, head, P, key] += change
            calls.append(change)
            return weights @ values
        monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
        with torch.no_grad(): return word_scores(captioner, prefix, words)[0, 1]

    slope = (score_with(0.02) - score_with(-0.02))/0.04
    monkeypatch.undo()
    close(slope/gradient[head, key], 1., 0.05)


# --- explanations

@pytest.mark.numerics
def test_what_holds_of_any_explanation(captioner):
    first, second, empty = explain(captioner, pictures(3), CAPTIONS)
    assert [(e.prefix.shape, e.earlier.shape, e.photo.shape) for e in (first, second, empty)] == [((W, 10), (W, W), (W, 8, 8)) for W in (4, 1, 0)]
    assert first.attention.shape == (2, 4, 4, 15) and first.constants.shape == (2, 4, 10, 10) and first.memory.shape == (2, 4, 10, 1)
    for e in (first, second):
        W = len(e.words)
        close(e.attention.sum(-1), torch.ones(2, 4, W), 1e-4)
        close(e.shares.sum(1), torch.ones(W), 1e-4)
        assert torch.equal(e.earlier.triu(1), torch.zeros(W, W)) and min(e.photo.min(), e.prefix.min(), e.earlier.min()) >= 0
    assert torch.equal(first.memory, torch.ones_like(first.memory))  # one token
    alone, = explain(captioner, pictures(3)[:1], CAPTIONS[:1])
    for field in ("photo", "prefix", "earlier", "attention"):
        a, b = getattr(alone, field), getattr(first, field)
        close(a/a.max(), b/a.max(), 1e-3)  # whatever else is in the batch


def test_captions_without_words_and_embeddings_can_be_explained(captioner):
    for given in (pictures(2), embeddings(2)): assert [e.prefix.shape for e in explain(captioner, given, ["", " "])] == [(0, 10)]*2
    found, = explain(captioner, embeddings(1), ["dog"])
    assert (found.photo, found.last, found.prefix.shape) == (None, None, (1, 10))


def test_words_beyond_the_models_positions_have_no_relevance(captioner):
    found, = explain(captioner, embeddings(1), ["dog "*200])  # the miniature GPT-2 has 128 positions
    assert len(found.words) == 200 and found.prefix[:100].sum(1).all() and not found.prefix[150:].any()


def test_words_are_read_up_to_the_models_last_position(captioner):
    with torch.no_grad(): prefix = captioner.prefix(embeddings(2))
    words = words_after(captioner, prefix, ["dog "*200, "a dog"])
    assert words.ids.shape[1] + prefix.shape[1] == captioner.gpt2.config.max_position_embeddings
    scores = word_scores(captioner, prefix, words)
    assert scores[0, :50].all() and not scores[0, 150:].any()


def with_clip(captioner, network=None, **vision):
    "The captioner behind a CLIP of other sizes, with random weights."
    torch.manual_seed(0)
    clip = CLIP(128, 64, context_length=8, vocab_size=16, transformer_width=64, transformer_heads=1, transformer_layers=1, **vision)
    return ClipCapModel(captioner.gpt2, captioner.tokenizer, network or captioner.mapping_network, clip).eval()


@pytest.mark.parametrize("grid, vision", [(8, dict(vision_layers=2, vision_width=64, vision_patch_size=8)),
                                          (4, dict(vision_layers=3, vision_width=64, vision_patch_size=16)),
                                          (2, dict(vision_layers=(1, 1, 1, 1), vision_width=16, vision_patch_size=None))], ids=["patches of 8", "patches of 16", "ResNet"])
def test_any_clip_can_be_explained(captioner, grid, vision):
    found, = explain(with_clip(captioner, **vision), pictures(), ["A dog ."])
    assert found.photo.shape == (3, grid, grid) and found.photo.min() >= 0 and found.photo.max() > 0


@pytest.mark.numerics
def test_mapping_network_that_sees_patches_can_be_explained(captioner):
    torch.manual_seed(0)
    model = with_clip(captioner, GridMapping(128, 128, 10, 2, 4, 64), vision_layers=2, vision_width=64, vision_patch_size=16)
    found, = explain(model, pictures(), ["A dog ."])
    assert (found.photo.shape, found.memory.shape, found.last.shape) == ((3, 4, 4), (2, 4, 10, 16), (4, 4))
    assert found.photo.min() >= 0 and found.photo.max() > 0
    close(found.memory.sum(-1), torch.ones(2, 4, 10), 1e-4)
    close(found.last.flatten(), found.memory.mean((0, 1, 2)), 1e-5)
    of_patches, = explain(model, torch.randn(1, 5, 128), ["A dog ."])  # no image encoder involved
    assert (of_patches.photo, of_patches.memory.shape) == (None, (2, 4, 10, 5))


def of_kind(captioner, kind):
    "The same tokenizer with a small random language model of another architecture, without CLIP."
    gpt2 = tiny_language_model(kind, vocabulary=len(captioner.tokenizer)).requires_grad_(False)
    choose_loss(gpt2)
    return ClipCapModel(gpt2, captioner.tokenizer, LinearMapping(7, 64, 3, num_layers=1, num_heads=1, feedforward_dim=8, dropout=0.)).eval()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "gptj", "bloom", "gemma2", "codegen"])
def test_language_models_that_return_their_attention_are_explained(captioner, kind):
    explanations = explain(of_kind(captioner, kind), torch.randn(2, 7, generator=torch.Generator().manual_seed(0)), CAPTIONS[:2])
    for e, words in zip(explanations, (4, 1)):
        assert e.attention.shape == (2, 4, words, 3 + 1 + words) and e.shares.sum(1).sub(1).abs().max() < 1e-4
        assert (e.attention >= 0).all() and (e.attention.sum(-1) <= 1 + 1e-4).all()


def test_a_model_without_attention_is_named(captioner):
    with pytest.raises(NoAttention, match="gpt2_model neither uses .* nor returns its attention"): explain(of_kind(captioner, "mamba"), torch.randn(1, 7), ["A dog"])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["mamba", pytest.param("mamba2", marks=pytest.mark.slow)])
def test_split_of_a_language_model_without_attention_is_left_out_with_the_reason(captioner, tmp_path, kind):
    captions, path = {"a": "A dog", "b": ""}, tmp_path/"relevance_test.safetensors"
    data = SimpleNamespace(embeddings=SimpleNamespace(stack=lambda names: torch.randn(len(names), 7)))
    for _ in range(2): assert explain_split(of_kind(captioner, kind), data, captions, path, "key") == {}
    packed, about = pack_relevance(path, captions)
    assert packed == [None, None] and about["reason"].startswith("gpt2_model neither uses PyTorch's scaled_dot_product_attention")
    assert word_shares({}, captions, 1).empty


# --- pictures

@pytest.mark.parametrize("caption", ["A dog runs , twice .", "$x_$ $5 .", "...", "dog"])
def test_any_explanation_can_be_drawn(captioner, caption):
    found, = explain(captioner, pictures(), [caption])
    photo = crop_photo(Image.new("RGB", (90, 70)), captioner.preprocess)
    assert photo.size == (64, 64)
    figures = [plot_photo_words(photo, found, caption), plot_prefix_words(found, caption), plot_mapping(found)]
    assert len(figures[0].axes) == 1 + 6  # a row of six, and the scale
    assert "one memory token:\nalways 1" in [t.get_text() for ax in figures[2].axes for t in ax.texts]
    for figure in figures: figure.canvas.draw(); plt.close(figure)


def test_deep_mapping_networks_show_four_layers(captioner):
    found, = explain(captioner, embeddings(1), ["dog"])
    deep = replace(found, constants=found.constants[:1].repeat(8, 1, 1, 1), memory=torch.rand(8, 4, 10, 49))
    figure = plot_mapping(deep)
    assert [ax.get_title() for ax in figure.axes[:5]] == [*(f"among constants, layer {n}" for n in (1, 3, 6, 8)), "to the memory, all layers"]
    plt.close(figure)


# --- a whole split

@pytest.fixture(scope="module")
def split_of(trained_outputs):
    "Model and data of the trained run, and captions of its test split."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPCAP_OUTPUTS", str(trained_outputs))
        run, config = open_run("demo")
        data = load_data(run, config)
        yield load_run("demo", device="cpu", precision="float32"), data, {n: f"A dog of {n[6:11]} ." for n in sorted(data.references("test"))}


def test_interrupted_split_is_completed(split_of, tmp_path, monkeypatch):
    model, data, captions = split_of
    part, path, explained = dict(list(captions.items())[:4]), tmp_path/"r.safetensors", []
    def counted(*given): explained.append(len(given[2])); return explain(*given)
    monkeypatch.setattr(module, "explain", counted)
    whole = explain_split(model, data, part, path, "k", batch_size=2)
    path.unlink()
    explain_split(model, data, dict(list(part.items())[:2]), path, "k", batch_size=2)
    again = explain_split(model, data, part, path, "k", batch_size=2)
    assert explained == [2, 2, 2, 2]  # the last two alone, the second time
    assert whole.keys() == again.keys() == {f"{kind}/{n}" for n in part for kind in ("words", "photo")}
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    about = read_relevance(path)[1]
    assert json.loads(about["words"]) == {n: c.split() for n, c in part.items()} and about["reason"] == ""
    explain_split(model, data, part, path, "another model", batch_size=4)
    assert explained[4:] == [4]


def test_split_whose_captions_are_empty_can_be_explained(split_of, tmp_path):
    model, data, captions = split_of
    names = list(captions)[:3]
    for texts in (["", "", ""], ["", "dog", ""]):
        tensors = explain_split(model, data, dict(zip(names, texts)), tmp_path/"r.safetensors", str(texts))
        assert [len(tensors[f"words/{n}"]) for n in names] == [len(t.split()) for t in texts]
        assert read_relevance(tmp_path/"r.safetensors")[0].keys() == tensors.keys()


def test_run_on_embeddings_says_why_it_has_no_photos(split_of, tmp_path):
    model, data, captions = split_of
    blind = ClipCapModel(model.gpt2, model.tokenizer, model.mapping_network).eval()
    one = dict(list(captions.items())[:1])
    assert list(explain_split(blind, data, one, tmp_path/"r.safetensors", "k")) == [f"words/{next(iter(one))}"]
    assert "the run was given embeddings" in read_relevance(tmp_path/"r.safetensors")[1]["reason"]


def test_missing_photo_is_named(split_of, tmp_path):
    model, data, captions = split_of
    with pytest.raises(FileNotFoundError, match=f"the photo of {list(captions)[0]} is not in .*; put it back"):
        model_inputs(model, replace(data, photos=tmp_path), list(captions)[:1])


def test_file_is_the_same_each_time_and_a_damaged_one_is_named(tmp_path):
    tensors, about = {"words/a": torch.rand(2, 3), "photo/ä": torch.rand(1)}, {"key": "ü\n", "words": '{"a": "\\u00e9"}', "reason": "", "method": "m"}
    path, written = tmp_path/"r.safetensors", set()
    for _ in range(12): _write_relevance(path, tensors, about); written.add(path.read_bytes())
    back, known = read_relevance(path)
    assert len(written) == 1 and known == about and all(torch.equal(back[k], tensors[k]) for k in tensors)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="r.safetensors is not a relevance file"): read_relevance(path)


# --- words of a split

def test_shares_of_a_word_are_averaged_over_its_places():
    tensors = {"words/a": torch.tensor([[1., 0, 0], [0.75, 0.25, 0]]), "words/b": torch.tensor([[1., 0, 0], [0.25, 0.75, 0]]), "words/c": torch.zeros(0, 1)}
    captions = {"a": "The dog", "b": "A Dog", "c": ""}
    assert word_shares(tensors, captions, 2).loc["dog"].tolist() == [2, 0.5]
    figure, axes = plt.subplots(1, 3)
    plot_word_shares(word_shares(tensors, captions), axes[0])
    assert axes[0].texts[0].get_text() == "no word is written often enough"
    plot_word_shares(word_shares(tensors, {"c": ""}, 1), axes[1])
    many = pd.DataFrame({"times": 5, "photo": 0.5}, index=[f"${n}$_" for n in range(40)])
    plot_word_shares(many, axes[2])
    figure.canvas.draw()
    assert len(axes[2].patches) == 24
    plt.close(figure)
