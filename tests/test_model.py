"""The reference recipe's mapping network, frozen GPT-2, the loss, and a model from a configuration (clipcap.model)."""
import copy
import inspect
import shutil

import pytest
import torch
from clip.model import CLIP
from transformers import GPT2Config, GPT2LMHeadModel

from clipcap.core import MAPPING_NETWORKS, Config, make_config
from clipcap.formats.tokenizer import encode_captions
from clipcap.model import (ClipCapModel, GridMapping, MappingNetwork, check_features, generate_caption, generate_caption_batch,
                           generate_from_embeddings, generate_ids, gpt2_hash, load_gpt2, load_model, trained_weights, tune_gpt2)
from clipcap.networks.mapping import fit_scaling, prepare_embeddings
from clipcap.networks.packing import has_bf16
from clipcap.networks.parameters import never_trained, parameter_table
from clipcap.runs.files import asset_path

SIZES = dict(num_layers=2, num_heads=4, feedforward_dim=64)


@pytest.fixture(scope="module")
def gpt2(tokenizer): return load_gpt2("mini", tokenizer, seed=1)


@pytest.fixture(scope="module")
def ids(tokenizer): return encode_captions(tokenizer, ["A dog runs .", "two red cats sit next to a ball on the snow", "a tree"])


@pytest.fixture(scope="module")
def batch(tokenizer, ids): return {**tokenizer.pad({"input_ids": ids}, return_tensors="pt")}


@pytest.fixture(scope="module")
def embedding(): return torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def small(gpt2, tokenizer, *more):
    "A model whose mapping network takes 16 numbers."
    torch.manual_seed(0)
    return ClipCapModel(gpt2, tokenizer, MappingNetwork(16, gpt2.config.n_embd, **SIZES), *more).eval()


@pytest.fixture(scope="module")
def exact(gpt2, tokenizer): return small(copy.deepcopy(gpt2), tokenizer).double()  # in float64


def loss_and_gradient(model, *args, **kwargs):
    loss = model(*args, **kwargs)
    return torch.cat([loss.detach(), *(g.flatten() for g in torch.autograd.grad(loss.sum(), list(model.mapping_network.parameters())))])


def close(a, b): torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def bytes_of(model): return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def configured(**changes): return load_model(make_config("mini", device="cpu", **changes), 16)


# --- mapping networks

@pytest.mark.numerics
def test_patches_are_a_set_and_one_patch_is_the_reference_network():
    torch.manual_seed(0)
    grid, one, patches = GridMapping(16, 32, 10, **SIZES).double().eval(), MappingNetwork(16, 32, 10, **SIZES).double().eval(), torch.randn(3, 7, 16).double()
    one.load_state_dict(grid.state_dict())
    close(grid(patches[:, torch.randperm(7)]), grid(patches))
    assert (grid(patches[:, :6]) - grid(patches)).abs().max() > 1e-3
    for same in (patches[:, 0], patches[:, :1], patches[:, :1].expand(-1, 4, -1)): close(grid(same), one(patches[:, 0]))


@pytest.mark.numerics
def test_preparation_applies_to_each_number_of_each_patch():
    torch.manual_seed(0)
    network, patches, seen = GridMapping(16, 32, 10, **SIZES), torch.randn(3, 7, 16), []
    prepare_embeddings(network, 16, "standard", noise=0.1, dropout=0.2)
    fit_scaling(network, patches)
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.eval()(patches)
    torch.testing.assert_close(seen[0], (patches - patches.mean((0, 1)))/patches.std((0, 1), correction=0), rtol=1e-3, atol=1e-4)
    assert network.train()(patches).shape == (3, 10, 32)
    zero = seen[1] == 0
    assert zero.any() and not zero.all(1).any() and not zero.all(2).any()


@pytest.mark.parametrize("network, tokens, error", [
    ("grid", None, "x.safetensors has one vector per photo; use features='grid'"), ("grid", 49, None), ("mlp", None, None),
    ("mlp", 49, "mapping_network='mlp' takes one vector per photo, and x.safetensors has one for each patch; use mapping_network='grid'")])
def test_embeddings_of_another_form_are_named(network, tokens, error):
    if error is None: check_features(network, tokens, "x.safetensors")
    else:
        with pytest.raises(ValueError, match=error): check_features(network, tokens, "x.safetensors")


