"""A captioner that is called, saved, loaded and shared (clipcap.decoding.captioner, clipcap.decoding.model_folder)."""
import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from test_encoders import write_hub
from test_stream import json_lines, save_run, varied_model

import clipcap
from clipcap.apps.cli import main
from clipcap.core import make_config
from clipcap.data import encode_images
from clipcap.decoding.captioner import Caption, Captioner, token_mask
from clipcap.decoding.model_folder import SETTINGS, WRITING
from clipcap.formats.clip_files import SIZES
from clipcap.formats.tokenizer import encode_captions, gpt2_path
from clipcap.model import generate_caption_batch, generate_from_embeddings, load_model
from clipcap.networks.language_models import tiny_language_model
from clipcap.runs.files import asset_path

SMALL = {"num_layers": 1, "max_length": 8, "num_beams": 2, "device": "cpu", "precision": "float32"}
KINDS = {
    "transformer": {}, "tokens": {"mapping_network": "transformer_clip_tokens"}, "grid": {"mapping_network": "grid", "features": "grid"},
    "mlp": {"mapping_network": "mlp"}, "lowrank": {"mapping_network": "lowrank"}, "scaled": {"mapping_network": "linear", "embedding_scaling": "standard"},
    "lora": {"mapping_network": "linear", "gpt2_tuning": "lora", "lora_rank": 2}, "full": {"mapping_network": "linear", "gpt2_tuning": "full"},
    "llama": {"mapping_network": "linear", "gpt2_model": "llama"}, "whole": {"mapping_network": "mlp", "gpt2_model": "llama", "clip_model": "clip", "prefix_length": 4},
    "siglip": {"mapping_network": "linear", "clip_model": "siglip"}, "given": {"start_token": "given", "length_penalty": 0.5}}
WHOLE = ("whole", "siglip")  # saved with their frozen parts, which are then deleted
CAPTIONING = """
import json, sys
from clipcap import Captioner
photos, *folders = sys.argv[1:]
captions = {folder: Captioner.from_pretrained(folder, device="cpu")(json.loads(photos)) for folder in folders}
print(json.dumps({folder: [[str(c), c.log_probability] for c in found] for folder, found in captions.items()}))"""


@pytest.fixture(scope="module")
def photos(scenes): return sorted(scenes.photos.iterdir())[:3]


@pytest.fixture(scope="module")
def captioner(): return Captioner(varied_model(max_length=12), make_config("mini", device="cpu", max_length=12))


def backbones(folder):
    "A language model that is not GPT-2, an encoder that is no CLIP, and a CLIP in a file of its own."
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(gpt2_path("mini"))
    write_hub(folder/"siglip", "siglip_vision_model")
    tiny_language_model("llama", len(tokenizer)).save_pretrained(folder/"llama")
    tokenizer.save_pretrained(folder/"llama")
    save_file(load_file(asset_path("mini/clip.safetensors")) | {name: torch.tensor(64) for name in SIZES}, folder/"clip.safetensors")


def moved_captioner(folder, kind):
    "A captioner all of whose own weights, rows of added tokens among them, are not those that its seed draws."
    changes = KINDS[kind]
    places = {"llama": str(folder/"llama"), "clip": str(folder/"clip.safetensors"), "siglip": f"hf:{folder/'siglip'}"}
    config = make_config("mini", **SMALL | {name: places.get(value, value) for name, value in changes.items()})
    model, draw = load_model(config).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in [*model.mapping_network.parameters(), *(p for p in model.gpt2.parameters() if p.requires_grad)]: p += 0.05*torch.randn(p.shape, generator=draw)
        for layer in {model.gpt2.get_input_embeddings(), model.gpt2.get_output_embeddings()}: layer.weight[-2:] += 0.3*torch.randn(2, layer.weight.shape[1], generator=draw)
        if kind == "scaled": model.mapping_network.embedding_std.mul_(0.3)
    return Captioner(model, config)


# --- saved and loaded

