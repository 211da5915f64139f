"""Writing captions: greedy, beams, sampling, ensembles, photos of all kinds (clipcap.model). All in float64, so that no two tokens tie."""
from dataclasses import replace

import pytest
import torch
from PIL import Image

from clipcap import model as module
from clipcap.core import make_config
from clipcap.data import encode_images
from clipcap.formats.embeddings import Embeddings, write_embeddings
from clipcap.formats.tokenizer import encode_captions
from clipcap.model import (AveragedPredictions, ClipCapModel, GridMapping, caption_images, decoding_protocol, generate_caption,
                           generate_caption_batch, generate_from_embeddings, generate_ids, ids_to_text, load_gpt2, plain_writer)

FEW = torch.arange(4.)[:, None]  # embeddings of four images, for `Prompts`
STARTS = ["A red dog is", "Two cats are", "There is a", "The big bird"]


class Prompts(torch.nn.Module):
    "Stands in for a trained mapping network: embedding [k] becomes the first words of caption k."
    def __init__(self, gpt2, tokenizer, captions):
        super().__init__()
        words = torch.tensor([ids[1:4] for ids in encode_captions(tokenizer, captions)])
        self.table = torch.nn.Parameter(gpt2.get_input_embeddings()(words))

    def forward(self, embeddings): return self.table[embeddings[:, 0].long()]  # (B, 3, d)


@pytest.fixture(scope="module")
def gpt2(tokenizer): return load_gpt2("mini", tokenizer, seed=1).double()


@pytest.fixture(scope="module")
def make(gpt2, tokenizer):
    "A function that makes a model from the first words of its captions."
    return lambda captions=STARTS, ensemble=(): ClipCapModel(gpt2, tokenizer, Prompts(gpt2, tokenizer, captions), ensemble=ensemble).eval()


@pytest.fixture
def speaker(make): return make()


@pytest.fixture(scope="module")
def second(make): return make(["Two birds are", "A cat is", "There is a", "A red bird"])


@torch.no_grad()
def by_hand(models, embedding, max_length, begun=()):
    "Greedy decoding of the mean of log-probabilities, without a cache: token ids."
    ids, end, words = list(begun), models[0].tokenizer.eos_token_id, models[0].gpt2.get_input_embeddings().weight
    while len(ids) < max_length and (not ids or ids[-1] != end):
        inputs = [torch.cat([m.prefix(embedding[None]), words[ids][None]], 1) for m in models]
        ids.append(sum(m.gpt2(inputs_embeds=x).logits[0, -1].log_softmax(-1) for m, x in zip(models, inputs)).argmax().item())
    return ids


def padded(ids, pad): return torch.nn.utils.rnn.pad_sequence([torch.tensor(i) for i in ids], True, pad)


# --- what `generate` does with a given prefix

@pytest.mark.numerics
@pytest.mark.parametrize("start_token", ["free", "given"])
@pytest.mark.parametrize("max_length", [3, 6, 30])
def test_greedy_decoding_is_a_loop_and_max_length_counts_new_tokens(speaker, max_length, start_token):
    begun = [speaker.tokenizer.bos_token_id] if start_token == "given" else []
    expected = [by_hand([speaker], e, max_length, begun) for e in FEW]
    if max_length < 30: assert max(map(len, expected)) == max_length
    else: assert {ids[-1] for ids in expected} == {speaker.tokenizer.eos_token_id}  # all ended by themselves
    assert generate_ids(FEW, speaker, max_length, 1, start_token=start_token).equal(padded(expected, speaker.tokenizer.pad_token_id))
    assert generate_from_embeddings(FEW, speaker, max_length, 1, start_token=start_token) == ids_to_text(speaker.tokenizer, expected)


@pytest.mark.numerics
def test_batch_is_its_images_alone_and_the_mode_stays(speaker):
    speaker.train()
    together = generate_from_embeddings(FEW, speaker, 12, 5)
    assert speaker.training and not speaker.gpt2.training
    assert together == [generate_from_embeddings(e[None], speaker, 12, 5)[0] for e in FEW] and len(set(together)) == 4


