"""Captions of many photos: reading ahead, streams, files that are resumed, finding photos (clipcap.decoding.stream)."""
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipcap.checks.literal import literal_beam_search
from clipcap.core import DECODING, FIELDS, Run, make_config
from clipcap.data import encode_images, load_clip
from clipcap.decoding.load import load_run
from clipcap.decoding.stream import (begin_captions, caption_files, caption_settings, caption_stream, find_photos, load_captioner,
                                     read_paths)
from clipcap.formats.clip_files import SIZES
from clipcap.formats.photos import read_photo
from clipcap.formats.tokenizer import gpt2_path
from clipcap.model import generate_from_embeddings, generate_ids, gpt2_hash, load_model
from clipcap.networks.packing import has_bf16
from clipcap.runs.checkpoints import save_checkpoint
from clipcap.runs.files import asset_path

SETTINGS = {"run": "small", "checkpoint": "mapping_network_epoch_2.pth", "sha256": "0123456789abcdef", "num_beams": 5, "max_length": 12}
HEADER, A, B = (json.dumps(line) + "\n" for line in (SETTINGS, {"image": "a.jpg", "caption": "A dog ."}, {"image": "b.jpg", "error": "damaged"}))
KILLED = """
import json, os, signal, sys
from clipcap.decoding import stream
encode, batches = stream.encode_images, iter("12")
def third_kills(*args):
    if next(batches, None) is None: os.kill(os.getpid(), signal.SIGKILL)
    return encode(*args)
stream.encode_images = third_kills
stream.caption_files(json.loads(sys.argv[1]), "small", sys.argv[2], batch_size=4, device="cpu")"""


def varied_model(**changes):
    "A `mini` model that is not trained, but writes a caption of its own for each photo."
    model = load_model(make_config("mini", device="cpu", **changes)).eval()
    with torch.no_grad(): model.mapping_network.project.weight.mul_(100)
    return model


def save_run(name, model, epochs=(1,), **changes):
    "A run with the weights of a model, as if trained."
    run = Run(name)
    run.update(preset="mini", config=dataclasses.asdict(make_config("mini", device="cpu", **changes)))
    for epoch in epochs: save_checkpoint(run.path/f"checkpoints/mapping_network_epoch_{epoch}.pth", model.mapping_network.state_dict())
    return run


CAPTIONING = (*DECODING, "num_beams", "max_length", "seed", "checkpoint")  # settings that change a caption
DIVERSE = {"rerank": "mbr", "num_beams": 12}  # with which each of them alone may have another value


def another(name, seed=0):
    "A possible value of a setting, drawn, other than that of `DIVERSE`."
    draw, config = random.Random(f"{name} {seed}"), make_config("mini", **DIVERSE)
    if name in ("ensemble", "checkpoint"): return {"ensemble": "other", "checkpoint": "average"}[name]
    if FIELDS[name]["choices"]: return draw.choice([choice for choice in FIELDS[name]["choices"] if choice != getattr(config, name)])
    return getattr(config, name) + (draw.randint(1, 3) if isinstance(getattr(config, name), int) else round(draw.uniform(0.1, 2), 2))


def json_lines(path): return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def model(): return varied_model()


@pytest.fixture(scope="module")
def double_model():
    "The same in float64, behind a CLIP that takes one photo at a time: rounding that depends on the batch changes no token."
    model = varied_model()
    encode, network = model.clip.encode_image, model.mapping_network.double()
    model.gpt2.double()
    model.clip.encode_image = lambda images: torch.cat([encode(image[None]) for image in images])
    network.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    return model


@pytest.fixture(scope="module")
def photos(scenes): return sorted(scenes.photos.iterdir())[:12]


@pytest.fixture(scope="module")
def captions(double_model, photos): return dict(caption_stream(double_model, photos, max_length=12))


@pytest.fixture
def small(outputs, model):
    "A run that captions, in an empty folder of runs."
    return save_run("small", model, (1, 2), max_length=12)


