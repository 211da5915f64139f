"""The report: its content, its page in a browser, and text that nobody should trust (clipcap.report)."""
import base64
import io
import json
import math
import shutil
import time
from functools import partial

import numpy as np
import pandas as pd
import pytest
from conftest import make_tiny
from PIL import Image
from safetensors.numpy import save_file

from clipcap import evaluate
from clipcap.core import Run
from clipcap.data import Data
from clipcap.report import (curves_svg, data_uri, error_content, make_report, optional_file, pack_relevance, report_html, required_file, sort_columns,
                            summary_content, thumbnails)
from clipcap.reporting.card import write_card
from clipcap.runs.files import write_json
from clipcap.scoring.error_kinds import ERROR_KINDS
from clipcap.train import train_run

SCORES = {"corpus": {"cider": 1.5, "spice": None, "bleu_4": 0.25}, "intervals": {"cider": [1.25, 1.75]},
          "unavailable": {"spice": "no jars", "spider": "no jars"}, "diversity": {"distinct_1": 0.5},
          "subsets": {"seen": {"images": 3, "cider": 2.0}}, "protocol": {"num_beams": 5, "metrics": ["cider"]}}
CONTROLS = pd.DataFrame({"cider": [1.5, 0.3], "share_of_model": [1, 0.2]}, index=["model", "shuffled images"])
KINDS = {"invented": "Names a thing that no reference has.", "wrong_color": "Gives a thing another color than people do."}
EVIL = "a dog </script><img src=x onerror=alert(1)>"


# --- pieces

def test_a_picture_becomes_a_small_webp_address():
    uri, width, height = data_uri(Image.new("RGB", (1000, 500), "teal"))
    back = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert (width, height) == (400, 200) and (back.format, back.size) == ("WEBP", (400, 200))
    assert np.abs(np.subtract(back.getpixel((7, 7)), (0, 128, 128))).max() <= 4
    assert data_uri(Image.new("L", (30, 20)))[1:] == (30, 20)  # smaller ones stay as they are


def test_photos_that_are_gone_or_damaged_say_so(tmp_path):
    (tmp_path/"torn.jpg").write_text("no photo")
    found = thumbnails(Data(None, None, tmp_path), ["torn.jpg", "none.jpg"])
    assert [t["gone"] for t in found] == ["this photo can't be read", "this photo is not here"]


def test_curves_are_the_same_bytes_without_styles():
    falling = pd.DataFrame({"epoch": [1, 2, 3], "train_loss": [3., 2., 1.], "val_loss": [3., 2., 2.5], "val_cider": [.1, .4, .3]})
    losses, cider = curves_svg(falling)
    assert "lowest after epoch 2" in losses and "highest after epoch 2: 0.40" in cider and "nats" in losses
    assert curves_svg(falling) == [losses, cider] and len(curves_svg(falling.drop(columns="val_cider"))) == 1
    assert "<!DOCTYPE" not in losses and losses.startswith("<svg ") and losses.rstrip().endswith("</svg>") and "style" not in losses
    assert 'stroke="#1f77b4" stroke-width="1.5"' in losses and 'text-anchor="middle"' in losses


def test_missing_and_outdated_files_name_their_stage(tmp_path):
    run, errors = Run("toy", tmp_path), "errors_test.csv"
    with pytest.raises(FileNotFoundError, match="papermill nbs/04_evaluate.ipynb OUT.ipynb -p run toy -p eval_split test"): required_file(run, "scores_test.csv", "test")
    assert "run 06_attention, then" in optional_file(run, "relevance_test.safetensors", "06_attention", "test")[1]
    write_json(run.path/errors, [])
    assert optional_file(run, errors, "05_error_analysis", "test") == (run.path/errors, "")
    run.update(stages={"04_evaluate": {"started": "Tuesday", "eval_split": "test"}, "05_error_analysis": {"built_on": {"04_evaluate": "Monday"}}})
    assert "older than these captions" in optional_file(run, errors, "05_error_analysis", "test")[1]
    assert optional_file(run, errors, "05_error_analysis", "val")[1] == ""  # Tuesday's captions were of another split


