"""The console script `clipcap`: score, caption, embed, verify (clipcap.apps.cli)."""
import dataclasses
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT

from clipcap.apps.cli import main, references_with_words, written_under
from clipcap.core import Run, make_config


def write(path, content):
    "Write bytes, text, or anything else as JSON; return the path."
    path.write_bytes(content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode())
    return path


def json_lines(text): return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def command(capsys):
    "A function that runs `clipcap` in this process: exit status, stdout, stderr."
    def run(*words):
        capsys.readouterr()
        try: status = main([str(word) for word in words])
        except SystemExit as end: status = end.code
        return status, *capsys.readouterr()
    return run


@pytest.fixture
def refused(command):
    "A function that runs `clipcap` and checks its exit status, what it says, and that it prints nothing."
    def run(*words, status=1, text):
        found, out, err = command(*words)
        assert (found, out if status == 1 else "") == (status, "") and text in err and "Traceback" not in err, err
    return run


# --- score

RESULTS = [{"image_id": 1, "caption": "a black dog runs through the snow"}, {"image_id": 2, "caption": "a girl climbs stairs"},
           {"image_id": 3, "caption": ""}, {"image_id": 4, "caption": "un niño\ncorre"}, {"image_id": 5, "caption": "dog "*2500}]
HUMAN = [("1", "A black dog is running in the snow ."), ("1", "The dog runs through deep snow ."), ("2", "A girl is climbing stairs"),
         ("3", "A red car"), ("4", "Un niño corre ."), ("5", "A dog"), ("6", "A cat")]


@pytest.fixture
def files(tmp_path):
    "Captions and references of a few images, as JSON."
    return (write(tmp_path/"captions", RESULTS), write(tmp_path/"references", {"annotations": [{"image_id": int(i), "caption": c} for i, c in HUMAN]}))


@pytest.mark.numerics
def test_scores_are_those_of_the_library_for_json_and_csv(command, files, tmp_path):
    from clipcap.scoring.metrics import score
    direct = score({str(r["image_id"]): r["caption"] for r in RESULTS}, {i: [c for j, c in HUMAN if j == i] for i, _ in HUMAN if i != "6"}, ["bleu_1", "cider"])
    status, out, err = command("score", *files, "--metrics", "bleu_1,cider", "--csv", tmp_path/"s.csv", "--json", tmp_path/"s.json")
    saved = json.loads((tmp_path/"s.json").read_text())
    assert status == 0 and saved["corpus"] == direct.corpus and "cider" in out
    per_image = pd.read_csv(tmp_path/"s.csv", index_col="image_id", dtype={"image_id": str}, float_precision="round_trip")
    pd.testing.assert_frame_equal(per_image, direct.per_image, check_names=False, rtol=1e-12)
    assert (per_image.loc["3"] == 0).all() and "empty captions, scored 0: 1 (3)" in err
    assert per_image.loc["4", "cider"] > 5 and per_image.loc["1", "bleu_1"] > 0.5  # line breaks and letters outside English pass
    assert {k: saved["protocol"][k] for k in ("images", "references", "tokenization", "images with references but without a caption, left out")} == {
        "images": 5, "references": 6, "tokenization": "ptb", "images with references but without a caption, left out": 1}
    pd.DataFrame([(r["image_id"], r["caption"].replace("\n", " ")) for r in RESULTS], columns=["image", "caption"]).to_csv(tmp_path/"c.csv", index=False)
    pd.DataFrame(HUMAN, columns=["image", "caption"]).to_csv(tmp_path/"r.csv", index=False)
    def corpus(*words): assert command("score", *words, "--metrics", "bleu_1 cider", "--json", tmp_path/"t.json")[0] == 0; return json.loads((tmp_path/"t.json").read_text())["corpus"]
    assert corpus(tmp_path/"c.csv", tmp_path/"r.csv") == direct.corpus != corpus(*files, "--tokenization", "raw")


