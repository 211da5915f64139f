"""The model is the reference recipe, in float64 (clipcap.checks.literal)."""
import pytest
import torch
from conftest import make_tiny
from torch import nn

from clipcap.checks.literal import literal_beam_search, literal_loss, literal_model, literal_prefix, literal_tokens, loss_and_gradients, mean_loss
from clipcap.core import make_config, seed_everything
from clipcap.data import FlickrDataset, load_data
from clipcap.model import ClipCapModel, generate_ids, load_model

pytestmark = pytest.mark.numerics
CLOSE = 1e-5  # the largest difference is 3e-7: transformers rounds the logits of its own loss to float32


@pytest.fixture(scope="module")
def models():
    "The miniature backbones and an untrained mapping network with dropout, fast and literal."
    model = load_model(make_config("mini", num_layers=3, feedforward_dim=256, device="cpu"), 16).double()
    return model, literal_model(model)


@pytest.fixture
def both(models): return tuple(model.eval() for model in models)


@pytest.fixture(scope="module")
def items(tmp_path_factory, scene_captions, models):
    "Eight captions of eight images, the first as short as can be: a data set, its batch."
    outputs = tmp_path_factory.mktemp("literal")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPCAP_OUTPUTS", str(outputs))
        captions = scene_captions.groupby("image").head(1).copy()
        captions.iloc[0, captions.columns.get_loc("caption")] = "a"
        data = load_data(*make_tiny(outputs, captions, 10))
    dataset = FlickrDataset(data.captions.sort_values("image").head(8), data.embeddings, models[0].tokenizer, caption_sampling="all")
    rows = [dataset[n] for n in range(8)]
    batch = dataset.collate(rows)
    return [row["caption"] for row in rows], {**batch, "embedding": batch["embedding"].double()}


def test_tokens_are_the_same(both, items):
    captions, batch = items
    ids, mask = literal_tokens(both[0].tokenizer, captions)
    assert ids[:, :batch["input_ids"].shape[1]].equal(batch["input_ids"]) and mask.sum(1).equal(batch["attention_mask"].sum(1))
    assert ids.shape[1] == 40 and "a" in captions


def test_prefix_follows_its_formulas(both):
    embeddings = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(both[0].prefix(embeddings), literal_prefix(both[0].mapping_network, embeddings), rtol=0, atol=1e-9)


@pytest.mark.parametrize("training, image_of", [(False, range(8)), (False, [0, 0, 1, 1, 2, 2, 3, 3]), (True, range(8))], ids=["evaluation", "shared prefixes", "dropout"])
def test_loss_and_gradients_are_the_same(models, items, training, image_of):
    captions, batch = items
    image_of = torch.tensor(image_of)
    few = batch["embedding"][:1 + image_of.max()]
    ours, literal = (model.train(training) for model in models)
    seed_everything(3)
    found = loss_and_gradients(mean_loss(ours, {**batch, "embedding": few, "image_of": image_of}), ours.mapping_network)
    seed_everything(3)
    wanted = loss_and_gradients(literal_loss(literal, few[image_of], captions), literal.mapping_network)
    torch.testing.assert_close(found, wanted, rtol=0, atol=CLOSE)
    assert wanted[1:].abs().max() > 1000*CLOSE  # there is something to compare


def test_dropout_changes_the_loss(models, items):
    losses = []
    for training in (False, True):
        seed_everything(3)
        losses.append(literal_loss(models[1].train(training), items[1]["embedding"], items[0]).item())
    assert abs(losses[0] - losses[1]) > 1e-3


class FirstWords(nn.Module):
    "Embedding [k] becomes the first words of caption k."
    def __init__(self, model):
        super().__init__()
        starts = ["A red dog is", "Two cats are", "There is a big", "The blue bird sits", "A small red car"]
        self.table = nn.Parameter(model.gpt2.get_input_embeddings()(torch.tensor([model.tokenizer(f"<|startoftext|>{s}")["input_ids"][:4] for s in starts])))
    def forward(self, embeddings): return self.table[embeddings[:, 0].long()]  # (B, 4, d)


def assert_same_captions(model, literal, embeddings, max_length, num_beams):
    for row, embedding in zip(generate_ids(embeddings, model, max_length, num_beams).tolist(), embeddings):
        wanted = literal_beam_search(literal, embedding, max_length, num_beams)
        assert row == wanted + [model.tokenizer.pad_token_id]*(len(row) - len(wanted))


@pytest.mark.parametrize("max_length, num_beams", [(40, 5), (40, 1), (6, 5), (40, 2)])
def test_beam_search_writes_the_same_tokens(both, max_length, num_beams):
    model, literal = both
    speaker = ClipCapModel(model.gpt2, model.tokenizer, FirstWords(model)).eval()
    assert_same_captions(speaker, ClipCapModel(literal.gpt2, model.tokenizer, speaker.mapping_network), torch.arange(5.)[:, None], max_length, num_beams)


def test_so_it_does_for_captions_that_rarely_end(both):
    assert_same_captions(*both, torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).double(), 20, 5)
