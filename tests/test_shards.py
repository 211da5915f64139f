"""Shards of embeddings and captions: written, resumed, refused (clipcap.scale.shards)."""
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import fsspec
import pytest
import torch
from test_stream import CAPTIONING, DIVERSE, another, json_lines, save_run, varied_model

from clipcap.core import Run, make_config
from clipcap.data import embed_photos, encode_images, load_clip
from clipcap.decoding.stream import caption_files
from clipcap.formats.embeddings import Embeddings
from clipcap.formats.store import EmbeddingStore, index_store
from clipcap.scale.shards import captioner, embedder, read_header, shard_address, write_shard, write_shards
from clipcap.scale.sources import find_units

MINI, HALF = partial(embedder, "mini", device="cpu"), partial(embedder, "mini", dtype="float16", device="cpu")
KILLED = """
import os, signal, sys
from functools import partial
from clipcap.scale import shards
from clipcap.scale.sources import find_units
write, calls = shards.write_embeddings, iter("12")
def third_kills(*args, **kwargs):
    write(*args, **kwargs)  # under its temporary name
    if next(calls, None) is None: os.kill(os.getpid(), signal.SIGKILL)
shards.write_embeddings = third_kills
shards.write_shards(partial(shards.embedder, "mini", device="cpu"), find_units([sys.argv[1]], 4, True), sys.argv[2])"""


@pytest.fixture(scope="module")
def photos(scenes): return sorted(scenes.photos.iterdir())[:12]


@pytest.fixture
def album(tmp_path, photos) -> Path:
    "A folder of twelve scenes, a damaged photo and a file that is none; its first unit of eight has the latter two."
    (tmp_path/"album").mkdir()
    for path in photos: shutil.copy(path, tmp_path/"album"/path.name)
    (tmp_path/"album/damaged.png").write_bytes(photos[0].read_bytes()[:300])
    (tmp_path/"album/note.jpg").write_text("not a photo")
    return tmp_path/"album"


@pytest.fixture
def units(album): return find_units([str(album)], shard_size=8, relative=True)


@pytest.fixture
def out(tmp_path): return str(tmp_path/"out")


@pytest.fixture(scope="module")
def writer(): return MINI()


def done(photos): "Progress that nobody looks at."


def state(folder): return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in Path(folder).glob("0*")}


def changed(folder, before): return [name for name, found in sorted(state(folder).items()) if found != before.get(name)]


@pytest.mark.numerics
def test_embeddings_are_those_of_embed_photos(outputs, album, units, photos, writer, tmp_path):
    summary = writer.write(units[0], tmp_path/"one.safetensors", {"stamp": units[0].stamp}, done)
    assert (summary["rows"], summary["bad"]) == (6, 2)
    one, (clip, preprocess, _) = Embeddings(tmp_path/"one.safetensors"), load_clip("mini")
    assert (one.names, one.encoder) == ([path.name for path in photos[:6]], writer.settings["encoder"])
    kept, bad = embed_photos(album, [name for name, _ in units[0].files], partial(encode_images, clip), preprocess, "test", shard_size=8)
    assert torch.allclose(one.stack(one.names), Embeddings(kept).stack(one.names), atol=1e-4)
    assert {*bad} == {"damaged.png", "note.jpg"}


@pytest.mark.numerics
def test_half_precision_and_patches(units, writer, tmp_path):
    half, grid = HALF(), embedder("mini", features="grid", device="cpu")
    for name, one in (("full", writer), ("half", half), ("grid", grid)): one.write(units[0], tmp_path/f"{name}.safetensors", {}, done)
    full, half = Embeddings(tmp_path/"full.safetensors"), Embeddings(tmp_path/"half.safetensors")
    assert torch.allclose(half.stack(full.names), full.stack(full.names), atol=2e-2)
    assert Embeddings(tmp_path/"grid.safetensors").tokens == 64 and grid.settings["encoder"] == f"{writer.settings['encoder']} grid"


@pytest.mark.parametrize("choice, message", [({"dtype": "int8"}, r"dtype='int8' is unknown; choose one of \('float32', 'float16'\)"),
                                             ({"features": "patches"}, "features='patches' is unknown")])
