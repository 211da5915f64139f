"""Folders, lists, tars and addresses of photos, and units of them (clipcap.scale.sources)."""
import io
import os
import tarfile
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from PIL import Image

from clipcap.decoding.stream import find_photos
from clipcap.formats.photos import read_photo
from clipcap.scale.sources import Photo, Unit, find_units, open_photo, read_sources, read_tar, read_unit


def png(shade):
    "Bytes of a small photo."
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, 90, 200)).save(file, "png")
    return file.getvalue()


PHOTOS = [png(20*n) for n in range(5)]
BROKEN = PHOTOS[0][:50]


def write_tar(path, members):
    "A tar of (name, bytes)."
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def write_shard(path, photos):
    "A tar as webdataset has it."
    return write_tar(path, [(f"{n:09d}{suffix}", content) for n, photo in enumerate(photos)
                            for suffix, content in ((".png", photo), (".txt", b"a wall"), (".json", b"{}"))])


def names(units): return [[photo.name for photo in read_unit(unit)] for unit in units]


@pytest.fixture
def album(tmp_path) -> Path:
    "Twelve photos, every second one in a folder below."
    (tmp_path/"album/more").mkdir(parents=True)
    for n in range(12): (tmp_path/"album"/("more" if n % 2 else ".")/f"{n:02d}.png").write_bytes(PHOTOS[n % 5])
    return tmp_path/"album"


@pytest.fixture
def shards(tmp_path) -> Path:
    "Two tars, of five photos and of one, and other files beside them."
    (tmp_path/"shards").mkdir()
    write_shard(tmp_path/"shards/00000.tar", PHOTOS)
    write_shard(tmp_path/"shards/00001.tar", PHOTOS[3:4])
    for name in ("00000.parquet", "00000_stats.json"): (tmp_path/"shards"/name).touch()
    return tmp_path/"shards"


@pytest.fixture
def memory(shards):
    "The same in fsspec's file system in memory, with a photo beside them: an address is memory://data."
    memory = fsspec.filesystem("memory")
    memory.put(str(shards), "/data", recursive=True)
    memory.pipe("/data/loose/b.png", PHOTOS[0])
    yield memory
    memory.rm("/data", recursive=True)


@pytest.mark.parametrize("content", ["{}", "file://{}", PHOTOS[1]])
def test_photo_is_the_same_from_path_address_or_bytes(tmp_path, content):
    (tmp_path/"a.png").write_bytes(PHOTOS[1])
    content = content.format(tmp_path/"a.png") if isinstance(content, str) else content
    assert open_photo(Photo("b.png", content)).tobytes() == read_photo(tmp_path/"a.png").tobytes()


@pytest.mark.parametrize("content", [BROKEN, "{}/absent.png", "file://{}/absent.png", "nowhere://{}/absent.png", "{}/broken.png", "file://{}/broken.png"])
def test_error_uses_the_name_of_the_photo(tmp_path, content):
    (tmp_path/"broken.png").write_bytes(BROKEN)
    content = content.format(tmp_path) if isinstance(content, str) else content
    with pytest.raises(OSError, match="her/name.png") as error: open_photo(Photo("her/name.png", content))
    assert "_File" not in str(error.value)
    with pytest.raises(ValueError, match="why"): open_photo(Photo("a.png", ValueError("why")))


def test_tar_is_read_in_its_order(shards):
    photos = list(read_tar("00000.tar", str(shards/"00000.tar")))
    assert [p.name for p in photos] == [f"00000.tar/{n:09d}.png" for n in range(5)]
    assert [p.content for p in photos] == PHOTOS


def test_cut_off_tar_keeps_what_comes_before_the_cut(shards):
    "Wherever something begins or ends."
    tar = shards/"00000.tar"
    data, whole = tar.read_bytes(), list(read_tar("cut.tar", str(tar)))
    with tarfile.open(tar) as members: begins = [at for member in members for at in (member.offset, member.offset_data)]
    for at in sorted({0, *begins, *(b + 7 for b in begins), max(begins) + 512}):
        tar.write_bytes(data[:at])
        *kept, last = read_tar("cut.tar", str(tar))
        assert kept == whole[:len(kept)] and last.name == "cut.tar"
        assert isinstance(last.content, OSError) and "cut.tar can't be read as a tar to its end" in str(last.content)
    assert len(kept) == 5  # only the end mark was cut off
    tar.write_bytes(data[:begins[6]] + b"#"*512 + data[begins[6] + 512:])  # garbage in place of the second photo's header
    assert [p.name for p in read_tar("cut.tar", str(tar))] == ["cut.tar/000000000.png", "cut.tar"]


@pytest.mark.parametrize("content", [b"not a tar"*999, None])
def test_what_is_no_tar_is_one_error(tmp_path, content):
    if content: (tmp_path/"no.tar").write_bytes(content)
    photo, = read_tar("no.tar", str(tmp_path/"no.tar"))
    assert photo.name == "no.tar" and isinstance(photo.content, OSError)


def test_compressed_tar(tmp_path):
    packed = tmp_path/"packed.tar.gz"
    (tmp_path/"1.png").write_bytes(PHOTOS[0])
    with tarfile.open(packed, "w:gz") as tar: tar.add(tmp_path/"1.png", "1.png")
    assert [p.name for p in read_tar("p", str(packed))] == ["p/1.png"]
    packed.write_bytes(packed.read_bytes()[:60])
    assert [p.name for p in read_tar("p", str(packed))] == ["p"]