@pytest.mark.parametrize("words, status, text", [
    (["score", "absent.json", "references"], 1, "absent.json"),
    (["score", "captions", "table.csv"], 1, "table.csv, line 1: expected the header"),
    (["score", "captions", "references", "--metrics", "cidre"], 1, "got ['cidre']"),
    (["score", "captions", "references", "--tokenization", "spacy"], 1, "not 'spacy'"),
    (["score", "foreign", "references"], 1, "the captions are of a.jpg, the references of 1, 2, 3"),
    (["score", "nothing", "references"], 1, "the captions are of nothing"),
    (["score", "captions"], 2, "references"),
    (["scroe", "captions", "references"], 2, "did you mean 'score'?"),
    (["caption"], 2, "photos"), (["caption", "photos", "--beams", 1], 2, "unrecognized arguments"),
])
def test_wrong_words_and_files_end_in_a_line_that_names_them(refused, files, tmp_path, monkeypatch, words, status, text):
    monkeypatch.chdir(tmp_path)
    for name, content in {"foreign": {"a.jpg": "a dog"}, "nothing": [], "table.csv": "image_id,cider\n1,0.5\n"}.items(): write(tmp_path/name, content)
    refused(*words, status=status, text=text)


def test_references_without_a_word_are_left_out_and_counted():
    notes = {}
    with pytest.warns(UserWarning) as told:
        found = references_with_words({"1": ["A dog", "..."], "2": ["A cat"], "3": ["...", ""], "4": ["", "One"]}, notes)
    assert found == {"1": ["A dog"], "2": ["A cat"], "4": ["One"]} and len(told) == 2
    assert notes == {"images with references without a word, which are left out": 2, "images without any word in their references, left out": 1}


def test_help_names_commands_and_options(command):
    assert command()[0] == 2
    for words, text in ((["--help"], "score Score captions"), (["score", "--help"], "Bootstrap draws for the intervals"), (["caption", "--help"], "the first is 1")):
        status, out, _ = command(*words)
        assert status == 0 and text in " ".join(out.split())


@pytest.mark.parametrize("content, found", [(None, {}), ('{"protocol": {"num_beams": 5, "seed": 42, "images": 9}}', {"num_beams": 5, "seed": 42}), ("{", {})])
def test_a_runs_captions_bring_how_they_were_written(tmp_path, content, found):
    captions = write(tmp_path/"captions_test.json", RESULTS)
    if content: write(tmp_path/"scores_test.json", content)
    assert written_under(captions) == found


PROGRAM = "import sys; from clipcap.apps.cli import main; status = main(); assert not {'torch', 'pandas'} & {*sys.modules}, 'slow'; sys.exit(status)"


def test_the_program_waits_for_no_heavy_import():
    done = subprocess.run([sys.executable, "-c", PROGRAM, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "") and "usage: clipcap" in done.stdout
    assert "console_scripts = clipcap=clipcap.apps.cli:main" in (ROOT/"settings.ini").read_text()


def test_a_pipe_that_closes_early_is_no_error(tmp_path):
    program = write(tmp_path/"say.py", """
import sys
from clipcap.apps import cli
def say():
    "Say much."
    for n in range(9999): print("y"*99, flush=True)
cli.COMMANDS["say"] = say
sys.exit(cli.main(["say"]))
""")
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as talker:
        assert talker.stdout.readline() == b"y"*99 + b"\n"
        talker.stdout.close()
        assert (talker.stderr.read(), talker.wait()) == (b"", 0)


def test_messages_hold_no_control_characters(command, tmp_path):
    _, _, err = command("score", tmp_path/"a\x1b[2J", tmp_path/"b")
    assert "a\\x1b[2J" in err and "\x1b" not in err


# --- caption and embed

@pytest.fixture(scope="module")
def model():
    from clipcap.model import load_model
    return load_model(make_config("mini", device="cpu", max_length=10)).eval()


@pytest.fixture
def photos(scenes): return [str(path) for path in sorted(scenes.photos.iterdir())[:3]]


@pytest.fixture
def small(outputs, model):
    "A run with an untrained mapping network as checkpoints 1 and 2."
    from clipcap.runs.checkpoints import save_checkpoint
    run = Run("small")
    run.update(preset="mini", config=dataclasses.asdict(make_config("mini", device="cpu", max_length=10)))
    for epoch in (1, 2): save_checkpoint(run.path/f"checkpoints/mapping_network_epoch_{epoch}.pth", model.mapping_network.state_dict())
    return run


def rows(model, *batches):
    "What `clipcap caption` should write of photos that are captioned in these batches."
    from clipcap.model import generate_caption_batch
    return [{"image": photo, "caption": text} for batch in batches for photo, text in zip(batch, generate_caption_batch(batch, model, 10))]


def test_captions_go_to_the_terminal_or_a_file_that_is_resumed(command, small, model, photos, tmp_path):
    status, out, _ = command("caption", *photos, "--run", "small", "--device", "cpu")
    assert (status, json_lines(out)) == (0, rows(model, photos))
    for given in (photos[:2], photos): assert command("caption", *given, "--run", "small", "--out", tmp_path/"c.jsonl", "--device", "cpu")[:2] == (0, "")
    assert json_lines((tmp_path/"c.jsonl").read_text())[1:] == rows(model, photos[:2], photos[2:])


def test_a_list_comes_by_standard_input(command, small, model, photos, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join([*photos, "nowhere.jpg"]).encode())))
    status, out, err = command("caption", "-", "--run", "small", "--num_beams", 5, "--epoch", 1, "--device", "cpu")
    assert (status, json_lines(out)[:3], json_lines(out)[3]["image"]) == (0, rows(model, photos), "nowhere.jpg")
    assert "1 photos can't be read" in err