def write_relevance(path, captions, patches=7, photo=True, reason=""):
    "Write a relevance file whose k-th word looks at the k-th place of a diagonal."
    tensors, grid = {}, np.arange(patches)
    for name, words in ((name, caption.split()) for name, caption in captions.items()):
        at = np.linspace(0, patches - 1, len(words))[:, None, None]
        spot = np.exp(-((grid[:, None] - at)**2 + (grid - at)**2)/3)  # (words, patches, patches)
        if photo: tensors[f"photo/{name}"] = (spot*np.linspace(0.5, 1, len(words))[:, None, None]).astype(np.float16)
        shares = np.tril(np.ones((len(words), len(words) + 1)))*np.r_[2, np.ones(len(words))]  # the photo counts twice
        tensors[f"words/{name}"] = (shares/shares.sum(1, keepdims=True)).astype(np.float16)
    save_file(tensors, path, {"words": json.dumps({n: c.split() for n, c in captions.items()}), "reason": reason, "method": "Made up."})


def test_relevance_is_packed_on_one_scale_and_of_other_captions_refused(tmp_path):
    write_relevance(tmp_path/"r.safetensors", {"1.jpg": "a dog runs", "2.jpg": "snow"})
    (packed, absent), _ = pack_relevance(tmp_path/"r.safetensors", {"1.jpg": "a dog runs", "3.jpg": "not there"})
    maps = np.frombuffer(base64.b64decode(packed["photo"]["data"]), np.uint8).reshape(3, *packed["photo"]["size"])
    shares = np.frombuffer(base64.b64decode(packed["shares"]["data"]), np.uint8).reshape(3, 4)
    assert absent is None and [(m.argmax(), m.max()) for m in maps] == [(0, 128), (24, 191), (48, 255)]
    assert shares[1].tolist() == [170, 85, 0, 0]  # 2/3 from the photo, 1/3 from "a"
    with pytest.raises(ValueError, match="it explains another caption of 1.jpg; run 06_attention"): pack_relevance(tmp_path/"r.safetensors", {"1.jpg": "a cat runs"})


def test_scores_become_text():
    content = summary_content(SCORES, CONTROLS)
    assert [list(row.values()) for row in content["scores"]] == [["CIDEr", "1.500", "1.250 to 1.750"], ["BLEU-4", "0.250", "none"]]
    assert content["unavailable"] == [("SPICE, SPIDEr", "no jars")]
    assert content["controls"][1] == {"label": "shuffled images", "cider": "0.300", "share": "20%", "width": 20.0}
    assert (content["subsets"]["rows"], content["protocol"]) == ([("seen", ["3", "2.000"])], [("num beams", 5)])


def test_controls_without_a_score_have_no_bar():
    for cider in ([math.nan]*2, [0., math.nan], [0., 0.]):
        controls = pd.DataFrame({"cider": cider, "share_of_model": math.nan}, index=["model", "shuffled images"])
        assert [row["width"] for row in summary_content(SCORES, controls)["controls"]] == [0, 0]


def test_a_measure_of_diversity_that_is_undefined_says_why():
    content = summary_content({**SCORES, "diversity": {"distinct_1": None, "mbleu_4": None, "novel": 1.0}}, None)
    assert [text for _, text in content["diversity"]] == ["none: no caption has a word", "none: there is only one caption", "1"]


def test_cards_are_sorted_by_what_has_a_number():
    per_image = pd.DataFrame({"bleu_4": [0.1, 0.2], "cider": [0.5, math.nan], "spice_size": [math.nan]*2}, index=["a", "b"])
    columns = sort_columns(per_image, pd.DataFrame({"cider": [9, 9], "copied": [True, False], "rarity": [1.5, 2]}, index=["a", "b"]))
    assert columns["sorts"] == [("scores", [("cider", "CIDEr"), ("bleu_4", "BLEU-4")]), ("error analysis", [("copied", "copied"), ("rarity", "rarity")])]
    assert (columns["columns"]["cider"], columns["columns"]["copied"], columns["flags"]) == ([0.5, None], [1., 0.], ["copied"])


