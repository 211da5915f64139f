"""Image encoders by name (clipcap.networks.encoders): what they give is what their own library gives.

Models are tiny, with random weights; the expected values are of transformers and open_clip alone."""
import json
import logging
import math
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as library
from PIL import Image
from safetensors.torch import load_file, save_file

from clipcap.core import Run, make_config, open_run
from clipcap.data import cache_folder, encode_images, load_clip, load_data, prepare_data
from clipcap.networks.encoders import HUB_ENCODERS, absolute_encoder, as_encoder, encoder_place, library_encoder_is_here
from clipcap.networks.language_models import tiny_language_model

encode_grid = partial(encode_images, features="grid")
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
VISION = dict(SIZES, image_size=32, patch_size=8, num_channels=3)
DINO = {k: v for k, v in VISION.items() if k != "intermediate_size"}
SQUARE, CROP = {"height": 32, "width": 32}, {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}


def config_of(kind, vocabulary=99):
    "Configuration of a tiny encoder of transformers."
    text = dict(SIZES, vocab_size=vocabulary, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    return {"clip": lambda: library.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24),
            "metaclip_2": lambda: library.MetaClip2Config(text_config=text, vision_config=VISION, projection_dim=24),
            "clip_vision_model": lambda: library.CLIPVisionConfig(**VISION, projection_dim=24),
            "siglip": lambda: library.SiglipConfig(text_config=text | {"projection_size": 32}, vision_config=VISION),
            "siglip_vision_model": lambda: library.SiglipVisionConfig(**VISION),
            "dinov2": lambda: library.Dinov2Config(**DINO),
            "dinov2_with_registers": lambda: library.Dinov2WithRegistersConfig(**DINO, num_register_tokens=3),
            "dinov3_vit": lambda: library.DINOv3ViTConfig(**VISION, num_register_tokens=2)}[kind]()


def processor_of(kind):
    if "siglip" in kind: return library.SiglipImageProcessor(size=SQUARE)
    if kind == "dinov3_vit": return library.DINOv3ViTImageProcessor(size=SQUARE)
    return library.BitImageProcessor(**CROP) if "dino" in kind else library.CLIPImageProcessor(**CROP)


def write_hub(folder, kind, vocabulary=99, seed=0):
    "Save a tiny encoder of transformers with its image processor: its model."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(library, HUB_ENCODERS[kind][0])(config_of(kind, vocabulary)).eval()
        with torch.no_grad():
            for p in model.parameters(): p.add_(0.05*torch.randn_like(p))  # biases, class tokens and norms that begin at 0 or 1
    model.save_pretrained(folder)
    processor_of(kind).save_pretrained(folder)
    return model


OPEN_CLIP = {"embed_dim": 24, "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
             "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}


def write_open_clip(folder, vision=None, **changes):
    "Save a tiny encoder of open_clip: its model."
    open_clip = pytest.importorskip("open_clip")
    folder.mkdir(parents=True, exist_ok=True)
    settings = OPEN_CLIP | changes | {"vision_cfg": vision or OPEN_CLIP["vision_cfg"]}
    (folder/"open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": {"mean": [.5]*3, "std": [.4]*3, "resize_mode": "squash"}}))
    before = logging.root.level
    logging.disable(logging.WARNING)  # that there are no weights yet
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    logging.disable(before if before > logging.WARNING else logging.NOTSET)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder/"open_clip_model.safetensors")
    return model


@pytest.fixture(autouse=True)
def quiet():
    "transformers' reports of loading stay off the terminal."
    from transformers.utils import logging as reports
    before = reports.get_verbosity()
    reports.set_verbosity_error()
    yield
    reports.set_verbosity(before)


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    "A function: kind -> folder of a tiny encoder of transformers, and its model."
    made, root = {}, tmp_path_factory.mktemp("hub")
    def make(kind):
        if kind not in made: made[kind] = root/kind, write_hub(root/kind, kind)
        return made[kind]
    return make


def pictures():
    "Three photos of different sizes."
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((50, 70), (33, 32), (64, 40))]


# --- transformers