@pytest.mark.parametrize("words, text", [
    (["{photo}", "absent", "--run", "small"], "there is no file or folder"),
    (["{photo}", "--run", "smal"], "clipcap caption: there is no run 'smal'"),
    (["{photo}", "--run", "small", "--epoch", "best?"], "no checkpoint of epoch best?; there are [1, 2]"),
    (["{photo}", "--run", "small", "--epoch", "0"], "no checkpoint of epoch 0; there are [1, 2]"),
    (["{photo}", "--run", "small", "--num_beams", "0"], "num_beams=0 is too small"),
    (["{photo}", "--run", "small", "--device", "abacus"], "abacus"),
    (["{photo}", "--cluster", "auto"], "name it with --out"),
])
def test_captioning_names_what_is_missing(refused, small, photos, words, text): refused("caption", *(w.format(photo=photos[0]) for w in words), text=text)


def test_captions_of_other_settings_are_not_resumed_and_ctrl_c_tells_how_to(command, refused, small, photos, tmp_path, monkeypatch):
    words = ["caption", photos[0], "--run", "small", "--out", tmp_path/"c.jsonl"]
    def stopped(*_): yield photos[0], "A dog ."; raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr("clipcap.decoding.stream.caption_stream", stopped)
        status, _, err = command(*words)
        assert status == 130 and "clipcap caption: stopped after 1 photos" in err
        assert command(*words[:-2], "--num_beams", 1)[0] == 130
    refused(*words, "--num_beams", 1, text="num_beams=5, and now it is 1")


@pytest.fixture
def album(tmp_path, photos):
    "Three photos and a file that is none, as a folder and as a tar."
    folder = tmp_path/"album"
    folder.mkdir()
    for n, photo in enumerate(photos): (folder/f"{n}.png").write_bytes(Path(photo).read_bytes())
    (folder/"note.jpg").write_text("not a photo")
    with tarfile.open(tmp_path/"00000.tar", "w") as tar: tar.add(folder, "")
    return folder


@pytest.mark.numerics
def test_photos_of_a_folder_and_of_a_tar_are_embedded(command, refused, album, photos, clip_mini, tmp_path, outputs):
    import torch

    from clipcap.data import encode_images
    from clipcap.formats.embeddings import Embeddings
    from clipcap.formats.photos import read_photo
    eye, preprocess, name = clip_mini
    words = ["embed", album, tmp_path/"embedded", "--clip_model", "mini", "--device", "cpu", "--shard_size", 2]
    status, out, err = command(*words)
    assert status == 0 and "3 photos in 2 shards" in out and "1 photos can't be read" in err
    assert sorted(p.name for p in (tmp_path/"embedded").iterdir()) == ["00000.safetensors", "00001.safetensors", "index.json"]
    found = Embeddings(tmp_path/"embedded")
    assert (found.names, found.encoder) == (["0.png", "1.png", "2.png"], name)
    torch.testing.assert_close(found.stack(found.names), encode_images(eye, torch.stack([preprocess(read_photo(p)) for p in photos])), atol=1e-5, rtol=0)
    assert command("embed", tmp_path/"00000.tar", tmp_path/"from-tar", "--clip_model", "mini", "--device", "cpu", "--dtype", "float16")[0] == 0
    assert Embeddings(tmp_path/"from-tar").names == [f"00000.tar/{n}.png" for n in range(3)]
    refused(*words, "--dtype", "float16", text="was made with dtype='float32', and now it is 'float16'")


