"""Every line of the list of hostile input, and the audit that judges them (clipcap.checks.hostile, .audit)."""
import mmap
import os
import pickle
import re

import pytest

from clipcap.checks.audit import peak_memory
from clipcap.checks.hostile import GOOD, HOSTILE, Handled, printable, run_row
from clipcap.checks.payloads import Payload

FINE = Handled("", lambda result: True)


@pytest.fixture(scope="module")
def control():
    "Every function took a good input, and has loaded what it loads once."
    for row in GOOD: assert not run_row(*row, seconds=120, megabytes=4000)["faults"], row[0]


@pytest.mark.parametrize("row", [pytest.param(row, id=re.sub(r"[^a-zA-Z0-9 ,.:=-]", "_", f"{topic}: {row[0]}")) for topic, rows in HOSTILE.items() for row in rows])
def test_input_is_refused_or_handled(control, row):
    outcome = run_row(*row)
    assert not outcome["faults"], outcome


def nothing(folder): return folder


def fresh_memory(folder):
    "Fill 400 MB of pages that are new: a large array may lie in pages that the process kept from earlier tests."
    with mmap.mmap(-1, 4*10**8) as memory: memory.write(b"1"*len(memory))


@pytest.mark.parametrize("harm, word", [
    (lambda f: sum(range(10**6)), "it took 0"), (lambda f: (f.parent/"elsewhere").write_text(""), "open /"), (fresh_memory, "MB"),
    (lambda f: (f/"big").write_bytes(bytes(70_000_000)), "it wrote 70 MB"), (lambda f: os.system("true"), "os.system"), (lambda f: (f/"canary").mkdir(), "the canary is there"),
    (lambda f: pickle.loads(pickle.dumps(Payload(f))), "the canary is there"), (lambda f: os.rename(f, f.parent/"moved"), "os.rename"), (lambda f: 1/0, "ZeroDivisionError"),
    (lambda f: os.symlink("/etc", f.parent/"link"), "os.symlink"), (lambda f: (f.parent/"folder").mkdir(), "os.mkdir"),
], ids=["time", "file", "memory", "disk", "process", "canary", "pickle", "rename", "error", "link", "folder"])
def test_audit_sees_harm(harm, word):
    if word == "MB" and not peak_memory(): pytest.skip("this system does not tell")
    def undo(folder): [p.rmdir() for p in folder.parent.rglob("canary")]; return folder
    assert word in run_row("harm", undo, harm, FINE, seconds=0 if "took" in word else 60)["faults"]


def test_harmless_call_has_no_faults():
    assert run_row("fine", nothing, lambda f: (f/"a").write_text("b"), FINE)["faults"] == ""


@pytest.mark.parametrize("feed, expected, fault", [
    (lambda f: 1, ValueError(), "NoneType (None), not ValueError; it returned 1"), (lambda f: 1, Handled("", lambda result: result == 2), "it returned 1"),
    (lambda f: int("x"), ValueError("photo.jpg"), "no 'photo.jpg' in invalid literal"), (lambda f: exec("raise ValueError('x'*2000)"), ValueError(), "a long message")])
def test_another_outcome_is_a_fault(feed, expected, fault): assert fault in run_row("other", nothing, feed, expected)["faults"]


def test_table_holds_no_control_characters(): assert printable("\x1b[2J\u202e🐕" + "x"*500)[:14] == "\\x1b[2J\\u202e🐕" and len(printable("x"*500)) == 150
