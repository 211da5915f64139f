"""Reading photos (clipcap.formats.photos)."""
import io
import threading

import numpy as np
import pytest
import torch
from data_files import fails
from PIL import Image

from clipcap.formats import photos as module
from clipcap.formats.photos import read_ahead, read_photo, upright


@pytest.fixture(scope="module")
def png():
    "Bytes of a photo."
    file = io.BytesIO()
    Image.fromarray(np.arange(40*30*3, dtype=np.uint8).reshape(40, 30, 3)).save(file, "PNG")
    return file.getvalue()


def test_file_and_bytes_give_the_same_photo(tmp_path, png):
    (tmp_path/"a.png").write_bytes(png)
    assert np.array_equal(np.asarray(read_photo(tmp_path/"a.png")), np.asarray(read_photo(io.BytesIO(png))))


@pytest.mark.parametrize("name, content", [("broken.png", None), ("text.jpg", b"not a photo"), ("program.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")])
def test_damaged_photo_is_named(tmp_path, png, name, content):
    (tmp_path/name).write_bytes(png[:60] if content is None else content)
    with pytest.raises(OSError, match=f"{name} can't be read as a photo"): read_photo(tmp_path/name)
    with pytest.raises(OSError, match="00000/1.jpg can't be read as a photo"): read_photo(io.BytesIO((tmp_path/name).read_bytes()), "00000/1.jpg")


def test_missing_photo_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.jpg"): read_photo(tmp_path/"absent.jpg")


def test_photo_of_a_turned_camera_is_upright():
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turned by 90°
    Image.new("RGB", (40, 20)).save(file, "PNG", exif=exif)
    assert read_photo(file).size == (20, 40)


@pytest.mark.parametrize("size, text", [((101, 1), "101×1 pixels: one side is more than 100 times the other"), ((1, 101), "1×101 pixels"), ((50, 50), "50×50 pixels are more than 2000")])
def test_photo_too_long_or_too_large_is_refused(monkeypatch, size, text):
    monkeypatch.setattr(module, "MOST_PIXELS", 2000)
    with fails(text): upright(Image.new("L", size))


# --- reading ahead

def test_photos_are_read_in_order_with_errors_in_place():
    batches = list(read_ahead(range(-3, 4), lambda n: 1/n, batch_size=3))
    assert [[n for n, _ in batch] for batch in batches] == [[-3, -2, -1], [0, 1, 2], [3]]
    assert isinstance(batches[1][0][1], ZeroDivisionError)
    assert all(value == 1/n for batch in batches for n, value in batch if n)
    assert list(read_ahead([], str, 3)) == []
    with pytest.raises(ValueError, match="batch_size=0 is too small"): list(read_ahead([1], str, 0))


def test_next_batch_is_read_while_this_one_is_used():
    eighth = threading.Event()  # photo 7 is the last of the second batch
    batches = read_ahead(range(100), lambda n: eighth.set() if n == 7 else None, batch_size=4)
    next(batches)
    assert eighth.wait(60)


def test_threads_that_read_compute_alone_and_the_caller_keeps_its_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        read = [threads for batch in read_ahead(range(8), lambda n: (n, torch.ones(200_000).add(1).sum(), torch.get_num_threads())[2], 4, workers=2) for _, threads in batch]
        assert read == [1]*8 and torch.get_num_threads() == 3
    finally: torch.set_num_threads(before)