@pytest.fixture(scope="module")
def loaded(tmp_path_factory, photos):
    "Kind -> what the captioner writes in this process, and what it writes in a new one that has its folder alone."
    there, elsewhere = tmp_path_factory.mktemp("captioners"), tmp_path_factory.mktemp("elsewhere")
    backbones(there)
    shutil.copytree(there, there/"moved")
    shutil.move(there/"moved", elsewhere/"moved")
    expected = {}
    for kind in KINDS:
        place = elsewhere/"moved" if kind in WHOLE else there
        captioner = moved_captioner(place, kind)
        captioner.save_pretrained(there/"saved"/kind, include_backbones=kind in WHOLE)
        expected[kind] = [[str(c), c.log_probability] for c in captioner(photos)]
    shutil.rmtree(elsewhere/"moved")
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(elsewhere/"hub"), "CLIPCAP_OUTPUTS": str(elsewhere/"outputs"), "PYTHONPATH": str(Path(clipcap.__path__[0]).parent)}
    done = subprocess.run([sys.executable, "-c", CAPTIONING, json.dumps([*map(str, photos)]), *(str(there/"saved"/kind) for kind in KINDS)],
                          cwd=elsewhere, env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {kind: (expected[kind], found[str(there/"saved"/kind)]) for kind in KINDS}, there/"saved"


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_process_writes_the_same_captions(loaded, kind):
    expected, found = loaded[0][kind]
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert np.allclose([p for _, p in found], [p for _, p in expected], atol=1e-5)


def test_captions_of_the_kinds_differ(loaded): assert len({str(expected) for expected, _ in loaded[0].values()}) == len(KINDS)


def test_a_whole_folder_names_no_place_of_this_machine(loaded):
    folder = loaded[1]/"whole"
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} >= {"clip/model.safetensors", "gpt2/model.safetensors", "gpt2/tokenizer.json"}
    text = (folder/"config.json").read_text()
    assert "/" not in text.replace("mini/", "") and json.loads(text)["settings"]["gpt2_model"] == "llama"
    Captioner.from_pretrained(folder, device="cpu").save_pretrained(folder.with_name("again"))  # whole, as it was
    assert (folder.with_name("again")/"config.json").read_text() == text


def test_weights_of_a_folder_are_those_that_were_trained(loaded):
    names = {kind: {name.partition(".")[0] for name in load_file(loaded[1]/kind/"model.safetensors")} for kind in KINDS}
    assert names["mlp"] == {"mapping_network", "added_tokens"} and names["lora"] == {"mapping_network", "gpt2", "added_tokens"}
    assert names["full"] == {"mapping_network", "gpt2"}
    assert {*load_file(loaded[1]/"llama"/"model.safetensors")} > {"added_tokens.input", "added_tokens.output"}  # its layers have weights of their own


def test_rows_of_added_tokens_are_saved_in_full_precision(tmp_path):
    rough, exact = (load_model(make_config("mini", precision=p, mapping_network="linear", device="cpu"), 16) for p in ("bfloat16", "float32"))
    Captioner(rough, make_config("mini", precision="bfloat16", mapping_network="linear", device="cpu")).save_pretrained(tmp_path/"a")
    Captioner.from_pretrained(tmp_path/"a", device="cpu").save_pretrained(tmp_path/"b")
    for name in "ab":
        saved = load_file(tmp_path/name/"model.safetensors")["added_tokens.input"]
        assert torch.equal(saved, exact.gpt2.get_input_embeddings().weight[-2:]) and saved.dtype == torch.float32


def test_a_write_that_fails_leaves_the_folder_as_it_was(tmp_path, captioner, monkeypatch):
    captioner.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr("clipcap.decoding.model_folder.save_file", full)
    other = Captioner(captioner.model, dataclasses.replace(captioner.config, num_beams=1))
    with pytest.raises(OSError, match="its disk is full"): other.save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_ensemble_is_not_saved(tmp_path, captioner):
    config = dataclasses.replace(captioner.config, ensemble="other")
    other = varied_model(max_length=12)
    other.ensemble = torch.nn.ModuleList([captioner.model])
    with pytest.raises(ValueError, match=r"is an ensemble \(other\), and a folder holds one model; save each run"): Captioner(other, config).save_pretrained(tmp_path/"x")
    assert not (tmp_path/"x").exists()


# --- called