def test_errors_are_counted_in_images():
    errors = pd.DataFrame([("a", "invented", "dog"), ("a", "invented", "cat"), ("b", "invented", "cow"), ("b", "repetition", ""), ("z", "generic", "")],
                          columns=["image_id", "kind", "what"])
    rows, of_image = error_content(errors, ["a", "b", "c", "d"], {"repetition": "Says it twice.", "invented": "In no reference.", "generic": "Said of many."})
    assert [(r["name"], r["images"], r["share"]) for r in rows] == [("invented", 2, "50%"), ("repetition", 1, "25%"), ("generic", 0, "0%")]
    assert of_image == {"a": {"invented": "dog; cat"}, "b": {"invented": "cow", "repetition": ""}}


# --- pages

def made_up_run(folder, photos, maps=True, late=True):
    "Make a run of eight images and its data, with text that would break out of the page; without files of later stages unless `late`."
    run, names = Run("made up", folder), [*sorted(p.name for p in photos.iterdir())[:7], '"><b>gone.jpg']
    captions = {n: f"a {animal} sits {'now '*k}." for k, (n, animal) in enumerate(zip(names, ["dog", "cat"]*4))} | {names[6]: EVIL}
    table = pd.DataFrame([(n, f"one {animal} runs", "test", "seen") for n in names for animal in ["dog"]*5], columns=["image", "caption", "split", "subset"])
    table.loc[table.image.isin(names[4:]), "subset"] = "unseen"
    write_json(run.path/"captions_test.json", [{"image_id": n, "caption": c} for n, c in captions.items()])
    write_json(run.path/"scores_test.json", SCORES)
    index = pd.Index(names, name="image_id")
    pd.DataFrame({"cider": [0.5, 0.1, 0.9, 0.3, math.nan, 0.2, 0.8, 0.7], "bleu_4": np.arange(8)/10}, index).to_csv(run.path/"scores_test.csv")
    if late:
        CONTROLS.to_csv(run.path/"controls_test.csv")
        pd.DataFrame([(names[0], "invented", EVIL), (names[1], "invented", "cat"), (names[1], "wrong_color", "")],
                     columns=["image_id", "kind", "what"]).to_csv(run.path/"errors_test.csv", index=False)
        pd.DataFrame({"difficulty": np.arange(8)[::-1]/8, "copied": [True]*2 + [False]*6}, index).to_csv(run.path/"analysis_test.csv")
        write_relevance(run.path/"relevance_test.safetensors", captions, photo=maps, reason="" if maps else "the run was given embeddings")
    return run, Data(table, None, photos), names


@pytest.fixture(scope="module")
def pages(tmp_path_factory, scenes):
    "Pages by kind: everything there; `bare` without later stages; `blind` without maps of photos; `torn` with a damaged file. And the images."
    folder = tmp_path_factory.mktemp("pages")
    run, data, names = made_up_run(folder/"html", scenes.photos)
    pages = {"html": report_html(run, data, "test", KINDS), "names": names,
             "bare": report_html(*made_up_run(folder/"bare", scenes.photos, late=False)[:2]),
             "blind": report_html(*made_up_run(folder/"blind", scenes.photos, maps=False)[:2])}
    (run.path/"relevance_test.safetensors").write_bytes(b"torn")
    return pages | {"torn": report_html(run, data, "test", KINDS)}


def test_the_page_is_text_and_loads_nothing(pages):
    html = pages["html"]
    assert EVIL not in html and "&lt;img src=x onerror=alert(1)&gt;" in html
    assert (html.count("<article"), html.count("<script"), html.count("</script>")) == (8, 2, 2)  # our script and the data, nothing else
    assert (html.count("<style"), html.count(" style="), html.count("unsafe-inline")) == (1, 0, 0)
    for address in ("http://", "https://", 'src="//'): assert address not in html.replace('xmlns="http://', "").replace('xlink="http://', "")


def test_the_page_says_what_is_missing(pages):
    for name in ("controls_test.csv", "errors_test.csv", "analysis_test.csv", "relevance_test.safetensors"): assert f"{name} is not there" in pages["bare"]
    assert "relevance_test.safetensors can&#39;t be used: " in pages["torn"]
    assert "No maps of the photos: the run was given embeddings" in pages["blind"]


