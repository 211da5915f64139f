"""Random files against everything that reads one (`make fuzz`): each gives a result, or a `ValueError` or `OSError` that names it.

    python .ci/fuzz/fuzz.py SECONDS [TARGET …]     every target, or these; what it finds lies in outputs/fuzz/
    python .ci/fuzz/fuzz.py --file TARGET FILE     one file again, as it was found
"""
import importlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import traceback
import zipfile
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORPUS, FOUND = Path(__file__).with_name("corpus"), ROOT/"outputs"/"fuzz"
MEMORY = next((folder for folder in ("/dev/shm",) if os.access(folder, os.W_OK)), None)  # a file an execution: spare the disk
# target -> name of the file that the input becomes
FILES = {"kaggle": "captions.txt", "flickr8k": "Flickr8k.token.txt", "lists": "Flickr_8k.testImages.txt",
         "flickr30k": "results.csv", "annotations": "flickr_annotations_30k.csv", "karpathy": "dataset_a.json",
         "coco": "captions_val2014.json", "urls": "a.tsv", "tar": "00000.tar", "sample": "00000/1.json", "counts": "00000_stats.json",
         "blip": "a_train.json", "imagefolder": "metadata.jsonl", "table": "a.csv", "texts": "a.txt",
         "pairs": "pairs.json", "manifest": "run.json", "metrics": "metrics.jsonl", "captions": "captions_test.json",
         "embeddings": "a.safetensors", "checkpoint": "a.pth"}
BESIDE = {"lists": {"captions.txt": "image,caption\na.jpg,A dog.\n"}, "urls": {"00000/1.jpg": "", "00000/1.json": '{"url": "http://a/1"}'},
          "sample": {"00000/1.jpg": "", "a.tsv": "http://a/1\tA dog.\n"}, "counts": {"00000/1.jpg": "", "00000/1.txt": "A dog."}, "texts": {"a.jpg": ""}}


def text(value): return isinstance(value, str) and value.encode() is not None  # half a surrogate pair can't be written again


def read_data(path):
    "A data set: a table of text, and photos that are there or are missed."
    table = readers.read_table(source := readers.find_source(path.parents[FILES["sample"].count("/") if path.name == "1.json" else 0]))
    assert all(map(text, table.image)) and all(map(text, table.caption)) and set(table.split) <= {"train", "val", "test", None}
    for name in table.image[:20]:
        photos = readers.as_photos(source.photos or source.root)
        photos.stamp(name)
        try: photos.open(name)
        except FileNotFoundError: pass
    try: readers.check_official(table, source)
    except ValueError: pass


def read_pairs(path):
    "What `clipcap score` is given."
    captions, references, names = {}, {}, {}
    try: captions = results.read_hypotheses(path, {})
    finally: references, names = results.read_references(path, {})
    assert all(isinstance(word, str) for pair in captions.items() for word in pair)
    assert all(isinstance(c, str) and c for texts in references.values() for c in texts)
    try: results.meet(captions, references, names)
    except ValueError as error: assert "could be" in str(error)


def read_manifest(path):
    "A run that goes on."
    run, config = core.open_run(core.Run(path.parent.name, path.parent.parent))
    core.check_earlier(run, "03_train", config, ())
    for stage in core.STAGES: assert isinstance(run.stage_entry(stage), dict)
    try: core.check_earlier(run, "04_evaluate", config, core.STAGES[:3])
    except ValueError: pass


def read_metrics(path):
    "Its epochs."
    metrics = checkpoints.read_metrics(path.parent)
    assert all(isinstance(row["epoch"], int) for row in metrics)


def read_captions(path):
    "A run's captions."
    assert all(isinstance(word, str) for pair in evaluate.read_captions_json(path).items() for word in pair)


def read_embeddings(path):
    "Every row, whole."
    found = embeddings.Embeddings(path)
    for name in found.names[:20]:
        assert isinstance(name, str)
        try: row = found[name]
        except ValueError: continue
        assert row.shape[-1] == found.dim and row.ndim == (1 if found.tokens is None else 2)