FORMS = {"path as text": str, "path": Path, "bytes": Path.read_bytes, "file in memory": lambda p: BytesIO(p.read_bytes()), "PIL image": Image.open,
         "pixels": lambda p: np.asarray(Image.open(p).convert("RGB"))}


@pytest.mark.parametrize("form", [*FORMS, "preprocessed"])
def test_a_photo_of_any_form_gives_a_caption(captioner, photos, form):
    path = photos[1]
    photo = FORMS[form](path) if form in FORMS else captioner.model.preprocess(Image.open(path).convert("RGB"))
    caption = captioner(photo, num_beams=1)
    assert isinstance(caption, Caption) and str(caption) == caption.text == generate_caption_batch([path], captioner.model, 12, 1)[0]


def test_a_list_gives_a_list_and_an_iterator_an_iterator(captioner, photos):
    alone = [captioner(photo) for photo in photos]
    for given in (photos, tuple(photos), np.array([*map(str, photos)]), iter(photos), (p for p in photos)):
        found = captioner(given, batch_size=2)
        assert isinstance(found, list) == (not hasattr(given, "__next__")) and [c.text for c in found] == [c.text for c in alone]
    assert captioner([]) == [] and [c.text for c in captioner(photos[:1])] == [alone[0].text] and list(captioner(iter([]))) == []


def test_an_iterator_is_read_a_few_batches_at_a_time(captioner, photos):
    taken = []
    def endless():
        while True: yield taken.append(0) or photos[0]
    captions = captioner(endless(), batch_size=2, num_beams=1, max_length=3)
    assert not taken
    for done, _ in zip(range(11), captions): assert len(taken) == (2 if done < 2 else 10 if done < 10 else 18)  # a batch, then four at once


def test_a_damaged_photo_of_a_later_batch_is_named(captioner, photos):
    with pytest.raises(OSError, match=r"photos\[2\] \(9 bytes\) can't be read"): captioner([*photos[:2], b"no photo!"], batch_size=2, num_beams=1, max_length=3)
    with pytest.raises(TypeError, match=r"expected a photo, found 3 \(int\) as photos\[1\]"): captioner([photos[0], 3])


@pytest.mark.parametrize("options, error, message", [
    ({"num_beam": 3}, ValueError, "unknown option 'num_beam'; did you mean 'num_beams'"), ({"rerank": "mbr"}, ValueError, "unknown option 'rerank'; options are num_beams, "),
    ({"epochs": 3}, ValueError, "unknown option 'epochs'"), ({"num_beams": 0}, ValueError, "num_beams=0 is too small"), ({"num_beams": "3"}, TypeError, "num_beams='3' is a str"),
    ({"temperature": -1.}, ValueError, "temperature=-1.0 is too small"), ({"temperature": float("nan")}, ValueError, "not a finite number"),
    ({"start_token": "maybe"}, ValueError, "start_token='maybe' is unknown"), ({"max_length": 9999}, ValueError, "max_length=9999 need"), ({"top_p": True}, TypeError, "top_p=True"),
    ({"candidates": 0}, ValueError, "candidates=0 must be a whole number"), ({"candidates": 2.5}, ValueError, "candidates=2.5"), ({"batch_size": 0}, ValueError, "batch_size=0"),
    ({"candidates": 6}, ValueError, "candidates=6 are more than the search has with num_beams=5; use num_beams=6, or sample")])
def test_an_option_that_is_not_possible_is_named(captioner, options, error, message):
    for photos in ([], iter([])):
        with pytest.raises(error, match=message): captioner(photos, **options)


@pytest.mark.parametrize("option, value", {"num_beams": 1, "max_length": 4, "start_token": "given", "length_penalty": 0., "no_repeat_ngram": 1, "temperature": 3., "top_p": 0.5}.items())
def test_every_option_of_decoding_matters(captioner, photos, option, value):
    def write(**options):
        torch.manual_seed(0)
        return [caption.text for caption in captioner(photos, **{"temperature": 2., "num_beams": 1} if option in ("top_p", "no_repeat_ngram") else {}, **options)]
    assert write(**{option: value}) != write() == write(**{option: None})
    assert option in WRITING and len(WRITING) == 7


