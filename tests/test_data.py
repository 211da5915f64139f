"""CLIP, the embedding cache, the data set and the first stage (clipcap.data)."""
import argparse
import copy
import functools
import inspect
import json
import pickle
import random
import re
import shutil
import threading
import urllib.request
import zipfile
from hashlib import md5
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from clip.clip import _transform
from clip.model import CLIP, LayerNorm, ResidualAttentionBlock
from data_files import photo_bytes, tar_bytes, write
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from clipcap import data as module
from clipcap.core import ENCODERS, Config, Run, make_config, open_run
from clipcap.data import (FLICKR8K, Data, FlickrDataset, _encoder, _raise_unusable, cache_folder, data_folder, download_flickr8k, embed_photos,
                          encode_images, load_clip, load_data, prepare_data, show_photos)
from clipcap.formats.embeddings import Embeddings, write_embeddings
from clipcap.formats.photos import read_photo
from clipcap.formats.readers import SPLITS, find_layout, find_source, official_split, read_captions, read_table
from clipcap.formats.tokenizer import encode_captions
from clipcap.networks.packing import has_bf16
from clipcap.runs.files import asset_path

TEXT = dict(context_length=8, vocab_size=20, transformer_width=64, transformer_heads=1, transformer_layers=1)


encode_grid = functools.partial(encode_images, features="grid")


def random_vit(): return CLIP(32, 64, vision_layers=2, vision_width=64, vision_patch_size=32, **TEXT).eval()


# --- CLIP

def test_clip_is_frozen_float32_and_known_by_its_weights(clip_mini, monkeypatch):
    model, preprocess, encoder = clip_mini
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert load_clip("mini")[2] == encoder
    monkeypatch.setattr("clip.clip._download", lambda *_: asset_path("mini/clip.safetensors"))
    assert load_clip("ViT-B/32")[2] == encoder.replace("mini", "ViT-B/32")


def test_unknown_clip_is_named():
    with pytest.raises(ValueError, match="clip_model='ViT-Z/9' is neither a file nor one of \\['RN50'"): load_clip("ViT-Z/9")


@pytest.mark.numerics
def test_grid_is_made_of_the_models_own_pieces(clip_mini):
    model, pictures = clip_mini[0], torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    visual = model.visual
    with torch.no_grad():
        patches = visual.conv1(pictures).flatten(2).transpose(1, 2)  # (B, T, width)
        tokens = torch.cat([visual.class_embedding.expand(2, 1, -1), patches], 1) + visual.positional_embedding
        tokens = visual.transformer(visual.ln_pre(tokens).transpose(0, 1)).transpose(0, 1)
        tokens = visual.ln_post(tokens) @ visual.proj
    torch.testing.assert_close(encode_images(model, pictures), tokens[:, 0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(encode_grid(model, pictures), tokens[:, 1:], rtol=1e-3, atol=1e-3)
    assert not visual.transformer._forward_hooks


@pytest.mark.numerics
def test_half_precision_state_dict_loads_as_float32(tmp_path):
    vit = random_vit()
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in own(vit).items()}, tmp_path/"vit.pt")
    loaded, preprocess, name = load_clip(str(tmp_path/"vit.pt"))
    assert name.startswith("vit.pt@") and preprocess(Image.new("L", (90, 50))).shape == (3, 64, 64)
    vit.load_state_dict({k: v.half().float() for k, v in vit.state_dict().items()})
    picture = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encode_images(loaded, picture), vit.encode_image(picture).detach(), rtol=1e-2, atol=1e-2)
    assert encode_grid(loaded, picture).shape == (2, 4, 32)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_pixels_are_not_encoded_as_they_are(clip_mini, dtype):
    for encode in (encode_images, encode_grid):
        with pytest.raises(ValueError, match=f"images hold {dtype}: encode what CLIP's preprocess returns"): encode(clip_mini[0], torch.ones(1, 3, 64, 64, dtype=dtype))


def test_file_that_is_no_clip_is_named(tmp_path):
    torch.save({"something": torch.zeros(2)}, tmp_path/"else.pt")
    with pytest.raises(ValueError, match="else.pt' is not a CLIP that can be read: .*has no entry 'visual.conv1.weight', but 'something'"): load_clip(str(tmp_path/"else.pt"))


# --- CLIP's files: what saved them, and with which activation

def own(vit): return {**vit.state_dict(), "input_resolution": torch.tensor(64), "context_length": torch.tensor(8), "vocab_size": torch.tensor(20)}  # as OpenAI's


def prefixed(state, prefix): return {prefix + key: value for key, value in state.items()}


@torch.no_grad()
def assert_same_clip(loaded, vit):
    "In float64, so that a rounding of the weights would show."
    loaded, vit, draw = copy.deepcopy(loaded).double(), copy.deepcopy(vit).double(), torch.Generator().manual_seed(0)
    pictures, words = torch.randn(2, 3, 64, 64, generator=draw).double(), torch.randint(1, 20, (3, 8), generator=draw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerNorm, "forward", torch.nn.LayerNorm.forward)  # CLIP's own computes in float32
        torch.testing.assert_close(loaded.encode_image(pictures), vit.encode_image(pictures), rtol=0, atol=1e-12)
        torch.testing.assert_close(loaded.encode_text(words), vit.encode_text(words), rtol=0, atol=1e-12)