def test_member_names_are_only_names(tmp_path):
    "Paths out of the folder, links, hidden files, and a name that comes twice."
    odd = write_tar(tmp_path/"odd.tar", [(name, PHOTOS[0]) for name in ("../../x.png", "/etc/y.png", "._a.png", "a.txt", "a.png", "a.png")])
    with tarfile.open(odd, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    photos = list(read_tar("odd.tar", odd))
    assert [p.name for p in photos] == ["odd.tar/../../x.png", "odd.tar//etc/y.png", "odd.tar/a.png", "odd.tar/a.png"]
    assert isinstance(photos[3].content, ValueError) and "odd.tar has a.png twice" in str(photos[3].content)
    assert [path.name for path in tmp_path.rglob("*")] == ["odd.tar"]  # nothing is unpacked


def test_tar_is_read_in_constant_memory(tmp_path):
    "Of 32 MB, a few members of 1 MB are held at most."
    large = write_tar(tmp_path/"large.tar", ((f"{n:09d}.jpg", bytes([n])*2**20) for n in range(32)))
    tracemalloc.start()
    sizes = [len(photo.content) for photo in read_tar("large.tar", large)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sizes == [2**20]*32 and peak < 12*2**20


def test_folder_is_split_into_units(album):
    units = find_units([str(album)], shard_size=5, relative=True)
    assert [len(unit.files) for unit in units] == [5, 5, 2]
    assert sum(names(units), []) == [os.path.relpath(path, album) for path in find_photos([str(album)])]
    assert sum(names(find_units([str(album)], 5)), []) == find_photos([str(album)])  # the names of `clipcap caption`
    assert find_units([str(album), str(album)]) == find_units([str(album)])  # each photo once


def test_each_tar_is_a_unit(album, shards):
    units = find_units([str(shards), str(album/"more")], shard_size=4, relative=True)
    assert [unit.files[0][0] for unit in units[:2]] == ["00000.tar", "00001.tar"] and [unit.number for unit in units] == [0, 1, 2, 3]
    assert names(units[2:]) == names(find_units([str(album/"more")], 4, True))


def test_list_in_a_file_or_on_standard_input(album, shards, tmp_path, monkeypatch):
    lines = "\n".join([*find_photos([str(album)]), str(shards/"00000.tar"), str(album/"absent.png")]).encode()
    (tmp_path/"list.txt").write_bytes(lines)
    units = find_units([str(tmp_path/"list.txt")], 100)
    assert [len(unit.files) for unit in units] == [12, 1, 1]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert find_units(["-"], 100) == units


def test_address_means_what_a_path_does(memory, shards):
    units = find_units(["memory://data"], relative=True)
    assert names(units) == [*names(find_units([str(shards/"00000.tar"), str(shards/"00001.tar")], relative=True)), ["loose/b.png"]]
    assert names(find_units(["memory://data/*.tar"], relative=True)) == names(units)[:2]
    assert names(find_units(["memory://data/00001.tar"], relative=True)) == names(units)[1:2]
    assert [photo.content for photo in read_unit(units[0])] == PHOTOS
    assert open_photo(next(read_unit(units[2]))).tobytes() == open_photo(Photo("b.png", PHOTOS[0])).tobytes()


def test_stamp_shows_a_change(album, memory):
    far, units = find_units(["memory://data"], relative=True), find_units([str(album)], 5, True)
    assert find_units([str(album)], 5, True) == units and Unit.from_json(units[0].to_json()) == units[0]
    (album/units[1].files[0][0]).write_bytes(BROKEN)
    assert [a == b for a, b in zip(find_units([str(album)], 5, True), units)] == [True, False, True]
    memory.pipe("/data/loose/b.png", BROKEN)
    assert [a == b for a, b in zip(find_units(["memory://data"], relative=True), far)] == [True, True, False]


def test_name_may_be_any_bytes(tmp_path):
    odd = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.png")
    Path(odd).write_bytes(PHOTOS[0])
    assert Unit.from_json(find_units([odd])[0].to_json()).files == [[odd, odd]]


@pytest.mark.parametrize("source, size, message", [
    ("absent", 5, "there is no file or folder"), ("absent.txt", 5, "there is no list"), ("memory://absent", 5, "memory://absent"),
    ("memory://absent/0.tar", 5, r"memory://absent/0.tar can't be read \(FileNotFoundError"),
    ("nowhere://bucket", 5, r"nowhere://bucket can't be read \(ValueError: Protocol not known: nowhere\)"),
    ("empty.txt", 5, "empty.txt names no photos"), ("empty.txt", 0, "shard_size=0 is too small")])
def test_impossible_source_is_named(tmp_path, monkeypatch, source, size, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=message): find_units([source], size)


def test_sources_are_read_without_units(album, shards):
    photos = read_sources([str(album)])
    assert isinstance(photos, list) and list(map(str, photos)) == find_photos([str(album)])
    assert [str(photo) for photo in read_sources([str(shards/"00001.tar")])] == [f"{shards}/00001.tar/000000000.png"]


def test_standard_input_is_read_as_it_is_needed(shards, monkeypatch):
    tar = shards/"00000.tar"
    def lines():
        for line in ("a.png", tar, "absent.png"): yield f"{line}\n".encode()
        raise AssertionError("read further than needed")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=lines()))
    photos = read_sources(["-"])
    assert [next(photos).name for _ in range(7)] == ["a.png", *(f"{tar}/{n:09d}.png" for n in range(5)), "absent.png"]
    with pytest.raises(ValueError, match="give no others beside it"): read_sources(["-", str(tar)])
