"""The model card of a run (clipcap.reporting.card)."""
import dataclasses
import math
import re

import pytest
from huggingface_hub import ModelCard

from clipcap.core import Config, Run, make_config
from clipcap.reporting.card import as_text, captioner_card, dataset_name, label, number, write_card
from clipcap.runs.files import write_json

EVIL = "a dog | ![x](http://evil.example/x.png) <script>alert(1)</script>\n# runs"
SCORES = {"corpus": {"bleu_4": 0.25, "cider": 1.5, "spice": None}, "intervals": {"bleu_4": [0.2, 0.3], "cider": [1.25, 1.75], "spice": [None, None]},
          "unavailable": {"spice": "OSError: no Java"}, "diversity": {}, "subsets": {},
          "protocol": {"split": "test", "tokenization": "ptb", "images": 2, "references": 3, "metrics": ["bleu_4", "cider", "spice"], "interval": "95% of 9 bootstrap samples of the images"}}


def made_up(folder, name="my run", cider=(1.0, 2.0), **changes):
    "A run that never was: run, configuration."
    run, config = Run(name, folder), make_config("mini", **changes)
    run.update(preset="mini", config=dataclasses.asdict(config), stages={
        "01_data": {"encoder": "mini@0123", "images": {"train": 8, "val": 1, "test": 2}, "captions": 44, "data_hash": "ab"*32, "bad_images": {}},
        "03_train": {"gpt2": "mini@4567", "epochs": 30, "final_val_loss": 0.7, "python": "3.11", "packages": {"torch": "2.14.1"}, "finished": "2026-11-25T03:25:15",
                     "made": {"checkpoints/mapping_network_epoch_30.pth": "cd"*32, "metrics.jsonl": "ef"*32}}})
    write_json(run.path/"captions_test.json", [{"image_id": "a.jpg", "caption": EVIL}, {"image_id": "b_1.jpg", "caption": "a cat"}])
    write_json(run.path/"scores_test.json", SCORES)
    (run.path/"scores_test.csv").write_text("image_id,cider\n" + "".join(f"{n},{c}\n" for n, c in zip(("a.jpg", "b_1.jpg"), cider)))
    (run.path/"captions_table.csv").write_text("image,caption,split\na.jpg,A dog runs.,test\nb_1.jpg,A cat sits.,test\n")
    return run, config


@pytest.fixture
def card(tmp_path): return write_card(*made_up(tmp_path)).read_text("utf-8")


@pytest.mark.parametrize("name, text", [("bleu_4", "BLEU-4"), ("rouge_l", "ROUGE-L"), ("cider", "CIDEr"), ("spice_color", "SPICE color"), ("wrong_color", "wrong color")])
def test_names_are_spelled_as_usual(name, text): assert label(name) == text


def test_numbers_are_formatted():
    assert [number(0.12345), number(None), number(math.nan), number(0.5, ".0%")] == ["0.123", "none", "none", "50%"]


@pytest.mark.parametrize("value, text", [("a *dog* | [x](y)\n# b", r"a \*dog\* \| \[x\](y) # b"), ("<img src=x>&", "&lt;img src=x&gt;&amp;"),
                                         ("see http://a.b and www.c.d, me@e.f", r"see http:\/\/a.b and www\.c.d, me\@e.f"), (0.5, "0.5"), (None, "None")])
def test_markup_is_escaped(value, text): assert as_text(value) == text


def test_data_sets_are_named_without_their_place():
    assert [dataset_name(make_config("mini", **c)) for c in ({}, {"data_root": Config.data_root}, {"data_root": "a/b/photos"})] == ["clipcap's embedded drawn scenes", "Flickr8k", "photos"]


def test_the_hub_reads_the_metadata(card):
    about = ModelCard(card).data
    assert (about.license, about.language, about.model_name) == ("mit", "en", "my run")
    assert [(r.metric_type, r.metric_value, r.dataset_split) for r in about.eval_results] == [("bleu_4", 0.25, "test"), ("cider", 1.5, "test")]


def test_own_data_have_no_licence_and_no_path_of_this_machine(tmp_path):
    card = write_card(*made_up(tmp_path, "real: one", data_root=f"{tmp_path}/photos", gpt2_model=f"{tmp_path}/own")).read_text("utf-8")
    about = ModelCard(card).data
    assert (about.license, about.license_name, about.language, about.datasets, about.model_name) == ("other", "as-the-training-data-allow", None, ["photos"], "real: one")
    assert str(tmp_path) not in card and "drawn scenes" not in card


def test_a_shared_card_names_an_encoder_without_its_place(tmp_path):
    run, config = made_up(tmp_path, clip_model=f"hf:{tmp_path}/siglip")
    card = captioner_card(config, "hf:siglip@0123", None, run)
    assert str(tmp_path) not in card and "| hf:siglip |" in card and "CIDEr | 1.500" in card and "How to use it" in card and "How to verify" not in card


@pytest.mark.parametrize("part", ["CIDEr | 1.500 | 1.250 to 1.750", "BLEU-4 | 0.250", "Not measured: SPICE (OSError: no Java)", "8 images", "cd"*32, "a frozen GPT-2",
                                  "learning\\_rate | 0.001 | 1e-05", "clipcap verify 'my run'", "split test, tokenization ptb, images 2", "drawn scenes, not photographs"])
def test_card_holds(card, part): assert part in card


def test_captions_stay_text_on_their_line_of_a_table(card):
    assert "<script" not in card and not re.search(r"(?<!\\)\]\(", card) and "ef"*32 not in card
    row, = (line for line in card.splitlines() if line.startswith("| a.jpg"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 4


def test_headings_and_tables_have_empty_lines_around_them(card):
    lines = card.splitlines()
    for before, line in zip(lines, lines[1:]):
        if line.startswith(("#", "| ")) != before.startswith(("#", "| ")): assert not before or not line or before.startswith("| ---"), (before, line)


@pytest.mark.parametrize("cider", [(), (1.0,), ("", "")], ids=["no image", "one image", "no CIDEr"])
def test_card_of_few_photos(tmp_path, cider): assert "CIDEr | 1.500" in write_card(*made_up(tmp_path, cider=cider)).read_text("utf-8")


def test_missing_scores_are_named(tmp_path):
    run, config = made_up(tmp_path)
    (run.path/"scores_test.json").unlink()
    with pytest.raises(FileNotFoundError, match="scores_test.json"): write_card(run, config)