def with_gelu(vit, heads=None):
    "The model as open_clip builds it."
    for module in vit.modules():
        if isinstance(module, ResidualAttentionBlock): module.mlp.gelu = torch.nn.GELU()
    for block in vit.visual.transformer.resblocks if heads else (): block.attn.num_heads, block.attn.head_dim = heads, 64//heads
    return vit


OPEN_CLIP = {"embed_dim": 32, "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 32},
             "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 64, "heads": 1, "layers": 1}}


def open_clip(folder, state, beside="open_clip_config.json", vision=(), text=(), preprocess=None, **changes):
    "A state dict as open_clip saves it, and the configuration beside it."
    torch.save(state, folder/"open.pt")
    config = {**OPEN_CLIP, "vision_cfg": {**OPEN_CLIP["vision_cfg"], **dict(vision)}, "text_cfg": {**OPEN_CLIP["text_cfg"], **dict(text)}, **changes}
    if beside == "open_clip_config.json": config = {"model_cfg": config, "preprocess_cfg": preprocess or {}}
    if beside: (folder/beside).write_text(json.dumps(config))
    return str(folder/"open.pt")


WRAPPERS = {
    "state_dict": lambda s: {"epoch": 3, "name": "run", "state_dict": s, "optimizer": {"state": {0: {"step": torch.ones(())}}, "param_groups": [{"lr": 1e-3}]}},
    "model": lambda s: {"model": s, "args": {"lr": 0.1}}, "module": lambda s: prefixed(s, "module."), "compiled": lambda s: prefixed(s, "_orig_mod."),
    "clip": lambda s: prefixed(s, "clip_model."), "inner": lambda s: {"model": {"weights": s}, "epoch": 1}}


@pytest.mark.parametrize("how", WRAPPERS)
def test_a_clip_inside_a_checkpoint_is_found(tmp_path, how):
    vit = random_vit()
    torch.save(WRAPPERS[how](own(vit)), tmp_path/"vit.pt")
    assert_same_clip(load_clip(str(tmp_path/"vit.pt"))[0], vit)


def test_a_clip_inside_any_wrappers_is_found(tmp_path):
    draw, vit = random.Random(0), random_vit()
    for _ in range(8):
        state = own(vit)
        for how in draw.choices([*WRAPPERS], k=draw.randint(1, 4)): state = WRAPPERS[how](state)
        torch.save(state, tmp_path/"vit.pt")
        assert_same_clip(load_clip(str(tmp_path/"vit.pt"))[0], vit)


@pytest.mark.parametrize("change, text", [
    (lambda s: {"model": s, "ema": s}, "holds several CLIPs: under 'model', under 'ema'; save one of them alone"),
    (lambda s: {**prefixed(s, "student."), **prefixed(s, "teacher.")}, "holds several CLIPs: 'student.…', 'teacher.…'"),
    (lambda s: {**prefixed(s, "clip."), "decoder.weight": torch.ones(2)}, "beside the CLIP 'clip.…' it holds 'decoder.weight'"),
    (lambda s: {"vision_model.embeddings.class_embedding": torch.ones(2)}, "has no entry 'visual.conv1.weight', but 'vision_model.embeddings.class_embedding'"),
    (lambda s: {k: v for k, v in s.items() if k != "text_projection"}, "has no entry 'text_projection'"),
    (lambda s: {k: v for k, v in s.items() if k != "visual.proj"}, "has no entry 'visual.layer1.0.conv1.weight'"),
    (lambda s: {**s, "text.ln_final.weight": torch.ones(2)}, "vit.pt: Unexpected key(s) in state_dict: \"text.ln_final.weight\""),
    (lambda s: {**s, "ln_final.bias": torch.ones(2)}, "vit.pt: size mismatch for ln_final.bias"),
    (lambda s: [1, 2], "holds a list"),
])
def test_what_a_clip_file_lacks_is_named(tmp_path, change, text):
    torch.save(change(own(random_vit())), tmp_path/"vit.pt")
    with pytest.raises(ValueError, match=re.escape(text)) as error: load_clip(str(tmp_path/"vit.pt"))
    assert "vit.pt" in str(error.value)


@pytest.mark.parametrize("write", [
    lambda path: torch.save(random_vit(), path), lambda path: torch.save(random_vit(), path, _use_new_zipfile_serialization=False),
    lambda path: path.write_bytes(b"text"), lambda path: path.write_bytes(b""), lambda path: path.write_bytes(pickle.dumps({"a": np.ones(2)})),
    lambda path: torch.save({"state_dict": own(random_vit()), "args": argparse.Namespace(lr=1)}, path),
    lambda path: (torch.save(own(random_vit()), path), path.write_bytes(path.read_bytes()[:-3000]))], ids=["model", "old", "text", "empty", "arrays", "args", "cut"])
def test_a_file_that_would_run_code_or_is_damaged_gets_no_advice_of_torch(tmp_path, write):
    write(tmp_path/"vit.pt")
    with pytest.raises(ValueError, match="vit.pt") as error: load_clip(str(tmp_path/"vit.pt"))
    assert "weights_only" not in str(error.value) and "torch.save(model.state_dict(), FILE)" in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("beside", ["open_clip_config.json", "open.json"])
@pytest.mark.parametrize("quick", [None, False, True])
def test_open_clips_configuration_decides_the_activation(tmp_path, quick, beside):
    vit = random_vit() if quick else with_gelu(random_vit())
    path = open_clip(tmp_path, WRAPPERS["state_dict"](prefixed({**vit.state_dict(), "logit_bias": torch.ones(())}, "module.")), beside, **({} if quick is None else {"quick_gelu": quick}))
    assert_same_clip(load_clip(path)[0], vit)


def test_safetensors_and_archives_need_the_configuration_too(tmp_path):
    vit = with_gelu(random_vit())
    path = open_clip(tmp_path, vit.state_dict())
    save_file(vit.state_dict(), tmp_path/"open.safetensors")
    torch.jit.trace(vit, (torch.zeros(1, 3, 64, 64), torch.zeros(1, 8, dtype=torch.long)), check_trace=False).save(str(tmp_path/"archive.pt"))
    for name in ("open.safetensors", "archive.pt"):
        assert load_clip(str(tmp_path/name))[2].split("@")[1] == load_clip(path)[2].split("@")[1]
        assert_same_clip(load_clip(str(tmp_path/name))[0], vit)


def test_a_state_dict_that_does_not_say_its_activation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="open.pt.* does not say .*QuickGELU.*open_clip_config.json"): load_clip(open_clip(tmp_path, random_vit().state_dict(), ""))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", ["GELU", "QuickGELU", "heads", "ResNet"])
def test_what_the_refusal_asks_for_is_enough(tmp_path, kind, suffix):
    "The configuration in the message, copied to where it says, loads the file."
    model = CLIP(32, 64, (1, 1, 1, 1), 16, None, **{**TEXT, "transformer_heads": 1}).eval() if kind == "ResNet" else random_vit()
    if kind in ("GELU", "heads"): model = with_gelu(model, **({"heads": 4} if kind == "heads" else {}))
    path = tmp_path/f"open.{suffix}"
    save_file(model.state_dict(), path) if suffix == "safetensors" else torch.save(model.state_dict(), path)
    with pytest.raises(ValueError) as error: load_clip(str(path))
    asked = re.search(r"write this into (\S+) beside it: (\{.*\}), with quick_gelu false for GELU", str(error.value))
    config = json.loads(asked[2])
    assert {*config["vision_cfg"]} >= {"image_size", "width", "head_width"} and config["text_cfg"] == {"width": 64, "layers": 1, "context_length": 8, "vocab_size": 20, "heads": 1}
    config["quick_gelu"] = kind in ("QuickGELU", "ResNet")
    if kind == "heads": config["vision_cfg"]["head_width"] = 16
    (tmp_path/asked[1]).write_text(json.dumps(config))
    assert_same_clip(load_clip(str(path))[0], model)
    for part, key in (("vision_cfg", "image_size"), ("text_cfg", "context_length"), ("text_cfg", "vocab_size")):
        (tmp_path/asked[1]).write_text(json.dumps({**config, part: {**config[part], key: 9}}))
        with pytest.raises(ValueError, match=f"{part}.{key} is 9, and the weights have"): load_clip(str(path))