def test_unknown_choice_is_named(choice, message):
    with pytest.raises(ValueError, match=message): embedder("mini", **choice)


def test_shard_says_what_it_is_and_is_written_once(units, writer, out):
    summary = write_shard(units[0], out, writer, writer.settings)
    assert summary == {"file": "00000.safetensors", "rows": 6, "bad": 2, "shape": summary["shape"]} and len(summary["shape"]) == 1
    assert read_header(f"{out}/00000.safetensors") == {**writer.settings, "stamp": units[0].stamp, "rows": 6, "bad": 2, "shape": summary["shape"]}
    def refuse(*_): raise AssertionError("there is nothing to do")
    idle = writer._replace(write=refuse)
    assert write_shard(units[0], out, idle, writer.settings) == summary
    with pytest.raises(AssertionError, match="nothing to do"): write_shard(dataclasses.replace(units[0], stamp="other"), out, idle, writer.settings)
    with pytest.raises(ValueError, match="was made with dtype='float32', and now it is 'float16'; use the same settings, name another"):
        write_shard(units[0], out, idle, HALF().settings)


@pytest.mark.parametrize("place", ["{}", "memory://shards-test"])
def test_interrupted_shard_leaves_nothing_under_its_name(units, writer, out, place):
    place = place.format(out)
    def dies(unit, path, header, progress):
        path.write_bytes(b"half")
        raise KeyboardInterrupt
    try:
        with pytest.raises(KeyboardInterrupt): write_shard(units[1], place, writer._replace(write=dies), writer.settings)
        assert read_header(shard_address(place, 1, ".safetensors")) is None
        assert write_shard(units[0], place, writer, writer.settings) == write_shard(units[0], place, writer, writer.settings)
        fs, folder = fsspec.url_to_fs(place)
        assert [os.path.basename(path) for path in fs.ls(folder, detail=False)] == ["00000.safetensors"]
    finally:
        if place != out: fs.rm(folder, recursive=True)


@pytest.mark.parametrize("name, content", [("3.safetensors", b"\1\0\0\0\0\0\0\0{"), ("3.jsonl", b"[]\n"), ("4.jsonl", b'{"image": "a"}\n')])
def test_foreign_file_is_no_shard(tmp_path, name, content):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is no shard of clipcap"): read_header(str(tmp_path/name))


def test_all_shards_and_their_index(units, photos, out):
    index = write_shards(MINI, units, out)
    assert Embeddings(out).names == [path.name for path in photos]
    assert json.loads(Path(out, "index.json").read_text()) == index
    assert (index["rows"], index["bad"], [shard["rows"] for shard in index["shards"]]) == (12, 2, [6, 6])
    write_shards(MINI, units[:1], out)  # the source has shrunk
    assert [*state(out)] == ["00000.safetensors"]


@pytest.mark.numerics
def test_rerun_writes_only_what_is_missing_or_changed(album, units, photos, out):
    index, before = write_shards(MINI, units, out), state(out)
    assert write_shards(MINI, units, out) == index and changed(out, before) == []
    rows = Embeddings(out).stack(Embeddings(out).names)
    Path(out, "00001.safetensors").unlink()
    write_shards(MINI, units, out)
    assert torch.equal(Embeddings(out).stack(Embeddings(out).names), rows) and changed(out, before) == ["00001.safetensors"]
    before = state(out)
    shutil.copy(photos[3], album/"damaged.png")  # mended
    assert write_shards(MINI, find_units([str(album)], 8, True), out)["bad"] == 1 and changed(out, before) == ["00000.safetensors"]
    assert torch.allclose(Embeddings(out)["damaged.png"], Embeddings(out)[photos[3].name], atol=1e-4)


