"""What `make run` installs, from where (Makefile): local indexes of empty wheels stand for PyPI and for PyTorch's."""
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_project import settings


def add_wheel(index, name, version, *needs):
    "Put an empty wheel into an index, a folder of folders."
    stem = f"{canonicalize_name(name).replace('-', '_')}-{version}"
    path = index/canonicalize_name(name)/f"{stem}-py3-none-any.whl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + "".join(f"Requires-Dist: {n}\n" for n in needs))
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


def add_installed(index, name):
    "Put a package of this environment into an index."
    found = metadata.distribution(name)
    (index/name).mkdir(parents=True)
    with zipfile.ZipFile(index/f"{name}/{name}-{found.version}-py3-none-any.whl", "w") as wheel:
        for file in found.files:
            if ".." not in file.parts and file.suffix != ".pyc": wheel.write(found.locate_file(file), str(file))


@pytest.fixture
def indexes(tmp_path):
    "Address of a server with the indexes `pypi` and `cpu`; the first has the newer torch, with CUDA."
    folder = tmp_path/"indexes"
    for name in ("pip", "setuptools"): add_installed(folder/"pypi", name)  # what an editable package is built and installed with
    for name in settings():
        if not name.endswith("requirements"): continue
        for r in map(Requirement, settings()[name].split()):
            if not r.name.startswith(("torch", "setuptools")): add_wheel(folder/"pypi", r.name, next(s.version for s in r.specifier if s.operator == ">="))
    add_wheel(folder/"pypi", "nvidia-cuda", "13.0")
    for torch, vision in (("2.13.0", "0.28.0"), ("2.14.1", "0.29.1")):
        add_wheel(folder/"pypi", "torch", torch, "nvidia-cuda", "filelock")
        add_wheel(folder/"pypi", "torchvision", vision, f"torch=={torch}")
    for torch, vision in (("2.13.0", "0.28.0"), ("2.14.0", "0.29.0"), ("2.15.0", "0.30.0")):  # the last is newer than settings.ini allows
        add_wheel(folder/"cpu", "torch", f"{torch}+cpu", "filelock")
        add_wheel(folder/"cpu", "torchvision", f"{vision}+cpu", f"torch=={torch}")
    add_wheel(folder/"cpu", "filelock", "3.20")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def checkout(tmp_path):
    "The files of a checkout that an installation reads."
    folder = tmp_path/"checkout"
    (folder/"clipcap").mkdir(parents=True)
    for name in ("Makefile", "settings.ini", "setup.py", "README.md", "requirements.lock", "clipcap/__init__.py"): shutil.copy(ROOT/name, folder/name)
    return folder


def make(checkout, *words, **env):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "MAKE", "PYTHONPATH"))}
    return subprocess.run(["make", "-s", f"PYTHON={sys.executable}", *words], cwd=checkout, capture_output=True, text=True,
                          env={**kept, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1", **env})


@pytest.mark.slow
@pytest.mark.parametrize("words, torch, vision", [((), "2.14.1", "0.29.1"), (("CPU=1",), "2.14.0+cpu", "0.29.0+cpu")], ids=["PyPI", "CPU=1"])
def test_torch_comes_from_pytorchs_index_for_cpus_where_that_is_asked_for(indexes, checkout, words, torch, vision):
    done = make(checkout, ".venv/installed", *words, f"TORCH_INDEX={indexes}/cpu/", PIP_INDEX_URL=f"{indexes}/pypi/")
    assert not done.returncode, done.stdout + done.stderr
    listed = subprocess.run([checkout/".venv/bin/python", "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True).stdout
    found = {canonicalize_name(p["name"]): p["version"] for p in json.loads(listed)}
    assert (found["torch"], found["torchvision"], "nvidia-cuda" in found) == (torch, vision, not words)
    wanted = {canonicalize_name(Requirement(w).name) for name in settings() if name.endswith("requirements") and name != "cluster_requirements" for w in settings()[name].split()}
    assert {"clipcap", *wanted} <= found.keys() and "ray" not in found


def test_locked_versions_and_the_build_for_cpus_exclude_each_other(checkout):
    done = make(checkout, ".venv-locked/installed", "LOCKED=1", "CPU=1")
    assert done.returncode and "leave out LOCKED=1 or CPU=1" in done.stderr and not (checkout/".venv-locked").exists()