def test_the_activation_is_part_of_the_encoders_name(tmp_path):
    vit = random_vit()
    names = [load_clip(open_clip(tmp_path, vit.state_dict(), quick_gelu=quick))[2] for quick in (True, False)]
    torch.save(own(vit), tmp_path/"open.pt")
    assert names[0] == load_clip(str(tmp_path/"open.pt"))[2] != names[1]


def test_heads_and_preprocess_are_those_of_the_configuration(tmp_path):
    vit, grey = with_gelu(random_vit(), heads=4), Image.new("RGB", (64, 64), (128, 128, 128))
    path = open_clip(tmp_path, vit.state_dict(), vision={"head_width": 16}, preprocess={"mean": [0.5]*3, "std": [0.25]*3, "interpolation": "bicubic"})
    loaded, preprocess, _ = load_clip(path)
    assert_same_clip(loaded, vit)
    torch.testing.assert_close(preprocess(grey), torch.full((3, 64, 64), (128/255 - 0.5)/0.25))


@pytest.mark.parametrize("changes, text", [
    (dict(vision={"width": 128}), "vision_cfg.width is 128, and the weights have 64"), (dict(embed_dim=512), "embed_dim is 512, and the weights have 32"),
    (dict(text={"layers": 12}), "text_cfg.layers is 12, and the weights have 1"), (dict(vision={"pool_type": "avg"}), "vision_cfg.pool_type"),
    (dict(vision={"timm_model_name": "vit"}), "vision_cfg.timm_model_name"), (dict(custom_text=True), "custom_text"), (dict(quick_gelu="yes"), "quick_gelu is 'yes'"),
    (dict(vision={"head_width": 48}), "vision_cfg.head_width is 48"), (dict(text={"heads": 7}), "text_cfg.heads is 7"), (dict(vision_cfg=None), "vision_cfg"),
    (dict(preprocess={"resize_mode": "squash"}), "preprocess_cfg.resize_mode is 'squash'"), (dict(preprocess={"mean": "none"}), "preprocess_cfg.mean is 'none'"),
])
def test_a_configuration_that_cannot_be_followed_is_refused(tmp_path, changes, text):
    state = random_vit().state_dict()
    if "vision_cfg" in changes: path = open_clip(tmp_path, state); (tmp_path/"open_clip_config.json").write_text("[]")
    else: path = open_clip(tmp_path, state, **changes)
    with pytest.raises(ValueError, match=re.escape(text)) as error: load_clip(path)
    assert "open_clip_config.json" in str(error.value)


