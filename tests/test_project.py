"""The project agrees with itself: layout, notebooks, exported modules, README, requirements (shared rules: design)."""
import ast
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from configparser import ConfigParser
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

BIN = Path(sys.executable).parent
ROAD = ("00_core", "01_data", "02_model", "03_train", "04_evaluate", "05_error_analysis", "06_attention", "07_report")
TOPMOST = ("studies", "checks", "apps")  # nothing else imports from them
LONGEST = 45  # lines of a cell or a function
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in (ROOT/"clipcap").rglob("*.py") if p.name not in ("_modidx.py", "__init__.py"))


def name_of(path): return path.relative_to(ROOT/"nbs").with_suffix("").as_posix()


def cells(path, kind="code"): return ["".join(c["source"]) for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == kind]


def is_exported(source): return re.search(r"^#\|\s*export", source, re.M)


def lines(source): return [line for line in source.splitlines() if line.strip()]


def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    return config["DEFAULT"]


# --- layout

def test_the_road_stands_alone_at_the_top():
    top = [p.stem for p in (ROOT/"nbs").glob("*.ipynb")]
    assert len(top) <= 10 and {*ROAD, "index"} == {*top}
    assert not [name_of(p) for p in NOTEBOOKS if re.match(r"\d+[a-z]", p.stem)]


def test_folders_and_subpackages_have_the_same_names():
    folders = {p.parent.name for p in NOTEBOOKS if p.parent != ROOT/"nbs" and any(map(is_exported, cells(p)))}  # `howto` exports nothing
    packages = {p.name for p in (ROOT/"clipcap").iterdir() if (p/"__init__.py").is_file()}
    assert folders == packages
    import clipcap
    assert not packages & {p.stem for p in (ROOT/"clipcap").glob("*.py")} and not packages & set(clipcap.__all__)


def test_a_notebook_in_a_folder_exports_the_module_of_its_name():
    for path in NOTEBOOKS:
        exported = re.findall(r"^#\| default_exp (\S+)", "\n".join(cells(path)), re.M)
        if path.parent != ROOT/"nbs" and exported: assert exported == [name_of(path).replace("/", ".")], path.name


def imports():
    "Module -> modules of the project that it imports, imports inside functions counted."
    found, known = {}, {}
    for path in MODULES: known[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    for module, path in known.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import): names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = module.split(".")[:-node.level] if node.level else []
                base = ".".join([*base, *([node.module] if node.module else [])])
                names = [base, *(f"{base}.{a.name}" for a in node.names)]
            else: continue
            found[module] |= {n for n in names if n in known and n != module}
    return found


def test_imports_make_no_circle():
    graph, order = imports(), []
    while free := sorted(m for m, needs in graph.items() if m not in order and needs <= {*order}): order += free
    assert not {m: sorted(needs - {*order}) for m, needs in graph.items() if m not in order}


def test_nothing_else_imports_studies_checks_or_apps():
    def part(module): return module.split(".")[1]
    assert not [(m, n) for m, needs in imports().items() for n in needs if part(n) in TOPMOST and part(m) not in TOPMOST]


def test_every_public_name_is_importable():
    import clipcap
    for name in clipcap.__all__: assert getattr(clipcap, name) is not None


# --- notebooks

