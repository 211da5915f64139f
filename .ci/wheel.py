"""Does the package work without the repository? sdist and wheel from a clean clone, the wheel used elsewhere (`make wheel-check`)."""
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ("scene_00000.png", "scene_00001.png")


def do(*command, **more): return subprocess.run([str(c) for c in command], check=True, text=True, **more)


def install(wheel, env, python):
    "A new environment with the wheel and the packages that `python` has; with python=None, with what pip fetches for it."
    do(python or sys.executable, "-m", "venv", *(["--without-pip"] if python else []), env)
    if not python: return do(env/"bin/python", "-m", "pip", "install", "--quiet", wheel)
    site = next(env.glob("lib/python*/site-packages"))
    others = do(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", stdout=subprocess.PIPE).stdout
    (site/"others.pth").write_text(others)  # read as a path alone: an editable clipcap there is not found
    do(python, "-m", "pip", "--python", env/"bin/python", "install", "--quiet", "--no-deps", "--no-index", wheel)


def main(python=None):
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        do("git", "clone", "--quiet", ROOT, folder/"clone")
        do(sys.executable, "-m", "build", "--outdir", folder/"dist", folder/"clone", stdout=subprocess.DEVNULL)  # the wheel from the sdist
        wheel = next((folder/"dist").glob("*.whl"))
        held = sorted(n.split("/", 1)[1] for n in zipfile.ZipFile(wheel).namelist() if n.startswith("clipcap/"))
        tracked = do("git", "-C", folder/"clone", "ls-files", "clipcap", stdout=subprocess.PIPE).stdout.split()
        assert held == sorted(n.split("/", 1)[1] for n in tracked), {*held} ^ {n.split("/", 1)[1] for n in tracked}
        install(wheel, folder/"env", python)

        here, home = folder/"elsewhere", folder/"home"
        here.mkdir(); home.mkdir()
        env = {k: v for k, v in os.environ.items() if not k.startswith(("CLIPCAP", "PYTHON"))}
        where = dict(cwd=here, env={**env, "HOME": str(home), "PATH": f"{folder}/env/bin:/usr/bin:/bin", "TQDM_DISABLE": "1"})
        at = do("python", "-c", "import clipcap; print(clipcap.__file__)", stdout=subprocess.PIPE, executable=folder/"env/bin/python", **where).stdout
        assert at.startswith(str(folder/"env")), at
        with zipfile.ZipFile(next((folder/"env").glob("lib/python*/site-packages/clipcap"))/"assets/mini/scenes.zip") as scenes:
            for name in PHOTOS: (here/name).write_bytes(scenes.read(f"Flicker8k_Dataset/{name}"))
            lines = [line.split("\t") for line in scenes.read("Flickr8k_text/Flickr8k.token.txt").decode().splitlines()]
        (here/"people.json").write_text(json.dumps({name: [text for key, text in lines if key.startswith(name)] for name in PHOTOS}))

        bin = folder/"env/bin"
        do(bin/"python", "-m", "clipcap.train", "--run", "demo", "epochs=1", **where)
        do(bin/"clipcap", "caption", *PHOTOS, "--run", "demo", "--out", "captions.jsonl", **where)
        print((here/"captions.jsonl").read_text())
        do(bin/"python", "-c", "from clipcap import Captioner; Captioner.from_run('demo').save_pretrained('shared')", **where)
        empty = {**where, "cwd": folder/"empty", "env": {**where["env"], "HF_HUB_OFFLINE": "1"}}
        empty["cwd"].mkdir()
        do(bin/"clipcap", "caption", *(here/name for name in PHOTOS), "--model", here/"shared", "--out", "captions.jsonl", **empty)
        def written(path): return [json.loads(line).get("caption") for line in path.read_text().splitlines() if '"caption"' in line]
        assert written(folder/"empty/captions.jsonl") == written(here/"captions.jsonl") != [], written(folder/"empty/captions.jsonl")
        if not python:  # nothing but the core is installed
            done = subprocess.run([bin/"clipcap", "score", "captions.jsonl", "people.json"], capture_output=True, text=True, **where)
            assert done.returncode == 1 and "pip install 'clipcap[metrics]'" in done.stderr, done.stderr
            do(bin/"python", "-m", "pip", "install", "--quiet", f"{wheel}[metrics]")
        do(bin/"clipcap", "score", "captions.jsonl", "people.json", "--json", "scores.json", **where)
        scores = json.loads((here/"scores.json").read_text())
        wrong = [name for name, value in scores["corpus"].items() if (value is None) != (name in scores["unavailable"])]
        assert not wrong and scores["corpus"]["cider"] and scores["corpus"]["meteor"], scores
        done = subprocess.run([bin/"python", "-m", "clipcap.apps.pipeline"], capture_output=True, text=True, **where)
        assert done.returncode and "the pipeline runs the notebooks of a checkout" in done.stderr, done.stderr
        print(f"passed  {wheel.name} without the repository")


if __name__ == "__main__": main(*map(Path, sys.argv[1:]))