@pytest.fixture
def broken(tmp_path, photos):
    "A damaged photo, and a file that is none."
    (tmp_path/"damaged.png").write_bytes(photos[0].read_bytes()[:300])
    (tmp_path/"note.jpg").write_text("not a photo")
    return tmp_path/"damaged.png", tmp_path/"note.jpg"


def test_stream_is_lazy_and_holds_two_batches(model, photos, monkeypatch):
    alive, most, taken, preprocess = set(), [0], [0], model.preprocess
    def watched(photo):
        image = preprocess(photo)
        alive.add(id(image))
        weakref.finalize(image, alive.discard, id(image))
        most[0] = max(most[0], len(alive))
        return image
    def endless():
        for taken[0] in range(1, 81): yield photos[taken[0] % 4]
    monkeypatch.setattr(model, "preprocess", watched)
    for done, _ in enumerate(caption_stream(model, endless(), 8, max_length=2, num_beams=1)): assert taken[0] <= done//8*8 + 16
    assert (done, most[0] <= 16, alive) == (79, True, set())


@pytest.mark.numerics
@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_captions_do_not_depend_on_the_batch(double_model, photos, captions, monkeypatch, batch_size):
    "Token by token those of the literal search, which takes one photo at a time and has no cache."
    rows = []
    def spy(*args):
        ids = generate_ids(*args)
        rows.extend([t for t in row if t != double_model.tokenizer.pad_token_id] for row in ids.tolist())
        return ids
    monkeypatch.setattr("clipcap.model.generate_ids", spy)
    assert list(caption_stream(double_model, photos, batch_size, max_length=12)) == list(captions.items())
    assert len(set(captions.values())) > 5
    for path, ids in zip(photos[:4], rows):
        image = double_model.preprocess(Image.open(path).convert("RGB"))[None]
        assert ids == literal_beam_search(double_model, encode_images(double_model.clip, image)[0], 12, 5)


@pytest.mark.numerics
@pytest.mark.parametrize("batch_size", [2, 3, 7])
def test_unreadable_photos_change_no_other_caption(double_model, photos, captions, broken, tmp_path, batch_size):
    damaged, note = broken
    mixed = [damaged, photos[0], note, tmp_path/"absent.jpg", photos[1], photos[2], damaged]
    found = list(caption_stream(double_model, mixed, batch_size, max_length=12))
    assert [path for path, _ in found] == mixed
    for path, caption in found:
        if path in captions: assert caption == captions[path]
        else: assert isinstance(caption, OSError) and path.name in str(caption)
    assert list(caption_stream(double_model, [note]))[0][1].args[0].startswith(f"{note} can")


@pytest.mark.numerics
def test_stream_takes_whatever_can_be_read(double_model, photos, captions):
    numbered = caption_stream(double_model, range(3), max_length=12, read=lambda n: read_photo(photos[n]))
    assert [caption for _, caption in numbered] == [captions[path] for path in photos[:3]]


def test_model_without_clip_is_refused_before_photos_are_read(mini_model):
    with pytest.raises(ValueError, match="this model has no CLIP"): caption_stream(mini_model, None)


def test_settings_name_run_checkpoint_and_search(small):
    settings = caption_settings(small)
    assert settings == {**{name: getattr(make_config("mini"), name) for name in (*DECODING, "seed")}, **SETTINGS,
                        "sha256": settings["sha256"], "gpt2": gpt2_hash("mini")} and len(settings["sha256"]) == 16
    assert caption_settings(small, epoch=1, num_beams=3) == settings | {"checkpoint": "mapping_network_epoch_1.pth", "num_beams": 3}
    small.update(config=small.manifest["config"] | {"ensemble": "small"})
    both = caption_settings(small)
    assert both["checkpoint"] == "mapping_network_epoch_2.pth + mapping_network_epoch_2.pth" and both["sha256"] != settings["sha256"]


@pytest.mark.parametrize("name, options, message", [
    ("smal", {}, "there is no run 'smal'"),
    ("untrained", {}, "run 'untrained' has no checkpoint; train it first"),
    ("small", {"epoch": 7}, r"no checkpoint of epoch 7; there are \[1, 2\]"),
    ("small", {"num_beams": 0}, "num_beams=0 is too small")])
