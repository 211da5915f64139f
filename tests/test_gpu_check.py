"""The GPU check works at reduced size on the CPU, so that it works on the day a GPU is there."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_gpu_check_runs_every_part_at_reduced_size(shared, tmp_path):
    command = [sys.executable, ".ci/gpu_check.py", "--data", shared/"flickr8k", "--tokenizer", shared/"gpt2_tokenizer", "--out", tmp_path,
               "--size", "reduced", "--device", "cpu", "--budget", "3600"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    found = json.loads((tmp_path/"gpu_check.json").read_text())
    assert found["errors"] == {}
    assert {"equality", "steps", "epochs", "resuming", "captioning", "embedding"} <= set(found["part_seconds"])