@pytest.mark.numerics
@torch.no_grad()
@pytest.mark.parametrize("kind", HUB_ENCODERS)
def test_embeddings_and_patches_are_those_of_transformers(kind, hub):
    folder, model = hub(kind)
    clip, preprocess, encoder = load_clip(f"hf:{folder}")
    pixels = library.AutoImageProcessor.from_pretrained(folder)(images=pictures(), return_tensors="pt")["pixel_values"]
    ours = torch.stack([preprocess(photo) for photo in pictures()])
    assert ours.equal(pixels) and ours.dtype == torch.float32
    seen = model.get_image_features(pixel_values=pixels) if hasattr(model, "get_image_features") else model(pixel_values=pixels)
    wanted = seen.image_embeds if kind == "clip_vision_model" else seen.pooler_output
    found = encode_images(clip, ours)
    assert (found - wanted).abs().max() < 1e-5 and found.shape == (3, clip.dim) and found.std() > 0.1
    patches = seen.last_hidden_state[:, -16:]  # 32 x 32 pixels in patches of 8 x 8
    if "clip" in kind: patches = model.visual_projection(model.vision_model.post_layernorm(patches))
    grid = encode_grid(clip, ours)
    assert (grid - patches).abs().max() < 1e-5 and grid.shape == (3, clip.tokens, clip.dim) == (3, 16, clip.dim)
    assert encoder.startswith(f"hf:{kind}@") and not any(p.requires_grad for p in clip.parameters()) and not clip.training


@pytest.mark.numerics
@torch.no_grad()
def test_a_clip_gives_the_same_in_openais_and_in_transformers_format(tmp_path, clip_mini):
    mini, preprocess, _ = clip_mini
    seeing, names = mini.visual, {"conv1": "embeddings.patch_embedding", "ln_pre": "pre_layrnorm", "ln_post": "post_layernorm", "ln_1": "layer_norm1",
                                  "ln_2": "layer_norm2", "out_proj": "out_proj", "c_fc": "mlp.fc1", "c_proj": "mlp.fc2"}
    width, layers = seeing.conv1.out_channels, seeing.transformer.layers
    state = {"visual_projection.weight": seeing.proj.T, "vision_model.embeddings.class_embedding": seeing.class_embedding,
             "vision_model.embeddings.position_embedding.weight": seeing.positional_embedding}
    for key, value in seeing.state_dict().items():
        *place, part, kind = f"_.{key}".split(".")
        layer = f"encoder.layers.{place[3]}." if "resblocks" in place else ""
        if part in names: state[f"vision_model.{layer}{'self_attn.' if part == 'out_proj' else ''}{names[part]}.{kind}"] = value
        elif kind.startswith("in_proj"):
            for name, third in zip("qkv", value.chunk(3)): state[f"vision_model.{layer}self_attn.{name}_proj.{kind.removeprefix('in_proj_')}"] = third
    config = library.CLIPVisionConfig(hidden_size=width, intermediate_size=4*width, num_hidden_layers=layers, num_attention_heads=width//64,
                                      image_size=seeing.input_resolution, patch_size=seeing.conv1.kernel_size[0], projection_dim=seeing.output_dim)
    model = library.CLIPVisionModelWithProjection(config)
    model.load_state_dict(state)
    model.save_pretrained(tmp_path/"mini")
    library.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(tmp_path/"mini")
    pixels, other = torch.stack([preprocess(photo) for photo in pictures()]), load_clip(f"hf:{tmp_path}/mini")[0]
    for encode in (encode_images, encode_grid): torch.testing.assert_close(encode(other, pixels), encode(mini, pixels), rtol=1e-4, atol=1e-4)
    from clipcap.attention import explain
    with torch.enable_grad(): ours, theirs = (explain(captioner_with(clip, preprocess), pixels[:1], ["a red circle"])[0].photo for clip in (other, mini))
    assert (ours - theirs).abs().max() < 1e-3*theirs.abs().max()
    assert (other.dim, other.tokens, other.before) == (as_encoder(mini).dim, as_encoder(mini).tokens, as_encoder(mini).before)