def test_resnet_has_no_patches():
    resnet = CLIP(32, 64, (1, 1, 1, 1), 16, None, **TEXT)
    with pytest.raises(ValueError, match="this CLIP sees with a ModifiedResNet; choose a clip_model such as 'ViT-B/32'"): encode_grid(resnet, torch.randn(2, 3, 64, 64))


def test_without_a_connection_file_hash_and_place_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr(urllib.request, "_opener", None)
    text = "Without a connection: put ViT-B-32.pt \\(SHA-256 40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af\\) in ~/.cache/clip"
    with pytest.raises(OSError, match=text): load_clip("ViT-B/32")


def test_a_new_encoder_is_one_line(monkeypatch, tmp_path, outputs, scenes, scene_captions):
    class Sums(torch.nn.Module):
        "Encodes a photo by the mean of each color."
        def __init__(self): super().__init__(); self.weight = torch.nn.Parameter(torch.ones(3))
        def encode_image(self, images): return images.mean((2, 3))*self.weight
    monkeypatch.setitem(ENCODERS, "sums", lambda: (Sums(), load_clip("mini")[1]))
    root, names = photo_folder(tmp_path, scenes, scene_captions, 20)
    entry, data = run_stage("sums", root, clip_model="sums")
    assert entry["encoder"].startswith("sums@") and entry["embedding_dim"] == 3 and set(data.embeddings.names) == set(names)


# --- the cache

@pytest.fixture
def counted(clip_mini):
    "A function that encodes images, and the sizes of the batches it was given."
    sizes = []
    def encode(images): sizes.append(len(images)); return encode_images(clip_mini[0], images)
    return encode, sizes


def copied(scenes, scene_captions, folder, number=20):
    "Copies of some scenes, and their names."
    folder.mkdir(parents=True)
    names = sorted(scene_captions.image.unique())[:number]
    for name in names: shutil.copy(scenes.photos/name, folder/name)
    return folder, names


@pytest.mark.numerics
def test_stopped_encoding_goes_on_with_the_rest(outputs, scenes, scene_captions, clip_mini, counted):
    model, preprocess, _ = clip_mini
    names, (encode, sizes) = sorted(scene_captions.image.unique())[:20], counted
    def interrupted(images):
        if sum(sizes) + len(images) == 20: sizes.append(4); raise KeyboardInterrupt  # Ctrl-C when the last batch comes
        return encode(images)
    def embed(encode): return embed_photos(scenes.photos, names, encode, preprocess, "test", batch_size=4, shard_size=8)
    with pytest.raises(KeyboardInterrupt): embed(interrupted)
    assert sizes == [4]*5
    folder, bad = embed(encode)
    assert (sizes[5:], bad) == ([4], {})  # 16 of the 20 were there
    assert embed(encode) == (folder, {}) and sizes[6:] == []
    alone = torch.cat([model.encode_image(preprocess(Image.open(scenes.photos/n).convert("RGB"))[None]) for n in names]).detach()
    torch.testing.assert_close(Embeddings(folder).stack(names), alone, rtol=1e-3, atol=1e-3)


def test_one_more_photo_is_one_more_encoding(outputs, scenes, scene_captions, tmp_path, clip_mini, counted):
    (encode, sizes), (photos, names) = counted, copied(scenes, scene_captions, tmp_path/"photos")
    def embed(names, encoder="one"): return embed_photos(photos, names, encode, clip_mini[1], encoder, batch_size=4, shard_size=8)[0]
    before = Embeddings(embed(names)).stack(names); sizes.clear()
    shutil.copy(scenes.photos/names[0], photos/"000 first.png")
    folder = embed(["000 first.png", *names])  # before all others: every shard has other photos than before
    assert sizes == [1] and Embeddings(folder).names == ["000 first.png", *names] and Embeddings(folder).stack(names).equal(before)
    embed(names[3:]); embed(sorted(names, reverse=True))
    assert sizes == [1]
    shutil.copy(scenes.photos/names[1], photos/names[9])
    assert Embeddings(embed(names)).stack([names[9]]).equal(Embeddings(embed(names[:10]))[names[9]][None]) and sizes == [1, 1]  # a replaced photo
    embed(names, "another")
    assert sum(sizes) == 22 and sizes[:2] == [1, 1]


