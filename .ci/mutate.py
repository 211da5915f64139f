"""Do the tests bite? Small faults, one at a time, put into notebook and module: which do the notebooks' tests notice? (`make mutation`)

The faults are cosmic-ray's: an operator, comparison, number or condition changed, a loop left out … One is drawn for each place in a module,
and of the places a sample, by a seed; what only touches an annotation is none. A fault that a module's own notebook does not notice is shown
to further ones (`TESTED_BY`), not to all of `make test`: the score is a lower bound."""
import argparse
import ast
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import cosmic_ray.plugins
import pandas as pd
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
TESTED_BY = {"data": ["01_data", "02_model", "02b_literal"], "model": ["02_model", "02b_literal"],
             "train": ["03_train"], "evaluate": ["04_evaluate", "05_error_analysis"]}
IN_ORDER = ["01_data", "02_model", "02b_literal", "03_train", "04_evaluate", "05_error_analysis"]  # each finds the files of those before


def meaning(code):
    "A module without its annotations; None where it is no Python."
    try: tree = ast.parse(code)
    except SyntaxError: return None
    for node in ast.walk(tree):
        if isinstance(node, ast.arg): node.annotation = None
        if isinstance(node, ast.FunctionDef): node.returns = None
        if isinstance(node, ast.AnnAssign): node.annotation = ast.Constant(None)
    return ast.dump(tree)


def mutants(module, number, seed):
    "A sample of a module's faults: line number, the line before and after, and the whole module."
    code = (ROOT/f"clipcap/{module}.py").read_text("utf-8")
    places = {}  # kind of fault and place -> (operator, which occurrence)
    nodes = list(ast_nodes(get_ast(code)))
    for name in sorted(cosmic_ray.plugins.operator_names()):
        kind = cosmic_ray.plugins.get_operator(name)
        if kind.arguments(): continue  # they want to know the names of variables
        positions = [p for node in nodes for p in kind().mutation_positions(node)]
        for k, place in enumerate(positions): places.setdefault((name.split("_")[0], str(place)), []).append((name, k))
    draw, before, found = random.Random(f"{seed} {module}"), code.splitlines(), []
    chosen = [draw.choice(variants) for variants in places.values()]
    draw.shuffle(chosen)
    for name, k in chosen:
        if len(found) == number: break
        if name.endswith(("_Eq_Is", "_NotEq_IsNot")): continue  # the same for words that stand in a program
        try: mutated = mutate_code(code, cosmic_ray.plugins.get_operator(name)(), k)
        except AttributeError: continue  # cosmic-ray replaces an exception by its plain name only
        if meaning(mutated) in (None, meaning(code)): continue
        line = next(n for n, (a, b) in enumerate(zip(before, mutated.splitlines())) if a != b)
        found.append({"module": module, "line": line + 1, "fault": name.removeprefix("core/"), "before": before[line].strip(),
                      "after": mutated.splitlines()[line].strip(), "code": mutated})
    return found, len(places)


def project_copy(folder):
    "A project whose files may be replaced; what is large is linked."
    for part in ("nbs", "clipcap"):
        (folder/part).mkdir(parents=True)
        for path in (ROOT/part).iterdir():
            if path.suffix in (".py", ".ipynb"): shutil.copy(path, folder/part/path.name)
            elif not path.name.startswith((".", "__")): (folder/part/path.name).symlink_to(path)
    for name in ("settings.ini", "setup.py", "README.md"): shutil.copy(ROOT/name, folder/name)
    if (shared := ROOT.parent/"shared").is_dir() and not (folder.parent/"shared").exists(): (folder.parent/"shared").symlink_to(shared.resolve())


def put(mutant, project):
    "Put a fault into a project: into the module, and into the cell that it was exported from."
    def cells(code): return dict(zip(*[iter(re.split(r"^# %% \S+ #(\w+)\n", code, flags=re.M)[1:])]*2))
    path, notebook = project/f"clipcap/{mutant['module']}.py", project/f"nbs/{TESTED_BY[mutant['module']][0]}.ipynb"
    was, now, nb = cells(path.read_text("utf-8")), cells(mutant["code"]), json.loads(notebook.read_text("utf-8"))
    changed = [cell for cell in nb["cells"] if cell["id"] in now and was.get(cell["id"]) != now[cell["id"]]]  # not one whose heading the fault took
    assert changed, f"no cell of {notebook.name} differs"
    for cell in changed: cell["source"] = "#| export\n" + re.sub(r"^from \.", "from clipcap.", now[cell["id"]], flags=re.M)
    path.write_text(mutant["code"], "utf-8")
    notebook.write_text(json.dumps(nb), "utf-8")


def _child(project, notebook, outputs, log):
    os.setsid()
    with open(log, "w") as file: os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    os.chdir(project)
    os.environ.update(PYTHONPATH=str(project), CLIPCAP_OUTPUTS=str(outputs), TQDM_DISABLE="1", MPLBACKEND="agg", OMP_NUM_THREADS="1")
    sys.path.insert(0, str(project))
    from nbdev.test import test_nb
    passed, _ = test_nb(project/f"nbs/{notebook}.ipynb", {"notest"})
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(not passed)