def read_checkpoint(path):
    "What it holds, and as weights of a layer."
    checkpoints.load_checkpoint(path)
    checkpoints.load_checkpoint(path, checkpoints.nn.Linear(2, 3))


OURS = ("core", "formats.tables", "formats.readers", "formats.results")  # what a target's file passes through
THEIRS = {"pairs": ("scoring.metrics",), "metrics": ("runs.checkpoints",), "captions": ("evaluate",), "embeddings": ("formats.embeddings",),
          "checkpoint": ("runs.checkpoints",)}
CALLS = {"pairs": read_pairs, "manifest": read_manifest, "metrics": read_metrics, "captions": read_captions,
         "embeddings": read_embeddings, "checkpoint": read_checkpoint}


def load(target):
    "Import what a target needs into this module."
    for name in (*OURS, *THEIRS.get(target, ())): globals()[name.rsplit(".")[-1]] = importlib.import_module(f"clipcap.{name}")


def once(target, folder, content):
    "One execution: the exception that breaks the contract, or None."
    path = folder/FILES[target]
    path.write_bytes(content)
    try: CALLS.get(target, read_data)(path)
    except (ValueError, OSError) as error:
        if isinstance(error, UnicodeError): return error  # a ValueError, but none that was meant
        return None if path.name in str(error) or str(folder) in str(error) else error
    except Exception as error: return error


def where(error):
    "Kind of an exception, and the last line of ours that it passed."
    ours = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}clipcap{os.sep}" in f.filename or "fuzz.py" in f.filename]
    return f"{type(error).__name__}, {Path(ours[-1].filename).name}, {ours[-1].name}: {ours[-1].line}"


ODD = (None, True, 0, -1, 2**70, 1e400, 0.5, "", "a.jpg", "\0", "\ud800", "../a", "a"*300, "\r\n", [], {}, [[]], [1], {"": None})


def change(value, chance):
    "JSON with one thing in it changed: removed, doubled, or replaced."
    if isinstance(value, (dict, list)) and value and chance.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, what = chance.choice(keys), chance.random()
        if what < 0.1: del value[key]
        elif what < 0.2 and isinstance(value, list): value.append(value[key])
        elif what < 0.2: value[chance.choice(keys)] = value[key]
        else: value[key] = change(value[key], chance)
        return value
    if isinstance(value, str) and chance.random() < 0.5:
        at = chance.randrange(len(value) + 1)
        return value[:at] + chance.choice(("\0", "\ud800", " ", "/", "\n", ".", "9")) + value[at:]
    return chance.choice(ODD)


def changed_json(content, chance): return json.dumps(change(json.loads(content), chance)).encode()


def changed_lines(content, chance): return b"\n".join(changed_json(line, chance) if chance.random() < 0.5 else line for line in content.splitlines())


def changed_header(content, chance):
    "Safetensors whose header is still as long as it says."
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + length])
    if chance.random() < 0.3: header["__metadata__"]["names"] = changed_json(header["__metadata__"]["names"], chance).decode()
    else: header = change(header, chance)
    new = json.dumps(header).encode()
    return len(new).to_bytes(8, "little") + new + content[8 + length:]


def changed_pickle(content, chance):
    "A checkpoint whose pickle is changed, in an archive that is whole."
    archive, out = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(out, "w") as new:
        for member in archive.infolist():
            held = archive.read(member)
            if member.filename.endswith("data.pkl"): held = bytes(atheris.Mutate(held, len(held) + 64))
            new.writestr(member.filename, held)
    return out.getvalue()


def changed_tar(content, chance):
    "An archive some bytes of which are changed, with the checksums set right."
    content = bytearray(atheris.Mutate(bytes(content), len(content) + 64))
    for start in range(0, len(content) - 511, 512):
        if content[start + 257:start + 262] == b"ustar":
            content[start + 148:start + 156] = b" "*8
            content[start + 148:start + 156] = b"%06o\0 " % sum(content[start:start + 512])
    return bytes(content)


