"CLIPScore and the encoding of texts."
import math

import numpy as np
import pytest
import torch

from clipcap.scoring.clipscore import CLIP_COLUMNS, clip_scores, encode_texts, text_encoder

DEGREES = {"caption": 60, "near": 60, "across": 150, "behind": 200}
def plane(texts): return np.array([[math.cos(math.radians(DEGREES[t])), math.sin(math.radians(DEGREES[t]))] for t in texts])


@pytest.mark.parametrize("caption, references, expected", [
    ("caption", ["near", "across"], [2.5*0.5, 2/(1/1.25 + 1/1)]),
    ("behind", ["near"], [0, 0])])  # more than 90° from both
def test_scores_in_a_plane_by_hand(caption, references, expected):
    found = clip_scores(torch.tensor([[3., 0.]]), {"x": caption}, {"x": references}, plane)
    assert [found[n].corpus for n in CLIP_COLUMNS] == pytest.approx(expected, rel=0, abs=1e-9)


@pytest.mark.numerics
def test_own_captions_score_far_above_others(clip_mini, scenes, scene_captions):
    from clipcap.data import encode_images
    from clipcap.formats.photos import read_photo
    model, preprocess, _ = clip_mini
    texts = scene_captions.groupby("image").caption.apply(list)[:40].to_dict()
    images = encode_images(model, torch.stack([preprocess(read_photo(scenes.photos/n)) for n in texts]))
    first, rest, encode = [t[0] for t in texts.values()], {n: t[1:] for n, t in texts.items()}, text_encoder(model, "mini")
    own, other = [clip_scores(images, dict(zip(texts, captions)), rest, encode) for captions in (first, [*first[1:], first[0]])]
    for n in CLIP_COLUMNS: assert other[n].corpus < 0.6*own[n].corpus


@pytest.mark.numerics
def test_text_is_encoded_alike_in_any_batch_and_only_once(clip_mini):
    model, texts = clip_mini[0], ["A dog .", "", "cat "*500]  # a caption that is too long loses its end; empty ones are read
    alone = np.concatenate([encode_texts(model, "mini", [t]) for t in texts])
    assert alone.shape == (3, model.text_projection.shape[1])
    np.testing.assert_allclose(encode_texts(model, "mini", texts), alone, rtol=0, atol=1e-5)
    encode = text_encoder(model, "mini")
    first, again = encode(texts[::-1] + texts), encode(texts)
    np.testing.assert_allclose(first, np.concatenate([alone[::-1], alone]), rtol=0, atol=1e-5)
    assert (again == first[3:]).all()


def tiny_clip(vocabulary):
    from clip.model import CLIP
    torch.manual_seed(0)
    return CLIP(8, 32, 1, 64, 32, 77, vocabulary, 64, 1, 1).eval()


@pytest.mark.numerics
@torch.no_grad()
def test_openai_clip_reads_its_own_tokens_after_the_prefix():
    import clip
    model = tiny_clip(49408)
    ids = clip.tokenize(["A photo depicts a dog", "A photo depicts " + "cat "*500], truncate=True)
    expected = torch.nn.functional.normalize(model.encode_text(ids), dim=1)
    np.testing.assert_allclose(encode_texts(model, "ViT-B/32", ["a dog", "cat "*500]), expected.numpy(), rtol=0, atol=1e-4)


def test_unknown_vocabulary_is_refused():
    with pytest.raises(ValueError, match="the text encoder of 'my.pt' has 99 tokens"): encode_texts(tiny_clip(99), "my.pt", ["a dog"])
