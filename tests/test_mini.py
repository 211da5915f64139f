"""The embedded scenes, their captions, and the miniature backbones (clipcap.mini)."""
import json
import random
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from clipcap.mini.backbones import (END, FACTS, GRID, THINGS, FactHeads, _fact_indices, _patch_tokens, caption_tokens, continue_text, draw_captions,
                                    file_hashes, linear_probe, load_clip, new_clip, patch_things, preprocess_scenes, probe_facts,
                                    retrieval_ranks, save_clip, scene_document, train_clip, train_gpt2, train_tokenizer)
from clipcap.mini.scenes import (COLORS, HEIGHTS, HELD_OUT, KINDS, SIZE, SPLITS, Scene, _large_sprite, _sprite, caption_facts, draw_dataset,
                                 draw_scene, is_sensible, is_unseen, random_scenes, read_scenes, scene_boxes, scene_masks, write_caption,
                                 write_captions, write_dataset)
from clipcap.runs.files import asset_path

DOGS = Scene("dog", "brown", 2, "snow", "running", layout=3)
ASSETS = asset_path("mini")


@pytest.fixture(scope="session")
def drawn():
    "Scenes of learned combinations, and of held-out ones."
    return random_scenes(1000, "a look"), random_scenes(300, "a look", unseen=True)


@pytest.fixture(scope="session")
def dataset(): return draw_dataset(0)


@pytest.fixture(scope="session")
def bpe(): return train_tokenizer(draw_captions(500, "tokenizer"))


@pytest.fixture(scope="session")
def mini_gpt2(): return GPT2LMHeadModel.from_pretrained(ASSETS/"gpt2").eval()


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def pixels(image): return np.asarray(image.convert("RGB")).astype(int)


# --- scenes

@pytest.mark.parametrize("scene, sensible", [
    (Scene("dog", "red", 1, "beach", "sleeping", "under", "tree"), True),
    (Scene("car", "red", 1, "beach", "sleeping"), False),
    (Scene("horse", "red", 1, "room", "standing"), False),
    (Scene("dog", "red", 3, "beach", "standing", "on", "box"), False),
    (Scene("dog", "red", 1, "beach", "standing", "on", ""), False),
])
def test_what_can_be_drawn(scene, sensible): assert is_sensible(scene) == sensible


def test_every_color_and_kind_is_held_out_somewhere_and_learned_elsewhere(drawn):
    seen, unseen = drawn
    assert {(s.color, s.kind) for s in unseen} == HELD_OUT and not {(s.color, s.kind) for s in seen} & HELD_OUT
    assert {c for c, _ in HELD_OUT} == set(COLORS) == {s.color for s in seen}
    assert {k for _, k in HELD_OUT} == set(KINDS) == {s.kind for s in seen}
    assert all(map(is_sensible, seen + unseen))


def test_the_same_seed_gives_the_same_scenes():
    assert random_scenes(5, 7) == random_scenes(5, 7) != random_scenes(5, 8)


# --- drawing

def test_color_changes_a_picture_but_no_outline():
    brown, green = (_large_sprite("dog", color, "running") for color in ("brown", "green"))
    assert brown.size == green.size and brown.getchannel("A").tobytes() == green.getchannel("A").tobytes()
    assert brown.tobytes() != green.tobytes()


def test_poses_have_the_scale_of_the_standing_one():
    assert _sprite("dog", "brown", "standing", 100, False).height == HEIGHTS["dog"]
    assert _sprite("dog", "brown", "sleeping", 100, False).height < .7*HEIGHTS["dog"]


def test_a_scene_always_gives_the_same_pixels():
    image = draw_scene(DOGS)
    assert (image.size, image.mode) == ((SIZE, SIZE), "RGB")
    assert image.tobytes() == draw_scene(DOGS).tobytes() != draw_scene(replace(DOGS, layout=4)).tobytes()


def test_a_scene_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="can.t be drawn; see `is_sensible`"): draw_scene(Scene("car", "red", 1, "room", "standing"))