def test_candidates_are_the_beams_or_samples(captioner, photos):
    beams = captioner(photos, candidates=3)
    assert [group[0].text for group in beams] == [c.text for c in captioner(photos)] and {len({c.text for c in group}) for group in beams} == {3}
    samples = captioner(photos[0], candidates=20, temperature=1.5)
    assert len(samples) == 20 and len({c.text for c in samples}) > 5
    assert [c.log_probability for c in samples] == sorted((c.log_probability for c in samples), reverse=True)


def test_a_captioner_of_embeddings_captions_them(captioner, tmp_path):
    blind = Captioner(load_model(captioner.config, 128).eval(), captioner.config)
    blind.save_pretrained(tmp_path)
    blind, rows = Captioner.from_pretrained(tmp_path, device="cpu"), torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    assert [c.text for c in blind.caption_embeddings(rows, batch_size=2)] == generate_from_embeddings(rows, blind.model, 12)
    assert [str(c) for c in blind.caption_embeddings(rows[0].numpy()[None])] == generate_from_embeddings(rows[:1], blind.model, 12)
    with pytest.raises(ValueError, match="this model has no CLIP"): blind([])
    for rows in (rows[0], rows*torch.nan):
        with pytest.raises(ValueError, match="expected embeddings"): blind.caption_embeddings(rows)


# --- log-probabilities

def embeddings_of(captioner, photos):
    return encode_images(captioner.model.clip, torch.stack([captioner.model.preprocess(Image.open(p).convert("RGB")) for p in photos])).clone()


@pytest.mark.numerics
@pytest.mark.parametrize("options", [{}, {"num_beams": 1}, {"temperature": 1.}, {"start_token": "given"}, {"max_length": 4}], ids=str)
def test_log_probability_is_the_loss_of_the_caption(captioner, photos, options):
    model = captioner.model
    for embedding, caption in zip(embeddings_of(captioner, photos), captioner(photos, **options)):
        ids = torch.tensor([caption.ids])
        loss = model(embedding[None], ids, torch.ones_like(ids)).item()/len(caption.ids)
        assert abs(caption.log_probability + loss) < 1e-5 and abs(sum(caption.log_probabilities)/len(caption.ids) + loss) < 1e-5
        assert [word for word, _ in caption.words] == caption.text.split() and all(0 < p <= 1 for _, p in caption.words)
        special = sum(p for i, p in zip(caption.ids, caption.log_probabilities) if i in model.tokenizer.all_special_ids)
        assert abs(np.log([p for _, p in caption.words]).sum() + special - sum(caption.log_probabilities)) < 1e-4
        assert caption.ids.count(model.tokenizer.eos_token_id) <= 1 and model.tokenizer.pad_token_id not in caption.ids


@pytest.mark.numerics
def test_log_probability_of_an_ensemble_is_the_mean(captioner, photos):
    both = Captioner(varied_model(max_length=12), captioner.config)
    both.model.ensemble = torch.nn.ModuleList([varied_model(max_length=12, seed=1)])
    for caption, embedding in zip(both(photos), embeddings_of(both, photos)):
        ids = torch.tensor([caption.ids])
        mean = -sum(m(embedding[None], ids, torch.ones_like(ids)).item() for m in (both.model, *both.model.ensemble))/2/len(caption.ids)
        assert abs(caption.log_probability - mean) < 1e-5


def test_tokens_end_with_the_first_end_token():
    assert token_mask(torch.tensor([[5, 9, 7, 9], [9, 7, 7, 7], [1, 2, 3, 4]]), 9).tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]


# --- damage

@pytest.fixture(scope="module")
def whole(tmp_path_factory, captioner):
    "A saved captioner, to be copied."
    folder = tmp_path_factory.mktemp("whole")
    captioner.save_pretrained(folder)
    return folder


def edited(**changes):
    "A change of `config.json`; None removes a key."
    def change(folder):
        about = json.loads((folder/"config.json").read_text())
        for name, value in changes.items():
            part, key = (about["settings"], name) if name in SETTINGS or name == "telepathy" else (about, name)
            part.update({key: value}) if value is not None else part.pop(key)
        (folder/"config.json").write_text(json.dumps(about))
    return change


def reweighed(change):
    "A change of the tensors, by a function of their dictionary."
    def write(folder):
        tensors = load_file(folder/"model.safetensors")
        change(tensors)
        save_file(tensors, folder/"model.safetensors")
    return write