def passes(project, notebook, outputs, seconds, log):
    "Run a notebook's tests in a process of their own: False where one fails, or after `seconds`."
    child = get_context("fork").Process(target=_child, args=(project, notebook, outputs, log))
    child.start()
    child.join(seconds)
    if child.exitcode is None:
        try: os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        child.join()
    return child.exitcode == 0


def baseline(folder):
    "Run the notebooks without a fault: what each finds, and the seconds it takes."
    project_copy(folder/"project")
    outputs, seconds = folder/"outputs", {}
    outputs.mkdir()
    for notebook in IN_ORDER:
        shutil.copytree(outputs, folder/"before"/notebook)
        started = time.monotonic()
        if not passes(folder/"project", notebook, outputs, 3600, folder/f"{notebook}.log"):
            sys.exit(f"{notebook} fails without a fault:\n{(folder/f'{notebook}.log').read_text()[-3000:]}")
        seconds[notebook] = time.monotonic() - started
        print(f"{notebook}: {seconds[notebook]:.0f} s without a fault", flush=True)
    for notebook in IN_ORDER:  # what SPICE's parser found, minutes of Java; no module under test reads or writes it
        for part in outputs.glob("cache/spice*"): shutil.copytree(part, folder/"before"/notebook/"cache"/part.name, dirs_exist_ok=True)
    return seconds


def noticed_by(mutant, folder, seconds):
    "The notebook whose tests fail with a fault, and the last line of why; empty where none does."
    for notebook in TESTED_BY[mutant["module"]]:
        with TemporaryDirectory(dir=folder) as scratch:
            scratch = Path(scratch)
            project_copy(scratch/"project")
            put(mutant, scratch/"project")
            shutil.copytree(folder/"before"/notebook, scratch/"outputs")
            if not passes(scratch/"project", notebook, scratch/"outputs", 5*seconds[notebook] + 60, scratch/"log"):
                why = [line for line in (scratch/"log").read_text(errors="replace").splitlines() if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
                return {"noticed_by": notebook, "why": why[-1][:100] if why else "no answer, or the process ended"}
    return {"noticed_by": "", "why": ""}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", default=list(TESTED_BY))
    parser.add_argument("--number", type=int, default=60, help="faults drawn from each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", default="outputs/mutation.csv", help="gone on with where it was begun; a fault is known by its lines")
    parser.add_argument("--again", action="store_true", help="try those that were neither noticed nor explained again")
    parser.add_argument("--scratch", help="folder that keeps the runs without a fault")
    args = parser.parse_args()
    import accelerate, clip, matplotlib.pyplot, nbdev.test, papermill, peft, torch, transformers  # noqa: once, before the forks
    table, columns = ROOT/args.table, ["module", "line", "fault", "before", "after", "noticed_by", "why", "explained"]
    known = pd.read_csv(table, keep_default_na=False) if table.is_file() else pd.DataFrame(columns=columns)
    rows = {(r["module"], r["fault"], r["before"], r["after"]): r for r in known.to_dict("records")}
    drawn = []
    for module in args.modules:
        found, places = mutants(module, args.number, args.seed)
        print(f"{module}: {len(found)} faults drawn from {places} places", flush=True)
        drawn += found
    wanted = [m for m in drawn if (r := rows.get((m["module"], m["fault"], m["before"], m["after"]))) is None or args.again and not r["noticed_by"] + r["explained"]]
    with TemporaryDirectory() as temporary:
        folder = Path(args.scratch or temporary)
        if (folder/"seconds.json").is_file(): seconds = json.loads((folder/"seconds.json").read_text())
        elif wanted:
            folder.mkdir(exist_ok=True)
            (folder/"seconds.json").write_text(json.dumps(seconds := baseline(folder)))
        for mutant in tqdm(wanted, "faults", unit="fault"):
            key = (mutant["module"], mutant["fault"], mutant["before"], mutant["after"])
            rows[key] = {**{"explained": ""}, **rows.get(key, {}), **{c: v for c, v in mutant.items() if c != "code"}, **noticed_by(mutant, folder, seconds)}
            frame = pd.DataFrame(sorted(rows.values(), key=lambda r: (r["module"], r["line"], r["fault"])), columns=columns)
            frame.to_csv(f"{table}.part", index=False)
            os.replace(f"{table}.part", table)
    frame = pd.DataFrame(list(rows.values()), columns=columns)
    frame = frame[frame.module.isin(args.modules)].assign(noticed=frame.noticed_by != "")
    score = frame.groupby("module").noticed.agg(["size", "sum"]).rename(columns={"size": "faults", "sum": "noticed"})
    score.loc["all"] = score.sum()
    print(score.assign(share=(score.noticed/score.faults).round(3)).to_string())


if __name__ == "__main__": main()
