"Data sets that tests write: files from a dictionary, photos, tar archives."
import io
import json
import re
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from PIL import Image

from clipcap.formats.readers import check_official, find_source, read_table


def fails(text, exc=ValueError):
    "Expect an error whose message contains this text."
    return pytest.raises(exc, match=re.escape(text))


def write(folder, files):
    "Write files: name -> text, bytes, or a value that becomes JSON."
    for name, content in files.items():
        path = Path(folder)/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode())


def rows_of(source):
    "The table of a source, as tuples."
    return list(read_table(source).itertuples(index=False, name=None))


def read_files(files, at="", official=False):
    "Read a data set made of these files: rows as tuples, what was left out, the source. `at`: what data_root names; `official`: check its split."
    with TemporaryDirectory() as folder:
        write(folder, files)
        source = find_source(Path(folder)/at)
        rows = rows_of(source)
        if official: check_official(read_table(source), source)
        return rows, dict(source.left_out), source


def photo_bytes(red, size=(24, 16)):
    "A small JPEG."
    file = io.BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def tar_bytes(files):
    "A tar archive: name -> bytes."
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return tar.getvalue()