@pytest.mark.numerics
def test_weights_without_a_gradient_are_counted():
    "Queries and keys of attention to one token, and biases of keys; of attention to patches, biases of keys alone."
    torch.manual_seed(0)
    d, layers = 32, SIZES["num_layers"]
    one, grid = (network(16, d, 10, **SIZES).double() for network in (MappingNetwork, GridMapping))
    key_biases = layers*d
    assert sum(never_trained(one, 16).values()) == layers*(2*d*d + 2*d) + key_biases
    assert sum(never_trained(grid, 16).values()) == 2*key_biases
    assert one.training and all(p.grad is None for p in one.parameters())
    one.unused = torch.nn.Parameter(torch.zeros(5).double())
    assert never_trained(one, 16)["unused"] == 5


def test_parts_of_a_model_are_counted(tokenizer):
    with torch.device("meta"):
        vit_b_32 = CLIP(512, 224, vision_layers=12, vision_width=768, vision_patch_size=32, context_length=77, vocab_size=49408,
                        transformer_width=512, transformer_heads=8, transformer_layers=12).requires_grad_(False)
        gpt2_small = GPT2LMHeadModel(GPT2Config(vocab_size=50257 + 2)).requires_grad_(False)
    gpt2_small.tie_weights()  # transformers 5.0 does not tie them on this device
    table = parameter_table(ClipCapModel(gpt2_small, tokenizer, MappingNetwork(16, 32, **SIZES), vit_b_32))
    assert table.loc["CLIP"].tolist() == [151_277_313, 0, 0] and table.parameters["CLIP: image encoder"] == 87_849_216
    assert table.loc["GPT-2"].tolist() == [124_439_808 + 2*768, 0, 0]
    assert table[table.index.str.startswith("mapping network:")].sum().tolist() == table.loc["mapping network"].tolist()
    assert table.loc["mapping network: cross-attention", "never get a gradient"] == 2*(2*32*32 + 2*32)


# --- GPT-2

def test_rows_of_added_tokens_are_drawn_from_the_seed(gpt2, tokenizer):
    table = gpt2.get_input_embeddings().weight
    assert len(table) == len(tokenizer) and gpt2.get_output_embeddings().weight is table
    assert torch.equal(load_gpt2("mini", tokenizer, seed=1).get_input_embeddings().weight, table)
    other = load_gpt2("mini", tokenizer, seed=2).get_input_embeddings().weight
    assert torch.equal(other[:-2], table[:-2]) and not (other[-2:] == table[-2:]).any()


def test_folder_without_a_language_model_is_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="can't be loaded as a causal language model"): load_gpt2(str(tmp_path), tokenizer, 1)


def test_hash_is_of_the_weights_not_of_the_folder(tmp_path):
    mine = tmp_path/"mine"
    shutil.copytree(asset_path("mini/gpt2"), mine)
    assert gpt2_hash(str(mine)) == gpt2_hash("mini").replace("mini@", "mine@")
    with open(mine/"model.safetensors", "ab") as file: file.write(b"x")
    assert gpt2_hash(str(mine)).split("@")[1] != gpt2_hash("mini").split("@")[1]
    (mine/"model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights in"): gpt2_hash(str(mine))


# --- the loss

@pytest.mark.numerics
def test_loss_is_the_cross_entropy_of_the_captions_tokens(exact, embedding, batch, ids):
    "Neither other captions nor padding change it: the expected value is of one caption, from all logits."
    expected = []
    for prefix, tokens in zip(exact.prefix(embedding.double()), map(torch.tensor, ids)):
        logits = exact.gpt2(inputs_embeds=torch.cat([prefix, exact.gpt2.get_input_embeddings()(tokens)])[None]).logits[0, 9:-1]
        expected.append(torch.nn.functional.cross_entropy(logits, tokens, reduction="sum"))
    close(exact(embedding.double(), **batch), torch.stack(expected))


@pytest.mark.numerics
def test_captions_of_an_image_may_share_its_prefix(exact, embedding, batch):
    image_of, embedding = torch.tensor([1, 0, 1]), embedding.double()
    close(loss_and_gradient(exact, embedding[:2], **batch, image_of=image_of), loss_and_gradient(exact, embedding[image_of], **batch))
    with pytest.raises(ValueError, match="3 embeddings for captions of 2 images; give one per image"): exact(embedding, **batch, image_of=image_of)


@pytest.mark.numerics
def test_bfloat16_is_float32_with_rounding(gpt2, tokenizer, embedding, batch):
    if not has_bf16("cpu"): pytest.skip("no hardware for bfloat16")
    model = small(gpt2, tokenizer)
    half = ClipCapModel(copy.deepcopy(gpt2).bfloat16(), tokenizer, model.mapping_network).eval()
    rough, fine = loss_and_gradient(half, embedding, **batch), loss_and_gradient(model, embedding, **batch)
    assert (half.precision, model.precision, rough.dtype) == ("bfloat16", "float32", torch.float32)
    assert {p.dtype for p in half.mapping_network.parameters()} == {torch.float32}
    assert (rough[:3]/fine[:3] - 1).abs().max() < 0.03 and torch.nn.functional.cosine_similarity(rough[3:], fine[3:], dim=0) > 0.98