def test_boxes_and_masks_hold_what_changes_with_the_color(drawn):
    for scene in drawn[0][:60] + drawn[1][:15]:
        other = replace(scene, color="blue" if scene.color != "blue" else "red")
        changed, inside = (pixels(draw_scene(scene)) != pixels(draw_scene(other))).any(-1), np.zeros((SIZE, SIZE), bool)
        boxes = [box for name, box in scene_boxes(scene) if name == scene.kind]
        assert len(boxes) == scene.count
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE, scene
            inside[top:bottom, left:right] = True
            assert changed[top:bottom, left:right].sum() > 30, scene
        assert not (changed & ~inside).any(), scene
        covered = np.any([mask for name, mask in scene_masks(scene) if name == scene.kind], 0)
        assert not (covered & ~inside).any() and (changed & covered).sum() > .6*changed.sum(), scene  # the rest: soft edges


def test_nearly_the_whole_thing_is_visible():
    colored = np.abs(pixels(draw_scene(DOGS)) - COLORS["brown"]).sum(-1) < 40
    assert all(colored[t:b, l:r].mean() > .2 for _, (l, t, r, b) in scene_boxes(DOGS))


# --- captions

@pytest.mark.parametrize("caption, facts", [
    ("Two crimson kittens are sitting on top of a crate in the living room .",
     dict(kind="cat", color="red", count=2, action="standing", relation="on", other="box", setting="room")),
    ("A vehicle is parked .", dict(kind="car", count=1, action="standing")),
    ("A group of three birds soar above the snowy ground .", dict(kind="bird", count=3, action="flying", setting="snow")),
    ("A dog and a cat run .", dict(kind=["dog", "cat"], count=1, action="running")),
])
def test_facts_are_read_from_a_caption(caption, facts): assert caption_facts(caption) == facts


def test_captions_are_true_and_leave_facts_out(drawn):
    rng, stated, lengths = random.Random(4), [], []
    for scene in drawn[0][:400] + drawn[1][:100]:
        captions = write_captions(scene, rng)
        assert len(set(captions)) == 5
        for caption in captions:
            facts = caption_facts(caption)
            assert all(getattr(scene, name) == value for name, value in facts.items()), (caption, scene)
            assert re.fullmatch(r"[A-Z][a-z]*( [a-z]+| ,)+ \.", caption), caption
            assert scene.relation or not {"relation", "other"} & {*facts}
            stated.append([fact in facts for fact in ("kind", "count", "color", "action", "setting")])
            lengths.append(len(caption.split()))
    kind, count, color, action, setting = np.mean(stated, 0)
    assert kind == count == 1 and .5 < color < .95 and .5 < action < .99 and .5 < setting < .95
    assert max(lengths) + 3 <= 40 and min(lengths) <= 5


def test_the_same_random_state_gives_the_same_captions():
    assert write_captions(DOGS, random.Random(1)) == write_captions(DOGS, random.Random(1))


# --- the data set

def test_no_split_shows_the_scenes_of_another_or_learns_held_out_ones(dataset):
    assert dataset.groupby(["split", "subset"]).size().to_dict() == {
        ("train", "seen"): 1600, ("dev", "seen"): 150, ("test", "seen"): 100, ("test", "unseen"): 100}
    assert len({replace(s, layout=0) for s in dataset.scene}) == len(dataset)
    assert [is_unseen(s) for s in dataset.scene] == list(dataset.subset == "unseen")


def test_an_archive_is_the_same_each_time_and_holds_what_was_drawn(dataset, tmp_path):
    for name in ("a.zip", "b.zip"): write_dataset(tmp_path/name, dataset[:20])
    assert (tmp_path/"a.zip").read_bytes() == (tmp_path/"b.zip").read_bytes()
    assert read_scenes(tmp_path/"a.zip") == dict(zip(dataset.image[:20], dataset.scene[:20]))
    with zipfile.ZipFile(tmp_path/"a.zip") as archive:
        text = archive.read("Flickr8k_text/Flickr8k.token.txt").decode().splitlines()
        image = Image.open(archive.open("Flicker8k_Dataset/scene_00003.png"))
        assert np.abs(pixels(image) - pixels(draw_scene(dataset.scene[3]))).mean() < 6  # 24 colors are enough
    assert len(text) == 100 and text[5] == f"scene_00001.png#0\t{dataset.captions[1][0]}"