def test_a_page_without_scores_names_the_stage(tmp_path, scenes):
    run, data, _ = made_up_run(tmp_path, scenes.photos)
    (run.path/"scores_test.csv").unlink()
    with pytest.raises(FileNotFoundError, match="scores_test.csv is missing; first: papermill nbs/04_evaluate"): report_html(run, data)


def test_a_trained_run_has_a_page_that_is_small_enough(trained_copy):
    run, config = trained_copy
    path = make_report(run, config, "test", ERROR_KINDS)
    images = len(json.loads((run.path/"captions_test.json").read_text()))
    assert path.stat().st_size <= 3_200_000 + 37_000*images  # 1,000 images: 40 MB


def test_a_run_of_few_images_that_writes_nothing_has_a_page(outputs, scene_captions, monkeypatch):
    run, config = make_tiny(outputs, scene_captions.groupby("image").head(1), 12, epochs=1, num_layers=1)  # one caption per image, given embeddings
    with run.stage("03_train", config, ["01_data"]): train_run(run, config)
    monkeypatch.setattr(evaluate, "caption_images", lambda model, embeddings, names, *_: dict.fromkeys(names, ""))
    monkeypatch.setattr(evaluate, "score_split", partial(evaluate.score_split, metrics=["bleu_4", "rouge_l", "cider"]))
    with run.stage("04_evaluate", config, ["01_data", "03_train"]): evaluate.evaluate_run(run, config)
    page = make_report(run, config).read_text("utf-8")
    assert page.count("<article") == len(json.loads((run.path/"captions_test.json").read_text())) and "this photo is not here" in page
    assert write_card(run, config).is_file()


# --- the page in a headless Chromium, by Playwright

@pytest.fixture(scope="module")
def chromium():
    "A browser; skips where there is none (apt-get install chromium, pip install playwright)."
    sync_api = pytest.importorskip("playwright.sync_api")
    if not (path := shutil.which("chromium")): pytest.skip("no chromium on the PATH")
    with sync_api.sync_playwright() as playwright:
        try: browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync_api.Error as error: pytest.skip(f"chromium does not start: {error}")
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, tmp_path):
    """A function that opens a page from a file, lets `look(page)` use it, and returns what that returned. It fails if the page asked for any other
    address, wrote an error to the console, was refused something by its policy, or needs to be scrolled sideways."""
    def visit(html, look, **options):
        file = tmp_path/"report.html"
        file.write_text(html, "utf-8")
        page, wrong = chromium.new_page(**options), []
        page.on("request", lambda request: request.url.split("#")[0] != file.as_uri() and not request.url.startswith("data:") and wrong.append(request.url))
        page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append("a dialog"), dialog.dismiss()))
        page.add_init_script("refused = []; addEventListener('securitypolicyviolation', event => refused.push(event.effectiveDirective))")
        page.goto(file.as_uri())
        seen = look(page)
        if options.get("java_script_enabled", True):
            if page.evaluate("document.documentElement.scrollWidth > innerWidth"): wrong.append("wider than the window")
            wrong.extend(page.evaluate("refused"))
            if page.evaluate("typeof canary") != "undefined": wrong.append("the canary sings")
        page.close()
        assert wrong == []
        return seen
    return visit


def soon(look, wanted, seconds=30):
    "Wait until `look()` is `wanted`: a page answers when it finds the time."
    until = time.monotonic() + seconds
    while (found := look()) != wanted and time.monotonic() < until: time.sleep(0.05)
    assert found == wanted


def choose(page, **fields): [page.select_option(f"[name={field}]", value) for field, value in fields.items()]