def test_no_photo_is_encoded_twice_whatever_the_lists(outputs, tmp_path):
    draw, seen, calls = random.Random(0), set(), []
    pixels = {f"{n}.png": n for n in range(12)}
    for name, n in pixels.items(): Image.new("L", (2, 2), 10*n).save(tmp_path/name)
    def preprocess(photo): return torch.tensor([float(photo.getpixel((0, 0))[0])])
    def encode(images): calls.append(len(images)); return images.repeat(1, 3)
    for _ in range(20):
        names = draw.sample([*pixels], draw.randint(1, 12))
        folder, bad = embed_photos(tmp_path, names, encode, preprocess, "e", batch_size=2, shard_size=draw.randint(1, 5))
        seen |= {*names}
        assert not bad and sum(calls) == len(seen) and Embeddings(folder).stack(names)[:, 0].tolist() == [10.*pixels[n] for n in names]


def test_a_cache_of_an_earlier_version_is_used(outputs, scenes, scene_captions, tmp_path, clip_mini, counted):
    (encode, sizes), (photos, names) = counted, copied(scenes, scene_captions, tmp_path/"photos", 8)
    stamps = json.dumps([module.as_photos(photos).stamp(n) for n in names])
    write_embeddings(cache_folder("old", clip_mini[1], photos, names)/"000000000.safetensors", names, torch.ones(8, 3), "old", stamps=stamps, bad="{}")
    folder, _ = embed_photos(photos, names, encode, clip_mini[1], "old")
    assert sizes == [] and Embeddings(folder).stack(names).equal(torch.ones(8, 3))


def test_replaced_photo_is_encoded_again_and_bad_ones_are_named(outputs, scenes, scene_captions, tmp_path, clip_mini, counted):
    (encode, sizes), (photos, names) = counted, copied(scenes, scene_captions, tmp_path/"photos")
    def embed(): return embed_photos(photos, names, encode, clip_mini[1], "other", batch_size=4, shard_size=8)
    embed(); sizes.clear()
    shutil.copy(scenes.photos/names[0], photos/names[9])
    folder, bad = embed()
    assert (sizes, bad) == ([1], {})  # no other of its shard
    torch.testing.assert_close(Embeddings(folder)[names[9]], Embeddings(folder)[names[0]], rtol=1e-3, atol=1e-3)
    (photos/names[2]).write_bytes(b"damaged")
    (photos/names[3]).unlink()
    folder, bad = embed()
    assert list(bad) == [names[2], names[3]] and "can't be read as a photo" in bad[names[2]] and bad[names[3]] == "missing"
    assert Embeddings(folder).names == [n for n in names if n not in bad]
    for name in names: (photos/name).unlink(missing_ok=True)
    assert len(embed()[1]) == 20  # a folder in which no photo can be read still gives its list


def test_cache_belongs_to_encoder_preprocess_photos_and_names(scenes, scene_captions, outputs):
    names, (_, preprocess, _) = sorted(scene_captions.image.unique())[:5], load_clip("mini")
    key = cache_folder("a@1", preprocess, scenes.photos, names)
    assert cache_folder("a@1", load_clip("mini")[1], scenes.photos, names) == key
    others = {cache_folder("a@2", preprocess, scenes.photos, names), cache_folder("a@1", preprocess, scenes.photos, names[1:]),
              cache_folder("a@1", preprocess, scenes.photos.parent, names), cache_folder("a@1", print, scenes.photos, names),
              cache_folder("a@1", preprocess, scenes.photos, names, torch.bfloat16)}
    assert len({key, *others}) == 6


def test_errors_of_preprocessing_are_raised(outputs, scenes, scene_captions):
    "Only a photo that can't be read is left out."
    def preprocess(photo): raise ZeroDivisionError("a fault of the code")
    with pytest.raises(ZeroDivisionError, match="a fault of the code"): embed_photos(scenes.photos, sorted(scene_captions.image.unique())[:3], len, preprocess, "e")


def test_clip_in_bfloat16_gives_nearly_the_same_embeddings(scenes, monkeypatch):
    "At the size of ViT-B/32, with random weights."
    if not has_bf16("cpu"): pytest.skip("no hardware for bfloat16")
    torch.manual_seed(0)
    wide = CLIP(512, 224, vision_layers=12, vision_width=768, vision_patch_size=32, **TEXT)
    monkeypatch.setitem(ENCODERS, "wide", lambda: (wide, _transform(224)))
    photos, rows = sorted(scenes.photos.iterdir())[:8], {}
    for precision in ("auto", "float32"):
        encode, preprocess, name, dtype = _encoder(make_config("flickr8k", clip_model="wide", device="cpu", precision=precision))
        rows[dtype] = encode(torch.stack([preprocess(read_photo(photo)) for photo in photos]))
    assert rows[torch.float32].dtype == rows[torch.bfloat16].dtype == torch.float32 and name.startswith("wide@")
    assert 0.9995 <= torch.cosine_similarity(*rows.values()).min() < 1


# --- the data set

TABLE = pd.DataFrame({"image": list("bbbaa"), "caption": ["a red dog", "one dog", "a dog runs here", "two cats", "cats"]})


@pytest.fixture
def store(tmp_path):
    write_embeddings(tmp_path/"x.safetensors", ["a", "b"], torch.arange(8.).view(2, 4), "test")
    return Embeddings(tmp_path/"x.safetensors")


