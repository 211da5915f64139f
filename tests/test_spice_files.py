"SPICE's files: folders, Maven repositories with and without ranges, damaged and missing files. A small repository stands for Maven Central."
import hashlib
import os
import re
import socket
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest

from clipcap.scoring.spice_files import (CODE, FILES, MAVEN_PATH, MODELS, SpiceFilesMissing, fetch, gather_files, missing_files,
                                         spice_folder)


def jar(members):
    file = BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items(): archive.writestr(name, content)
    return file.getvalue()


noise = np.random.default_rng(0)
MEMBERS = {"edu/a.txt": b"animate " * 3000, "edu/b.gz": noise.bytes(50_000)}
CONTENT = {CODE: b"some classes", MODELS: jar({"edu/large.txt": noise.bytes(400_000), **MEMBERS})}
WANTED = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in {**CONTENT, **MEMBERS}.items()}


class Repository(BaseHTTPRequestHandler):
    "Serve `content`, in `ranges` or whole, or `cut` short; note in `sent` what was sent."
    def do_GET(self):
        body = self.content.get(self.path.removeprefix(f"/maven2/{MAVEN_PATH}/"), b"")
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")) if self.ranges else None
        self.send_response(404 if not body else 206 if asked else 200)
        if asked:
            first = int(asked[1]) if asked[1] else max(0, len(body) - int(asked[2]))
            last = min(int(asked[2]), len(body) - 1) if asked[1] and asked[2] else len(body) - 1
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(body)}")
            body = body[first:last + 1]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = body[:len(body)//2] if self.cut else body
        self.sent.append(len(body))
        try: self.wfile.write(body)
        except ConnectionError: pass

    def log_message(self, *args): pass


@pytest.fixture
def alone(outputs, tmp_path, monkeypatch):
    "No files of SPICE, no local Maven repository but `m2`, no folder named, no proxy, and a mirror that nobody serves."
    monkeypatch.delenv("CLIPCAP_SPICE_JARS", raising=False)
    for name, value in {"M2_REPO": str(tmp_path/"m2"), "NO_PROXY": "*", "CLIPCAP_MAVEN": "http://127.0.0.1:9"}.items(): monkeypatch.setenv(name, value)
    return tmp_path


@pytest.fixture
def serve(alone, monkeypatch):
    "A function that makes a repository the only source: what it sent, and its address."
    servers = []

    def start(content=CONTENT, ranges=True, cut=False):
        handler = type("Handler", (Repository,), dict(content=content, ranges=ranges, cut=cut, sent=[]))
        servers.append(server := ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setenv("CLIPCAP_MAVEN", address := f"http://127.0.0.1:{server.server_port}/maven2")
        return SimpleNamespace(sent=handler.sent, address=address)

    yield start
    for server in servers: server.shutdown(), server.server_close()


def gathered(): return {p.relative_to(spice_folder()).as_posix(): p.read_bytes() for p in spice_folder().rglob("*") if p.is_file()}


@pytest.mark.parametrize("ranges", [True, False])
def test_members_are_cut_out_of_the_large_jar(serve, ranges):
    repository = serve(ranges=ranges)
    assert {*gather_files(files=WANTED).values()} == {repository.address}
    assert gathered() == {CODE: CONTENT[CODE], **MEMBERS} and missing_files(spice_folder(), WANTED) == []
    # with ranges little more than the members is sent, without them the whole jar of 450,000 bytes
    assert (0 < sum(repository.sent) < 200_000) if ranges else (sum(repository.sent) > len(CONTENT[MODELS]))


def test_files_are_fetched_once_and_damaged_ones_again(serve):
    repository = serve()
    gather_files(files=WANTED)
    requests = len(repository.sent)
    assert {*gather_files(files=WANTED).values()} == {str(spice_folder())} and len(repository.sent) == requests
    (spice_folder()/"edu/a.txt").write_bytes(b"damaged")
    gather_files(files=WANTED)
    assert gathered()["edu/a.txt"] == MEMBERS["edu/a.txt"] and len(repository.sent) > requests


WRONG = {**CONTENT, MODELS: jar({**MEMBERS, "edu/b.gz": b"other"})}


@pytest.mark.parametrize("message, kept, how", [
    ("edu/b.gz is not the expected file and is not used: 5 bytes", [CODE, "edu/a.txt"], dict(content=WRONG)),
    (f"{MODELS} is not the expected file", [CODE], dict(content=WRONG, ranges=False)),
    (f"{CODE} is not the expected file", [], dict(content={**CONTENT, CODE: b"evil"})),
    ("IncompleteRead", [], dict(cut=True)), ("404", [], dict(content={}))], ids=["member", "jar", "code", "cut", "empty"])
def test_wrong_bytes_are_refused_by_name_and_whole_files_kept(serve, message, kept, how):
    serve(**how)
    with pytest.raises(SpiceFilesMissing, match=re.escape(message)): gather_files(files=WANTED)
    assert sorted(gathered()) == sorted(kept)


def test_what_is_missing_why_and_what_to_do(alone, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # taken, but nobody listens
        monkeypatch.setenv("CLIPCAP_MAVEN", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(SpiceFilesMissing) as raised: gather_files(jars="no/such/folder")
    for part in (f"SPICE needs {len(FILES) - 1} files", "englishPCFG.ser.gz (1.884 MB)", "no/such/folder: FileNotFoundError: no such folder",
                 str(alone/"m2"), "refused", "python -m clipcap.scoring.spice_files", "CLIPCAP_SPICE_JARS=FOLDER"): assert part in str(raised.value), part


@pytest.fixture
def holding(alone):
    "A function that writes the two jars into a folder."
    def write(folder, length=None):
        folder.mkdir(parents=True)
        for name, content in CONTENT.items(): (folder/name).write_bytes(content[:length])
        return folder
    return write


@pytest.mark.parametrize("place", ["named", f"m2/{MAVEN_PATH}"], ids=["named", "maven"])
def test_folder_with_the_jars_is_a_source(alone, holding, place):
    folder = holding(alone/place)
    assert {*gather_files(jars=folder if place == "named" else None, files=WANTED).values()} == {str(folder)}
    assert gathered() == {CODE: CONTENT[CODE], **MEMBERS}


def test_gathered_folder_is_a_source_itself_and_the_command_names_it(alone, holding, monkeypatch, capsys):
    gather_files(jars=holding(alone/"named"), files=WANTED)
    first = spice_folder()
    monkeypatch.setenv("CLIPCAP_SPICE_JARS", str(first))
    monkeypatch.setenv("CLIPCAP_OUTPUTS", str(alone/"second"))
    assert {*gather_files(files=WANTED).values()} == {str(first)}
    monkeypatch.setattr(gather_files, "__defaults__", (None, WANTED))
    fetch(str(first))
    assert f"from {os.environ['CLIPCAP_OUTPUTS']}" in capsys.readouterr().out


def test_local_maven_repository_with_other_bytes_is_refused(alone, holding):
    holding(alone/"m2"/MAVEN_PATH, length=9)
    with pytest.raises(SpiceFilesMissing, match="is not the expected file"): gather_files(files=WANTED)