@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_what_a_notebook_holds_may_always_run(path):
    nb = json.loads(path.read_text("utf-8"))
    tags = {tag for c in nb["cells"] for tag in c["metadata"].get("tags", [])}
    allowed = {"parameters"} if path.stem != "index" else {"hide", "hide-input"}
    assert tags <= allowed and "IN_TEST" not in "".join(cells(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_cells_fit_on_a_screen(path):
    drawing = path.parent.name == "mini"
    long = [source.splitlines()[1 if is_exported(source) else 0][:60] for source in cells(path) if len(lines(source)) > LONGEST]
    assert drawing or not long, long


@pytest.mark.parametrize("name", ROAD)
def test_the_road_demonstrates_more_than_it_asserts(name):
    shown = [line for source in cells(ROOT/f"nbs/{name}.ipynb") if not is_exported(source) and "default_exp" not in source for line in lines(source)]
    asserting = [line for line in shown if re.match(r"\s*(assert\b|test_\w+\()", line)]
    assert len(asserting) < len(shown)/2, f"{len(asserting)} of {len(shown)}"


def test_links_between_notebooks_lead_somewhere():
    lost = []
    for path in NOTEBOOKS:
        for link in re.findall(r"\]\(([^)#:]+)\)", "\n".join(cells(path, "markdown"))):
            if not (path.parent/link).exists(): lost.append((name_of(path), link))
    assert not lost


def test_no_text_holds_a_path_of_a_machine():
    for path in [*NOTEBOOKS, *MODULES, ROOT/"README.md"]: assert not re.search(r"/(root|work|home|tmp)/[A-Za-z]", path.read_text("utf-8")), path


# --- modules

def test_modules_are_short():
    long = {p.name: n for p in MODULES if p.parent.name != "mini" and (n := len(p.read_text("utf-8").splitlines())) >= 500}
    assert not long


def test_functions_fit_on_a_screen():
    long = []
    for path in MODULES:
        if path.parent.name == "mini": continue  # drawing code
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and (n := node.end_lineno - node.lineno + 1) > LONGEST: long.append((path.stem, node.name, n))
    assert not long


# --- what is made from what

def contents(folder, pattern): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.glob(pattern) if p.is_file()}


def differing(copy, pattern):
    here, there = contents(ROOT, pattern), contents(copy, pattern)
    return sorted(name for name in {*here, *there} if here.get(name) != there.get(name))


def test_modules_and_readme_are_what_the_notebooks_export(tmp_path):
    copy = tmp_path/"clipcap"
    shutil.copytree(ROOT/"nbs", copy/"nbs", ignore=shutil.ignore_patterns("*checkpoints/"))
    for name in ("settings.ini", "setup.py", "Makefile"): shutil.copy(ROOT/name, copy/name)
    for command in ([BIN/"nbdev_export"], [BIN/"nbdev_clean"], ["make", "-s", "readme", f"BIN={BIN}"]):
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        assert not done.returncode, done.stdout + done.stderr
    assert not differing(copy, "clipcap/**/*.py"), "run: make export"
    assert not differing(copy, "nbs/**/*.ipynb"), "run: nbdev_clean"
    assert not differing(copy, "README.md") + differing(copy, "outputs/readme/*"), "run: make readme"


def test_environment_lists_what_settings_require():
    wanted = {word for name in settings() if name.endswith("requirements") and name != "cluster_requirements" for word in settings()[name].split()}
    text = (ROOT/"environment.yml").read_text("utf-8").splitlines()
    start = next(n for n, line in enumerate(text) if line.strip() == "- pip:")
    assert Counter(line.strip(" -\"'") for line in text[start + 1:] if line.strip().startswith("- ")) == Counter(wanted)


def test_lock_holds_what_settings_require():
    locked = {}
    for line in (ROOT/"requirements.lock").read_text("utf-8").splitlines():
        if "==" not in line: continue
        name, version = line.split(" ")[0].split("==")
        locked.setdefault(canonicalize_name(name), []).append(version)
    wanted = " ".join(settings()[name] for name in settings() if name.endswith("requirements")).split()
    unmet = [str(r) for r in map(Requirement, wanted) if not all(r.specifier.contains(v) for v in locked.get(canonicalize_name(r.name), ["0"]))]
    assert not unmet, "run: make lock"


def test_citation_is_of_this_version():
    text = dict(line.split(": ", 1) for line in (ROOT/"CITATION.cff").read_text("utf-8").splitlines() if ": " in line and line[0] not in " -")
    assert (text["version"], text["license"]) == (settings()["version"], settings()["license"].upper())


# --- Makefile

COMMANDS = re.findall(r"papermill (\S+\.ipynb) (\S+\.ipynb)", (ROOT/"Makefile").read_text("utf-8"))


@pytest.mark.parametrize("notebook, out", COMMANDS, ids=[notebook for notebook, _ in COMMANDS])
def test_commands_name_notebooks_that_are_there_and_folders_that_are_made(notebook, out):
    folder = str(Path(out).parent)
    assert (ROOT/notebook).is_file()
    assert folder == "outputs" or f"mkdir -p {folder}\n" in (ROOT/"Makefile").read_text("utf-8")


# --- docments

def public_functions(path):
    "Yields name and node of each function, class and public method that a module exports (its `__all__`)."
    tree = ast.parse(path.read_text("utf-8"))
    exported = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"), [])
    for node in tree.body:
        patched = isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and any("patch" in ast.unparse(d) for d in node.decorator_list)
        if not patched and getattr(node, "name", None) not in exported: continue
        yield node.name, node
        for inner in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(inner, ast.FunctionDef) and (inner.name == "__init__" or not inner.name.startswith("_")): yield f"{node.name}.{inner.name}", inner


def without_docment(node, source):
    "Lists the parameters of a function that have no comment of their own, in the line where they stand; `Param(...)` of fastcore counts as one."
    of, lines = node.args, source.splitlines()
    given = [a for a in [*of.posonlyargs, *of.args, *of.kwonlyargs, of.vararg, of.kwarg] if a and a.arg not in ("self", "cls")]
    def is_patched(arg): return arg is of.args[0] and any("patch" in ast.unparse(d) for d in node.decorator_list) if of.args else False
    def documented(arg):
        alone = sum(other.lineno == arg.lineno for other in given) == 1
        return alone and "#" in lines[arg.end_lineno - 1][arg.end_col_offset:] or arg.annotation and ast.unparse(arg.annotation).startswith("Param(")
    return [arg.arg for arg in given if not is_patched(arg) and not documented(arg)]


def test_a_parameter_without_a_comment_of_its_own_is_found():
    source = "@patch\ndef f(\n    self: A,\n    a,  # (N,)\n    b, c,  # two\n    *d,\n    e: Param('help', str),\n): pass\n\n\ndef g(a):  # (N,)\n    pass\n"
    f, g = ast.parse(source).body
    assert without_docment(f, source) == ["b", "c", "d"] and not without_docment(g, source)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_exported_functions_have_docstrings_and_docments(path):
    source, lacking = path.read_text("utf-8"), []
    for name, node in public_functions(path):
        if not ast.get_docstring(node) and not name.endswith("__init__"): lacking.append(f"{name}: no docstring")
        if isinstance(node, ast.FunctionDef): lacking += [f"{name}: {arg}" for arg in without_docment(node, source)]
    assert not lacking