def test_one_caption_is_drawn_per_image_and_epoch(store, tokenizer):
    dataset = FlickrDataset(TABLE, store, tokenizer)
    assert (len(dataset), dataset.images, dataset.references["a"]) == (2, ["a", "b"], ["two cats", "cats"])
    assert torch.equal(dataset[1]["embedding"], store["b"])
    drawn = {}
    for epoch in range(30):
        dataset.set_epoch(epoch)
        drawn[epoch] = dataset[1]["caption"]
    assert set(drawn.values()) == set(dataset.references["b"])
    dataset.set_epoch(7)
    assert dataset[1]["caption"] == drawn[7]


def test_a_batch_has_each_image_once_and_pads_its_captions(store, tokenizer):
    dataset = FlickrDataset(TABLE, store, tokenizer, caption_sampling="all")
    assert [dataset[i]["caption"] for i in range(5)] == ["two cats", "cats", "a red dog", "one dog", "a dog runs here"]
    batch = dataset.collate([dataset[i] for i in range(5)])
    lengths = [len(ids) for ids in encode_captions(tokenizer, [dataset[i]["caption"] for i in range(5)])]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["input_ids"][batch["attention_mask"] == 0].unique().tolist() == [tokenizer.pad_token_id]
    assert (tuple(batch["embedding"].shape), batch["image_of"].tolist()) == ((2, 4), [0, 0, 1, 1, 1])
    assert torch.equal(batch["embedding"][batch["image_of"][4]], store["b"])


@pytest.mark.parametrize("sampling", ["random", "all"])
def test_items_count_from_the_end_as_those_of_a_list(store, tokenizer, sampling):
    dataset = FlickrDataset(TABLE, store, tokenizer, caption_sampling=sampling)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        for item in range(1, len(dataset) + 1):
            back, forth = dataset[-item], dataset[len(dataset) - item]
            assert back["caption"] == forth["caption"] and torch.equal(back["input_ids"], forth["input_ids"])
    for item in (len(dataset), -len(dataset) - 1, 10**9):
        with pytest.raises(IndexError): dataset[item]
    for item in (np.int64(1), torch.tensor(1)): assert dataset[item]["caption"] == dataset[1]["caption"]


@pytest.mark.parametrize("sampling", ["al", "", None, "ALL"])
def test_unknown_way_of_sampling_captions_is_named(store, tokenizer, sampling):
    with pytest.raises(ValueError, match=f"caption_sampling={sampling!r} is unknown; choose one of \\('random', 'all'\\)"):
        FlickrDataset(TABLE, store, tokenizer, caption_sampling=sampling)


def test_caption_without_embedding_is_named(store, tokenizer):
    with pytest.raises(ValueError, match="1 images have captions but no embedding in .*x.safetensors: z"): FlickrDataset(TABLE.assign(image="z"), store, tokenizer)


@pytest.mark.parametrize("function", [FlickrDataset, encode_captions])
def test_defaults_are_the_reference_recipe(function):
    for name, parameter in inspect.signature(function).parameters.items():
        if hasattr(Config, name) and parameter.default is not parameter.empty: assert parameter.default == getattr(Config, name), name


# --- download

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


def real_archives(folder, scenes, captions, images):
    "Flickr8k's two archives in small: names as published, and the litter of the real ones."
    token = "".join(f"{n}#{k}\t{c}\n" for n in images for k, c in enumerate(captions[captions.image == n].caption))
    lists = zip(SPLITS.values(), (images[:2], images[2:3], images[3:]))
    with zipfile.ZipFile(folder/"Flickr8k_text.zip", "w") as file:
        for name, text in [("Flickr8k.token.txt", token), *((n, "\n".join(i)) for n, i in lists)]: file.writestr(name, text)
    with zipfile.ZipFile(folder/"Flickr8k_Dataset.zip", "w") as file:
        for n in images: file.write(scenes.photos/n, f"Flicker8k_Dataset/{n}")
        file.writestr("__MACOSX/Flicker8k_Dataset/._litter", b"")
    return {name: f"md5:{md5((folder/name).read_bytes()).hexdigest()}" for name in FLICKR8K}


def test_flickr8k_is_downloaded_once_or_taken_from_archives_put_there(tmp_path, scenes, scene_captions):
    source, target, images = tmp_path/"source", tmp_path/"target", sorted(set(scene_captions.image))[:4]
    source.mkdir()
    archives = real_archives(source, scenes, scene_captions, images)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(source)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    get = functools.partial(download_flickr8k, base_url=f"http://127.0.0.1:{server.server_port}", archives=archives, timeout=1, attempts=1)
    get(target/"text", photos=False)
    assert [p.name for p in (target/"text").iterdir() if p.is_dir()] == ["Flickr8k_text"]
    get(target/"all")
    got = find_layout(target/"all")
    assert sorted(p.name for p in got.photos.iterdir()) == images == sorted(set(read_captions(got.captions).image))
    assert official_split(got.text)[images[3]] == "test"
    server.shutdown(); server.server_close()
    get(target/"all"); get(scenes.root)  # what is there is not fetched
    with pytest.raises(OSError, match=f"get Flickr8k_text.zip by other means \\(md5 {archives['Flickr8k_text.zip'][4:]}\\), put it in {target}/none"):
        get(target/"none")
    shutil.copytree(source, target/"hand")
    get(target/"hand")
    assert find_layout(target/"hand").photos.is_dir()