@pytest.mark.slow
def test_the_shipped_archive_is_drawn_again(dataset, tmp_path):
    write_dataset(tmp_path/"again.zip", dataset)
    with zipfile.ZipFile(ASSETS/"scenes.zip") as shipped, zipfile.ZipFile(tmp_path/"again.zip") as again:
        assert shipped.namelist() == again.namelist()
        for name in shipped.namelist():
            if name.endswith(".png"):  # pixels: another zlib packs them into other bytes
                assert np.array_equal(pixels(Image.open(shipped.open(name))), pixels(Image.open(again.open(name)))), name
            else: assert shipped.read(name) == again.read(name), name


def test_shipped_files_are_those_recorded_and_small():
    recorded = json.loads((ASSETS/"hashes.json").read_text())
    assert file_hashes(ASSETS) == recorded and sum((ASSETS/name).stat().st_size for name in recorded) < 8e6


def test_shipped_lists_and_captions_agree_with_the_shipped_scenes():
    facts = read_scenes(ASSETS/"scenes.zip")
    with zipfile.ZipFile(ASSETS/"scenes.zip") as archive:
        lists = {split: archive.read(f"Flickr8k_text/Flickr_8k.{split}Images.txt").decode().split() for split in SPLITS}
        lines = archive.read("Flickr8k_text/Flickr8k.token.txt").decode().splitlines()
    assert sorted(sum(lists.values(), [])) == sorted(facts)
    assert {split: sum(is_unseen(facts[name]) for name in names) for split, names in lists.items()} == {"train": 0, "dev": 0, "test": 100}
    captions = {}
    for name, caption in (line.split("\t") for line in lines):
        captions.setdefault(name[:-2], set()).add(caption)
        assert all(getattr(facts[name[:-2]], k) == v for k, v in caption_facts(caption).items()), caption
    assert captions.keys() == facts.keys() and {len(five) for five in captions.values()} == {5}


# --- GPT-2

def test_the_tokenizer_is_shaped_like_gpt2s(bpe):
    assert (bpe.eos_token_id, bpe.bos_token_id) == (len(bpe) - 1,)*2 and bpe.get_added_vocab() == {END: len(bpe) - 1}
    assert bpe.decode(bpe("Any text, even café !")["input_ids"]) == "Any text, even café !"


def test_documents_are_about_one_scene_and_end(bpe):
    for k in range(6):
        ids, hint = scene_document(DOGS, bpe, random.Random(k))
        captions = bpe.decode(ids[hint:]).split(END)
        assert captions.pop() == "" and {caption_facts(c)["kind"] for c in captions} == {"dog"}


@pytest.mark.parametrize("train", [lambda bpe, seed: train_gpt2(bpe, steps=12, batch_size=8, seed=seed),
                                   pytest.param(lambda bpe, seed: train_clip(bpe, steps=12, batch_size=32, n_scenes=96, seed=seed), marks=pytest.mark.slow)],
                         ids=["GPT-2", "CLIP"])
def test_the_same_seed_trains_the_same_weights(bpe, train):
    (short, losses), (again, _), (other, _) = (train(bpe, seed) for seed in (1, 1, 2))
    assert np.mean(losses[-3:]) < losses[0] and not short.training
    assert same_weights(short, again) and not same_weights(short, other)


def test_shipped_gpt2_fits_the_shipped_tokenizer_and_clip(tokenizer, mini_gpt2, clip_mini):
    size = mini_gpt2.config.vocab_size  # `tokenizer` has the captioner's two more
    assert tokenizer.eos_token_id == size - 1 and len(tokenizer) == size + 2 and clip_mini[0].vocab_size == size


