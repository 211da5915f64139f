"""Reasonable calls from Python: photos in all forms, numbers that make no sense, other precisions (clipcap.model, clipcap.formats.photos)."""
import copy
import random
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_stream import varied_model

from clipcap import model as module
from clipcap.decoding.stream import caption_stream
from clipcap.formats.embeddings import Embeddings, write_embeddings
from clipcap.formats.photos import read_photo
from clipcap.model import caption_images, generate_caption, generate_caption_batch, generate_from_embeddings


@pytest.fixture(scope="module")
def model(): return varied_model()


@pytest.fixture(scope="module")
def paths(scenes): return sorted(scenes.photos.iterdir())[:3]


@pytest.fixture
def seen(monkeypatch):
    "Captioning returns the embeddings themselves."
    monkeypatch.setattr(module, "generate_from_embeddings", lambda embeddings, *_, **__: embeddings)


def pictures(paths): return [Image.open(path).convert("RGB") for path in paths]


def pixels(paths): return np.stack([np.asarray(image) for image in pictures(paths)])  # (B, H, W, 3)


def channels_first(paths): return torch.from_numpy(pixels(paths)).movedim(3, 1)  # (B, 3, H, W)


def assert_same(found, expected): torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


# --- photos

SINGLE = {
    "path as text": str, "path": Path, "PIL image": lambda p: Image.open(p), "bytes of a file": Path.read_bytes,
    "bytearray": lambda p: bytearray(p.read_bytes()),
    "open file": lambda p: open(p, "rb"), "file in memory": lambda p: BytesIO(p.read_bytes()), "array (H, W, 3)": lambda p: pixels([p])[0],
    "tensor (H, W, 3)": lambda p: torch.from_numpy(pixels([p])[0]), "tensor (3, H, W)": lambda p: channels_first([p])[0],
    "array (3, H, W)": lambda p: channels_first([p])[0].numpy(), "array (H, W, 4)": lambda p: np.asarray(Image.open(p).convert("RGBA")),
    "array mirrored twice": lambda p: pixels([p])[0][::-1].copy()[::-1], "preprocessed": None, "preprocessed array": None, "preprocessed float64": None,
}
SEVERAL = {
    "tuple of paths": tuple, "generator of paths": lambda ps: (p for p in ps), "keys": lambda ps: dict.fromkeys(ps).keys(),
    "array of paths": lambda ps: np.array([*map(str, ps)]), "column of a table": lambda ps: pd.DataFrame({"image": map(str, ps)}).image,
    "list of all forms": lambda ps: [str(ps[0]), ps[1].read_bytes(), *pictures(ps[2:])],
    "array (B, H, W, 3)": pixels, "tensor (B, 3, H, W)": channels_first, "array (B, 3, H, W)": lambda ps: channels_first(ps).numpy(),
    "list of arrays": lambda ps: [*pixels(ps)], "generator of images": lambda ps: map(Image.open, ps),
}


def single(form, model, path):
    "A photo in one of the forms above."
    if SINGLE[form]: return SINGLE[form](path)
    image = model.preprocess(pictures([path])[0])
    return {"preprocessed": image, "preprocessed array": image.numpy(), "preprocessed float64": image.double()}[form]


@pytest.mark.numerics
@pytest.mark.parametrize("form", SINGLE)
def test_photo_of_any_form_is_the_picture_in_it(seen, model, paths, form):
    expected = generate_caption_batch(pictures(paths[1:2]), model)
    assert_same(generate_caption_batch([single(form, model, paths[1])], model), expected)
    assert_same(generate_caption(single(form, model, paths[1]), model), expected[0])
    assert_same(generate_caption_batch(single(form, model, paths[1]), model), expected)  # one photo is a batch of one


@pytest.mark.numerics
@pytest.mark.parametrize("form", SEVERAL)
def test_batch_of_any_form_is_its_photos_in_order(seen, model, paths, form):
    assert_same(generate_caption_batch(SEVERAL[form](paths), model), generate_caption_batch(pictures(paths), model))


@pytest.mark.numerics
def test_grey_pixels_are_a_grey_picture(seen, model, paths):
    grey = pictures(paths)[0].convert("L")
    for form in (np.asarray(grey), torch.tensor(np.asarray(grey))[None]):
        assert_same(generate_caption_batch(form, model), generate_caption_batch([grey], model))


@pytest.mark.numerics
def test_random_photos_in_random_forms(seen, model, tmp_path):
    "Sizes, modes, number and forms are drawn; the caption is that of the PIL image."
    draw, noise = random.Random(0), np.random.default_rng(0)
    def formed(image):
        image.save(path := tmp_path/f"{len([*tmp_path.iterdir()])}.png")
        return single(draw.choice([*SINGLE]), model, path)
    for _ in range(20):
        sizes = [(draw.randint(8, 90), draw.randint(8, 90), 3) for _ in range(draw.randint(1, 4))]
        images = [Image.fromarray(noise.integers(0, 256, size, dtype=np.uint8)) for size in sizes]
        images = [image.convert(draw.choice(["RGB", "L", "RGBA", "P", "CMYK"])).convert("RGB") for image in images]
        batch = draw.choice([list, tuple, iter])([*map(formed, images)])
        assert_same(generate_caption_batch(batch, model), generate_caption_batch(images, model))


