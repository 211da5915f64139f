"""Every notebook's tests in order, then: do module, notebooks and README agree? (`make test`)"""
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def test_notebook(path, outputs):
    "Run one notebook under nbdev_test; stages leave their files in `outputs`, for the next."
    env = {**os.environ, "CLIPCAP_OUTPUTS": str(outputs), "TQDM_DISABLE": "1", "MPLBACKEND": "agg"}
    return subprocess.run([BIN/"nbdev_test", "--path", path], cwd=ROOT, env=env).returncode == 0


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


def environments_agree():
    "Names in which environment.yml and settings.ini differ."
    from configparser import ConfigParser
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    wanted = {*config["DEFAULT"]["requirements"].split(), *config["DEFAULT"]["dev_requirements"].split()}
    lines = (ROOT/"environment.yml").read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.strip() == "- pip:")
    found = {line.strip(" -\"'") for line in lines[start + 1:] if line.strip().startswith("- ")}
    return sorted(wanted ^ found)


def main():
    results = {}
    with TemporaryDirectory() as outputs:
        for path in sorted((ROOT/"nbs").glob("*.ipynb")):
            started = time.monotonic()
            results[path.name] = test_notebook(path, outputs)
            print(f"{'passed' if results[path.name] else 'FAILED'}  {path.name}  "
                  f"{time.monotonic() - started:.0f} s", flush=True)
    checks = {**agreement(), "environment.yml lists what settings.ini requires": environments_agree()}
    for what, wrong in checks.items():
        results[what] = not wrong
        print(f"{'FAILED' if wrong else 'passed'}  {what}" + (f": not {', '.join(wrong)}" if wrong else ""))
    passed = sum(results.values())
    print(f"{passed} passed, {len(results) - passed} failed")
    return passed < len(results)


if __name__ == "__main__": sys.exit(main())