def test_a_step_changes_the_mapping_network_alone(gpt2, tokenizer, clip_mini, embedding, batch):
    model = small(gpt2, tokenizer, *clip_mini[:2])
    before = bytes_of(model)
    model.train()
    assert model.mapping_network.training and not any(m.training for part in (model.gpt2, model.clip) for m in part.modules())
    model(embedding, **batch).sum().backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert {name.split(".")[0] for name, value in bytes_of(model).items() if value != before[name]} == {"mapping_network"}


# --- a model from a configuration

@pytest.mark.parametrize("name", MAPPING_NETWORKS)
def test_every_mapping_network_gives_prefixes(name):
    model = configured(mapping_network=name, prefix_length=4)
    assert model.prefix(torch.randn(3, 16)).shape == (3, 4, model.gpt2.config.n_embd)


def test_a_new_mapping_network_is_one_entry(monkeypatch, embedding, batch):
    class Mine(torch.nn.Module):
        def __init__(self, clip_dim, gpt2_dim, prefix_length, **unused): super().__init__(); self.shape, self.layer = (prefix_length, gpt2_dim), torch.nn.Linear(clip_dim, prefix_length*gpt2_dim)
        def forward(self, embeddings): return self.layer(embeddings).unflatten(1, self.shape)
    monkeypatch.setitem(MAPPING_NETWORKS, "mine", Mine)
    model = configured(mapping_network="mine")
    model(embedding, **batch).sum().backward()
    assert isinstance(model.mapping_network, Mine) and model.mapping_network.layer.weight.grad.abs().max() > 0


@pytest.mark.numerics
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_tuned_gpt2_begins_as_it_was_and_only_what_is_trained_changes(tuning, embedding, batch):
    model, frozen = configured(gpt2_tuning=tuning), configured()
    width, blocks = model.gpt2.config.n_embd, model.gpt2.config.n_layer
    of_rank_8 = blocks*8*width*((1 + 3) + (1 + 1) + (1 + 4) + (4 + 1))  # to 3, 1, 4 times the width, and back from 4
    expected = {"lora": of_rank_8, "full": sum(p.numel() for p in frozen.gpt2.parameters())}
    assert sum(p.numel() for p in trained_weights(model.gpt2).values()) == expected[tuning] and not trained_weights(frozen.gpt2)
    with torch.no_grad(): close(copy.deepcopy(model).double().eval()(embedding.double(), **batch), frozen.double().eval()(embedding.double(), **batch))
    before = bytes_of(model.gpt2)
    model.train()(embedding, **batch).sum().backward()
    assert not [name for name, p in model.gpt2.named_parameters() if p.requires_grad != (p.grad is not None)]
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
    moved = {name for name, value in bytes_of(model.gpt2).items() if value != before[name]}
    assert moved and moved <= {*trained_weights(model.gpt2), "lm_head.weight"}


@pytest.mark.parametrize("setting, measure", [("embedding_noise", lambda x: x.std()), ("embedding_dropout", lambda x: (x == 0).float().mean())])
def test_disturbance_of_embeddings_reaches_the_network(setting, measure):
    network, seen = configured(**{setting: 0.25}).mapping_network.train(), []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    network(torch.ones(200, 16))
    assert abs(measure(seen[0]).item() - 0.25) < 0.03


@pytest.mark.parametrize("changes, error", [
    (dict(gpt2_tuning="lora", precision="bfloat16"), "gpt2_tuning='lora' needs 'auto' or 'float32'"),
    (dict(num_heads=7), "num_heads=7 does not divide GPT-2's width 128; choose one that does, such as 4"),
    (dict(prefix_length=999), "prefix_length=999 and max_length=40 need 1039 positions; 'mini' has [0-9]+: shorten one of them")])
def test_settings_that_do_not_fit_are_named(changes, error):
    with pytest.raises(ValueError, match=error): configured(**changes)


@pytest.mark.parametrize("function", [MappingNetwork, generate_ids, generate_from_embeddings, generate_caption_batch, generate_caption, tune_gpt2])
def test_defaults_are_the_reference_recipe(function):
    for name, parameter in inspect.signature(function).parameters.items():
        field = {"rank": "lora_rank"}.get(name, name)
        if hasattr(Config, field) and parameter.default is not parameter.empty: assert parameter.default == getattr(Config, field), name