@pytest.mark.slow
def test_cards_are_sorted_and_filtered_by_controls_and_by_a_link(opened, pages):
    def cards(page, *order): soon(lambda: [pages["names"].index(n) for n in page.locator("#cards .name").all_text_contents()], [*order])
    def look(page):
        cards(page, 1, 5, 3, 0, 7, 6, 2, 4)  # worst CIDEr first, the one without a score last
        soon(lambda: page.locator("#count").inner_text(), "8 of 8 images, mean CIDEr 0.500")
        choose(page, order="high"), cards(page, 2, 6, 7, 0, 3, 5, 1, 4)
        choose(page, sort="difficulty"), cards(page, *range(8))
        choose(page, order="low"), cards(page, *range(8)[::-1])
        choose(page, kind="invented"), cards(page, 1, 0)
        choose(page, kind="none", subset="seen"), cards(page, 3, 2)
        page.click("text=Clear"), cards(page, 1, 5, 3, 0, 7, 6, 2, 4)
        page.fill("[name=word]", "Dog"), cards(page, 1, 5, 3, 0, 7, 6, 2, 4)  # people say it of all
        choose(page, where="caption"), cards(page, 0, 6, 2, 4)
        choose(page, where="missed"), cards(page, 1, 5, 3, 7)
        choose(page, where="invented"), cards(page)
        soon(lambda: page.locator("#nothing").is_visible(), True)
        page.fill("[name=word]", "ca* now"), cards(page, 1, 5, 3, 7)
        address = page.url.partition("#")[2]
        page.click("text=Clear"), page.click("a.filter >> text=wrong color"), cards(page, 1)
        page.evaluate("address => location.hash = address", address), cards(page, 1, 5, 3, 7)  # a view can be linked to
    opened(pages["html"], look)


BRIGHTEST = """() => { const canvas = document.querySelector("#stage canvas"), {width, height} = canvas
    const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data
    let best = 0; for (let i = 0; i < width*height; i++) if (pixels[4*i] + pixels[4*i + 1] > pixels[4*best] + pixels[4*best + 1]) best = i
    return [Math.floor(best/width)/height, best % width/width].map(x => Math.round(7*x - .5)) }"""