def test_only_the_presets_own_folder_is_downloaded_into(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "download_flickr8k", lambda root, photos: asked.append(photos))
    for config in (Config(), Config(embeddings="given.safetensors"), Config(data_root="elsewhere")): data_folder(config)
    assert asked == [True, False]  # photos only where embeddings are not given


# --- the stage

def photo_folder(folder, scenes, scene_captions, number=24):
    "A data set of some scenes: folder, names."
    photos, names = copied(scenes, scene_captions, folder/"data/Images", number)
    scene_captions[scene_captions.image.isin(names)].to_csv(photos.parent/"captions.txt", index=False)
    return photos.parent, names


def run_stage(name, root, **changes):
    "What the stage records and leaves."
    run, config = open_run(name, "mini", data_root=str(root), **{"split": "random", **changes})
    with run.stage("01_data", config) as notes: notes.update(prepare_data(run, config))
    return run.stage_entry("01_data"), load_data(run, config)


def test_missing_and_damaged_photos_stop_the_stage_or_are_left_out(outputs, tmp_path, scenes, scene_captions):
    root, names = photo_folder(tmp_path, scenes, scene_captions)
    (root/"Images"/names[0]).unlink()
    for text in (f"{names[0]}: missing", "on_bad_image='skip'"):
        with pytest.raises(OSError, match=text): run_stage("bad", root)
    shutil.copy(scenes.photos/names[0], root/"Images"/names[0])
    (root/"Images"/names[5]).write_bytes((scenes.photos/names[5]).read_bytes()[:300])
    with pytest.raises(OSError, match=f"{names[5]} can't be read as a photo"): run_stage("bad", root)
    entry, data = run_stage("bad", root, on_bad_image="skip")
    assert list(entry["bad_images"]) == [names[5]] and sum(entry["images"].values()) == 23 and names[5] not in data.embeddings


def test_subsets_of_images_whose_names_are_numbers_or_NA(outputs, tmp_path):
    names = ["007", "NA", *(f"{k:03d}" for k in range(20))]
    (tmp_path/"captions.txt").write_text("image,caption\n" + "".join(f"{name},A dog\n" for name in sorted({*names})))
    (tmp_path/"subsets.csv").write_text("image,subset\n007,seen\nNA,unseen\n")
    write_embeddings(tmp_path/"e.safetensors", sorted({*names}), torch.zeros(len({*names}), 7), "other")
    _, data = run_stage("subsets", tmp_path, embeddings=str(tmp_path/"e.safetensors"))
    assert data.captions.set_index("image").subset[["007", "NA", "001"]].tolist() == ["seen", "unseen", ""]


def test_long_list_of_bad_photos_is_cut(outputs, tmp_path):
    with pytest.raises(OSError, match="  … and 25 more"): _raise_unusable({f"{k}.jpg": "missing" for k in range(45)}, tmp_path, open_run("bad")[0])


def test_spreadsheets_see_no_formula(outputs, tmp_path):
    run, _ = open_run("bad")
    with pytest.raises(OSError): _raise_unusable({"=1+1.jpg": "missing"}, tmp_path, run)
    assert "'=1+1.jpg" in (run.path/"bad_images.csv").read_text()


def test_given_embeddings_replace_clip(outputs, tmp_path, scenes, scene_captions, monkeypatch):
    root, names = photo_folder(tmp_path, scenes, scene_captions)
    given = tmp_path/"e.safetensors"
    write_embeddings(given, names[:12], torch.zeros(12, 7), "other")
    monkeypatch.setattr(module, "load_clip", None)
    entry, _ = run_stage("given", root, embeddings=str(given))
    assert (entry["without_embedding"], entry["embedding_dim"], entry["encoder"]) == (12, 7, "other")
    with pytest.raises(ValueError, match="e.safetensors has one vector per photo; give embeddings of shape \\(N, T, D\\)"):
        run_stage("given", root, embeddings=str(given), features="grid")
    write_embeddings(given, ["x.jpg"], torch.zeros(1, 7), "other")
    with pytest.raises(ValueError, match=f"their names must agree: '{names[0]}' there, 'x.jpg' here"): run_stage("names", root, embeddings=str(given))


@pytest.mark.numerics
def test_patches_are_kept_in_a_cache_of_their_own(outputs, tmp_path, scenes, scene_captions, clip_mini):
    root, names = photo_folder(tmp_path, scenes, scene_captions, 20)
    plain_entry, plain = run_stage("seen", root)
    entry, data = run_stage("seen", root, features="grid")
    assert (data.embeddings.tokens, data.embeddings.dim) == (64, plain.embeddings.dim) and entry["encoder"].endswith(" grid")
    live = encode_grid(clip_mini[0], clip_mini[1](read_photo(root/"Images"/names[0]))[None])[0]
    assert (data.embeddings[names[0]] - live).abs().max() < 1e-2*live.abs().max()  # kept in half precision
    assert {safe_open(p, "pt").get_slice("embeddings").get_dtype() for p in (outputs/entry["embeddings"]).glob("*")} == {"F16"}
    again, _ = run_stage("seen", root, features="embedding")
    assert (again["data_hash"], again["embeddings"]) == (plain_entry["data_hash"], plain_entry["embeddings"])