def test_prefix_goes_through_gpt2_once_per_image(speaker, monkeypatch):
    shapes, forward = [], speaker.gpt2.base_model.forward
    def seen(*args, **kwargs):
        if kwargs.get("inputs_embeds") is not None: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2]))
        return forward(*args, **kwargs)
    monkeypatch.setattr(speaker.gpt2.base_model, "forward", seen)
    generate_from_embeddings(FEW, speaker, 12, 5)
    assert shapes[:2] == [(4, 3), (4, 5)] and {n for _, n in shapes[1:]} == {5}  # the prefix; then one position per beam


def test_no_images_no_captions_and_no_clip_is_named(speaker, clip_mini, gpt2, tokenizer):
    assert generate_from_embeddings(FEW[:0], speaker) == []
    assert generate_caption_batch([], ClipCapModel(gpt2, tokenizer, speaker.mapping_network, *clip_mini[:2])) == []
    with pytest.raises(ValueError, match="this model has no CLIP: it was trained on embeddings from a file"): generate_caption("photo.jpg", speaker)


# --- ensembles

@pytest.mark.numerics
@pytest.mark.parametrize("start_token", ["free", "given"])
def test_ensemble_writes_by_the_mean_of_log_probabilities(make, speaker, second, start_token):
    pair, begun = make(ensemble=[second]), [speaker.tokenizer.bos_token_id] if start_token == "given" else []
    expected = [by_hand([speaker, second], e, 12, begun) for e in FEW]
    assert generate_ids(FEW, pair, 12, 1, start_token=start_token).equal(padded(expected, pair.tokenizer.pad_token_id))
    assert generate_from_embeddings(FEW, pair, 12) != generate_from_embeddings(FEW, speaker, 12)


@pytest.mark.numerics
@pytest.mark.parametrize("beams", [1, 5])
def test_ensemble_of_equals_is_each_of_them(make, speaker, beams):
    assert generate_from_embeddings(FEW, make(ensemble=[speaker, speaker]), 12, beams) == generate_from_embeddings(FEW, speaker, 12, beams)


@pytest.mark.numerics
def test_average_of_equal_predictions_is_each_of_them(speaker):
    written = torch.full((4, 1), 5)
    with torch.no_grad():
        scores = speaker.gpt2(inputs_embeds=torch.cat([speaker.prefix(FEW), speaker.gpt2.get_input_embeddings()(written)], 1)).logits[:, -1]
        averaged = AveragedPredictions([speaker]*2, FEW, 1)(written, scores)
    torch.testing.assert_close(averaged, scores.log_softmax(-1), rtol=1e-4, atol=1e-4)


# --- sampling and the start token

def test_sampling_follows_the_seed_and_the_temperature(speaker):
    def sampled(temperature, seed):
        torch.manual_seed(seed)
        return generate_from_embeddings(FEW, speaker, 12, 1, temperature)
    assert sampled(1e-4, 0) == generate_from_embeddings(FEW, speaker, 12, 1)
    assert sampled(2., 0) == sampled(2., 0) != sampled(2., 1)
    assert len({tuple(sampled(0.9, seed)) for seed in range(5)}) > 1


def test_given_start_token_begins_every_sample_and_beam(speaker):
    start, given = speaker.tokenizer.bos_token_id, dict(start_token="given")
    with torch.no_grad(): free = speaker.gpt2(inputs_embeds=speaker.prefix(FEW)).logits[:, -1].softmax(-1)[:, start]
    assert (free < 0.5).all()  # this model seldom writes it by itself
    torch.manual_seed(0)
    samples = generate_ids(FEW, speaker, 12, 1, 1., 50, **given)
    assert (samples[:, 0] == start).all() and samples[:, 1].unique().numel() > 1
    assert (generate_ids(FEW, speaker, 12, 5, num_return_sequences=5, **given)[:, 0] == start).all()


@pytest.mark.parametrize("changes, expected", [
    (dict(), {"num_beams": 5}), (dict(num_beams=2, length_penalty=0.5, neighbours=70), {"num_beams": 2, "length_penalty": 0.5, "neighbours": 70})])
def test_protocol_names_what_is_not_in_the_reference_recipe(changes, expected): assert decoding_protocol(make_config("mini", **changes)) == expected


# --- a whole split, and photos

