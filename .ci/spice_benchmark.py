"""SPICE in this process beside the unmodified tool: time and memory of a run that parses everything and of one that finds its parses.

    python .ci/spice_benchmark.py FOLDER

FOLDER holds `captions.json` in SPICE's input format (a list of `{"image_id", "test", "refs"}`) and is used as scratch space. It needs a
`java` of version 17 on PATH and fetches the tool's own models (378 MB) from Maven Central. The table is in nbs/scoring/spice.ipynb.
"""
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
from jgo.maven import MavenContext

from clipcap.scoring.java import java_program

OURS = ("import json, sys, time; from clipcap.scoring.spice import spice_scores; items = json.load(open(sys.argv[1])); started = time.monotonic(); "
        "spice_scores({i['image_id']: i['test'] for i in items}, {i['image_id']: i['refs'] for i in items}); print(time.monotonic() - started)")
OPENED = ["lang", "io", "math", "net", "nio", "text", "util", "util.concurrent", "util.concurrent.atomic", "util.concurrent.locks"]


def tool_command(captions, folder):
    "The tool as its authors start it, with what Java 17 wants besides: opened packages and a JavaScript engine."
    maven = MavenContext(repo_cache=Path(folder)/"m2", timeout=60)
    def jar(group, name, version, classifier=""): return maven.project(group, name).at_version(version).artifact(classifier).resolve()
    jars = [jar("edu.stanford.nlp", "stanford-corenlp", "3.6.0", c) for c in ("", "models")] + [jar("org.openjdk.nashorn", "nashorn-core", "15.4")]
    jars += [jar("org.ow2.asm", name, "7.3.1") for name in ("asm", "asm-util", "asm-commons", "asm-tree", "asm-analysis")]
    class_path = [java_program("spice/spice-1.0.jar"), *sorted(java_program("spice/lib").glob("*.jar")), *jars]
    opens = [word for name in OPENED for word in ("--add-opens", f"java.base/java.{name}=ALL-UNNAMED")]
    opens += ["--add-opens", "java.base/sun.nio.ch=ALL-UNNAMED", "--add-opens", "java.sql/java.sql=ALL-UNNAMED"]
    os.makedirs(f"{folder}/cache", exist_ok=True)
    return ["java", "-Xmx8G", *opens, "-cp", os.pathsep.join(map(str, class_path)), "edu.anu.spice.SpiceScorer", captions,
            "-cache", f"{folder}/cache", "-out", f"{folder}/tool.json", "-subset", "-silent"]


def seconds_and_memory(command, **environment):
    "Wall time of a process in seconds, its peak memory in MB, and what it printed."
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, **environment})
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return round(time.monotonic() - started, 1), usage.ru_maxrss//1024, printed.strip()


if __name__ == "__main__":
    folder = sys.argv[1]
    captions = f"{folder}/captions.json"
    commands = {"tool": tool_command(captions, folder), "ours": [sys.executable, "-c", OURS, captions]}
    rows = {f"{name}, run {n}": seconds_and_memory(command, CLIPCAP_OUTPUTS=f"{folder}/outputs") for n in (1, 2) for name, command in commands.items()}
    print(pd.DataFrame(rows, index=["seconds", "peak memory (MB)", "seconds in spice_scores()"]).T.to_string())
