"""Fixtures that several test files share: made data, miniature models, small trained runs. Each is made once per session."""
import os
import shutil
import sys
from pathlib import Path

os.environ.update(TQDM_DISABLE="1", MPLBACKEND="agg", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers of pytest-xdist share the cores; `make test-kernels` sets it
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)  # relative paths start at the project's root

import pandas as pd
import pytest
import torch

SHARED = ROOT.parent/"shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    "Folder of real inputs beside the checkout; skips where it is absent."
    if not SHARED.is_dir(): pytest.skip("../shared is not here")
    return SHARED


@pytest.fixture
def outputs(tmp_path, monkeypatch) -> Path:
    "An empty folder of runs, for this test alone."
    monkeypatch.setenv("CLIPCAP_OUTPUTS", str(tmp_path/"outputs"))
    return tmp_path/"outputs"


@pytest.fixture(scope="session")
def spice_files() -> Path:
    "SPICE's files in the project's own cache, fetched once; skips where they can't be had."
    from filelock import FileLock

    from clipcap.scoring.spice_files import SpiceFilesMissing, gather_files, spice_folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPCAP_OUTPUTS", str(ROOT/"outputs"))
        spice_folder().mkdir(parents=True, exist_ok=True)
        with FileLock(ROOT/"outputs/cache/.spice.lock"):  # one worker of pytest-xdist fetches
            try: gather_files(SHARED/"spice" if (SHARED/"spice").is_dir() else None)
            except SpiceFilesMissing as error: pytest.skip(f"SPICE's files are not here: {str(error)[:200]}")
        return spice_folder()


def link_spice(outputs, spice_files):
    "Let a folder of runs use SPICE's files."
    (Path(outputs)/"cache").mkdir(parents=True, exist_ok=True)
    (Path(outputs)/"cache/spice").symlink_to(spice_files, target_is_directory=True)


@pytest.fixture
def spice(outputs, spice_files):
    "SPICE can be computed in this test, with `outputs` as folder of runs and an empty cache of parses."
    link_spice(outputs, spice_files)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    "Layout of the embedded scenes: `captions`, `photos` (a folder of PNG), `text` (the split lists)."
    from clipcap.core import make_config
    from clipcap.data import data_folder
    from clipcap.formats.readers import find_layout
    before = os.environ.get("CLIPCAP_OUTPUTS")
    os.environ["CLIPCAP_OUTPUTS"] = str(tmp_path_factory.mktemp("scenes"))
    try: return find_layout(data_folder(make_config("mini")))
    finally: os.environ.pop("CLIPCAP_OUTPUTS") if before is None else os.environ.update(CLIPCAP_OUTPUTS=before)


@pytest.fixture(scope="session")
def scene_captions(scenes) -> pd.DataFrame:
    "Captions of the embedded scenes: columns `image`, `caption`."
    from clipcap.formats.readers import read_captions
    return read_captions(scenes.captions)


@pytest.fixture(scope="session")
def tokenizer():
    "The miniature GPT-2's tokenizer."
    from clipcap.formats.tokenizer import load_tokenizer
    return load_tokenizer("mini")


@pytest.fixture(scope="session")
def clip_mini():
    "The miniature CLIP: (model, preprocess, name@hash)."
    from clipcap.data import load_clip
    return load_clip("mini")


@pytest.fixture
def mini_model():
    "An untrained model of the preset `mini` on embeddings of 16 numbers, float32, in evaluation mode."
    from clipcap.core import make_config
    from clipcap.model import load_model
    return load_model(make_config("mini"), 16).eval()


def make_tiny(outputs, captions, images=30, name="tiny", random_state=0, **changes):
    "A run on a few scenes with random embeddings of 16 numbers, `01_data` finished: run, configuration."
    from clipcap.core import open_run
    from clipcap.data import prepare_data
    from clipcap.formats.embeddings import write_embeddings
    names = sorted(captions.image.unique())[:images]
    root, store = Path(outputs)/f"data-{images}", Path(outputs)/f"tiny-{images}.safetensors"
    if not root.is_dir():
        root.mkdir(parents=True)
        captions[captions.image.isin(names)].to_csv(root/"captions.txt", index=False)
        write_embeddings(store, names, torch.randn(images, 16, generator=torch.Generator().manual_seed(random_state)), "random")
    settings = {"preset": "mini", "data_root": str(root), "embeddings": str(store), "split": "random", **changes}
    run, config = open_run(name, **settings)
    with run.stage("01_data", config) as notes: notes.update(prepare_data(run, config))
    return run, config


@pytest.fixture
def tiny(outputs, scene_captions):
    "A function that makes a small run, ready to train: `run, config = tiny(images=30, name='tiny', epochs=2, ...)`."
    def make(images=30, name="tiny", **changes): return make_tiny(outputs, scene_captions, images, name, **changes)
    return make


@pytest.fixture(scope="session")
def trained_outputs(tmp_path_factory, scenes, scene_captions, spice_files) -> Path:
    """A folder of runs with the run `demo`: 60 scenes seen by the miniature CLIP, trained for 3 epochs, test split captioned and scored. Tests only read it; those that write copy it (`trained_copy`)."""
    from clipcap.core import open_run
    from clipcap.data import prepare_data
    from clipcap.evaluate import evaluate_run
    from clipcap.model import gpt2_hash
    from clipcap.train import train_run
    folder = tmp_path_factory.mktemp("trained")
    root = folder/"data"
    (root/"Images").mkdir(parents=True)
    names = sorted(scene_captions.image.unique())[:60]
    for name in names: shutil.copy(scenes.photos/name, root/"Images"/name)
    scene_captions[scene_captions.image.isin(names)].to_csv(root/"captions.txt", index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPCAP_OUTPUTS", str(folder/"outputs"))
        link_spice(folder/"outputs", spice_files)
        run, config = open_run("demo", "mini", data_root=str(root), split="random", epochs=3, caption_sampling="all", num_beams=2)
        with run.stage("01_data", config) as notes: notes.update(prepare_data(run, config))
        with run.stage("03_train", config, ["01_data"]) as notes:
            metrics = train_run(run, config)
            notes.update(epochs=len(metrics), final_val_loss=metrics.val_loss.iloc[-1], gpt2=gpt2_hash(config.gpt2_model))
        with run.stage("04_evaluate", config, ["01_data", "03_train"]) as notes:
            evaluate_run(run, config)
            notes.update(eval_split="test", epoch=None)
    return folder/"outputs"


@pytest.fixture
def trained(trained_outputs, monkeypatch):
    "The run `demo` of `trained_outputs`, to be read: run, configuration."
    from clipcap.core import open_run
    monkeypatch.setenv("CLIPCAP_OUTPUTS", str(trained_outputs))
    return open_run("demo")


@pytest.fixture
def trained_copy(trained_outputs, outputs):
    "A copy of the run `demo` that a test may change: run, configuration."
    from clipcap.core import open_run
    shutil.copytree(trained_outputs, outputs, symlinks=True)
    return open_run("demo")
