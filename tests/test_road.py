"""Every stage of the road runs to its end, on real photos and on very little data, by the pipeline (papermill)."""
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from conftest import ROOT, link_spice

from clipcap.core import Run

SMALL = ["gpt2_model=../shared/real/gpt2-captions", "epochs=1", "num_layers=1"]
REAL = ["data_root=../shared/flickr8k", "embeddings=../shared/real/photos.safetensors", "gpt2_model=../shared/real/gpt2-captions",
        "caption_sampling=all", "num_layers=2", "learning_rate=3e-4", "epochs=1"]


def make_run(outputs, *changes):
    "Run 01 to 07 with the preset flickr8k: the run."
    command = [sys.executable, "-m", "clipcap.apps.pipeline", "--run", "road", "--preset", "flickr8k", *changes]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "CLIPCAP_OUTPUTS": str(outputs)}, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-4000:]
    return Run("road", outputs), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("case, photos", [("09-few-photos", 12), ("02-one-caption-a-photo", 12), ("02-one-caption-a-photo", 40)])
def test_little_data(shared, outputs, spice_files, tmp_path, case, photos):
    "Twelve photos, and one caption per photo; the model learns nothing and may write nothing."
    link_spice(outputs, spice_files)
    root = tmp_path/"data"
    shutil.copytree(shared/"cases"/case, root)
    table = pd.read_csv(root/"captions.txt")
    table[table.image.isin(sorted(table.image.unique())[:photos])].to_csv(root/"captions.txt", index=False)
    run, said = make_run(outputs, f"data_root={root}", "clip_model=mini", *SMALL)
    assert (run.path/"report.html").is_file() and "protocol" in said


@pytest.mark.slow
def test_real_photos_with_the_preset_flickr8k(shared, outputs, spice_files):
    link_spice(outputs, spice_files)
    run, said = make_run(outputs, *REAL)
    assert run.stage_entry("04_evaluate")["finished"] and (run.path/"report.html").is_file() and "shuffled images" in said