class Boom:
    def __reduce__(self): return (print, ("ran",))


NAME = "mapping_network.project.weight"
DAMAGE = {
    "no config": (lambda f: (f/"config.json").unlink(), "holds no config.json, and so no captioner"),
    "no weights": (lambda f: (f/"model.safetensors").unlink(), "model.safetensors is missing; save it again"),
    "config is no JSON": (lambda f: (f/"config.json").write_text("{"), "config.json is not JSON"),
    "config is binary": (lambda f: (f/"config.json").write_bytes(b"\xff\xfe{}"), "config.json is not JSON"),
    "config is deep": (lambda f: (f/"config.json").write_text("["*100000), "config.json is not JSON"),
    "config is a list": (lambda f: (f/"config.json").write_text("[]"), "config.json: it is not of a captioner of clipcap"),
    "config of GPT-2": (lambda f: shutil.copy(gpt2_path("mini") + "/config.json", f), "config.json: it is not of a captioner of clipcap"),
    "later format": (edited(format=2, clipcap="9.0"), "config.json: format=2, and clipcap .* reads 1; use clipcap 9.0"),
    "unknown key": (edited(telephone=1), "config.json: the key 'telephone' is unknown"), "missing key": (edited(sha256=None), "config.json: the key 'sha256' is missing"),
    "unknown setting": (edited(telepathy=1), "config.json: the setting 'telepathy' is unknown"), "missing setting": (edited(num_heads=None), "config.json: the setting 'num_heads' is missing"),
    "impossible setting": (edited(num_beams=0), "config.json: num_beams=0 is too small"), "setting of another type": (edited(num_layers="2"), "config.json: num_layers='2' is a str"),
    "unknown network": (edited(mapping_network="os:system"), "config.json: mapping_network='os:system' is unknown"), "key of another type": (edited(clip_dim="x"), "config.json: clip_dim='x' is a str"),
    "unknown part": (edited(inside=["../x"]), r"config.json: inside=\['../x'\]; it may list"), "part that is missing": (edited(inside=["gpt2_model"]), "gpt2 is missing, or holds no safetensors file; save it again"),
    "part as a pickle": (lambda f: ((f/"gpt2").mkdir(), torch.save({}, f/"gpt2"/"pytorch_model.bin"), edited(inside=["gpt2_model"])(f)), "gpt2 is missing, or holds no safetensors file"),
    "other CLIP": (edited(encoder="mini@0123456789abcdef"), "config.json: encoder was 'mini@0123456789abcdef', and clip_model='mini' is 'mini@.*'; name the one it was made with"),
    "other language model": (edited(language_model={"gpt2": "mini@0123"}), "config.json: gpt2 was 'mini@0123', and gpt2_model='mini' is 'mini@.*'; name the one"),
    "other tokenizer": (edited(language_model={"tokenizer": "0123"}), "config.json: tokenizer was '0123'"),
    "other network": (edited(mapping_network="mlp"), "model.safetensors: 'mapping_network.layers.0.bias' is missing"),
    "other width": (edited(feedforward_dim=8), r"model.safetensors: 'mapping_network.decoder.layers.0.linear1.bias' has the shape \(512,\), and by config.json it is \(8,\)"),
    "NaN": (reweighed(lambda t: t[NAME].view(-1)[:1].fill_(torch.nan)), f"model.safetensors: '{NAME}' holds NaN or infinity"),
    "infinity": (reweighed(lambda t: t["added_tokens.input"].view(-1)[:1].fill_(torch.inf)), "model.safetensors: 'added_tokens.input' holds NaN or infinity"),
    "shape": (reweighed(lambda t: t.update({NAME: t[NAME][1:].clone()})), rf"model.safetensors: '{NAME}' has the shape \(127, 128\)"),
    "type": (reweighed(lambda t: t.update({NAME: t[NAME].long()})), f"model.safetensors: '{NAME}' holds torch.int64"),
    "missing tensor": (reweighed(lambda t: t.pop(NAME)), f"model.safetensors: '{NAME}' is missing"),
    "unknown tensor": (reweighed(lambda t: t.update(backdoor=torch.zeros(1))), "model.safetensors: 'backdoor' is not of this model"),
    "rows of more tokens": (reweighed(lambda t: t.update({"added_tokens.input": torch.zeros(3, 128)})), r"model.safetensors: 'added_tokens.input' has the shape \(3, 128\)"),
    "another number": (reweighed(lambda t: t[NAME].mul_(2)), "model.safetensors is not the file that config.json was written with"),
    "cut file": (lambda f: os.truncate(f/"model.safetensors", 1000), "model.safetensors can't be read as safetensors"),
    "empty file": (lambda f: os.truncate(f/"model.safetensors", 0), "model.safetensors can't be read as safetensors"),
    "pickle": (lambda f: (f/"model.safetensors").write_bytes(pickle.dumps(Boom())), "model.safetensors can't be read as safetensors .* such as a pickle, which is never read"),
    "torch file": (lambda f: torch.save({"x": torch.zeros(1)}, f/"model.safetensors"), "model.safetensors can't be read as safetensors")}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_by_name(whole, tmp_path, capsys, kind):
    damage, message = DAMAGE[kind]
    damage(shutil.copytree(whole, tmp_path/"captioner"))
    with pytest.raises(ValueError, match=message): Captioner.from_pretrained(tmp_path/"captioner", device="cpu")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nowhere", "user/nowhere", "no/such/folder", "a b"])
