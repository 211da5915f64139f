"""Reading photos (clipcap.formats.photos)."""
import io

import numpy as np
import pytest
from data_files import fails
from PIL import Image

from clipcap.formats import photos as module
from clipcap.formats.photos import read_photo, upright


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