def test_shipped_gpt2_takes_hints(tokenizer, mini_gpt2):
    right = {"kind": [], "count": [], "color": [], "setting": []}
    for i, scene in enumerate(random_scenes(40, "hints", unseen=True)):
        said = caption_facts(continue_text(mini_gpt2, tokenizer, END.join(write_captions(scene, random.Random(i), 4)) + END))
        for fact in right.keys() & said.keys(): right[fact].append(said[fact] == getattr(scene, fact))
    assert all(np.mean(results) > .8 for results in right.values()), {fact: np.mean(results) for fact, results in right.items()}


# --- CLIP

def test_patches_are_of_the_thing_that_covers_them():
    scene = Scene("ball", "red", 1, "snow", "standing", layout=3)
    (_, (left, top, right, bottom)), = scene_boxes(scene)
    covered = (patch_things(scene) == THINGS.index("ball")).nonzero()*SIZE/GRID + SIZE/GRID/2  # middles: y, x
    assert len(covered) >= 4
    assert (covered > torch.tensor([top, left]) - 8).all() and (covered < torch.tensor([bottom, right]) + 8).all()


@pytest.mark.numerics
def test_heads_that_know_the_answers_have_no_loss():
    scene, heads = Scene("ball", "red", 1, "snow", "standing", layout=3), FactHeads(new_clip(800))
    facts, things = torch.tensor([_fact_indices(scene)]), patch_things(scene)[None]
    nothing, embedding, patches = things*0, torch.zeros(1, 128), torch.zeros(1, GRID*GRID, 128)
    with torch.no_grad():
        heads.facts.bias.copy_(40.*torch.cat([F.one_hot(fact, len(values)) for fact, values in zip(facts[0], FACTS.values())]))
        heads.patches.bias.zero_()[[0, len(THINGS)]] = 40.  # nothing, no color
        wrong = torch.cat([(facts[:, :1] + 1) % len(KINDS), facts[:, 1:]], 1)
        assert heads.loss(embedding, patches, facts, nothing) < 1e-4 < 1 < heads.loss(embedding, patches, facts, things)  # there is a ball
        assert heads.loss(embedding, patches, wrong, nothing).item() == pytest.approx(40/7, abs=1e-3)


def test_patch_tokens_are_collected_and_the_hook_is_removed():
    model = new_clip(800)
    with _patch_tokens(model) as patches: model.encode_image(torch.zeros(2, 3, 64, 64))
    assert patches[0].shape == (2, GRID*GRID, 128) and not model.visual.transformer._forward_hooks


def test_saved_clip_is_the_same_in_half_precision(bpe, drawn, tmp_path):
    model = new_clip(len(bpe)).eval()
    save_clip(model, tmp_path/"clip.safetensors")
    rebuilt = load_clip(tmp_path/"clip.safetensors")
    model.load_state_dict({k: v.half().float() if v.is_floating_point() else v for k, v in model.state_dict().items()})
    assert same_weights(rebuilt, model) and not rebuilt.training
    images, texts = preprocess_scenes(drawn[0][:4]).float(), caption_tokens(bpe, ["A dog .", "Two cats run ."])
    with torch.no_grad():
        assert torch.equal(rebuilt.encode_image(images), model.encode_image(images))
        assert torch.equal(rebuilt.encode_text(texts), model.encode_text(texts))


def test_a_probe_separates_what_is_separable():
    shift = torch.tensor([6.]*50 + [-6.]*50)[:, None]
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)) + shift
    assert linear_probe(x, ["a"]*50 + ["b"]*50)(x) == ["a"]*50 + ["b"]*50


@pytest.mark.slow
def test_shipped_clip_holds_every_fact(clip_mini):
    found = probe_facts(clip_mini[0], random_scenes(2000, "probe"), {"seen": random_scenes(400, "probe test")})
    assert (found["seen"] > found["most common"] + .1).all(), found


@pytest.mark.parametrize("unseen", [False, True])
def test_shipped_clip_finds_captions(clip_mini, tokenizer, unseen):
    scenes = random_scenes(100, "probe test", unseen)
    ranks = retrieval_ranks(clip_mini[0], tokenizer, scenes, [write_caption(s, random.Random(i)) for i, s in enumerate(scenes)])
    assert (ranks < 5).float().mean() > .3