def test_a_name_that_is_nothing_is_refused(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"'{name}' is neither a folder nor a captioner"): Captioner.from_pretrained(name)


def test_a_missing_card_is_no_damage(whole, tmp_path):
    (shutil.copytree(whole, tmp_path/"captioner")/"README.md").unlink()
    assert Captioner.from_pretrained(tmp_path/"captioner", device="cpu").card == ""


# --- shared

class Hub:
    "What `push_to_hub` needs of the hub's API; keeps what it was sent."
    def __init__(self, token=None): pass
    def create_repo(self, repo_id, **options): return type("Repo", (), {"repo_id": repo_id})
    def upload_folder(self, repo_id, folder_path, **options):
        Hub.sent = {p.relative_to(folder_path).as_posix(): p.read_bytes() for p in Path(folder_path).rglob("*") if p.is_file()}
        return f"https://hub/{repo_id}"


@pytest.fixture
def hub(monkeypatch): monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)


def test_push_to_hub_sends_the_files_of_the_folder(hub, captioner, whole, tmp_path):
    assert captioner.push_to_hub("user/name") == "https://hub/user/name"
    assert Hub.sent == {p.name: p.read_bytes() for p in whole.iterdir()} and {*Hub.sent} == {"config.json", "model.safetensors", "README.md"}
    Hub.sent = None
    captioner.save_pretrained(tmp_path/"mine", push_to_hub=True)
    assert len(Hub.sent) == 3
    with pytest.raises(ValueError, match="config: a captioner writes its own"): captioner.push_to_hub("user/name", config={"a": 1})


def test_parts_that_only_this_machine_has_are_sent_along_or_refused(hub, tmp_path):
    backbones(tmp_path)
    captioner, Hub.sent = moved_captioner(tmp_path, "whole"), None
    with pytest.raises(ValueError, match="clip_model='.*clip.safetensors' is on this machine alone; send it along"): captioner.push_to_hub("user/name")
    assert Hub.sent is None
    captioner.push_to_hub("user/name", include_backbones=True)
    assert {"clip/model.safetensors", "gpt2/config.json", "gpt2/model.safetensors", "config.json", "model.safetensors", "README.md"} < {*Hub.sent}
    assert not [name for name, content in Hub.sent.items() if str(tmp_path).encode() in content]


def test_a_name_on_the_hub_is_downloaded_and_loaded(monkeypatch, captioner, whole, photos):
    asked = {}
    monkeypatch.setattr("clipcap.decoding.captioner.snapshot_download", lambda name, **options: asked.update(options, name=name) or whole)
    again = Captioner.from_pretrained("user/name", device="cpu", revision="v1")
    assert asked["name"] == "user/name" and asked["revision"] == "v1" and "config.json" in asked["allow_patterns"]
    assert again(photos[0], num_beams=1).text == captioner(photos[0], num_beams=1).text