@pytest.mark.parametrize("kind", ["siglip", "dinov2"])
def test_an_encoder_is_known_by_its_weights_and_its_configuration_and_a_cache_by_its_preprocess(kind, tmp_path):
    write_hub(tmp_path/"a", kind)
    shutil.copytree(tmp_path/"a", tmp_path/"same/a")
    write_hub(tmp_path/"other/a", kind, seed=1)
    shutil.copytree(tmp_path/"a", tmp_path/"set/a")
    settings = json.loads((tmp_path/"set/a/config.json").read_text())
    settings.get("vision_config", settings)["hidden_act"] = "relu"
    (tmp_path/"set/a/config.json").write_text(json.dumps(settings | {"transformers_version": "9.9"}))
    names = [load_clip(f"hf:{tmp_path/place}")[2] for place in ("a", "same/a", "other/a", "set/a")]
    assert names[0] == names[1] and len({*names}) == 3 and all(name.startswith("hf:a@") for name in names)
    shutil.copytree(tmp_path/"a", tmp_path/"crop/a")
    wanted = json.loads((tmp_path/"crop/a/preprocessor_config.json").read_text())
    (tmp_path/"crop/a/preprocessor_config.json").write_text(json.dumps(wanted | {"image_mean": [0., 0., 0.]}))
    found = [load_clip(f"hf:{tmp_path/place}") for place in ("a", "same/a", "crop/a")]
    folders = [cache_folder(encoder, preprocess, tmp_path, ["x.jpg"]) for _, preprocess, encoder in found]
    assert found[0][2] == found[2][2] and folders[0] == folders[1] != folders[2]


@pytest.mark.parametrize("kind", ["siglip", "dinov2"])
def test_the_picture_that_an_encoder_sees_can_be_drawn(kind, hub):
    from clipcap.attention import crop_photo
    _, preprocess, _ = load_clip(f"hf:{hub(kind)[0]}")
    seen, processor = crop_photo(pictures()[0], preprocess), preprocess.processor
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (processor.image_mean, processor.image_std))
    pixels = (torch.from_numpy(np.array(seen)).permute(2, 0, 1)/255 - mean)/std
    assert seen.size == (32, 32) and (pixels - preprocess(pictures()[0])).abs().max() < 0.6/255/std.min()


def test_mini_is_known_by_the_hash_it_always_had(clip_mini):
    assert clip_mini[2] == "mini@7b470adb4d89f583"
    found = as_encoder(clip_mini[0])
    assert (found.encoder, found.preprocess, found.dim, found.tokens) == (clip_mini[2], clip_mini[1], clip_mini[0].visual.output_dim, 64)
    assert type(clip_mini[0]).__module__ == "clip.model"  # OpenAI's own object


@pytest.mark.parametrize("kind", ["clip", "siglip_vision_model", "dinov2"])
def test_parameters_of_an_encoder_are_counted(kind, hub):
    from clipcap.networks.parameters import parameter_table
    clip, preprocess, _ = load_clip(f"hf:{hub(kind)[0]}")
    table = parameter_table(captioner_with(clip, preprocess)).loc
    assert table["CLIP"].parameters >= table["CLIP: image encoder"].parameters > 10_000 and table["CLIP"].trained == 0


# --- texts

