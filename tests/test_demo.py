"""The demo page: what it answers to photos and to files that are none, by functions, by gradio_client, and in a browser (clipcap.apps.demo)."""
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

gradio = pytest.importorskip("gradio")

from clipcap.apps.demo import WORD_COLORS, Session, build_page, example_photos, find_captioner, free_port, heat_map, percent, serve
from clipcap.apps.cli import main
from clipcap.checks.hostile import HOSTILE
from clipcap.checks.payloads import photo
from clipcap.decoding.captioner import Caption, Captioner
from clipcap.formats.photos import read_photo


@pytest.fixture(scope="module")
def captioner(trained_outputs):
    "The run `demo`, by its name."
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("CLIPCAP_OUTPUTS", str(trained_outputs))
        warnings.simplefilter("ignore")
        yield find_captioner("demo", "cpu")


@pytest.fixture(scope="module")
def served(captioner, tmp_path_factory):
    "Address of the page, paths of its photos to try, and every address that this process asked for."
    folder, asked = tmp_path_factory.mktemp("demo"), []
    sys.addaudithook(lambda event, given: asked.append(str(given[1][0])) if event == "socket.connect" and isinstance(given[1], tuple)
                     else asked.append(str(given[0])) if event == "socket.getaddrinfo" else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        examples = example_photos(captioner, folder)
        page = build_page(captioner, examples, "demo <b>")
        yield serve(page).rstrip("/"), examples, asked
        page.close()


@pytest.fixture(scope="module")
def client(served):
    from gradio_client import Client, handle_file
    found = Client(served[0], verbose=False, analytics_enabled=False)
    def ask(path, beams=1, temperature=0, candidates=1):
        return found.predict(path and handle_file(str(path)), beams, temperature, candidates, api_name="/caption")["captions"]
    return ask


# --- pieces

def test_heat_map_is_bright_where_the_relevance_is():
    relevance = np.zeros((7, 7))
    relevance[1, 5] = 1
    drawn = np.asarray(heat_map(Image.new("RGB", (32, 32), "gray"), relevance, side=70)).sum(2)
    assert drawn.shape == (70, 70) and np.unravel_index(drawn.argmax(), drawn.shape)[0]//10 == 1 and drawn.argmax() % 70//10 == 5
    assert heat_map(Image.new("RGB", (500, 600)), relevance).size == (500, 600)  # never smaller than what the model saw


def test_every_probability_has_a_color():
    assert {percent(p) for p in np.linspace(0, 1, 1001)} == {*WORD_COLORS} and (WORD_COLORS["100%"], WORD_COLORS["0%"]) == ("#2563eb", "#ea580c")


def test_a_name_that_is_nothing_names_the_three_places(outputs):
    for name in ("nobody/nothing", "nothing"):
        with pytest.raises(ValueError, match="is neither a run in .*outputs, nor a folder, nor a captioner on the hub"): find_captioner(name)


def test_a_folder_of_a_run_names_the_run(trained):
    with pytest.raises(ValueError, match="is the folder of a run; give the run's name: demo"): find_captioner(str(trained[0].path))


def test_a_saved_captioner_is_found_by_its_folder(captioner, tmp_path):
    captioner.save_pretrained(tmp_path/"saved")
    found = find_captioner(str(tmp_path/"saved"), "cpu")
    assert example_photos(found, tmp_path) == [] and found(photo(), num_beams=1).text == captioner(photo(), num_beams=1).text


def test_a_model_without_image_encoder_is_refused(trained, mini_model, monkeypatch):
    monkeypatch.setattr(Captioner, "from_run", lambda *_, **__: Captioner(mini_model, trained[1]))
    with pytest.raises(ValueError, match="no CLIP"): find_captioner("demo")


def test_a_port_that_is_taken_is_named(served):
    port = int(served[0].rpartition(":")[2])
    with pytest.raises(ValueError, match=f"--port {port} can't be used .*name another, or 0"): free_port(port)
    with pytest.raises(ValueError, match="--port 70000 can't be used"): free_port(70_000)


def test_words_of_maps_are_words_of_the_caption(captioner, served):
    session = Session(captioner)
    caption, = session.captions(served[1][0], captioner.config.num_beams, 0, 1)
    _, explanation = session.explanation(served[1][0], caption.text)
    assert explanation.words == [word for word, _ in caption.words] and len(explanation.photo) == len(explanation.words)
    maps = [session.word_map(served[1][0], caption, number) for number in range(len(caption.words))]
    assert max(strength for _, strength in maps) == 1 and min(picture.size[0] for picture, _ in maps) >= 448
    with pytest.raises(ValueError, match="can't be told apart"): session.word_map(served[1][0], Caption("a dog", -1., (("dog", 1.),)), 0)


def test_a_word_has_no_map_where_the_encoder_has_none(captioner, served, monkeypatch):
    monkeypatch.setattr("clipcap.apps.demo.no_photo_maps", lambda model: "maps begin at a class token")
    with pytest.raises(ValueError, match="No maps of the photo: maps begin at a class token"): Session(captioner).word_map(served[1][0], Caption("a", -1.), 0)


def test_the_command_says_what_is_wrong_before_it_serves(outputs, capsys):
    assert main(["demo", "nothing", "--port", "0"]) == 1 and "'nothing' is neither a run" in capsys.readouterr().err
    assert main(["demo", "nothing", "--port", "-1"]) == 1 and "--port -1 can't be used" in capsys.readouterr().err


# --- the HTTP API, by gradio_client

def test_the_api_writes_the_captioner_s_own_captions(client, served, captioner):
    own = captioner(read_photo(served[1][0]))
    answer, = client(served[1][0], captioner.config.num_beams)
    assert answer["caption"] == own.text and answer["log_probability"] == pytest.approx(own.log_probability, abs=1e-5)
    assert [(w["word"], pytest.approx(w["probability"], abs=1e-5)) for w in answer["words"]] == [*own.words]


def test_candidates_are_written_by_beams_or_sampled(client, served):
    assert [len(client(served[1][0], *options)) for options in ((3, 0, 3), (5, 0.7, 2))] == [3, 2]


def test_requests_at_once_get_the_same_answers(client, served):
    alone = [client(path) for path in served[1][:2]]
    with ThreadPoolExecutor(4) as threads: assert [*threads.map(client, served[1][:2]*2)] == alone*2


@pytest.mark.parametrize("options, message", [
    ((1, 0, 5), "candidates=5 are more than the search has with num_beams=1"), ((500, 0, 1), "greater than maximum"), ((1, -1, 1), "less than minimum")])
def test_options_that_are_not_possible_get_a_message(client, served, options, message):
    with pytest.raises(Exception, match=message): client(served[1][0], *options)


def test_no_photo_gets_a_message(client):
    with pytest.raises(Exception, match="there is no photo; upload one"): client(None)


@pytest.mark.parametrize("row", [row for row in HOSTILE["Photos"] if "in memory" not in row[0]], ids=lambda row: row[0][:40])
def test_hostile_photos_get_a_caption_or_a_message(client, tmp_path, row):
    path = row[1](tmp_path)
    try: read_photo(path)
    except OSError:
        with pytest.raises(Exception, match=r"1\.(jpg|png|gif) .*can't be read as a photo") as caught: client(path)
        assert type(caught.value).__name__ == "AppError" and "/" not in str(caught.value).partition(" can't be read")[0]
    else: assert client(path)[0]["caption"]


@pytest.mark.parametrize("path, message", [("http://127.0.0.1:9/a.png", "not fetched from addresses"), ("/etc/hostname", "")],
                         ids=["address", "file of the server"])
def test_files_that_were_not_uploaded_are_refused(served, path, message):
    import requests
    call = requests.post(f"{served[0]}/gradio_api/call/caption", json={"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, 1, 0, 1]}, timeout=30)
    answer = requests.get(f"{served[0]}/gradio_api/call/caption/{call.json()['event_id']}", timeout=60).text
    assert answer.startswith("event: error") and message in answer


def test_nothing_is_asked_of_another_machine(client, served):
    client(served[1][0])
    assert {*served[2]} <= {"127.0.0.1", "localhost"}


# --- the page in a headless Chromium, by Playwright

@pytest.fixture
def browser():
    "A browser; skips where there is none."
    sync_api = pytest.importorskip("playwright.sync_api")
    if not (path := shutil.which("chromium")): pytest.skip("no chromium on the PATH")
    with sync_api.sync_playwright() as playwright:
        try: browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync_api.Error as error: pytest.skip(f"chromium does not start: {error}")
        yield browser
        browser.close()


@pytest.mark.slow
def test_a_photo_is_uploaded_captioned_and_a_word_explained(served, captioner, browser, tmp_path):
    page, asked = browser.new_page(), []
    page.set_default_timeout(60_000)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(served[0])
    own = captioner(read_photo(served[1][0]))
    page.locator("input[type=file]").first.wait_for(state="attached")
    page.locator("input[type=file]").first.set_input_files(served[1][0])  # upload
    page.locator("#words .token").nth(len(own.words) - 1).wait_for()
    assert page.locator("#words .token .text").all_inner_texts() == [word for word, _ in own.words]
    assert page.locator("#words .token .label").all_inner_texts() == [percent(p) for _, p in own.words]
    page.locator("#words .token").nth(1).click()
    page.locator("#map img").wait_for()
    page.get_by_text(f"Heat map of “{own.words[1][0]}”").wait_for()
    (tmp_path/"no <b>.png").write_text("<html>")
    page.get_by_label("Remove Image").click()
    page.locator("#words .token").first.wait_for(state="detached")
    page.locator("input[type=file]").first.set_input_files(tmp_path/"no <b>.png")
    page.get_by_text("can't be read as a photo").first.wait_for()
    page.get_by_label("Remove Image").click()
    page.locator("#examples img").nth(1).click()  # a photo to try
    page.locator("#words .token").first.wait_for()
    page.get_by_label("Candidates").fill("2")
    page.get_by_role("button", name="Caption", exact=True).click()
    page.locator("input[type=radio]").nth(1).check()
    assert asked and not [url for url in asked if not url.startswith((served[0], "data:", "blob:"))]
