"""The same losses from one process, two, and four of which one is killed (clipcap.train.train_stage)."""
import os
import re
import socket
import subprocess
import sys
import time

import psutil
import pytest

from clipcap.core import open_run
from clipcap.runs.checkpoints import read_metrics
from clipcap.train import train_run, trained_so_far

pytestmark = [pytest.mark.slow, pytest.mark.numerics]
SETTINGS = dict(epochs=2, caption_sampling="all", batch_size=30)  # 6 images per batch, and dropout


def losses(run, epochs=None): return [loss for m in read_metrics(run.path)[:epochs] for loss in (m["train_loss"], m["val_loss"])]


def start(outputs, *words):
    "Start a command whose processes have one thread each."
    return subprocess.Popen([sys.executable, *words], env={**os.environ, "CLIPCAP_OUTPUTS": str(outputs), "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def one(tiny):
    "The run of one process."
    run, config = tiny(40, "one", **SETTINGS)
    train_run(run, config)
    return run


def test_two_processes_from_a_notebook(one, tiny, outputs):
    two, _ = tiny(40, "two", **SETTINGS)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    job = start(outputs, "-c", "from accelerate import notebook_launcher; from clipcap.train import train_stage; "
                               f"notebook_launcher(train_stage, ('two',), num_processes=2, use_port='{port}')")
    said, _ = job.communicate()
    assert job.returncode == 0, said
    assert two.stage_entry("03_train")["processes"] == 2 and losses(two) == pytest.approx(losses(one), rel=1e-5)


def test_killed_process_ends_all_four_and_one_resumes(one, tiny, outputs):
    four, _ = tiny(40, "four", **SETTINGS)
    job = start(outputs, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4", "-m", "clipcap.train", "--", "--run", "four", "epochs=99")
    while len(read_metrics(four.path)) < 2:
        assert job.poll() is None, job.stdout.read()
        time.sleep(0.05)
    victim, = (p for p in psutil.Process(job.pid).children(recursive=True) if p.environ().get("RANK") == "2")
    victim.kill()
    said, _ = job.communicate()
    assert job.returncode and re.search(r"Root Cause[^=]*rank +: 2 [^=]*SIGKILL", said), said
    assert losses(four, 2) == pytest.approx(losses(one), rel=1e-5)
    finished = trained_so_far(four.path)["epoch"] + 1
    for name in ("one", "four"): train_run(*open_run(name, epochs=finished))
    assert [m["epoch"] for m in read_metrics(four.path)] == list(range(1, finished + 1))
    assert losses(four) == pytest.approx(losses(one), rel=1e-4)