@pytest.mark.slow
def test_a_card_is_opened_and_left_by_keyboard_and_its_maps_are_right(opened, pages):
    names = pages["names"]
    def place(page, text): soon(lambda: page.locator("#place").inner_text(), text)
    def look(page):
        page.locator("#cards .photo").first.focus()
        page.keyboard.press("ArrowRight"), page.keyboard.press("Enter")  # the second worst: names[5]
        soon(lambda: page.locator("#viewer").is_visible(), True)
        place(page, f"2 of 8: {names[5]}")
        soon(lambda: page.locator("#stage .references li").count(), 5)
        words = page.locator("#stage .word")
        soon(words.all_text_contents, "a cat sits now now now now now .".split())
        for k in range(9):  # each word's brightest spot is where the file has it
            while not words.nth(k).evaluate("e => e === document.activeElement"): page.keyboard.press("Tab")
            if k in (0, 4, 8): soon(lambda: page.evaluate(BRIGHTEST), [6*k//8]*2)
        soon(lambda: page.locator("#told").inner_text(), "“.”: 20% from the photo; strongest earlier word: “a”, 10%.")
        page.keyboard.press("ArrowRight"), place(page, f"3 of 8: {names[3]}")
        page.keyboard.press("Escape"), soon(lambda: page.locator("#viewer").is_visible(), False)
        page.keyboard.press("ArrowLeft"), page.keyboard.press("Enter")
        place(page, f"2 of 8: {names[5]}")  # back where the reader was
        page.click("text=Close")
        page.hover("#cards .caption span >> nth=2"), soon(lambda: page.locator("#cards canvas").count(), 1)  # in the gallery, too
        page.locator("#cards .photo").nth(5).click()  # the caption that nobody should trust
        soon(lambda: page.locator("#stage .caption").inner_text().split(), EVIL.split())
    opened(pages["html"], look)


@pytest.mark.slow
def test_without_maps_or_relevance_the_page_says_so(opened, pages):
    def without_maps(page):
        page.locator("#cards .photo").first.click()
        page.locator("#stage .word").nth(1).hover()
        soon(lambda: (page.locator("canvas").count(), page.locator("#told").inner_text()), (0, "“cat”: 67% from the photo; strongest earlier word: “a”, 33%."))
        soon(lambda: (page.locator("#no-photo-map").is_visible(), page.locator("#scale").is_visible()), (True, False))
    def without_relevance(page):
        page.locator("#cards .photo").first.click()
        soon(lambda: (page.locator("#unexplained").is_visible(), page.locator("#explained").is_visible()), (True, False))
        soon(lambda: page.locator("label:has([name=kind])").is_visible(), False)
    opened(pages["blind"], without_maps)
    opened(pages["bare"], without_relevance)


@pytest.mark.slow
def test_touch_and_a_narrow_screen(opened, pages):
    def look(page):
        page.locator("#cards .caption span").nth(1).tap()
        soon(lambda: (page.locator("#cards canvas").count(), page.locator("#viewer").is_visible()), (1, False))
        page.locator("#cards .photo").nth(2).tap(), page.locator("#stage .word").nth(1).tap()
        soon(lambda: page.locator("#stage canvas").is_visible(), True)
    opened(pages["html"], look, viewport={"width": 380, "height": 700}, has_touch=True)


@pytest.mark.slow
def test_without_scripts_it_is_a_plain_list(opened, pages):
    def look(page):
        assert page.locator("#cards .name").all_text_contents() == pages["names"]
        for part in (".caption", ".references", ".scores", ".what"): assert page.locator(f"#cards {part}").first.is_visible()
        assert not page.locator("#controls").is_visible() and not page.locator("#viewer").is_visible()
        assert page.locator("#cards .references li").count() == 40
    opened(pages["html"], look, java_script_enabled=False)


# --- text that nobody should trust: each would set `canary` if it could

HOSTILE = ["<script>canary = 1</script>", "<img src=x onerror=canary=1>", '"><svg onload=canary=1>', "' onmouseover='canary=1' '",
           "</script><script>canary = 1</script>", "</style><script>canary = 1</script>", "<!-- <script>",
           "]]>--></title><iframe srcdoc='<script>top.canary=1</script>'>", "javascript:canary=1", "{{7*7}} {% raw %} ${7*7}", "$\\frac{", "&lt;b&gt; &amp;amp;",
           "\u202egnp.xes\u2066 \u200f\u05d0", "bell\a, escape\x1b[2J, nul\0", "half \ud800", "long "*200, "x"*5000]


def readable(text): return text.replace("\0", "").encode("utf-8", "replace").decode()  # HTML has no NUL, UTF-8 no half of a pair


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, scenes):
    "The page of a run whose every text is hostile, and its captions by image."
    run, texts = Run("<img src=x onerror=canary=1>", tmp_path_factory.mktemp("hostile")), {f"{readable(text)[:200]}.jpg": text for text in HOSTILE}
    index, several = pd.Index(texts, name="image_id"), {f"{k} {text}": text for k, text in enumerate(HOSTILE)}
    run.path.mkdir(parents=True)
    (run.path/"captions_test.json").write_text(json.dumps([{"image_id": n, "caption": text} for n, text in texts.items()]))
    (run.path/"scores_test.json").write_text(json.dumps({**SCORES, "protocol": several, "unavailable": {"spice": HOSTILE[4]}}))
    pd.DataFrame({"cider": np.arange(len(texts))/10, HOSTILE[2]: 0.5}, index).to_csv(run.path/"scores_test.csv")
    pd.DataFrame({HOSTILE[0]: 0.5}, index).to_csv(run.path/"analysis_test.csv")
    pd.DataFrame([(n, kind, readable(text)) for n, text in texts.items() for kind in HOSTILE[:6]],
                 columns=["image_id", "kind", "what"]).to_csv(run.path/"errors_test.csv", index=False)
    CONTROLS.rename(lambda name: f"{HOSTILE[1]} {name}").to_csv(run.path/"controls_test.csv")
    write_relevance(run.path/"relevance_test.safetensors", texts, photo=False, reason=HOSTILE[4])
    several = {readable(key): readable(text) for key, text in several.items()}
    run.update(config=several, stages={"04_evaluate": {"git_commit": HOSTILE[0], "finished": HOSTILE[1], "packages": several, "hardware": several}})
    table = pd.DataFrame([(n, readable(text), "test", readable(text)) for n, text in texts.items()], columns=["image", "caption", "split", "subset"])
    return report_html(run, Data(table, None, scenes.photos), "test", dict(zip(HOSTILE[:6], HOSTILE))), texts


def test_hostile_text_adds_no_element(hostile): assert [hostile[0].count(tag) for tag in ("<script", "<!--", "<img")] == [2, 0, 0]


@pytest.mark.slow
def test_hostile_text_is_there_to_read(opened, hostile):
    "In the gallery, in an opened card, and in lists to choose from."
    html, texts = hostile
    def contents(page, part): return page.locator(part).evaluate_all("found => found.map(e => e.textContent)")
    def look(page):
        soon(lambda: page.locator("#cards .card").count(), len(HOSTILE))
        for part, wanted in ((".references li", HOSTILE), (".name", texts), (".kinds li:first-child bdi", HOSTILE),
                             ("[name=subset] option:not([value])", sorted(map(readable, HOSTILE)))):
            assert contents(page, part) == [readable(text) for text in wanted]
        assert [text.split() for text in page.locator("#cards .caption").all_text_contents()] == [readable(text).split() for text in HOSTILE]
        assert page.title() == "<img src=x onerror=canary=1>: test split" and set(map(readable, HOSTILE)) <= set(contents(page, "footer dd"))
        page.locator("#cards .photo").first.click()
        for k, (name, text) in enumerate(list(texts.items())[:14]):
            soon(lambda: page.locator("#place").inner_text(), f"{k + 1} of {len(HOSTILE)}: {name}")
            page.locator("#stage .word").first.hover()
            soon(lambda: page.locator("#told").inner_text().startswith(f"“{readable(text).split()[0]}”: 100% from the photo"), True)
            page.keyboard.press("ArrowRight")
        page.keyboard.press("Escape")
        for k in range(6): page.locator("a.filter").nth(k).click(), soon(lambda: page.locator("#count").inner_text().split(",")[0], f"{len(HOSTILE)} of {len(HOSTILE)} images")
        choose(page, subset=readable(HOSTILE[2])), soon(lambda: page.locator("#cards .card").count(), 1)
    opened(html, look)


INJECTED = {"<script>canary = 1</script>": "script-src-elem", "<img src='data:,' onerror='canary = 1'>": "script-src-attr",
            "<script src='data:text/javascript,canary=1'></script>": "script-src-elem", "<a id=lure href='javascript:canary=1'>.</a>": "script-src-elem",
            "<iframe srcdoc='<script>top.canary=1</script>'></iframe>": "script-src-elem", "<object data='data:text/html,x'></object>": "object-src",
            "<p style='color: red'>": "style-src-attr", "<style>p { color: red }</style>": "style-src-elem", "<img src='https://example.org/x.png'>": "img-src",
            "<link rel=stylesheet href='https://example.org/x.css'>": "style-src-elem", "<base href='https://example.org'>": "base-uri",
            "<form id=sent action='https://example.org'></form>": "form-action"}


@pytest.mark.slow
def test_code_that_got_into_the_page_is_refused_by_its_policy(opened, pages):
    "Should the escaping fail one day: none of it runs, nothing is fetched, and `opened` tells."
    told = []
    def look(page):
        for act in ("lure.click()", "sent.submit()", "setTimeout('canary = 1')", "stage.innerHTML = '<b>'"): page.evaluate(f"() => {{ try {{ {act} }} catch {{}} }}")
        soon(lambda: sorted(set(page.evaluate("refused"))), sorted({*INJECTED.values(), "require-trusted-types-for"}))
        told.append((page.evaluate("typeof canary"), page.evaluate("getComputedStyle(document.querySelector('main p')).color") == "rgb(255, 0, 0)"))
    with pytest.raises(AssertionError, match="Content Security Policy"): opened(pages["html"].replace("</main>", "".join(INJECTED) + "</main>"), look)
    assert told == [("undefined", False)]


@pytest.mark.slow
@pytest.mark.parametrize("code, text", [("<script>canary = 1</script>", "the canary sings"), ("<img src='https://example.org/x.png'>", "example.org")])
def test_without_the_policy_the_same_code_runs_and_is_seen(opened, pages, code, text):
    allowed = pages["html"].replace('http-equiv="Content-Security-Policy"', 'name="none"')
    with pytest.raises(AssertionError, match=text): opened(allowed.replace("</main>", f"{code}</main>"), lambda page: page.wait_for_load_state())