def test_run_that_cannot_caption_is_refused(small, model, name, options, message):
    save_run("untrained", model, ())
    with pytest.raises(ValueError, match=message): caption_settings(Run(name), **options)


def test_epoch_zero_is_not_the_last(small):
    for call in (caption_settings, lambda run, epoch: load_captioner(run.name, epoch, device="cpu")):
        with pytest.raises(ValueError, match=r"no checkpoint of epoch 0; there are \[1, 2\]"): call(small, 0)


@pytest.mark.parametrize("name", CAPTIONING)
def test_every_setting_that_changes_a_caption_is_compared(small, model, tmp_path, name):
    "In both directions: also where one of the two has the default."
    save_run("other", model)
    def settings(**changes):
        small.update(config=dataclasses.asdict(make_config("mini", device="cpu", **DIVERSE | changes)))
        return caption_settings(small)
    plain, other = {}, {name: another(name)}
    for number, (before, now) in enumerate([(plain, other), (other, plain)]):
        path, values = tmp_path/f"{number}.jsonl", [settings(**changes).get(name) for changes in (before, now)]
        begin_captions(path, settings(**before))
        with pytest.raises(ValueError) as refused: begin_captions(path, settings(**now))
        assert f"{number}.jsonl was made with {name}={values[0]!r}, and now it is {values[1]!r}; use the same settings, name another" in str(refused.value)
        assert begin_captions(path, settings(**before)) == set()


@pytest.mark.parametrize("option, part", [("gpt2_model", "gpt2"), ("clip_model", "(?i)clip")])
def test_captions_of_replaced_backbones_are_not_continued(outputs, model, tmp_path, option, part):
    from safetensors.torch import load_file, save_file
    weights, given = tmp_path/"clip.safetensors", tmp_path/"clip.safetensors"
    if option == "gpt2_model": weights = shutil.copytree(gpt2_path("mini"), given := tmp_path/"gpt2")/"model.safetensors"
    else: save_file(load_file(asset_path("mini/clip.safetensors")) | {name: torch.tensor(64) for name in SIZES}, weights)  # as OpenAI publishes it
    save_run("small", model, **{option: str(given)})
    def begin(): return begin_captions(tmp_path/"captions.jsonl", load_captioner("small", device="cpu")[0])
    begin(), begin()
    tensors = load_file(weights)
    name = next(name for name in sorted(tensors) if tensors[name].is_floating_point() and tensors[name].ndim == 2)
    save_file(tensors | {name: tensors[name]*1.01}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=part): begin()


def test_captions_ranked_by_other_training_captions_are_not_continued(small, tmp_path):
    def settings(data_hash, **changes):
        config = dataclasses.asdict(make_config("mini", device="cpu", **changes))
        small.update(config=config, stages={"01_data": {"config": config, "data_hash": data_hash}})
        return caption_settings(small)
    begin_captions(tmp_path/"captions.jsonl", settings("a"*64, rerank="mbr"))
    with pytest.raises(ValueError, match="data_hash='aaaaaaaaaaaa', and now it is 'bbbbbbbbbbbb'"):
        begin_captions(tmp_path/"captions.jsonl", settings("b"*64, rerank="mbr"))
    assert settings("a"*64) == settings("b"*64)


@pytest.mark.parametrize("begun, now", [(set(), {"gpt2"}), ({"gpt2"}, set())])
def test_captions_file_without_one_of_the_settings_is_not_continued(small, tmp_path, begun, now):
    "As an earlier or a later version may write it."
    path, settings = tmp_path/"captions.jsonl", {**SETTINGS, "gpt2": "mini@0123456789abcdef"}
    def without(names): return {k: v for k, v in settings.items() if k not in names}
    begin_captions(path, without(begun))
    with pytest.raises(ValueError, match="was made with gpt2=.*, and now it is .*") as refused: begin_captions(path, without(now))
    assert "(not recorded)" in str(refused.value) and settings["gpt2"] in str(refused.value)