CHANGES = dict.fromkeys(("karpathy", "coco", "blip", "sample", "counts", "pairs", "manifest", "captions"), changed_json) | {
    "metrics": changed_lines, "imagefolder": changed_lines, "embeddings": changed_header, "checkpoint": changed_pickle, "tar": changed_tar}


def mutate(target, content, most, seed):
    "libFuzzer's own changes, or such as leave the format whole."
    chance = random.Random(seed)
    if target in CHANGES and chance.random() < 0.7:
        seeds = sorted((CORPUS/target).iterdir())
        for whole in (bytes(content), chance.choice(seeds).read_bytes()):
            try: return CHANGES[target](whole, chance)[:most]
            except Exception: pass  # changed so often that it is no such format any more
    return atheris.Mutate(content, most)


def fuzz(target, seconds):
    "Fuzz one target in this process; new findings are written as they come. Never returns."
    if target in THEIRS: import torch, transformers, pandas  # theirs are taken as they are: many, and slow to instrument
    else: import pandas
    with atheris.instrument_imports(include=["clipcap"]): load(target)
    if target == "checkpoint":
        from torch._weights_only_unpickler import Unpickler
        Unpickler.load = atheris.instrument_func(Unpickler.load)
    seen, found = set(), FOUND/target
    for folder in (found/"corpus", CORPUS/target): folder.mkdir(parents=True, exist_ok=True)

    def execute(content):
        with tempfile.TemporaryDirectory(dir=MEMORY) as top:
            folder = Path(top)/"data"
            for name, held in ({FILES[target]: ""} | BESIDE.get(target, {})).items():
                (folder/name).parent.mkdir(parents=True, exist_ok=True)
                (folder/name).write_text(held)
            error = once(target, folder, content)
        if error is None or where(error) in seen: return
        seen.add(where(error))
        (found/f"found-{len(seen)}").write_bytes(content)
        told = "".join(traceback.format_exception(error, limit=-3)).encode("utf-8", "backslashreplace").decode()
        (found/f"found-{len(seen)}.txt").write_text(f"{where(error)}\n{told}", "utf-8")
        print(f"FOUND {target}: {where(error)} ({str(error)[:120]!r})", flush=True)

    more = {"custom_mutator": partial(mutate, target)}
    atheris.Setup([sys.argv[0], str(found/"corpus"), str(CORPUS/target), f"-max_total_time={seconds}", "-max_len=8192", "-timeout=20",
                   "-rss_limit_mb=6000", "-print_final_stats=1", f"-artifact_prefix={found}/"], execute, **more)
    atheris.Fuzz()


def main():
    seconds, *targets = sys.argv[1:]
    total = 0
    for target in targets or FILES:
        for old in (FOUND/target).glob("found-*"): old.unlink()
        done = subprocess.run([sys.executable, __file__, "--fuzz", target, seconds], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env={**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"})
        runs = re.search(r"number_of_executed_units:\s*(\d+)", done.stdout)
        found = re.findall(r"^FOUND .*", done.stdout, re.MULTILINE)
        if done.returncode or not runs: found.append(f"{target} stopped ({done.returncode}): {done.stdout[-2000:]}")
        print(f"{target:12} {runs[1] if runs else '?':>9} executions, {len(found)} findings", *found, sep="\n  ", flush=True)
        total += len(found)
    print(f"{total} findings" + (f": inputs and tracebacks in {FOUND}" if total else ""))
    return total > 0


if sys.argv[1:2] == ["--fuzz"]:
    import atheris
    with atheris.instrument_imports(include=["tarfile"]): import tarfile

if __name__ == "__main__":
    if sys.argv[1] == "--fuzz": fuzz(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1] == "--file":
        load(sys.argv[2])
        with tempfile.TemporaryDirectory() as top:
            folder = Path(top)/"data"
            for name, held in ({FILES[sys.argv[2]]: ""} | BESIDE.get(sys.argv[2], {})).items():
                (folder/name).parent.mkdir(parents=True, exist_ok=True)
                (folder/name).write_text(held)
            error = once(sys.argv[2], folder, Path(sys.argv[3]).read_bytes())
        if error: raise error
        print("as promised")
    else: sys.exit(main())