@pytest.mark.slow
def test_killed_process_loses_only_the_shard_in_hand(album, photos, writer, out):
    "Killed by a signal that can't be caught, while it writes its third shard."
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    assert subprocess.run([sys.executable, "-c", KILLED, str(album), out], env=env).returncode == -signal.SIGKILL
    assert sorted(state(out)) == ["00000.safetensors", "00001.safetensors"] and [*Path(out).glob(".*")]
    begun = []
    def noted(unit, *args): return (begun.append(unit.number), writer.write(unit, *args))[1]
    index = write_shards(lambda: writer._replace(write=noted), find_units([str(album)], 4, True), out)
    assert (index["rows"], begun, [*Path(out).glob(".*")]) == (12, [2, 3], [])
    assert Embeddings(out).names == [path.name for path in photos]


def test_other_settings_are_refused_before_anything_is_done(units, out):
    write_shards(MINI, units, out)
    before = state(out)
    with pytest.raises(ValueError, match="was made with dtype='float32', and now it is 'float16'"): write_shards(HALF, units, out)
    with pytest.raises(ValueError, match="was made with source=.not recorded., and now it is 'elsewhere'"): write_shards(MINI, units, out, source="elsewhere")
    assert changed(out, before) == []
    assert write_shards(HALF, units[:1], out, restart=True)["row"]["dtype"] == "float16" and [*state(out)] == ["00000.safetensors"]


@pytest.fixture(scope="module")
def model(): return varied_model()


@pytest.fixture
def quick(outputs, model, monkeypatch):
    "A function that makes a writer of captions of the run `small` with these settings; it loads no model, and writes nothing but headers."
    save_run("small", model, (1, 2)), save_run("other", model)
    monkeypatch.setattr("clipcap.decoding.captioner.load_ensemble", lambda *_: model)
    monkeypatch.setattr("clipcap.decoding.captioner.Captioner.writer", lambda *_, **__: None)
    def write(unit, path, header, progress):
        path.write_text(json.dumps(header | {"rows": 1, "bad": 0}) + "\n")
        return {"rows": 1, "bad": 0}
    def make(options={}, **changes):
        Run("small").update(config=dataclasses.asdict(make_config("mini", device="cpu", **DIVERSE | changes)))
        return partial(lambda writer: writer._replace(write=write), captioner("small", **options))
    return make


@pytest.mark.parametrize("name", CAPTIONING)
def test_shards_of_any_other_setting_are_refused(quick, units, tmp_path, name):
    plain, other = {}, {name: another(name)}
    for number, (before, now) in enumerate([(plain, other), (other, plain)]):
        index = write_shards(quick(**before), units, out := str(tmp_path/f"{number}"))
        with pytest.raises(ValueError, match=f"00.jsonl was made with {name}=.*, and now it is .*; use the same settings, name another file or folder"):
            write_shards(quick(**now), units, out)
        assert write_shards(quick(**before), units, out) == index


@pytest.mark.parametrize("before, now", [("float32", None), (None, "float32"), ("float32", "auto")])
def test_shards_of_another_precision_are_refused(quick, units, out, before, now):
    write_shards(quick({"precision": before}, precision="auto"), units, out)
    with pytest.raises(ValueError, match=f"was made with precision='{before or 'auto'}', and now it is '{now or 'auto'}'"):
        write_shards(quick({"precision": now}, precision="auto"), units, out)


def test_shards_begun_with_a_length_penalty_are_not_continued_without(outputs, units, out):
    run, make = save_run("small", varied_model(), max_length=4, num_beams=2, length_penalty=0.2), partial(captioner, "small", device="cpu")
    write_shards(make, units[:1], out)
    before = state(out)
    run.update(config=run.manifest["config"] | {"length_penalty": 1.})
    with pytest.raises(ValueError, match="00000.jsonl was made with length_penalty=0.2, and now it is 1.0; use the same settings"):
        write_shards(make, units, out)
    assert changed(out, before) == [] and len(state(out)) == 1


def test_setting_that_is_no_longer_given_is_a_difference(units, out):
    write_shards(MINI, units, out, source="album")
    with pytest.raises(ValueError, match="was made with source='album', and now it is .not recorded."): write_shards(MINI, units, out)


def test_shards_of_captions_say_in_which_precision_they_were_computed(outputs, units, out):
    save_run("small", varied_model(), max_length=4, num_beams=1)
    index = write_shards(partial(captioner, "small", device="cpu"), units, out)
    assert index["settings"]["precision"] == "float32"  # as the preset says
    assert [shard["computed_in"] for shard in index["shards"]] == ["float32"]*2 == [read_header(f"{out}/0000{n}.jsonl")["computed_in"] for n in range(2)]