def test_splits_are_apart_and_what_was_read_stays(trained):
    data = load_data(*trained)
    parts = {part: set(data.split(part).image) for part in SPLITS}
    assert not (parts["train"] & parts["val"] or parts["train"] & parts["test"] or parts["val"] & parts["test"])
    assert set().union(*parts.values()) <= set(data.embeddings.names)
    with pytest.raises(AttributeError): data.photos = None
    assert data.photo(data.embeddings.names[0]) is not None and data.photo("none.jpg") is None


COCO = {"annotations/captions_train2014.json": {"images": [{"id": 7, "file_name": "7.jpg"}], "annotations": [{"image_id": 7, "caption": "A red square"}]},
        "annotations/captions_val2014.json": {"images": [{"id": 9, "file_name": "9.jpg"}], "annotations": [{"image_id": 9, "caption": "A red square"}]}}
SOURCES = {"folder": {"captions.txt": "image,caption\n7.jpg,A red square\n", "Images/7.jpg": photo_bytes(200)},
           "COCO's folders of a split each": {**COCO, "train2014/7.jpg": photo_bytes(200), "val2014/9.jpg": photo_bytes(90)},
           "tar": {"00000.tar": tar_bytes({"7.jpg": photo_bytes(200), "7.txt": b"A red square"})}}


@pytest.mark.parametrize("files", SOURCES.values(), ids=SOURCES)
def test_photo_of_any_source_is_read_and_captioned_in_one_way(tmp_path, files):
    from test_stream import varied_model

    from clipcap.model import generate_caption
    write(tmp_path, files)
    source, model = find_source(tmp_path), varied_model()
    data = Data(read_table(source), None, source.photos)
    photo = data.photo(name := min(data.captions.image))
    assert photo.size == (24, 16) and photo.getpixel((0, 0))[0] > 190 and data.photo("none.jpg") is None
    assert generate_caption(photo, model, 4, 1) == generate_caption(photo_bytes(200), model, 4, 1) and "7" in name


def test_missing_files_of_the_stage_are_named(trained_copy, tmp_path):
    run, config = trained_copy
    with pytest.raises(ValueError, match="load_data needs 01_data, which is not finished in run 'new'"): load_data(Run("new", tmp_path), config)
    (run.path/"captions_table.csv").unlink()
    with pytest.raises(FileNotFoundError, match="captions_table.csv is missing; make it again: papermill nbs/01_data.ipynb"): load_data(run, config)


def test_texts_of_a_page_of_photos_are_no_formulas():
    figure = show_photos(Data(None, None, None), ["a", "b"], ["$x_$ costs $5 and $_", r"$\frac{$"], "$_$ and $_")
    assert figure.axes[0].texts[0].get_text() == "$x_$ costs $5 and $_" and not figure.axes[0].texts[0].get_parse_math()
    figure.canvas.draw()
    plt.close(figure)


def test_a_page_of_photos_is_legible(tmp_path, trained):
    "Photos and their texts don't overlap, columns line up, and an absent photo is a light square."
    data = load_data(*trained)
    shapes = {"square.png": (90, 90), "wide.png": (300, 90), "tall.png": (90, 300), "photo.png": (500, 375)}
    for name, size in shapes.items(): Image.new("RGB", size).save(tmp_path/name)
    figure = show_photos(Data(data.captions, data.embeddings, tmp_path), [*shapes, "absent.jpg"], ["one line"]*2 + ["some words of a long caption "*4]*3, "Title")
    figure.canvas.draw()
    assert figure.get_size_inches()[0] == 4*3.2
    fields = [ax.get_window_extent() for ax in figure.axes]
    words = [text.get_window_extent() for ax in figure.axes for text in ax.texts]
    assert (len(fields), len(words)) == (8, 5)
    page, title = figure.bbox, figure._suptitle.get_window_extent()
    boxes = [*fields, *words, title]
    for box in boxes: assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
    for k, box in enumerate(boxes): assert not any(box.overlaps(other) for other in boxes[:k]), k
    assert all(max(box.width, box.height) > 0.9*page.width/4 for box in fields)
    for k, (photo, text) in enumerate(zip(fields, words)):
        assert abs(photo.x0 - fields[k % 4].x0) < 5 and abs(text.x0 - fields[k % 4].x0) < 5
        assert 0 < photo.y0 - text.y1 < 0.1*photo.height  # a caption is close to its photo
    assert title.y0 - max(box.y1 for box in fields) < 0.2*fields[0].height
    absent = np.asarray(figure.axes[4].images[0].get_array())
    assert absent.shape[0] == absent.shape[1] and absent.min() == absent.max() > 128
    assert {text.get_fontsize() for ax in figure.axes for text in ax.texts} == {12}
    plt.close(figure)