@pytest.mark.numerics
def test_a_dark_and_a_white_preprocessed_photo_are_captioned(seen, model):
    "White is above 1 everywhere once it is preprocessed."
    images = [Image.new("RGB", (80, 60), color) for color in ("black", "white", "red", (150, 150, 150))]  # the grey lies between 0 and 1
    assert_same(generate_caption_batch(torch.stack([*map(model.preprocess, images)]), model), generate_caption_batch(images, model))
    with pytest.raises(ValueError, match="values from 0.00 to 1.00"): generate_caption_batch(torch.rand(1, 3, 64, 64), model)


def noisy(*shape): return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


REFUSED = {
    "pixels from 0 to 1": (noisy(2, 3, 64, 64), ValueError, r"photos\[0\] has values from 0.00 to 1.00, as pixels that are not preprocessed.*uint8"),
    "pixels from 0 to 255": (noisy(2, 3, 64, 64)*255, ValueError, r"photos\[0\] has values from 0.0\d to 25\d.\d\d, as pixels that are not preprocessed"),
    "one of several is pixels": ([Image.new("L", (9, 9)), noisy(3, 64, 64).numpy()], ValueError, r"photos\[1\] has values from 0.00 to 1.00"),
    "one of several in a tensor is pixels": (
        torch.cat([noisy(2, 3, 64, 64) - 0.5, noisy(1, 3, 64, 64)]), ValueError, r"photos\[2\] has values from 0.00 to 1.00"),
    "nothing but black": (torch.zeros(2, 3, 64, 64), ValueError, r"photos\[0\] has values from 0.00 to 0.00"),
    "not finite": (noisy(1, 3, 64, 64)/0, ValueError, r"photos\[0\] holds NaN or infinity"),
    "another size": (noisy(1, 3, 32, 48) - 0.5, ValueError, r"photos\[0\] has the shape \(3, 32, 48\).*model.preprocess gives \(3, 64, 64\)"),
    "floats, channels last": (noisy(1, 64, 64, 3), ValueError, r"photos\[0\] has the shape \(64, 64, 3\)"),
    "two channels": (np.zeros((9, 9, 2), np.uint8), ValueError, r"photos\[0\] has the shape \(9, 9, 2\)"),
    "which side is color?": (np.zeros((3, 9, 3), np.uint8), ValueError, r"photos\[0\] has the shape \(3, 9, 3\)"),
    "a batch in a batch": (np.zeros((1, 1, 3, 9, 9), np.uint8), ValueError, r"photos\[0\] has the shape \(1, 3, 9, 9\)"),
    "16 bits": (np.zeros((9, 9, 3), np.uint16), ValueError, r"photos\[0\] holds .*int"),
    "whole numbers": (torch.zeros(2, 3, 64, 64, dtype=torch.long), ValueError, r"photos\[0\] holds .*int64"),
    "truth values": (np.zeros((64, 64, 3), bool), ValueError, r"photos\[0\] holds .*bool"),
    "a number": (7, TypeError, r"expected photos, found 7 \(int\); give a path, a PIL image"),
    "nothing": (None, TypeError, r"expected photos, found None"),
    "a list in a list": ([["a.jpg"]], TypeError, r"expected a photo, found \['a.jpg'\] \(list\) as photos\[0\]"),
    "no photo among them": ([Image.new("L", (9, 9)), None], TypeError, r"expected a photo, found None \(NoneType\) as photos\[1\]"),
    "a table": ({"a.jpg": "x"}, TypeError, r"expected photos, found .* \(dict\)"),
    "without an order": ({"a.jpg", "b.jpg"}, TypeError, r"expected photos, found .* \(set\)"),
    "absent": ("absent.jpg", FileNotFoundError, "absent.jpg"),
    "a path as bytes": (b"absent.jpg", OSError, r"photos\[0\] \(10 bytes\) can't be read as a photo"),
    "bytes that are no photo": ([b"\xff\xd8"*4000], OSError, r"photos\[0\] \(8,000 bytes\) can't be read as a photo"),
    "text of a photo": ("data:image/png;base64," + "iVBORw0K"*1000, OSError, "can't be read as a photo"),
}


@pytest.mark.parametrize("given, error, message", REFUSED.values(), ids=REFUSED)
def test_what_is_no_photo_is_refused_by_name_and_briefly(model, given, error, message):
    with pytest.raises(error, match=message) as raised: generate_caption_batch(given, model, 4, 1)
    assert len(str(raised.value)) < 700


