"""Every notebook's tests, then: do module, notebooks and README agree? (`make test`)"""
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


# one after another: each reads what those before it left in the run `demo`
STAGES = ("01_data 01d_store 02_model 03_train 03b_decode 03c_scst 04_evaluate 04b_compare 05_error_analysis 06_attention 06b_faithful 06c_explore "
          "10_report 14_cluster index").split()
# they time what they do: alone
TIMED = "07_benchmark 07c_scaling".split()
# of the others, which need nobody's files, these take longest and begin
LONG = "02c_spice 08_sweep 13_full_size 09_mini 11_pipeline 04c_errors 08c_search".split()


def test_notebook(path, outputs=None, **more):
    "Run one notebook under nbdev_test, in a folder of its own or in `outputs`, where stages leave files for the next. Name -> passed."
    with TemporaryDirectory() as own:
        env = {**os.environ, "CLIPCAP_OUTPUTS": str(outputs or own), "TQDM_DISABLE": "1", "MPLBACKEND": "agg", **more}
        started = time.monotonic()
        done = subprocess.run([BIN/"nbdev_test", "--path", path], cwd=ROOT, env=env, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(f"{done.stdout}{'FAILED' if done.returncode else 'passed'}  {path.name}  {time.monotonic() - started:.0f} s", flush=True)
    return {path.name: not done.returncode}


def test_stages(paths):
    "Run notebooks in order, on one folder of outputs; what SPICE has parsed for `make run` it need not parse again. Name -> passed."
    with TemporaryDirectory() as outputs:
        if (parses := ROOT/"outputs/cache/spice-parses").is_dir(): shutil.copytree(parses, Path(outputs)/"cache/spice-parses")
        return {name: ok for path in paths for name, ok in test_notebook(path, outputs, OMP_NUM_THREADS="1").items()}


def test_notebooks(paths):
    "Run notebooks, two at a time on a thread each; those that time something then. Name -> passed."
    stages, timed = ([path for path in paths if path.stem in names] for names in (STAGES, TIMED))
    free = sorted((path for path in paths if path.stem not in STAGES + TIMED), key=lambda path: [*LONG, path.stem].index(path.stem))
    with ThreadPoolExecutor(2) as pool:
        side_by_side = [pool.submit(test_stages, stages), *(pool.submit(test_notebook, path, OMP_NUM_THREADS="1") for path in free)]
    return {name: ok for done in [*(job.result() for job in side_by_side), *map(test_notebook, timed)] for name, ok in done.items()}


def contents(folder, pattern):
    "Bytes of the files that match, by name."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.glob(pattern) if p.is_file()}


def differing(copy, pattern):
    "Files that `make export` changed in the copy."
    here, there = contents(ROOT, pattern), contents(copy, pattern)
    return sorted(name for name in {*here, *there} if here.get(name) != there.get(name))


def agreement():
    "Export, clean and render in a copy of the notebooks alone; what each would change here."
    with TemporaryDirectory() as folder:
        copy = Path(folder)/"clipcap"
        shutil.copytree(ROOT/"nbs", copy/"nbs", ignore=shutil.ignore_patterns("*checkpoints"))
        for name in ("settings.ini", "setup.py", "Makefile"): shutil.copy(ROOT/name, copy/name)
        for command in ([BIN/"nbdev_export"], [BIN/"nbdev_clean"], ["make", "-s", "readme", f"BIN={BIN}"]):
            if subprocess.run(command, cwd=copy).returncode: return {"make export works": ["it failed"]}
        return {"clipcap/ is what the notebooks export": differing(copy, "clipcap/*.py"),
                "notebooks are clean": differing(copy, "nbs/*.ipynb"),
                "README.md is what index.ipynb renders to":
                    differing(copy, "README.md") + differing(copy, "outputs/readme/*")}


def settings():
    "What settings.ini says."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def environments_agree():
    "Names in which environment.yml and settings.ini differ."
    config = settings()
    wanted = {*config["requirements"].split(), *config["dev_requirements"].split()}
    lines = (ROOT/"environment.yml").read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.strip() == "- pip:")
    found = {line.strip(" -\"'") for line in lines[start + 1:] if line.strip().startswith("- ")}
    return sorted(wanted ^ found)


def not_locked():
    "Requirements of settings.ini that a version in requirements.lock does not meet, or that it lacks."
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    config = settings()
    locked = {}
    for line in (ROOT/"requirements.lock").read_text(encoding="utf-8").splitlines():
        if "==" not in line: continue
        name, version = line.split(" ")[0].split("==")
        locked.setdefault(canonicalize_name(name), []).append(version)
    wanted = " ".join(config[f"{kind}requirements"] for kind in ("", "dev_", "cluster_")).split()
    def met(r): return all(r.specifier.contains(v) for v in locked.get(canonicalize_name(r.name), ["0"]))
    return [str(r) for r in map(Requirement, wanted) if not met(r)]


def citation_agrees():
    "Why CITATION.cff is not about this version; empty where it is."
    config = settings()
    lines = dict(line.split(": ", 1) for line in (ROOT/"CITATION.cff").read_text("utf-8").splitlines() if ": " in line and line[0] not in " -")
    wanted = {"version": config["version"], "license": config["license"].upper()}
    return [f"{name} {lines.get(name)}, settings.ini says {value}" for name, value in wanted.items() if lines.get(name) != value]


def main():
    results = test_notebooks(sorted((ROOT/"nbs").glob("*.ipynb")))
    checks = {**agreement(), "environment.yml lists what settings.ini requires": environments_agree(),
              "requirements.lock (make lock) holds what settings.ini requires": not_locked(),
              "CITATION.cff is of the version in settings.ini": citation_agrees()}
    for what, wrong in checks.items():
        results[what] = not wrong
        print(f"{'FAILED' if wrong else 'passed'}  {what}" + (f": not {', '.join(wrong)}" if wrong else ""))
    passed = sum(results.values())
    print(f"{passed} passed, {len(results) - passed} failed")
    return passed < len(results)


if __name__ == "__main__": sys.exit(main())