def test_captions_begun_with_a_length_penalty_are_not_continued_without(small, photos, tmp_path):
    out, plain = tmp_path/"captions.jsonl", small.manifest["config"]
    small.update(config=plain | {"length_penalty": 0.2})
    caption_files(photos[:2], "small", out, device="cpu")
    begun = out.read_bytes()
    small.update(config=plain)
    with pytest.raises(ValueError, match=r"captions.jsonl was made with length_penalty=0.2, and now it is 1.0; use the same settings, name another file"):
        caption_files(photos, "small", out, device="cpu")
    assert out.read_bytes() == begun


@pytest.mark.parametrize("before, after, done", [
    (None, HEADER, set()), ("", HEADER, set()),
    (HEADER + A + B + A[:17], HEADER + A + B, {"a.jpg", "b.jpg"})])
def test_captions_file_is_begun_or_resumed_without_a_torn_line(tmp_path, before, after, done):
    path = tmp_path/"captions.jsonl"
    if before is not None: path.write_text(before)
    assert begin_captions(path, SETTINGS) == done and path.read_text() == after


@pytest.mark.parametrize("name, value, message", [("run", "other", "run='small', and now it is 'other'"),
                                                  ("num_beams", 1, "num_beams=5, and now it is 1"), ("sha256", "0", "sha256=")])
def test_captions_file_of_other_settings_is_refused_or_restarted(tmp_path, name, value, message):
    path = tmp_path/"captions.jsonl"
    path.write_text(HEADER + A)
    with pytest.raises(ValueError, match=f"captions.jsonl was made with {message}"): begin_captions(path, {**SETTINGS, name: value})
    assert path.read_text() == HEADER + A
    assert begin_captions(path, {**SETTINGS, name: value}, restart=True) == set()
    assert json_lines(path) == [{**SETTINGS, name: value}]


@pytest.mark.parametrize("text, line", [("a shopping list", 1), (A, 1), (HEADER + "x\n" + A, 2), (HEADER + "[1]\n", 2)])
def test_foreign_file_is_left_alone(tmp_path, text, line):
    path = tmp_path/"captions.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"captions.jsonl, line {line}: "): begin_captions(path, SETTINGS)
    assert path.read_text() == text
    with pytest.raises(ValueError, match="is not a file; name one"): begin_captions(tmp_path, SETTINGS)


def test_captions_file_has_a_row_for_each_photo(small, photos, broken, tmp_path, capsys):
    out, paths = tmp_path/"captions.jsonl", [*map(str, photos), str(broken[0])]
    with pytest.warns(UserWarning, match="1 photos can't be read"): counts = caption_files(paths, "small", out, batch_size=4, device="cpu")
    assert counts == {"captioned": 12, "unreadable": 1, "done": 0}
    first, *rows = json_lines(out)
    assert first == {**caption_settings(small), "clip": load_clip("mini")[2], "precision": "float32"}
    expected = caption_stream(load_run("small", device="cpu"), photos, 4, max_length=12)
    assert rows[:12] == [{"image": str(path), "caption": caption} for path, caption in expected]
    assert rows[12].keys() == {"image", "error"}
    whole = out.read_bytes()
    assert caption_files(paths + paths[:3], "small", out, device="cpu") == {"captioned": 0, "unreadable": 0, "done": 13}
    assert out.read_bytes() == whole
    caption_files(iter(paths[:4]), "small", batch_size=4, device="cpu")  # to standard output, without a first line
    assert list(map(json.loads, capsys.readouterr().out.splitlines())) == rows[:4]


