"""Do the tests notice small faults? One fault at a time is put into a module; its own tests must fail. (`make mutation`)

The faults are cosmic-ray's: an operator, comparison, number or condition changed, a loop left out … One is drawn for each place in a module,
and a sample of the places by a seed. Faults that only touch an annotation are left out. Each fault is shown to the module's own tests
(`TESTS`), not to all tests: the score is a lower bound."""
import argparse
import ast
import os
import random
import re
import shutil
import signal
import sys
import time
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import cosmic_ray.plugins
import pandas as pd
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
TESTS = {  # module -> its tests
    "core": ["core", "runs"], "runs/files": ["runs", "data"], "runs/folder": ["runs", "runs_old"], "runs/checkpoints": ["checkpoints", "train_resume"],
    "data": ["data"], "formats/embeddings": ["embeddings", "data"], "model": ["model", "generate", "literal"], "decoding/load": ["load"],
    "train": ["train", "train_resume"], "evaluate": ["evaluate"]}
COLUMNS = ["module", "line", "fault", "before", "after", "noticed_by", "why", "explained"]


def meaning(code):
    "A module without its annotations; None where it is no Python."
    try: tree = ast.parse(code)
    except SyntaxError: return None
    for node in ast.walk(tree):
        if isinstance(node, ast.arg): node.annotation = None
        if isinstance(node, ast.FunctionDef): node.returns = None
        if isinstance(node, ast.AnnAssign): node.annotation = ast.Constant(None)
    return ast.dump(tree)


def places_in(code):
    "Kind of fault and place -> (operator, which occurrence)."
    found, nodes = {}, list(ast_nodes(get_ast(code)))
    for name in sorted(cosmic_ray.plugins.operator_names()):
        kind = cosmic_ray.plugins.get_operator(name)
        if kind.arguments(): continue  # they want to know the names of variables
        positions = [p for node in nodes for p in kind().mutation_positions(node)]
        for k, place in enumerate(positions): found.setdefault((name.split("_")[0], str(place)), []).append((name, k))
    return found


def mutants(module, number, seed):
    "A sample of a module's faults (the line before and after, and the whole module), and the number of places."
    code = (ROOT/f"clipcap/{module}.py").read_text("utf-8")
    places, draw, before, found = places_in(code), random.Random(f"{seed} {module}"), code.splitlines(), []
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


def _child(project, tests, log):
    os.setsid()
    with open(log, "w") as file: os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    os.chdir(project)
    os.environ.update(PYTHONPATH=str(project), OMP_NUM_THREADS="1")
    sys.path.insert(0, str(project))
    import pytest
    code = pytest.main(["-x", "-q", "-m", "not slow and not soak and not cluster", "-p", "no:cacheprovider", *(f"tests/test_{name}.py" for name in tests)])
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(int(code))


def passes(project, tests, seconds, log):
    "Run tests in a process of their own: False where one fails, or after `seconds`."
    child = get_context("fork").Process(target=_child, args=(project, tests, log))
    child.start()
    child.join(seconds)
    if child.exitcode is None:
        try: os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        child.join()
    return child.exitcode == 0


def project_copy(folder):
    "A project whose modules may be replaced; what is large is linked."
    shutil.copytree(ROOT/"clipcap", folder/"clipcap", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    (folder/"clipcap/assets").symlink_to(ROOT/"clipcap/assets")
    shutil.copytree(ROOT/"tests", folder/"tests", ignore=shutil.ignore_patterns("__pycache__"))  # a link would lead them back to these modules
    (folder/"nbs").symlink_to(ROOT/"nbs")
    for name in ("settings.ini", "setup.py", "README.md"): shutil.copy(ROOT/name, folder/name)
    if (ROOT/"outputs/cache/spice").is_dir(): shutil.copytree(ROOT/"outputs/cache/spice", folder/"outputs/cache/spice")


def noticed(mutant, seconds):
    "Whether the module's tests fail with a fault, and the last line of why."
    with TemporaryDirectory() as folder:
        project, log = Path(folder)/"main", Path(folder)/"log"
        project.mkdir()
        project_copy(project)
        if (shared := ROOT.parent/"shared").is_dir(): (Path(folder)/"shared").symlink_to(shared.resolve())
        (project/f"clipcap/{mutant['module']}.py").write_text(mutant["code"], "utf-8")
        for name in TESTS[mutant["module"]]:
            if not passes(project, [name], seconds, log):
                why = re.findall(r"^E +(\S.*)", log.read_text(errors="replace"), re.M)
                return {"noticed_by": name, "why": why[-1][:100] if why else "no answer, or the process ended"}
    return {"noticed_by": "", "why": ""}


@cache
def check_tests(module):
    "Stop where a module's tests fail without a fault: then they would notice anything."
    found = noticed({"module": module, "code": (ROOT/f"clipcap/{module}.py").read_text("utf-8")}, 600)
    if found["noticed_by"]: raise SystemExit(f"tests/test_{found['noticed_by']}.py fails without a fault ({found['why']}); mend it first")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", default=list(TESTS))
    parser.add_argument("--number", type=int, default=10, help="faults drawn from each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", default="outputs/mutation.csv", help="continued where it was begun; a fault is known by its lines")
    parser.add_argument("--again", action="store_true", help="try those that were neither noticed nor explained again")
    args = parser.parse_args()
    import accelerate, clip, matplotlib.pyplot, peft, pytest, torch, transformers  # noqa: once, before the forks
    table = ROOT/args.table
    known = pd.read_csv(table, keep_default_na=False) if table.is_file() else pd.DataFrame(columns=COLUMNS)
    rows, drawn = {(r["module"], r["fault"], r["before"], r["after"]): r for r in known.to_dict("records")}, []
    for module in args.modules:
        found, places = mutants(module, args.number, args.seed)
        print(f"{module}: {len(found)} faults drawn from {places} places", flush=True)
        drawn += found
    for mutant in tqdm(drawn, "faults", unit="fault"):
        key = (mutant["module"], mutant["fault"], mutant["before"], mutant["after"])
        before = rows.get(key, {"noticed_by": "", "explained": ""})
        if key in rows and (not args.again or before["noticed_by"] + before["explained"]): continue
        check_tests(mutant["module"])
        started = time.monotonic()
        rows[key] = {**before, **{c: v for c, v in mutant.items() if c != "code"}, **noticed(mutant, 900)}
        tqdm.write(f"{mutant['module']}:{mutant['line']} {rows[key]['noticed_by'] or 'NOT NOTICED'} {time.monotonic() - started:.0f} s")
        pd.DataFrame(sorted(rows.values(), key=lambda r: (r["module"], r["line"], r["fault"])), columns=COLUMNS).to_csv(f"{table}.part", index=False)
        os.replace(f"{table}.part", table)
    frame = pd.DataFrame(list(rows.values()), columns=COLUMNS)
    frame = frame[frame.module.isin(args.modules)].assign(noticed=frame.noticed_by != "")
    score = frame.groupby("module").noticed.agg(["size", "sum"]).rename(columns={"size": "faults", "sum": "noticed"})
    score.loc["all"] = score.sum()
    print(score.assign(fraction=(score.noticed/score.faults).round(3)).to_string())


if __name__ == "__main__": main()
