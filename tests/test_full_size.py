"""Backbones in the published formats, at reduced size, and the notebook that runs them (checks/full_size)."""
import json

import papermill
import pytest
import torch
from conftest import ROOT
from PIL import Image

from clipcap.core import Run, make_config
from clipcap.data import encode_images, load_clip
from clipcap.decoding.load import load_run, save_weights
from clipcap.formats.tokenizer import load_tokenizer
from clipcap.model import generate_caption, generate_caption_batch, load_model
from clipcap.runs.files import write_json
from clipcap.studies.flops import CLIP_SIZES, GPT2_SIZES, NETWORK_SIZES, publish_clip, publish_gpt2

WIDE_CLIP = CLIP_SIZES["reduced"] | dict(embed_dim=768, image_resolution=56, vision_patch_size=14)  # embeddings as of ViT-L/14


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "A folder with a CLIP (`clip.pt`, `clip-state.pt`) and a GPT-2 (`gpt2`), and the same in `wide`, of other sizes; the CLIP; words of the vocabulary."
    folder = tmp_path_factory.mktemp("published")
    (folder/"wide").mkdir()
    clip, words = publish_clip(folder, **CLIP_SIZES["reduced"]), publish_gpt2(folder/"gpt2", **GPT2_SIZES["reduced"])
    publish_clip(folder/"wide", **WIDE_CLIP)
    publish_gpt2(folder/"wide/gpt2", n_embd=1024, n_layer=1, n_head=16)
    return folder, clip, words


def config_of(folder, **changes): return make_config("flickr8k", clip_model=str(folder/"clip.pt"), gpt2_model=str(folder/"gpt2"), device="cpu", precision="float32", **{**NETWORK_SIZES["reduced"], **changes})


@pytest.fixture(scope="module")
def model(published): return load_model(config_of(published[0])).eval()


def test_archive_and_state_dict_are_the_same_clip(published):
    folder, clip, _ = published
    size = CLIP_SIZES["reduced"]["image_resolution"]
    pictures = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    loaded = [load_clip(str(folder/name)) for name in ("clip.pt", "clip-state.pt")]
    for found, _, _ in loaded:
        assert {p.dtype for p in found.parameters()} == {torch.float32}
        assert encode_images(found, pictures).equal(clip.encode_image(pictures)) and found.visual.output_dim == 32
    assert len({name.split("@")[1] for _, _, name in loaded}) == 1


def test_gpt2_directory_gets_two_tokens(published): assert len(load_tokenizer(str(published[0]/"gpt2"))) == published[2] + 2


def test_real_vocabulary(shared, tmp_path):
    assert publish_gpt2(tmp_path, shared/"gpt2_tokenizer", **GPT2_SIZES["reduced"]) == 50_257
    assert len(load_tokenizer(str(tmp_path))) == 50_259


@pytest.mark.parametrize("kind", ["plain.jpg", "alpha.png", "grey.jpg", "inks.jpg", "palette.png", "turned.jpg", "pixel.png"])
def test_photos_of_all_kinds_are_captioned_like_rgb(model, tmp_path, kind):
    ramp = Image.linear_gradient("L").resize((90, 60))
    photo, turned = Image.merge("RGB", (ramp, ramp.rotate(180), ramp.rotate(90, expand=True).resize((90, 60)))), Image.Exif()
    turned[0x0112] = 6  # the camera was turned by 90°
    made = {"alpha.png": photo.convert("RGBA"), "grey.jpg": photo.convert("L"), "inks.jpg": photo.convert("CMYK"), "palette.png": photo.convert("P"),
            "pixel.png": photo.crop((0, 0, 1, 1))}.get(kind, photo)
    made.save(tmp_path/kind, **({"exif": turned} if kind == "turned.jpg" else {}))
    plain = Image.open(tmp_path/kind).convert("RGB")
    if kind == "turned.jpg": plain = plain.transpose(Image.Transpose.ROTATE_270)
    expected = generate_caption_batch(model.preprocess(plain)[None], model, max_length=8)
    assert [generate_caption(tmp_path/kind, model, max_length=8)] == expected and type(expected[0]) is str


def test_sizes_follow_from_the_weights(published, tmp_path):
    wide = load_model(config_of(published[0]/"wide"))
    assert (wide.mapping_network.project.in_features, wide.mapping_network.project.out_features) == (768, 1024)
    Image.new("RGB", (60, 40)).save(tmp_path/"photo.png")
    assert type(generate_caption(tmp_path/"photo.png", wide, max_length=4)) is str


def test_heads_that_do_not_divide_the_width_are_named(published):
    with pytest.raises(ValueError, match="num_heads=12 does not divide GPT-2's width 1024; choose one that does, such as 8"): load_model(config_of(published[0]/"wide", num_heads=12))


def test_weights_that_were_trained_with_another_clip_are_named(published, model, outputs):
    save_weights(outputs/"run", model, 2)
    config = vars(config_of(published[0])) | {"clip_model": str(published[0]/"wide/clip.pt")}
    write_json(outputs/"run/run.json", {"preset": "flickr8k", "config": config, "stages": {"03_train": {"config": config, "finished": "now"}}})
    assert Run("run").config("03_train").clip_model == config["clip_model"]
    with pytest.raises(ValueError, match="mapping_network_epoch_2.pth does not fit this MappingNetwork"): load_run("run")


@pytest.mark.slow
@pytest.mark.numerics
def test_notebook_runs_at_reduced_size(spice, outputs, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    papermill.execute_notebook(str(ROOT/"nbs/checks/full_size.ipynb"), str(tmp_path/"out.ipynb"), {"size": "reduced", "images": 64}, kernel_name="python3", cwd=str(ROOT), progress_bar=False)
    record = json.loads((outputs/"reduced-size/full_size.json").read_text())
    assert record["equality"]["largest_difference"] < 1e-4
    assert record.keys() == json.loads((ROOT/"outputs/full_size.json").read_text()).keys()