@pytest.mark.slow
def test_killed_captioning_resumes_to_the_same_bytes(small, photos, tmp_path):
    out, paths = tmp_path/"captions.jsonl", list(map(str, photos))
    caption_files(paths, "small", out, batch_size=4, device="cpu")
    whole = out.read_bytes()
    out.unlink()
    ended = subprocess.run([sys.executable, "-c", KILLED, json.dumps(paths), str(out)], env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    part = out.read_bytes()
    assert (ended.returncode, part, part.count(b"\n")) == (-signal.SIGKILL, whole[:len(part)], 1 + 4)  # a batch; the next four were being written
    out.write_bytes(whole[:len(part) + 9])  # torn, as a crash of the machine leaves it
    assert caption_files(paths, "small", out, batch_size=4, device="cpu")["done"] == 4
    assert out.read_bytes() == whole


def test_ctrl_c_keeps_what_is_written(small, photos, tmp_path):
    def interrupted():
        yield from photos
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt, match="stopped after 4 photos; the same command goes on from there"):
        caption_files(interrupted(), "small", tmp_path/"captions.jsonl", batch_size=4, device="cpu")
    assert [row["image"] for row in json_lines(tmp_path/"captions.jsonl")[1:]] == list(map(str, photos[:4]))


def test_other_search_or_precision_is_refused_or_restarted(small, photos, tmp_path):
    out = tmp_path/"captions.jsonl"
    caption_files(photos[:2], "small", out, device="cpu")
    with pytest.raises(ValueError, match="num_beams=5, and now it is 1"): caption_files(None, "small", out, num_beams=1)
    if has_bf16("cpu"):
        with pytest.raises(ValueError, match="precision='float32', and now it is 'bfloat16'"):
            caption_files(None, "small", out, device="cpu", precision="bfloat16")
    caption_files(photos[:2], "small", out, num_beams=1, device="cpu", restart=True)
    greedy = caption_stream(load_run("small", device="cpu"), photos[:2], max_length=12, num_beams=1)
    first, *rows = json_lines(out)
    assert (first["num_beams"], [row["caption"] for row in rows]) == (1, [caption for _, caption in greedy])


def test_run_that_decodes_in_another_way_does_so_here(small, model, photos, tmp_path):
    small.update(config=small.manifest["config"] | {"length_penalty": 3., "num_beams": 3})
    caption_files(photos[:4], "small", tmp_path/"captions.jsonl", device="cpu")
    first, *rows = json_lines(tmp_path/"captions.jsonl")
    images = torch.stack([model.preprocess(read_photo(path)) for path in photos[:4]])
    assert [row["caption"] for row in rows] == generate_from_embeddings(encode_images(model.clip, images), model, 12, 3, length_penalty=3.)
    assert (first["num_beams"], first["length_penalty"]) == (3, 3.)


def test_folder_means_its_photos_in_sorted_order(tmp_path):
    (tmp_path/"more").mkdir()
    for name in ("b.png", "more/a.jpeg", "LOUD.JPG", "._scene.png", "list.txt"): (tmp_path/name).touch()
    found = [os.path.relpath(path, tmp_path) for path in find_photos([str(tmp_path)])]
    assert found == ["LOUD.JPG", "b.png", "more/a.jpeg"]
    assert find_photos([str(tmp_path/"more"), str(tmp_path/"list.txt")]) == [str(tmp_path/"more/a.jpeg"), str(tmp_path/"list.txt")]


@pytest.mark.parametrize("paths, message", [(["absent.jpg"], "there is no file or folder absent.jpg"), (["empty"], r"empty has no photos in it \(.apng, .avif, "),
                                            (["-", "empty"], "give no others beside it")])
def test_path_without_photos_is_named(tmp_path, monkeypatch, paths, message):
    (tmp_path/"empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message): find_photos(paths)


def test_paths_may_be_any_bytes(small, photos, tmp_path):
    assert list(read_paths([b"a b.jpg\n", b"\n", b"caf\xe9.jpg\r\n", b"last"])) == ["a b.jpg", os.fsdecode(b"caf\xe9.jpg"), "last"]
    odd = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.png")
    Path(odd).write_bytes(photos[0].read_bytes())
    for counts in ({"captioned": 1, "unreadable": 0, "done": 0}, {"captioned": 0, "unreadable": 0, "done": 1}):
        assert caption_files([odd], "small", tmp_path/"captions.jsonl", device="cpu") == counts