def test_a_moved_language_model_is_named_where_it_is_now(tmp_path, photos):
    backbones(tmp_path)
    captioner = moved_captioner(tmp_path, "llama")
    captioner.save_pretrained(tmp_path/"captioner")
    (tmp_path/"llama").rename(tmp_path/"elsewhere")
    with pytest.raises(ValueError, match="gpt2_model='.*llama' can't be loaded"): Captioner.from_pretrained(tmp_path/"captioner", device="cpu")
    again = Captioner.from_pretrained(tmp_path/"captioner", device="cpu", gpt2_model=str(tmp_path/"elsewhere"))
    assert again(photos[0]).text == captioner(photos[0]).text


# --- runs and cards

def test_a_run_is_loaded_saved_and_its_card_holds_its_scores(trained, tmp_path, photos):
    run, config = trained
    captioner = Captioner.from_run("demo", device="cpu")
    captioner.save_pretrained(tmp_path)
    again = Captioner.from_pretrained(tmp_path, device="cpu")
    assert [*map(str, again(photos))] == [*map(str, captioner(photos))] == generate_caption_batch(photos, captioner.model, config.max_length, config.num_beams)
    assert str(run.path.parent) not in (tmp_path/"config.json").read_text() + again.card and "Captioner.from_pretrained" in again.card
    written = json.loads((run.path/"scores_test.json").read_text())["corpus"]
    about = ModelCard.load(tmp_path/"README.md").data
    assert about.library_name == "clipcap" and about.pipeline_tag == "image-to-text" and "clip" in about.tags
    assert {r.metric_type: r.metric_value for r in about.eval_results} == {name: value for name, value in written.items() if value is not None}
    again.save_pretrained(tmp_path/"again")
    assert (tmp_path/"again"/"README.md").read_text() == again.card  # the card stays with the captioner


def test_a_captioner_without_run_or_scores_has_a_card(whole, small, tmp_path):
    for folder in (whole, tmp_path):
        if folder == tmp_path: Captioner.from_run("small", device="cpu").save_pretrained(folder)
        card = ModelCard.load(folder/"README.md")
        assert card.data.eval_results is None and "## How to use it" in card.text and ("these weights were not evaluated" in card.text) == (folder == tmp_path) and "metric |" not in card.text and "undefined" not in card.text.lower()


def test_scores_of_other_weights_are_not_on_the_card(trained_copy, tmp_path):
    run, _ = trained_copy
    shutil.copy(next((run.path/"checkpoints").glob("mapping_network_epoch_*")), run.path/"checkpoints/mapping_network_epoch_1.pth")
    Captioner.from_run("demo", 1, device="cpu").save_pretrained(tmp_path/"other")
    Captioner.from_run("demo", device="cpu").save_pretrained(tmp_path/"evaluated")
    run.update_stage("03_train", started="later")
    Captioner.from_run("demo", device="cpu").save_pretrained(tmp_path/"trained again")
    assert ["| CIDEr |" in (tmp_path/name/"README.md").read_text() for name in ("other", "evaluated", "trained again")] == [False, True, False]


@pytest.fixture
def small(outputs, captioner):
    "A run that is trained and not evaluated."
    return save_run("small", captioner.model, (1, 2), max_length=12)


def test_runs_that_are_not_there_or_not_trained_are_named(small, captioner):
    save_run("untrained", captioner.model, ())
    with pytest.raises(ValueError, match="there is no run 'none' in"): Captioner.from_run("none")
    with pytest.raises(ValueError, match="run 'untrained' has no checkpoint"): Captioner.from_run("untrained")
    with pytest.raises(ValueError, match="no checkpoint of epoch 7"): Captioner.from_run("small", epoch=7)


def test_reranked_captions_have_probabilities_and_are_saved_without_reranking(trained, tmp_path, photos):
    run, config = trained
    captioner = Captioner.from_run("demo", device="cpu", precision="float32")
    options = {"rerank": "mbr", "samples": 3, "temperature": 1., "num_beams": 3}
    caption, *_ = captioner(photos, **options)
    ids = encode_captions(captioner.model.tokenizer, [caption.text])[0]
    assert list(caption.ids) == ids and caption.log_probability < 0 and caption.text == captioner.writer(scores=False, **options)(embeddings_of(captioner, photos))[0]
    assert len(captioner(photos[0], candidates=2, **options)) == 2
    captioner.config = dataclasses.replace(captioner.config, **options)
    with pytest.warns(UserWarning, match="rerank='mbr' needs the training data, which are not saved"): captioner.save_pretrained(tmp_path)
    assert Captioner.from_pretrained(tmp_path, device="cpu")(photos[0]).text == captioner(photos[0], rerank="none", temperature=0.).text


