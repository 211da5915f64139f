"""Downloads from a server with bad habits, and unpacking (clipcap.formats.download)."""
import hashlib
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pooch
import pytest
from data_files import fails

from clipcap.formats import download as module
from clipcap.formats.download import download, unpack

CONTENT = bytes(range(256))*1000  # 256 kB
HASH = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


class Handler(BaseHTTPRequestHandler):
    "GET /<habits, comma-separated>/<name>; the first request for a path may `stall` or `break` off in the middle."

    def log_message(self, *_): pass

    def do_GET(self):
        habits, wanted = self.path.strip("/").split("/")[0].split(","), self.headers.get("Range")
        first = not self.server.asked
        self.server.asked.append(wanted)
        if "busy" in habits: return self.send_error(503)
        body, start = CONTENT[::-1] if "wrong" in habits else CONTENT, 0
        if wanted and "ranges" in habits:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body): return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else: self.send_response(200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if first and {"stall", "break"} & {*habits}:
            self.wfile.write(body[:len(body)//2])
            if "stall" in habits: self.server.stop.wait(30)  # longer than the client's patience
            self.close_connection = True
        else: self.wfile.write(body[start:])


@pytest.fixture(scope="module")
def server():
    "A server on this machine: its address, the ranges that it was asked for."
    pooch.get_logger().setLevel("ERROR")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.stop = [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(address=f"http://127.0.0.1:{server.server_port}", asked=server.asked)
    server.stop.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def get(server, tmp_path):
    "A function that downloads data.bin and returns what the server was asked for."
    server.asked.clear()
    def get(habits, address=server.address, **options):
        before = len(server.asked)
        path = download("data.bin", tmp_path, f"{address}/{habits}", HASH, **{"timeout": 10, "attempts": 1, **options})
        assert path.read_bytes() == CONTENT and [p.name for p in tmp_path.iterdir()] == ["data.bin"]  # and nothing beside it
        return server.asked[before:]
    return get


def test_file_that_is_there_is_not_fetched(get):
    assert get("ranges") == [None] and get("ranges") == []


@pytest.mark.parametrize("habits", ["stall,ranges", "break,ranges", "stall", "break"])
def test_download_goes_on_from_the_middle(get, habits):
    first, rest, *_ = get(habits, timeout=2 if "stall" in habits else 10, attempts=5)  # without ranges the server sends all again
    assert first is None and 0 < int(rest[len("bytes="):-1]) <= len(CONTENT)//2


def test_killed_process_leaves_its_part(get, server, tmp_path):
    code = "import sys; from clipcap.formats.download import download; download(*sys.argv[1:], timeout=60)"
    process = subprocess.Popen([sys.executable, "-c", code, "data.bin", tmp_path, f"{server.address}/stall,ranges", HASH], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = tmp_path/"data.bin.part"
    while not (part.is_file() and part.stat().st_size):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = part.stat().st_size
    for stray in {*tmp_path.iterdir()} - {part}:  # pooch's own, still empty
        assert stray.stat().st_size == 0
        stray.unlink()
    assert get("ranges") == [f"bytes={kept}-"]


def test_part_that_is_longer_than_the_file_is_fetched_anew(get, tmp_path):
    (tmp_path/"data.bin.part").write_bytes(CONTENT + b"too long")
    assert get("ranges") == [f"bytes={len(CONTENT) + 8}-", None]


def test_part_of_another_file_is_found_by_the_hash(get, tmp_path):
    (tmp_path/"data.bin.part").write_bytes(b"another file")
    assert get("ranges", attempts=2) == ["bytes=12-", None]


@pytest.mark.parametrize("habits, before, text, exc, left", [
    ("wrong", {}, "sent a data.bin whose hash is not md5:", ValueError, {}),
    ("busy", {}, "503", OSError, {}),
    ("ranges", {"data.bin": b"mine"}, "data.bin is damaged or another file: its hash is not md5:", ValueError, {"data.bin": b"mine"}),
    ("ranges", {"data.bin.part": b"another file"}, "sent a data.bin whose hash is not md5:", ValueError, {})], ids=["wrong", "busy", "mine", "part"])
def test_what_fails_leaves_no_file_of_that_name(get, tmp_path, habits, before, text, exc, left):
    for name, content in before.items(): (tmp_path/name).write_bytes(content)
    with fails(text, exc): get(habits)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == left


def test_without_a_connection_file_hash_and_place_are_named(get, tmp_path):
    with fails(f"Without a connection: get data.bin by other means (md5 {HASH[4:]}), put it in {tmp_path}", OSError): get("", "http://127.0.0.1:9")


def test_full_disk_is_named_before_anything_is_written(get, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="0 MB are still to come and 0 MB are free on the disk of"): get("ranges")
    assert not any(p.stat().st_size for p in tmp_path.iterdir())


# --- unpacking

def zipped(path, members):
    "A zip with these members."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for member, body in members.items(): file.writestr(member, body)
    return path


def test_archive_becomes_a_folder_without_litter(tmp_path):
    archive = zipped(tmp_path/"x.zip", {"photos/1.jpg": b"one", "__MACOSX/._1.jpg": b"litter"})
    for _ in range(2): assert unpack(archive, tmp_path/"x") == tmp_path/"x"  # the second time it is kept
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == ["x.zip", "x/photos/1.jpg"]


@pytest.mark.parametrize("name", ["../outside.txt", "a/../../outside.txt", "/outside.txt"])
def test_member_that_leads_out_is_refused(tmp_path, name):
    with fails(f"{name!r} would be written outside of"): unpack(zipped(tmp_path/"x.zip", {"ok.txt": b"", name: b""}), tmp_path/"y")
    assert [p.name for p in tmp_path.iterdir()] == ["x.zip"]  # nothing half-made stays


@pytest.mark.parametrize("damage, text", [(lambda whole: whole.replace(b"\1\2\3\4", b"\4\3\2\1"), "x.zip is damaged (Bad CRC-32 for file '1.jpg'); delete it"),
                                          (lambda whole: b"no zip", "x.zip is damaged (File is not a zip file)")])
def test_damaged_archive_is_named(tmp_path, damage, text):
    with zipfile.ZipFile(tmp_path/"x.zip", "w") as file: file.writestr("1.jpg", b"\1\2\3\4"*10)
    (tmp_path/"x.zip").write_bytes(damage((tmp_path/"x.zip").read_bytes()))
    with fails(text): unpack(tmp_path/"x.zip", tmp_path/"y")
    assert [p.name for p in tmp_path.iterdir()] == ["x.zip"]


def test_link_becomes_a_plain_file(tmp_path):
    link = zipfile.ZipInfo("link")
    link.create_system, link.external_attr = 3, 0o120777 << 16  # as Unix zips mark it
    unpack(zipped(tmp_path/"x.zip", {link: "/etc/passwd"}), tmp_path/"x")
    assert not (tmp_path/"x/link").is_symlink() and (tmp_path/"x/link").read_text() == "/etc/passwd"
