"""The weights that ClipCap's authors published (clipcap.decoding.published, .mean_beams), against their networks and decoding written out in checks/published, in float64."""
import json
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel

from clipcap.apps.cli import main
from clipcap.checks.published import (beam_ids, greedy_ids, perceptron_prefix, perceptron_shapes, published_state, random_weights, transformer_prefix,
                                      transformer_shapes)
from clipcap.core import open_run
from clipcap.data import encode_images
from clipcap.decoding.captioner import Captioner
from clipcap.decoding.mean_beams import mean_beam_search
from clipcap.decoding.published import import_published, read_published
from clipcap.model import generate_from_embeddings, generate_ids
from clipcap.networks.language_models import last_logits
from clipcap.studies.flops import publish_gpt2

WIDTH, DIM = 32, 128  # of the language model; of the miniature CLIP's embeddings
FEW = torch.randn(6, DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def perceptron(clip_dim, length, width=WIDTH): return random_weights(perceptron_shapes(clip_dim, length, width))


def transformer(clip_dim, length, layers, width=WIDTH, hidden=None): return random_weights(transformer_shapes(clip_dim, length, width, layers, hidden))


# --- files

@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    "Configuration, tokenizer and weights of a small GPT-2, to which a file's weights belong."
    folder = tmp_path_factory.mktemp("gpt2")
    publish_gpt2(folder, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=96)
    return folder


@pytest.fixture(scope="module")
def stop(tokenizer): return tokenizer.encode(".")[0]


@pytest.fixture(scope="module")
def gpt2(gpt2_folder, stop):
    "A GPT-2 with large random weights, which likes to end a sentence: a model of its own beside the folder's."
    model = GPT2LMHeadModel(GPT2Config.from_pretrained(gpt2_folder)).eval()
    for i, (name, p) in enumerate(model.named_parameters()): p.data = random_weights({name: p.shape}, seed=100 + i)[name] + (p.ndim == 1 and name.endswith("weight"))
    table, bias = model.transformer.wte.weight.data, model.transformer.ln_f.bias.data
    table[stop] += 4*bias/bias.square().sum()
    return model


@pytest.fixture
def write(tmp_path, gpt2_folder):
    "A function that writes a file of weights and reads it: `write({...}, prefix='module.')`."
    def make(state, prefix="", suffix="pt", wrap=lambda state: state, old=False, **options):
        from safetensors.torch import save_file
        path, state = tmp_path/f"weights.{suffix}", {prefix + key: value for key, value in state.items()} if prefix else state
        if suffix == "safetensors": save_file({key: value.clone() for key, value in state.items()}, path)
        else: torch.save(wrap(state), path, _use_new_zipfile_serialization=not old)
        return read_published(path, **{"clip_model": "mini", "gpt2_model": str(gpt2_folder), **options})
    return make


@pytest.fixture
def convert(tmp_path, gpt2_folder):
    "A function that writes a file of weights, imports it and loads the captioner."
    def make(state, **options):
        torch.save(state, tmp_path/"weights.pt")
        import_published(tmp_path/"weights.pt", tmp_path/"captioner", **{"clip_model": "mini", "gpt2_model": str(gpt2_folder), **options})
        return Captioner.from_pretrained(tmp_path/"captioner", device="cpu")
    return make


MADE = {"mlp": (lambda: perceptron(DIM, 10), perceptron_prefix, 10), "transformer": (lambda: transformer(DIM, 4, 3), transformer_prefix, 4)}


@pytest.mark.numerics
@pytest.mark.parametrize("kind", MADE)
def test_prefixes_logits_and_captions_are_the_authors(convert, gpt2, stop, kind):
    make, prefix_of, length = MADE[kind]
    network = make()
    model = convert(published_state(network, gpt2)).model.double()
    reference, x = GPT2LMHeadModel(gpt2.config).double().eval(), F.normalize(FEW) if kind == "transformer" else FEW
    reference.load_state_dict(gpt2.state_dict())
    wanted = prefix_of({name: value.double() for name, value in network.items()}, x, WIDTH)
    prefix = model.prefix(FEW)
    assert prefix.shape == (6, length, WIDTH)
    torch.testing.assert_close(prefix, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(last_logits(model.gpt2, prefix), reference(inputs_embeds=wanted).logits[:, -1:], rtol=1e-8, atol=1e-8)
    pad, ours = model.tokenizer.pad_token_id, generate_ids(FEW, model, 20, 1)
    alone = [greedy_ids(reference, p, stop, 20) for p in wanted]
    assert [row[:len(ids)] + [pad]*(20 - len(ids)) for row, ids in zip(ours.tolist(), alone)] == [ids + [pad]*(20 - len(ids)) for ids in alone]
    ids, means = mean_beam_search(model.gpt2, prefix, stop, pad, 5, 20)
    searched = [beam_ids(reference, p, stop, 20) for p in wanted]
    assert [[i[:len(b)] for i, (_, b) in zip(row, found)] for row, found in zip(ids.tolist(), searched)] == [[b for _, b in found] for found in searched]
    torch.testing.assert_close(means, torch.tensor([[mean for mean, _ in found] for found in searched], dtype=torch.float64), rtol=1e-8, atol=1e-8)
    assert len({len(b) for found in searched for _, b in found}) > 3 and ids.eq(pad).any()
    others = mean_beam_search(model.gpt2, prefix, stop, pad, 5, 20, ids[:, 0, 0].unique())[0][..., 0]
    assert not torch.isin(others, ids[:, 0, 0]).any()  # tokens that may not be written
    assert generate_ids(FEW, model, 20, 5).equal(ids[:, 0]) and generate_ids(FEW, model, 20, 5, num_return_sequences=2).equal(ids[:, :2].flatten(0, 1))


# --- what the shapes and names tell

FORMS = {"plain": {}, "module": dict(prefix="module."), "safetensors": dict(suffix="safetensors"),
         "in a checkpoint": dict(wrap=lambda state: {"model": state, "epoch": 9, "optimizer": {"state": {}, "lr": 2e-5}}),
         "of old PyTorch": dict(old=True), "with integer keys beside": dict(wrap=lambda state: {0: {}, "model": state}),
         "of several GPUs": dict(prefix="model.module.", wrap=lambda s: {"state_dict": s})}


@pytest.mark.parametrize("form", FORMS)
def test_files_of_all_forms_hold_the_same(write, gpt2, form):
    network, published = perceptron(DIM, 10), write(published_state(perceptron(DIM, 10), gpt2), **FORMS[form])
    assert published.network.keys() == {"layers.0.weight", "layers.0.bias", "layers.3.weight", "layers.3.bias"}
    assert published.network["layers.3.weight"].equal(network["model.2.weight"])
    assert published.dropped == [f"gpt.transformer.h.{i}.attn.{name}" for i in (0, 1) for name in ("bias", "masked_bias")]
    weights = dict(gpt2.named_parameters())
    assert published.gpt2.keys() == weights.keys() and all(value.equal(weights[name]) for name, value in published.gpt2.items())


@pytest.mark.parametrize("network, options, wanted", [
    (lambda: perceptron(512, 10, 768), {}, dict(clip_model="ViT-B/32", mapping_network="mlp", prefix_length=10, embedding_scaling="none")),
    (lambda: perceptron(640, 2, 768), {}, dict(clip_model="RN50x4", prefix_length=2)),
    (lambda: perceptron(512, 2, 768), dict(clip_model="ViT-B/16", normalize=True), dict(clip_model="ViT-B/16", embedding_scaling="unit")),
    (lambda: perceptron(512, 2, 1024), dict(gpt2_model="gpt2-medium"), dict(gpt2_model="gpt2-medium", prefix_length=2)),
    (lambda: {"weight": torch.zeros(768*3, 512), "bias": torch.zeros(768*3)}, {}, dict(mapping_network="linear", prefix_length=3)),
    (lambda: transformer(640, 40, 2, 768), {}, dict(clip_model="RN50x4", mapping_network="transformer_clip_tokens", prefix_length=40, num_layers=2, num_heads=8,
                                                     feedforward_dim=1536, embedding_scaling="unit")),
    (lambda: transformer(512, 4, 1, 768, 768*4), dict(normalize=False), dict(clip_model="ViT-B/32", feedforward_dim=3072, embedding_scaling="none")),
])
def test_settings_follow_from_shapes(write, network, options, wanted):
    config = write(published_state(network()), **{"clip_model": None, "gpt2_model": None, **options}).config
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert (config.caption_format, config.gpt2_tuning, config.max_length, config.dropout) == ("plain", "none", 67, 0)
    assert config.gpt2_model == options.get("gpt2_model", "gpt2")


def changed(**changes):
    "A small file with some tensors replaced, or, where None, left out."
    state = {**published_state(perceptron(DIM, 10)), **{key.replace("__", "."): value for key, value in changes.items()}}
    return {key: value for key, value in state.items() if value is not None}


def changed_transformer(**changes):
    state = {**published_state(transformer(DIM, 4, 2)), **{key.replace("__", "."): value for key, value in changes.items()}}
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize("state, options, text", [
    (lambda: {"weight": torch.zeros(2)}, {}, "has none of clip_project.model.0.weight, clip_project.linear.weight, clip_project.weight, but 'weight': it is no captioner"),
    (lambda: changed(clip_project__model__2__bias=None), {}, "1 tensors are missing: clip_project.model.2.bias"),
    (lambda: changed(clip_project__model__2__weight=None), {}, "the mapping network has no 'model.2.weight'"),
    (lambda: changed(clip_project__model__4__weight=torch.zeros(2)), {}, "1 tensors are unknown: clip_project.model.4.weight"),
    (lambda: changed(gpt__transformer__extra=torch.zeros(2)), {}, "1 tensors are unknown: gpt.transformer.extra"),
    (lambda: changed(clip_project__model__0__bias=torch.zeros(2)), {}, "1 tensors have another shape: clip_project.model.0.bias (2,) for (160,)"),
    (lambda: changed(clip_project__model__2__bias=torch.full((320,), torch.nan)), {}, "clip_project.model.2.bias holds NaN or infinity"),
    (lambda: changed(clip_project__model__0__weight=torch.zeros(7, DIM)), {}, "another shape: clip_project.model.0.weight (7, 128) for (160, 128)"),
    (lambda: changed(clip_project__linear__weight=torch.zeros(2)), {}, "holds several mapping networks: 'clip_project.model.0.weight', 'clip_project.linear.weight'"),
    (lambda: {**changed(), 3: torch.zeros(2)}, {}, "1 tensors are unknown: 3; "),
    (lambda: changed(epoch=3), {}, "'epoch' is no tensor; where it was made, save its weights alone"),
    (lambda: changed(), dict(prefix="module.", wrap=lambda s: {**s, "head": torch.zeros(2)}), "beside the captioner 'module.…' it holds 'head'"),
    (lambda: changed(), dict(clip_model=None), "its embeddings have 128 numbers, which several CLIPs have or none; name the one it was trained with: clip_model=… (--clip)"),
    (lambda: changed(), dict(clip_model="ViT-B/32"), "its embeddings have 128 numbers, and those of clip_model='ViT-B/32' 512"),
    (lambda: changed(), dict(gpt2_model=None), "320 numbers are no prefix for a GPT-2 of width 768"),
    (lambda: changed(), dict(gpt2_model="no/such/folder"), "there is no folder"),
    (lambda: changed(), dict(gpt2_model="bert-large"), "it has no GPT-2; name its language model: gpt2_model=FOLDER (--gpt2) with its config.json and tokenizer, or one of gpt2, "),
    (lambda: changed_transformer(clip_project__prefix_const=torch.zeros(3, WIDTH)), {}, "its transformer reads 4 positions of the photo and 3 of the prefix; only equal numbers"),
    (lambda: changed_transformer(clip_project__prefix_const=None), {}, "the mapping network has no 'prefix_const'"),
    (lambda: changed_transformer(), dict(gpt2_model=None), "its prefix has 32 numbers per position, and its GPT-2 768"),
    (lambda: changed_transformer(clip_project__transformer__layers__1__attn__to_queries__bias=torch.zeros(WIDTH)), {}, "unknown: clip_project.transformer.layers.1.attn.to_queries.bias"),
])
def test_what_is_no_captioner_is_named(write, state, options, text):
    with pytest.raises(ValueError) as error: write(state(), **options)
    assert text in str(error.value) and "weights.pt" in str(error.value) or "no/such" in text or "no folder" in text


def test_gpt2_in_the_file_is_checked(write, gpt2):
    state = published_state(perceptron(DIM, 10), gpt2)
    for key, value, text in (("gpt.transformer.h.1.ln_1.bias", None, "1 tensors are missing: gpt.transformer.h.1.ln_1.bias"),
                             ("gpt.lm_head.weight", state["gpt.lm_head.weight"] + 1, "gpt.lm_head.weight and gpt.transformer.wte.weight differ"),
                             ("gpt.transformer.wte.weight", torch.zeros(605, 16), "gpt.transformer.wte.weight (605, 16) for (605, 32)"),
                             ("gpt.transformer.h.7.attn.bias", torch.ones(1), None)):
        found = {name: v for name, v in {**state, key: value}.items() if v is not None}
        if text is None: assert key in write(found).dropped
        else:
            with pytest.raises(ValueError, match=text.replace("(", r"\(").replace(")", r"\)")): write(found)
    with pytest.raises(ValueError, match="its GPT-2 has 2 layers of width 32; name its language model: gpt2_model=FOLDER"): write(state, gpt2_model=None)
    assert write({name: v for name, v in state.items() if name != "gpt.lm_head.weight"}).gpt2.keys() == dict(gpt2.named_parameters()).keys()


class Evil:
    def __reduce__(self): return print, ("run",)


@pytest.mark.parametrize("made, text", [(Evil(), "holds a print"), (torch.zeros(3), "holds a Tensor, and no state dict"), (b"text", "no weights that can be read")])
def test_pickles_and_other_files_are_refused(tmp_path, capsys, made, text):
    path = tmp_path/"weights.pt"
    path.write_bytes(made) if isinstance(made, bytes) else torch.save(made, path)
    with pytest.raises(ValueError, match=text): read_published(path)
    assert not capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="there is no file"): read_published(tmp_path/"none.pt")


# --- captions without a start token

def test_captions_of_a_published_model_end_at_the_first_full_stop(convert, gpt2):
    model = convert(published_state(perceptron(DIM, 10), gpt2)).model.double()
    assert len(model.tokenizer) == len(model.gpt2.get_input_embeddings().weight) == 605  # no token is added
    for beams in (1, 5):
        texts = generate_from_embeddings(FEW, model, 30, beams)
        assert all(text.count(".") <= 1 for text in texts) and any(text.endswith(".") for text in texts)
    torch.manual_seed(0)
    assert any(text.endswith(".") for text in generate_from_embeddings(FEW, model, 30, 1, temperature=1., num_return_sequences=3))
    with pytest.raises(ValueError, match="start_token='given': captions that end at '.' have no start token"): generate_ids(FEW, model, 30, 1, start_token="given")
    for options in (dict(length_penalty=2.), dict(processors=(print,))):
        with pytest.raises(ValueError, match=f"{[*options][0]}: the search for captions that end at '.' has no such option"): generate_ids(FEW, model, 30, 5, **options)


def test_runs_are_not_trained_with_plain_captions(outputs):
    with pytest.raises(ValueError, match="caption_format='plain' is of weights that `clipcap import` reads"): open_run("plain", "mini", caption_format="plain")
    assert not (outputs/"plain/run.json").exists()


# --- the captioner and its folder

def test_captioner_of_photos_is_its_embeddings_and_their_probabilities(convert, gpt2, clip_mini):
    captioner = convert(published_state(perceptron(DIM, 10), gpt2))
    photos = [Image.new("RGB", (64, 64), color) for color in ("red", "green", "blue")]
    captions, model = captioner(photos, max_length=20), captioner.model
    embeddings = encode_images(clip_mini[0], torch.stack([clip_mini[1](photo) for photo in photos])).clone()
    ids, means = mean_beam_search(model.gpt2, model.prefix(embeddings), model.stop_id, model.tokenizer.pad_token_id, 5, 20)
    assert [str(c) for c in captions] == generate_from_embeddings(embeddings, model, 20, 5)
    assert [list(c.ids) for c in captions] == [[i for i in row if i != model.tokenizer.pad_token_id] for row in ids[:, 0].tolist()]
    torch.testing.assert_close(torch.tensor([c.log_probability for c in captions]), means[:, 0], rtol=1e-5, atol=1e-5)
    assert captioner(photos[0], num_beams=1, max_length=20).text == generate_from_embeddings(embeddings[:1], model, 20, 1)[0]


@pytest.mark.parametrize("kind", MADE)
def test_folder_names_what_it_does_not_hold(write, gpt2, gpt2_folder, tmp_path, kind):
    "A folder with a configuration and no tokenizer: GPT-2's weights are those of the file, its name is kept, and its tokenizer is found when it is loaded."
    (tmp_path/"bare").mkdir()
    shutil.copy(gpt2_folder/"config.json", tmp_path/"bare")
    out, tuned, made = tmp_path/"captioner", kind == "mlp", MADE[kind][0]()
    torch.save(published_state(made, gpt2 if tuned else None), tmp_path/"weights.pt")
    import_published(tmp_path/"weights.pt", out, "mini", str(tmp_path/"bare"))
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    about = json.loads((out/"config.json").read_text())
    assert (about["encoder"], about["language_model"], about["inside"], about["clip_dim"]) == ("mini", {}, [], DIM)
    assert {name: about["settings"][name] for name in ("caption_format", "gpt2_tuning", "embedding_scaling")} == {
        "caption_format": "plain", "gpt2_tuning": "full" if tuned else "none", "embedding_scaling": "none" if tuned else "unit"}
    model = Captioner.from_pretrained(out, "cpu", gpt2_model=str(gpt2_folder)).model
    wanted = gpt2 if tuned else GPT2LMHeadModel.from_pretrained(gpt2_folder)
    assert model.gpt2.get_input_embeddings().weight.equal(wanted.transformer.wte.weight)
    torch.testing.assert_close(model.prefix(FEW), MADE[kind][1](made, (FEW if tuned else F.normalize(FEW)).float(), WIDTH), rtol=1e-4, atol=1e-4)


def test_self_contained_folder_saves_and_loads_and_notices_changes(convert, gpt2, tmp_path):
    captioner = convert(published_state(perceptron(DIM, 10), gpt2))
    first = [str(c) for c in captioner.caption_embeddings(FEW.float(), max_length=12)]
    captioner.save_pretrained(tmp_path/"again")
    again = Captioner.from_pretrained(tmp_path/"again", "cpu")
    assert [str(c) for c in again.caption_embeddings(FEW.float(), max_length=12)] == first and len({*first}) > 1
    assert "read them from `weights.pt` (SHA-256 " in (tmp_path/"captioner/README.md").read_text()
    ModelCard.load(tmp_path/"captioner/README.md")
    config = json.loads((tmp_path/"captioner/gpt2/config.json").read_text())
    (tmp_path/"captioner/gpt2/config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 0.1}))
    with pytest.raises(ValueError, match="gpt2_config was"): Captioner.from_pretrained(tmp_path/"captioner", "cpu")


def test_command_converts_without_clip_and_network_and_says_what_it_assumed(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "clip", None)
    monkeypatch.setattr(socket, "socket", None)
    torch.save({**published_state(transformer(640, 4, 2, 768)), "gpt.transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}, tmp_path/"weights.pt")
    def run(*words): return main(["import", str(tmp_path/"weights.pt"), str(tmp_path/"out"), *words]), *capsys.readouterr()
    status, out, err = run()
    assert (status, err) == (0, "") and out.splitlines() == [
        f"{tmp_path/'out'}: a transformer, prefix of 4, 2 layers",
        "CLIP: RN50x4 (assumed from 640 numbers; --clip names another); its embedding is divided by its L2 norm (assumed; --normalize)",
        "GPT-2: gpt2, which the file has not", "left out: 1 constants of GPT-2's attention, such as gpt.transformer.h.0.attn.masked_bias"]
    assert json.loads((tmp_path/"out/config.json").read_text())["settings"]["clip_model"] == "RN50x4"
    status, out, _ = run("--normalize", "no", "--clip", "RN50x4")
    assert status == 0 and "CLIP: RN50x4 (as asked); its embedding is used as it is\n" in out
    for words, text in ((["--normalize", "maybe"], "--normalize=maybe is unknown; choose one of auto, yes, no"), (["--clip", "ViT-B/32"], "of clip_model='ViT-B/32' 512")):
        status, out, err = run(*words)
        assert (status, out) == (1, "") and text in err


@pytest.mark.parametrize("real", [False, True])
def test_tokenizer_alone_makes_a_folder_that_needs_no_other_gpt2(tmp_path, gpt2_folder, request, real):
    "Sizes come from the weights, with 64 numbers per attention head."
    if real: vocabulary = request.getfixturevalue("shared")/"gpt2_tokenizer"
    else: vocabulary = Path(shutil.copytree(gpt2_folder, tmp_path/"words", ignore=shutil.ignore_patterns("config.json", "model.safetensors", "generation_config.json")))
    words = 50257 if real else 605
    config = GPT2Config(vocab_size=words, n_embd=64, n_layer=1, n_head=1, n_positions=96, bos_token_id=0, eos_token_id=0)
    model, network = GPT2LMHeadModel(config).eval(), transformer(DIM, 3, 1, 64)
    torch.save(published_state(network, model), tmp_path/"weights.pt")
    import_published(tmp_path/"weights.pt", tmp_path/"out", "mini", str(vocabulary))
    captioner = Captioner.from_pretrained(tmp_path/"out", "cpu")
    assert captioner.model.gpt2.config.n_head == 1 and len(captioner.model.tokenizer) == words and captioner.model.stop_id == 13
    prefix = transformer_prefix(network, F.normalize(FEW).float(), 64)
    torch.testing.assert_close(last_logits(captioner.model.gpt2, captioner.model.prefix(FEW)), model(inputs_embeds=prefix).logits[:, -1:], rtol=1e-4, atol=1e-4)


def test_captions_file_says_how_captions_are_written_and_a_clip_of_another_size_is_named(convert, gpt2, tmp_path):
    convert(published_state(perceptron(DIM, 10), gpt2), normalize=True)
    Image.new("RGB", (64, 64), "red").save(tmp_path/"red.png")
    assert main(["caption", str(tmp_path/"red.png"), "--model", str(tmp_path/"captioner"), "--out", str(tmp_path/"captions.jsonl"), "--num_beams", "1"]) == 0
    header, row = map(json.loads, (tmp_path/"captions.jsonl").read_text().splitlines())
    assert (header["caption_format"], header["embedding_scaling"], header["max_length"], header["num_beams"]) == ("plain", "unit", 67, 1) and row["caption"]
    path = tmp_path/"captioner/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_dim": 96}))
    with pytest.raises(ValueError, match="its embeddings have 96 numbers, and those of clip_model='mini' 128; name the one it was trained with"):
        Captioner.from_pretrained(tmp_path/"captioner", "cpu")