@pytest.mark.parametrize("rerank, temperature", [("none", 0.5), ("mbr", 0.)])
def test_temperature_of_candidates_is_not_that_of_captions(speaker, rerank, temperature):
    assert plain_writer(speaker, make_config("mini", rerank=rerank, temperature=0.5)).keywords["temperature"] == temperature


def test_images_are_captioned_in_batches_in_their_order(speaker, tmp_path):
    "Four batches go to a writer at once, as a finished photo makes room for another."
    write_embeddings(tmp_path/"x.safetensors", list("abc"), torch.tensor([[0.], [1.], [2.]]), "test")
    sizes = []
    def write(embeddings): sizes.append(len(embeddings)); return [str(int(e)) for e in embeddings]
    config = make_config("mini", eval_batch_size=2, num_beams=1, max_length=6)
    assert caption_images(speaker, Embeddings(tmp_path/"x.safetensors"), ["c", "a", "b"], config, write) == {"c": "2", "a": "0", "b": "1"}
    caption_images(speaker, Embeddings(tmp_path/"x.safetensors"), list("abcabcabc"), config, write)
    caption_images(speaker, Embeddings(tmp_path/"x.safetensors"), list("abc"), replace(config, temperature=1.), write)
    assert sizes == [3, 8, 1, 2, 1]
    assert list(caption_images(speaker, Embeddings(tmp_path/"x.safetensors"), ["b"], config).values()) == generate_from_embeddings(FEW[1:2], speaker, 6, 1)


@pytest.fixture
def seen(monkeypatch):
    "Captioning returns the embeddings themselves."
    monkeypatch.setattr(module, "generate_from_embeddings", lambda embeddings, *_: embeddings)


@pytest.mark.numerics
def test_photos_of_all_kinds_are_the_plain_picture_in_them(seen, tmp_path, clip_mini, gpt2, tokenizer):
    (clip, preprocess, _), picture = clip_mini, Image.linear_gradient("L").resize((90, 60))
    picture = Image.merge("RGB", (picture, picture.rotate(180), Image.new("L", picture.size, 90)))
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was turned by 90°
    kinds = {"plain.jpg": (picture, {}), "alpha.png": (picture.convert("RGBA"), {}), "grey.jpg": (picture.convert("L"), {}),
             "inks.jpg": (picture.convert("CMYK"), {}), "palette.png": (picture.convert("P"), {}), "turned.jpg": (picture, {"exif": turned}),
             "pixel.png": (picture.crop((0, 0, 1, 1)), {}), "pixel.jpg": (picture.crop((0, 0, 1, 1)).convert("L"), {})}
    for name, (image, options) in kinds.items(): image.save(tmp_path/name, **options)
    paths = [tmp_path/name for name in kinds]
    plain = [Image.open(path).convert("RGB") for path in paths]
    plain[list(kinds).index("turned.jpg")] = plain[0].transpose(Image.Transpose.ROTATE_270)
    model = ClipCapModel(gpt2, tokenizer, torch.nn.Linear(1, 1), clip, preprocess)
    expected = generate_caption_batch(torch.stack([preprocess(image) for image in plain]), model)
    assert (expected[0] - expected[5]).abs().max() > 0.1  # turned is not the same
    for images in (paths, [Image.open(path) for path in paths]):
        torch.testing.assert_close(generate_caption_batch(images, model), expected, rtol=1e-3, atol=1e-3)
    alone = torch.stack([generate_caption(str(path), model) for path in paths])
    torch.testing.assert_close(alone, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.numerics
def test_model_that_needs_patches_gets_patches(seen, clip_mini, gpt2, tokenizer):
    clip, preprocess, _ = clip_mini
    model = ClipCapModel(gpt2, tokenizer, GridMapping(16, 32, num_layers=1, num_heads=1), clip, preprocess)
    pictures = [Image.linear_gradient("L"), Image.linear_gradient("L").rotate(90)]
    torch.testing.assert_close(generate_caption_batch(pictures, model), encode_images(clip, torch.stack([*map(preprocess, pictures)]), "grid"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name, value", [(name, value) for name in ("num_beams", "max_length", "num_return_sequences") for value in (0, -1, 2.5, None)] + [("temperature", -1)])
def test_ids_of_an_impossible_search_are_not_written(speaker, name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be "): generate_ids(FEW, speaker, **{name: value})
