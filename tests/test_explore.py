"""The prefix as words, the map of images, and the interactive page (clipcap.interpret.explore)."""
import math
from io import BytesIO

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from PIL import Image

from clipcap.data import load_data
from clipcap.decoding.load import load_run, save_weights
from clipcap.evaluate import read_captions_json
from clipcap.interpret.explore import explore, nearest_tokens, plot_map, principal_plane
from clipcap.model import load_model, plain_writer
from clipcap.runs.files import write_json


@pytest.mark.numerics
def test_word_embeddings_are_their_own_nearest_tokens(mini_model):
    ids = mini_model.tokenizer(" dog running")["input_ids"]
    table = nearest_tokens(mini_model, mini_model.gpt2.get_input_embeddings().weight[ids])
    assert table.token_1.tolist() == [mini_model.tokenizer.decode(i) for i in ids]
    assert table.cosine_1.tolist() == pytest.approx([1]*len(ids), abs=1e-4) and list(table.index) == list(range(1, len(ids) + 1))


@pytest.mark.numerics
def test_plane_lies_along_what_differs_most():
    line = torch.outer(torch.linspace(-1, 1, 9), torch.tensor([3., 4.])) + torch.tensor([50., 0])
    places, shares = principal_plane(torch.cat([line, torch.full((9, 1), 50.)], dim=1))
    assert shares[0] > 0.9 and places[:, 0].diff().sign().unique().numel() == 1  # in order


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("score", [0., 1., math.nan])
def test_any_number_of_images_can_be_mapped(number, score):
    places, shares = principal_plane(torch.eye(4)[:number])
    assert places.shape == (number, 2) and torch.isfinite(places).all() and torch.isfinite(shares).all()
    texts = ["A dog.", "two dogs", "a cat", "nothing"][:number]
    figure = plot_map(places, shares, pd.Series([score]*number, name="CIDEr"), texts, {"dog": ("dog", "dogs"), "cat": ("cat",)})
    figure.canvas.draw()
    labels = [t.get_text() for t in figure.axes[1].get_legend().get_texts()]
    assert labels == [f"dog ({min(number, 2)})", f"cat ({int(number > 2)})", f"none of these ({int(number > 3)})"]
    plt.close(figure)


def views(page): return [part.value for part in page.children if hasattr(part, "format")]


def test_page_follows_its_controls(trained, monkeypatch):
    drawn = []
    def png(figure): drawn.append([t.get_text() for t in figure.findobj(plt.Text)]); plt.close(figure); return str(len(drawn)).encode()
    monkeypatch.setattr("clipcap.interpret.explore._png", png)
    (run, config), page = trained, explore("demo", device="cpu")
    (image, beams, temperature, _), caption = page.children[0].children, page.children[1]
    write, data = plain_writer(load_run("demo", device="cpu", precision="float32"), config), load_data(run, config)
    assert len(drawn) == 3 and image.options == tuple(read_captions_json(run.path/"captions_test.json"))
    for name in image.options[:2]:
        image.value = name
        assert caption.value == write(data.embeddings.stack([name]))[0]  # with the run's own settings
    assert len(drawn) == 6
    caption.value = "A zebra ."  # anybody's words
    assert len(drawn) == 9 and all("zebra" in texts for texts in drawn[6:8])
    temperature.value = 2.
    sampled = caption.value
    temperature.value, beams.value = 0., 1
    temperature.value, beams.value = 2., 2
    assert caption.value == sampled  # the same seed, the same sample


def test_page_of_an_empty_caption_has_no_views(trained_copy, monkeypatch):
    run, config = trained_copy
    monkeypatch.setattr("clipcap.interpret.explore.plain_writer", lambda *_: lambda embeddings: [""]*len(embeddings))
    page = explore("demo")
    assert page.children[1].value == "" and not any(views(page))
    page.children[1].value = "dog"
    assert len(views(page)) == 3 and all(Image.open(BytesIO(png)).width > 200 for png in views(page))


def test_run_on_embeddings_has_two_views(tiny):
    run, config = tiny(10)
    save_weights(run.path, load_model(config, 16), 1)
    write_json(run.path/"captions_test.json", [{"image_id": n, "caption": "A dog ."} for n in pd.read_csv(run.path/"captions_table.csv").query("split == 'test'").image.unique()])
    page = explore("tiny")
    page.children[1].value = "A dog ."
    assert len(views(page)) == 2 and all(views(page))
    assert "no view of the photo" in page.children[3].value


def test_epoch_zero_is_not_the_last(trained):
    with pytest.raises(ValueError, match=r"no checkpoint of epoch 0; there are \["): explore("demo", epoch=0, device="cpu")