def test_bytes_are_read_and_never_printed():
    file = BytesIO()
    Image.new("RGB", (9, 9)).save(file, "PNG")
    assert read_photo(file.getvalue()).size == (9, 9)
    for damaged in (file.getvalue()[:40], b"\0\xff"*2000):
        with pytest.raises(OSError, match=f"{len(damaged):,} bytes can't be read as a photo") as raised: read_photo(damaged)
        assert len(str(raised.value)) < 200


def test_stream_takes_a_single_path(model, paths):
    expected = [(path, caption) for path, caption in caption_stream(model, paths[:1], max_length=4)]
    assert list(caption_stream(model, paths[0], max_length=4)) == expected
    assert list(caption_stream(model, str(paths[0]), max_length=4)) == [(str(paths[0]), expected[0][1])]


def test_stream_captions_a_light_grey_photo(model, tmp_path):
    "All of its preprocessed values lie between 0 and 1."
    Image.new("RGB", (64, 64), (150, 150, 150)).save(tmp_path/"grey.png")
    values = model.preprocess(Image.open(tmp_path/"grey.png"))
    assert 0 <= values.min() and values.max() <= 1
    (_, caption), = caption_stream(model, [tmp_path/"grey.png"], max_length=4)
    assert caption == generate_caption(tmp_path/"grey.png", model, max_length=4)


# --- numbers

BAD_NUMBERS = [({name: value}, f"{name}={value!r} must be a whole number, 1 or more")
               for name in ("num_beams", "max_length") for value in (0, -1, 2.5, "5", None)]


@pytest.mark.parametrize("options, message", BAD_NUMBERS, ids=[message for _, message in BAD_NUMBERS])
def test_impossible_search_is_named_before_anything_is_read(model, options, message):
    rows = torch.zeros(1, model.clip.visual.output_dim)
    for call in (generate_from_embeddings, generate_caption_batch, generate_caption, lambda photos, model, **o: caption_stream(model, photos, **o)):
        with pytest.raises(ValueError, match=message): call(rows if call is generate_from_embeddings else "absent.jpg", model, **options)
    with pytest.raises(ValueError, match=message): generate_from_embeddings(rows[:0], model, **options)


@pytest.mark.parametrize("temperature", [-1., float("nan")])
def test_impossible_temperature_is_named(model, temperature):
    rows = torch.zeros(1, model.clip.visual.output_dim)
    with pytest.raises(ValueError, match=f"temperature={temperature} must be 0 or more"): generate_from_embeddings(rows, model, temperature=temperature)


@pytest.mark.parametrize("form", [lambda e: e.numpy(), lambda e: [*e], iter, lambda e: e.double(), lambda e: e.numpy().astype("float64")],
                         ids=["array", "list", "generator", "float64", "array of float64"])
def test_embeddings_may_be_arrays_and_lists(model, form):
    rows = torch.randn(3, model.clip.visual.output_dim, generator=torch.Generator().manual_seed(0))
    assert generate_from_embeddings(form(rows), model, 6, 2) == generate_from_embeddings(rows, model, 6, 2)


@pytest.mark.parametrize("wrong, message", [(lambda e: e[0], r"shape \(16,\).*embedding\[None\]"), (lambda e: e/0, "hold NaN or infinity")],
                         ids=["one", "not finite"])
def test_embeddings_that_are_none_are_named(model, wrong, message):
    rows = torch.ones(2, model.clip.visual.output_dim)[:, :16]
    with pytest.raises(ValueError, match=message): generate_from_embeddings(wrong(rows), model, 4)


def test_names_of_images_may_be_one_or_any_iterable(model, tmp_path):
    from clipcap.core import make_config
    write_embeddings(tmp_path/"x.safetensors", ["ab", "a", "b"], torch.randn(3, 4), "test")
    embeddings, config = Embeddings(tmp_path/"x.safetensors"), make_config("mini", eval_batch_size=2)
    def write(rows): return [str(tuple(row.shape)) for row in rows]
    assert caption_images(model, embeddings, "ab", config, write) == {"ab": "(4,)"}
    assert [*caption_images(model, embeddings, (name for name in ("b", "a", "ab")), config, write)] == ["b", "a", "ab"]


# --- precision

@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.to(torch.float16), lambda m: m.bfloat16(), lambda m: m.to("cpu", torch.bfloat16)],
                         ids=["half", "float16", "bfloat16", "with a device"])
def test_half_precision_is_refused_and_changes_nothing(model, paths, convert):
    changed = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"ClipCapModel can't be converted to torch.b?float16; .*precision='bfloat16'"): convert(changed)
    assert {p.dtype for p in changed.parameters()} == {torch.float32} and generate_caption(paths[0], changed, 6, 2) == generate_caption(paths[0], model, 6, 2)


@pytest.mark.numerics
def test_double_and_back_captions_as_before(model, paths):
    wide, expected = copy.deepcopy(model).double(), generate_caption_batch(paths, model, 6, 2)
    assert wide.precision == "float64" and generate_caption_batch(paths, wide, 6, 2) == expected
    assert generate_caption_batch(paths, wide.float(), 6, 2) == expected and wide.precision == "float32"