def test_photos_of_a_tar_are_captioned_as_those_of_files(command, small, model, photos, album, tmp_path):
    status, out, _ = command("caption", tmp_path/"00000.tar", "--run", "small", "--device", "cpu")
    tar = f"{tmp_path}/00000.tar"
    assert [(row["image"], row.get("caption")) for row in json_lines(out)] == [*((f"{tar}/{n}.png", row["caption"]) for n, row in enumerate(rows(model, photos))),
                                                                               (f"{tar}/note.jpg", None)]


@pytest.mark.parametrize("words, text", [
    (["absent", "x"], "there is no file or folder"),
    ([".", "x", "--cluster", "somewhere"], "--cluster somewhere is no address of a cluster; give HOST:PORT"),
    ([".", "x", "--cluster", "127.0.0.1:9"], "no cluster answers at 127.0.0.1:9 ("),
])
def test_embedding_names_what_is_missing(refused, tmp_path, monkeypatch, outputs, words, text):
    monkeypatch.chdir(tmp_path)
    write(tmp_path/"a.jpg", "")
    refused("embed", *words, "--clip_model", "mini", text=text)
    assert not (tmp_path/"x").exists()


# --- verify

def test_status_of_verify_is_1_where_a_byte_differs(command, refused, outputs):
    run, config = Run("seen"), make_config("mini", device="cpu")
    run.update(preset="mini", config=dataclasses.asdict(config), stages={})
    pd.DataFrame({"image": list("abc"), "caption": ["a dog"]*3, "split": ["train", "val", "test"]}).to_csv(run.path/"captions_table.csv", index=False)
    with run.stage("01_data", config): pass
    status, out, _ = command("verify", "seen", "--json", outputs/"checks.json")
    assert status == 0 and "0 differ" in out
    checks = json.loads((outputs/"checks.json").read_text())
    assert [row["agrees"] for row in checks if row["what"] == "captions_table.csv"] == [True]
    assert None in [row["agrees"] for row in checks]  # notes: there are no embeddings to hash
    assert [command("verify", *words)[0] for words in (["seen", "--strict"], [run.path], ["seen", "--against", "seen"])] == [1, 0, 0]
    with open(run.path/"captions_table.csv", "a") as file: file.write("d,a cat,train\n")
    status, out, _ = command("verify", "seen")
    assert status == 1 and "DIFFERS  files: captions_table.csv: " in out and "1 differ" in out
    refused("verify", "sen", text="there is no run 'sen'")
    refused("verify", "seen", "--against", "sen", text="there is no run 'sen'")
    refused("verify", status=2, text="run")


# --- options

def test_version_is_that_of_the_package(command):
    import clipcap
    assert command("--version") == (0, f"clipcap {clipcap.__version__}\n", "")


def test_options_may_have_hyphens_but_values_keep_theirs(monkeypatch, command):
    from clipcap.apps import cli
    calls = []
    def say(words: cli.Param("Some words", str, nargs="*"), num_beams: int = 5, out_file: str = "", very_new: bool = False):
        "Keep what was given."
        calls.append((words, num_beams, out_file, very_new))
    monkeypatch.setitem(cli.COMMANDS, "say", say)
    for words in (["--num-beams", "2", "--out-file=a-b--c-d", "--very-new", "x-y"], ["--num_beams", "2", "--out_file", "a-b--c-d", "--very_new", "x-y"]):
        assert command("say", *words) == (0, "", "")
    assert command("say", "--num-b", "2", "--", "--a-file", "-b")[0] == 0
    assert calls == [(["x-y"], 2, "a-b--c-d", True)]*2 + [(["--a-file", "-b"], 2, "", False)]