def test_unit_without_a_readable_photo_says_what_rows_would_be_like(tmp_path, writer, out):
    (tmp_path/"nothing").mkdir()
    (tmp_path/"nothing/note.jpg").write_text("no")
    index = write_shards(MINI, find_units([str(tmp_path/"nothing")]), out)
    assert index["rows"] == 0 and index["row"]["shape"] == [load_clip("mini")[0].visual.output_dim]


def anywhere(device="cpu"): return MINI()


def test_another_loop_in_any_order_with_a_failure(album, out):
    units = find_units([str(album)], 4, True)
    def backwards(make, settings, units, out):
        for unit in units[::-1]: yield {"file": "00001.safetensors", "failed": "no space left"} if unit.number == 1 else write_shard(unit, out, make(), settings)
    with pytest.raises(OSError, match=r"1 of 4 shards could not be written \(00001.safetensors: no space left\); the same command tries them again"):
        write_shards(anywhere, units, out, backwards)
    assert not Path(out, "index.json").exists()
    assert write_shards(MINI, units, out)["rows"] == 12


def test_ctrl_c_says_how_to_resume(units, out):
    write_shards(MINI, units, out)
    Path(out, "00001.safetensors").unlink()
    def interrupted(*_):
        raise KeyboardInterrupt
        yield
    with pytest.raises(KeyboardInterrupt, match="stopped with 1 of 2 shards; the same command resumes from there"): write_shards(anywhere, units, out, interrupted)


def test_folder_with_captions_added_is_a_store(units, writer, out):
    write_shards(MINI, units, out)
    with pytest.raises(ValueError, match=r"holds embeddings without captions \(of clipcap embed\?\)"): EmbeddingStore(out)
    index_store(out, lambda name: [f"a picture called {name}"])
    store, first = EmbeddingStore(out), Embeddings(f"{out}/00000.safetensors")
    assert (len(store), store.encoder) == (len(Embeddings(out)), writer.settings["encoder"])
    assert torch.equal(torch.from_numpy(store.map(0).copy()), first.stack(first.names))


def test_captions_are_those_of_one_file(outputs, album, tmp_path, out):
    save_run("small", varied_model(), max_length=10)
    with pytest.warns(UserWarning, match="2 photos"):
        caption_files([str(path) for path in sorted(album.iterdir())], "small", tmp_path/"captions.jsonl", batch_size=8, device="cpu")
    units, make = find_units([str(album)], 8), partial(captioner, "small", batch_size=8, device="cpu")
    index = write_shards(make, units, out)
    rows = [row for path in sorted(Path(out).glob("*.jsonl")) for row in json_lines(path)[1:]]
    assert rows == json_lines(tmp_path/"captions.jsonl")[1:]
    assert len({row.get("caption") for row in rows}) > 5 and [Path(row["image"]).name for row in rows if "error" in row] == ["damaged.png", "note.jpg"]
    assert (index["rows"], index["bad"], index["settings"]["num_beams"]) == (12, 2, 5)
    with pytest.raises(ValueError, match="num_beams=5, and now it is 1"): write_shards(partial(make, num_beams=1), units, out)
    with pytest.raises(ValueError, match="was made with encoder=.not recorded., and now it is 'mini@"): write_shards(MINI, units, out)


def test_sampled_captions_depend_on_the_unit_alone(outputs, album, tmp_path):
    save_run("small", varied_model(), max_length=10, temperature=1., num_beams=1)
    units, make = find_units([str(album)], 8), partial(captioner, "small", device="cpu")
    for name in ("a", "b"): write_shards(make, units, str(tmp_path/name))
    (tmp_path/"b/00001.jsonl").unlink()
    write_shards(make, units, str(tmp_path/"b"))
    for name in ("00000.jsonl", "00001.jsonl"): assert json_lines(tmp_path/"a"/name) == json_lines(tmp_path/"b"/name)