def test_reranking_without_the_data_of_the_run_names_a_way_out(trained_copy, photos):
    run, _ = trained_copy
    captioner = Captioner.from_run("demo", device="cpu")
    (run.path/"captions_table.csv").unlink()
    with pytest.raises(ValueError, match=r"rerank='mbr' needs the data of run 'demo', and .*captions_table.csv.*save_pretrained\(FOLDER\), then clipcap caption --model FOLDER"):
        captioner(photos[0], rerank="mbr")


# --- the command

@pytest.fixture
def caption_command(capsys):
    "A function that runs `clipcap caption`: exit status, rows on standard output, messages."
    def run(*words):
        capsys.readouterr()
        status = main(["caption", *map(str, words), "--device", "cpu"])
        out, err = capsys.readouterr()
        return status, [json.loads(line) for line in out.splitlines()], err
    return run


def test_scores_are_written_beside_the_captions(caption_command, small, captioner, photos):
    status, rows, _ = caption_command(*photos, "--run", "small", "--scores")
    expected = captioner(photos)
    assert not status and [row["caption"] for row in rows] == [c.text for c in expected]
    assert np.allclose([row["log_probability"] for row in rows], [c.log_probability for c in expected], atol=1e-5)
    assert "log_probability" not in caption_command(photos[0], "--run", "small")[1][0]


def test_a_file_of_captions_has_scores_throughout(caption_command, small, photos, tmp_path):
    words = ["--run", "small", "--out", tmp_path/"captions.jsonl", *photos[:2]]
    assert caption_command(*words, "--scores")[0] == 0 and json_lines(tmp_path/"captions.jsonl")[0]["scores"] is True
    status, _, err = caption_command(*words)
    assert status == 1 and "was made with scores=True, and now it is (not recorded)" in err
    assert caption_command(*words, photos[2], "--scores")[0] == 0 and len(json_lines(tmp_path/"captions.jsonl")) == 4


def test_shards_hold_scores(small, captioner, photos, tmp_path):
    from functools import partial

    from clipcap.scale.shards import captioner as shard_captioner
    from clipcap.scale.shards import write_shards
    from clipcap.scale.sources import find_units
    index = write_shards(partial(shard_captioner, "small", scores=True, device="cpu"), find_units([*map(str, photos)], 10, False), str(tmp_path/"out"))
    first, *rows = json_lines(tmp_path/"out"/"00000.jsonl")
    assert first["scores"] is index["settings"]["scores"] is True
    assert np.allclose([row["log_probability"] for row in rows], [c.log_probability for c in captioner(photos)], atol=1e-5)


def test_a_folder_is_captioned_with_in_place_of_a_run(caption_command, captioner, whole, photos, tmp_path):
    status, rows, _ = caption_command(*photos, "--model", whole)
    assert not status and [row["caption"] for row in rows] == [c.text for c in captioner(photos)]
    words = [photos[0], "--model", whole, "--out", tmp_path/"captions.jsonl"]
    assert caption_command(*words)[0] == caption_command(*words)[0] == 0
    first = json_lines(tmp_path/"captions.jsonl")[0]
    assert (first["model"], first["checkpoint"], first["num_beams"]) == (whole.name, "model.safetensors", 5) and first["clip"].startswith("mini@")
    for more, message in ((["--num_beams", 1], "num_beams=5, and now it is 1"), (["--run", "small"], "name one of them"), (["--epoch", 1], "epoch=1: .* leave it out"),
                          (["--cluster", "auto"], "leave out --model")):
        status, _, err = caption_command(*words, *more)
        assert status == 1 and re.search(message, err), err
    assert "is neither a folder nor" in caption_command(photos[0], "--model", "no/such/folder")[2]