@pytest.mark.numerics
@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_texts_are_read_by_the_librarys_own_text_encoder(kind, tmp_path, tokenizer):
    from clipcap.scoring.clipscore import CLIP_PREFIX, clip_scores, text_encoder
    model = write_hub(tmp_path, kind, len(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    clip, preprocess, _ = load_clip(f"hf:{tmp_path}")
    texts = ["a red circle .", "a blue square is above a green circle "*9]
    own = library.AutoTokenizer.from_pretrained(tmp_path)([CLIP_PREFIX + t for t in texts], padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    wanted = torch.nn.functional.normalize(model.get_text_features(input_ids=own.input_ids, attention_mask=own.attention_mask).pooler_output, dim=1)
    found = text_encoder(clip, "x")(texts)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-5)
    images = encode_images(clip, torch.stack([preprocess(photo) for photo in pictures()[:2]]))
    scores = clip_scores(images, dict(zip("ab", texts)), {n: [t] for n, t in zip("ab", texts)}, text_encoder(clip, "x"))
    cosines = (wanted*torch.nn.functional.normalize(images, dim=1)).sum(1).clamp(min=0)
    assert scores["clipscore"].corpus == pytest.approx(2.5*cosines.mean().item(), abs=1e-5)


@pytest.mark.parametrize("kind, reason", [("dinov2", "sees photos and reads no texts"), ("clip", "has no tokenizer beside its weights"), ("siglip", "has no tokenizer")])
def test_clipscore_is_missing_with_the_reason_where_texts_cannot_be_read(kind, reason, hub, tmp_path):
    from clipcap.data import Data
    from clipcap.evaluate import score_split
    from clipcap.formats.embeddings import Embeddings, write_embeddings
    from clipcap.scoring.clipscore import text_encoder
    clip, _, encoder = load_clip(f"hf:{hub(kind)[0]}")
    write_embeddings(tmp_path/"e.safetensors", ["a"], torch.ones(1, clip.dim), encoder)
    data = Data(pd.DataFrame([("a", "a dog", "test")], columns=["image", "caption", "split"]), Embeddings(tmp_path/"e.safetensors"), None)
    with pytest.warns(UserWarning, match="clipscore"): scores = score_split({"a": "a dog"}, data, "test", text_encoder(clip, "x"), ["clipscore", "bleu_1"])
    assert reason in scores.unavailable["clipscore"] and "hf:" in scores.unavailable["clipscore"]
    assert math.isnan(scores.corpus["clipscore"]) and scores.corpus["bleu_1"] == pytest.approx(1)


# --- what is wrong is named

def no_config(folder): (folder/"config.json").unlink()
def no_weights(folder): (folder/"model.safetensors").unlink()
def no_processor(folder): (folder/"preprocessor_config.json").unlink()
def other_kind(folder): (folder/"config.json").write_text(json.dumps({"model_type": "gpt2"}))
def naflex(folder): (folder/"config.json").write_text(json.dumps({"model_type": "siglip2"}))


def a_tensor_less(folder):
    state = load_file(folder/"model.safetensors")
    save_file({key: value for key, value in state.items() if "fc1.bias" not in key}, folder/"model.safetensors", {"format": "pt"})


def not_a_number(folder):
    save_file({key: value*float("nan") for key, value in load_file(folder/"model.safetensors").items()}, folder/"model.safetensors", {"format": "pt"})


def other_photos(folder):
    (folder/"preprocessor_config.json").write_text(json.dumps(json.loads((folder/"preprocessor_config.json").read_text()) | {"size": {"height": 20, "width": 20}}))


def pickled_code(folder):
    no_weights(folder)
    torch.save({"x": SimpleNamespace(a=1)}, folder/"pytorch_model.bin")


@pytest.mark.parametrize("change, text", [
    (no_config, "has no config.json"), (no_weights, "can't be loaded as an image encoder"), (no_processor, "does not say how photos are preprocessed"),
    (other_kind, "is of model_type 'gpt2'"), (naflex, "model_type 'siglip2' \\(NaFlex: photos of several sizes\\)"), (a_tensor_less, "3 tensors of a SiglipVisionModel are missing: .*fc1.bias"),
    (not_a_number, "no vector of finite numbers"), (other_photos, "can't be used as an image encoder"), (pickled_code, "pytorch_model.bin holds more than weights, or is damaged")])
def test_a_folder_that_cannot_be_used_is_named(change, text, hub, tmp_path):
    shutil.copytree(hub("siglip_vision_model")[0], tmp_path/"own")
    change(tmp_path/"own")
    with pytest.raises(ValueError, match=f"clip_model='hf:.*own'.*{text}"): load_clip(f"hf:{tmp_path}/own")


def test_weights_alone_in_a_pickle_are_read(hub, tmp_path):
    folder, _ = hub("dinov2")
    shutil.copytree(folder, tmp_path/"dinov2")
    torch.save(load_file(tmp_path/"dinov2/model.safetensors"), tmp_path/"dinov2/pytorch_model.bin")
    no_weights(tmp_path/"dinov2")
    assert load_clip(f"hf:{tmp_path}/dinov2")[2] == load_clip(f"hf:{folder}")[2]


@pytest.mark.parametrize("name, text", [("nbs", "a folder is written as 'hf:nbs' or 'open_clip:local-dir:nbs'"), ("hf:/no/such/folder", "there is no folder"), ("hf:nobody/nothing", "neither a folder nor a name that the hub answers"),
                                        ("mini:x", "neither a file nor one of .*'mini', 'hf:…', 'open_clip:…'")])
def test_an_unknown_name_is_named(name, text):
    with pytest.raises(ValueError, match=f"clip_model='{name}'.*{text}"): load_clip(name)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(ValueError, match="clip_model='open_clip:ViT-B-32/openai' needs open_clip .*: pip install clipcap\\[open_clip\\]"): load_clip("open_clip:ViT-B-32/openai")
    assert not library_encoder_is_here("open_clip:ViT-B-32/openai")


def test_patches_of_an_encoder_that_has_none_are_refused(hub, monkeypatch):
    from clipcap.networks.encoders import HubEncoder
    monkeypatch.setattr(HubEncoder, "patches", lambda self, images: self.embed(images)[:, None, :5])
    clip, preprocess, _ = load_clip(f"hf:{hub('dinov2')[0]}")
    with pytest.raises(ValueError, match="features='grid' .*\\(its patches have 5 numbers, and its embedding 32"): encode_grid(clip, preprocess(pictures()[0])[None])


# --- open_clip

TIMM = {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "timm_pool": "token", "timm_proj": ""}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}


@pytest.mark.numerics
@torch.no_grad()
@pytest.mark.parametrize("vision, changes", [(None, {}), (None, {"quick_gelu": True}), (RESNET, {}), pytest.param(TIMM, {"embed_dim": 192, "custom_text": True}, marks=pytest.mark.slow)],
                         ids=["vit", "quick_gelu", "resnet", "timm"])
def test_embeddings_patches_and_texts_are_those_of_open_clip(vision, changes, tmp_path):
    import_of = pytest.importorskip("open_clip")
    model = write_open_clip(tmp_path/"own", vision, **changes)
    clip, preprocess, encoder = load_clip(f"open_clip:local-dir:{tmp_path}/own")
    _, own = import_of.create_model_from_pretrained(f"local-dir:{tmp_path}/own")
    pixels = torch.stack([own(photo) for photo in pictures()])
    assert torch.stack([preprocess(photo) for photo in pictures()]).equal(pixels) and encoder.startswith("open_clip:local-dir:own@")
    assert (encode_images(clip, pixels) - model.encode_image(pixels)).abs().max() < 1e-5
    if vision is RESNET:
        with pytest.raises(ValueError, match="has none \\(it sees with a ModifiedResNet\\)"): encode_grid(clip, pixels)
        return
    patches = model.visual.forward_intermediates(pixels, indices=1, normalize_intermediates=True, output_fmt="NLC")["image_intermediates"][-1]
    if vision is None:
        model.visual.output_tokens = True
        torch.testing.assert_close(model.visual(pixels)[1], patches, rtol=0, atol=1e-5)
        patches = patches @ model.visual.proj
    assert (encode_grid(clip, pixels) - patches).abs().max() < 1e-5
    wanted = model.encode_text(import_of.get_tokenizer(f"local-dir:{tmp_path}/own")(["a dog"]))
    assert (clip.encode_texts(["a dog"]) - wanted).abs().max() < 1e-5


def test_the_same_weights_with_another_activation_are_another_encoder_of_open_clip(tmp_path):
    for name, quick in (("a", False), ("b", True)): write_open_clip(tmp_path/name/"own", quick_gelu=quick)
    shutil.copy(tmp_path/"a/own/open_clip_model.safetensors", tmp_path/"b/own")
    a, b = (load_clip(f"open_clip:local-dir:{tmp_path}/{name}/own")[2] for name in "ab")
    assert a != b and a.split("@")[0] == b.split("@")[0]


@pytest.mark.parametrize("name, error, text", [
    ("ViT-Z/openai", ValueError, "open_clip has no model 'ViT-Z'"), ("ViT-B-32", ValueError, "open_clip has no weights '' of ViT-B-32; choose one of openai"),
    ("ViT-B-32/none", ValueError, "open_clip has no weights 'none' of ViT-B-32"), ("local-dir:/no/such", ValueError, "there is no folder /no/such"),
    ("local-dir:nbs", ValueError, "has no open_clip_config.json"), ("ViT-B-32/laion2b_s34b_b79k", OSError, "Without a connection: pass open_clip:local-dir:FOLDER"),
    ("hf-hub:nobody/nothing", OSError, "Without a connection")])
def test_what_open_clip_does_not_have_is_named(name, error, text, monkeypatch):
    hub = pytest.importorskip("huggingface_hub.constants")
    pytest.importorskip("open_clip")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    with pytest.raises(error, match=f"clip_model='open_clip:{name}'.*{text}"): load_clip(f"open_clip:{name}")


@pytest.mark.parametrize("change, text", [("gone", "can't be loaded"), ("pickle", "holds more than weights"), ("cut", "can't be loaded")])
def test_weights_of_open_clip_that_cannot_be_used_are_named(change, text, tmp_path):
    write_open_clip(tmp_path/"own")
    file = tmp_path/"own/open_clip_model.safetensors"
    if change == "cut": file.write_bytes(file.read_bytes()[:1000])
    else: file.unlink()
    if change == "pickle": torch.save({"x": SimpleNamespace(a=1)}, tmp_path/"own/open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match=f"clip_model='open_clip:local-dir:.*own'.*{text}"): load_clip(f"open_clip:local-dir:{tmp_path}/own")


# --- files on this machine

def test_a_name_means_the_same_in_any_folder_and_says_where_its_files_are(hub):
    from clipcap.decoding.recorded import clip_is_here
    folder = hub("siglip")[0]
    assert encoder_place("open_clip:local-dir:nbs") == ("open_clip:local-dir:", Path("nbs").resolve()) and absolute_encoder("hf:nbs") == f"hf:{Path('nbs').resolve()}"
    for name in ("mini", "ViT-B/32", "hf:nobody/nothing", "open_clip:ViT-B-32/openai"): assert absolute_encoder(name) == name
    assert clip_is_here(f"hf:{folder}") and not clip_is_here("hf:nobody/nothing") and not clip_is_here("open_clip:hf-hub:nobody/nothing")


def test_a_stage_depends_on_the_files_of_its_encoder(tmp_path, scenes):
    from conftest import ROOT

    from clipcap.apps.pipeline import depends_on
    config = make_config("mini", data_root=str(scenes.captions), clip_model=f"hf:{tmp_path}/own")
    def now(): return depends_on("01_data", config, ROOT/"nbs")["inputs"]
    write_hub(tmp_path/"own", "dinov2")
    before = now()
    assert before == now()
    write_hub(tmp_path/"own", "dinov2", seed=1)
    assert before != now()


@pytest.mark.parametrize("features, shape", [("embedding", (32,)), ("grid", (16, 32))])
def test_embed_takes_an_encoder_of_transformers(features, shape, hub, tmp_path):
    from clipcap.apps.cli import embed
    from clipcap.formats.embeddings import Embeddings
    (tmp_path/"photos").mkdir()
    for n, photo in enumerate(pictures()): photo.save(tmp_path/f"photos/{n}.png")
    folder = hub("dinov2")[0]
    embed(str(tmp_path/"photos"), str(tmp_path/"out"), f"hf:{folder}", features, device="cpu")
    clip, preprocess, encoder = load_clip(f"hf:{folder}")
    found = Embeddings(tmp_path/"out")
    assert found.encoder == encoder + " grid"*(features == "grid") and found["0.png"].shape == shape
    torch.testing.assert_close(found["0.png"].float(), encode_images(clip, preprocess(pictures()[0])[None], features)[0], rtol=0, atol=1e-5)


# --- maps over the photo

def captioner_with(clip, preprocess):
    "An untrained captioner that looks through an encoder."
    from clipcap.model import load_model
    model = load_model(make_config("mini", device="cpu"), as_encoder(clip).dim).eval()
    model.clip, model.preprocess = clip, preprocess
    return model


@pytest.mark.parametrize("kind, maps", [("dinov2", True), ("dinov2_with_registers", True), ("dinov3_vit", True), ("clip", True), ("siglip", False)])
def test_words_have_maps_where_the_embedding_is_a_class_token(kind, maps, hub):
    from clipcap.attention import explain, no_photo_maps
    clip, preprocess, _ = load_clip(f"hf:{hub(kind)[0]}")
    model, pixels = captioner_with(clip, preprocess), torch.stack([preprocess(photo) for photo in pictures()[:2]])
    found = explain(model, pixels, ["a dog", "a cat runs"])
    assert [e.photo.shape if maps else e.photo for e in found] == ([(2, 4, 4), (3, 4, 4)] if maps else [None, None])
    assert bool(no_photo_maps(model)) != maps and all(e.prefix.sum() > 0 for e in found)


# --- from 01 to 05

def write_language_model(folder, kind, tokenizer):
    "Save a tiny language model with the miniature GPT-2's tokenizer."
    tiny_language_model(kind, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_encoder(folder, kind):
    "Save a tiny encoder: its `clip_model`."
    if kind == "open_clip": write_open_clip(folder)
    else: write_hub(folder, kind)
    return f"open_clip:local-dir:{folder}" if kind == "open_clip" else f"hf:{folder}"


@pytest.fixture
def forty(tmp_path, scenes, scene_captions):
    "A folder of 40 scenes and their captions."
    root, names = tmp_path/"data", sorted(scene_captions.image.unique())[:40]
    (root/"Images").mkdir(parents=True)
    for name in names: shutil.copy(scenes.photos/name, root/"Images"/name)
    scene_captions[scene_captions.image.isin(names)].to_csv(root/"captions.txt", index=False)
    return root


def settings_of(tmp_path, root, encoder, words, tokenizer):
    "Settings of a small run with that encoder and that language model."
    write_language_model(tmp_path/"lm", words, tokenizer)
    return dict(data_root=str(root), split="random", clip_model=write_encoder(tmp_path/"encoder", encoder), gpt2_model=str(tmp_path/"lm"), epochs=1, num_layers=1,
                num_heads=4, feedforward_dim=64, max_length=12, num_beams=2, device="cpu")


def check_embeddings(run, config):
    "Assert that the embeddings of a run are the library's own, photo by photo."
    data, folder = load_data(run, config), encoder_place(config.clip_model)[1]
    if config.clip_model.startswith("hf:"):
        model, processor = library.AutoModel.from_pretrained(folder).eval(), library.AutoImageProcessor.from_pretrained(folder)
        def own(photo):
            pixels = processor(images=photo, return_tensors="pt")["pixel_values"]
            return (model.get_image_features(pixel_values=pixels) if hasattr(model, "get_image_features") else model(pixel_values=pixels)).pooler_output[0]
    else:
        import open_clip
        model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        def own(photo): return model.eval().encode_image(preprocess(photo)[None])[0]
    with torch.no_grad():
        for name in data.embeddings.names: assert (data.embeddings[name] - own(data.photo(name).convert("RGB"))).abs().max() < 1e-5, name
    assert len(data.embeddings.names) == 40


def test_forty_scenes_seen_by_a_siglip_and_told_by_a_llama(tmp_path, forty, outputs, tokenizer):
    from clipcap.decoding.load import load_run
    from clipcap.evaluate import score_split
    from clipcap.model import caption_images, generate_caption
    from clipcap.reporting.verify import verify
    from clipcap.train import train_run
    run, config = open_run("small", "mini", **settings_of(tmp_path, forty, "siglip", "llama", tokenizer))
    with run.stage("01_data", config) as notes: notes.update(prepare_data(run, config))
    with run.stage("03_train", config, ["01_data"]) as notes: notes.update(epochs=len(train_run(run, config)))
    check_embeddings(run, config)
    model, data = load_run("small", device="cpu"), load_data(run, config)
    names = list(data.references("test"))
    captions = caption_images(model, data.embeddings, names, config)
    assert captions == {name: generate_caption(forty/"Images"/name, model, config.max_length, config.num_beams) for name in names}
    assert score_split(captions, data, "test", None, ["bleu_1"]).corpus["bleu_1"] >= 0
    rows = verify(run).query("what in ['CLIP', 'encoder of the embeddings', 'tokenizer']")
    assert len(rows) == 3 and rows.agrees.eq(True).all()
    write_hub(encoder_place(config.clip_model)[1], "siglip", seed=1)
    with pytest.raises(ValueError, match="run 'small' was trained with something else: encoder"): load_run("small", device="cpu")


STAGES_RUN = ("01_data", "03_train", "04_evaluate", "05_error_analysis", "06_attention")


@pytest.mark.slow
@pytest.mark.parametrize("words", ["llama", "opt"])
@pytest.mark.parametrize("encoder", ["siglip", "dinov2", "open_clip"])
def test_forty_scenes_from_01_to_06(encoder, words, tmp_path, forty, outputs, tokenizer, spice):
    from clipcap.checks.children import _run_stage
    settings = settings_of(tmp_path, forty, encoder, words, tokenizer)
    run, config = open_run("pair", "mini", **settings)
    for stage in STAGES_RUN: _run_stage(stage, "pair")
    check_embeddings(run, config)
    assert all(Run("pair").stage_entry(stage)["finished"] for stage in STAGES_RUN)
    written = json.loads((run.path/"scores_test.json").read_text())
    assert written["unavailable"].get("clipscore", "").startswith("ValueError" if encoder != "open_clip" else "") and written["corpus"]["cider"] >= 0
    assert ("clipscore" in written["unavailable"]) == (encoder != "open_clip") and Run("pair").stage_entry("01_data")["encoder"].split("@")[0].endswith("encoder")
