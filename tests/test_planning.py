"""Arithmetic of larger machines (clipcap.studies.planning)."""
import json
import shutil
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch
from clip.clip import _transform

from clipcap.studies.planning import (LABEL, NETWORK, Assumed, Measured, Recipe, bytes_kept, decoding_speed, encode_hours, gradient_bytes, machines,
                                      measure_planning, memory_needed, plan, plan_row, plot_plan, read_measured, slowest, together, train_hours)

# round numbers: 2 GPUs a machine of 10¹² operations a second at one half, 4 cores each that decode 100 photos a second, 50 kB a photo over 1 GB/s
SIMPLE = Measured(1e10, 1e10, 100., 1000., 5e4, 200., 1000., 4e9, 2.5e8, 7.5e8, 1e11, 0.5, 5., 5.)
PLAIN = Assumed(1e12, 0.5, 2, 4, 1e11, 1e12, 2e9, 1e4, 1e9, 1e11)
SMALL = Recipe(epochs=3, batch=25, trained=10**7, embedding_dim=100)
GROWING = ("encoding, hours", "training, hours", "memory of a machine, GB", "embeddings, GB", "disk, GB")


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    "Figures of a machine with two cores, as `make benchmark`, `make planning` and `make full-size-check` write them."
    folder = tmp_path_factory.mktemp("outputs")/"benchmark"
    folder.mkdir()
    step = {"gflop": {"one": 397.435}, "data": {"seconds_a_batch": {"ours: read embeddings": {"median": 0.0042}},
            "photos_embedded_per_second": {"median": 19.92}}, "peak_memory_gb": 3.43, "limit_gflops": 198.53, "share_of_limit": 0.7797,
            "captions_per_second": 12.46}
    own = {"photos_decoded_a_core_second": 247.2, "bytes_a_photo": 40139, "memory_a_photo": 183.2, "memory_a_caption": 1106}
    for path, value in ((folder/"step.json", step), (folder/"planning.json", own), (folder.parent/"full_size.json", {"checkpoint_mb": 254, "last_mb": 761})):
        path.write_text(json.dumps(value))
    return read_measured(folder)


@pytest.fixture(scope="session")
def table(measured): return plan(measured)[LABEL]


def in_seconds(hours): return {part: value*3600 for part, value in hours.items()}


# --- measuring

def test_a_core_decodes_on_one_thread(scenes):
    threads = torch.get_num_threads()
    assert decoding_speed([next(scenes.photos.glob("*.png"))]*3, _transform(224)) > 0 and torch.get_num_threads() == threads


def test_memory_that_is_kept_is_counted():
    assert 1_000_000 <= bytes_kept(lambda: bytearray(1_000_000)) < 1_010_000
    assert bytes_kept(lambda: None) == 0


def test_what_is_measured_on_photos(scenes, scene_captions, shared, tmp_path):
    names = sorted(scene_captions.image.unique())[:4]
    (tmp_path/"Images").mkdir()
    for name in names: shutil.copy(scenes.photos/name, tmp_path/"Images")
    scene_captions[scene_captions.image.isin(names)].to_csv(tmp_path/"captions.txt", index=False)
    found = measure_planning(str(tmp_path), str(shared/"gpt2_tokenizer"), side=128)
    assert found["bytes_a_photo"] == sum((tmp_path/"Images"/name).stat().st_size for name in names)/4
    assert min(found[name] for name in ("photos_decoded_a_core_second", "memory_a_photo", "memory_a_caption")) > 0
    with pytest.raises(ValueError, match="expected photos of 500 pixels, found none; choose another data_root"):
        measure_planning(str(tmp_path), str(shared/"gpt2_tokenizer"))


def test_missing_measurements_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="step.json is missing; it comes from: make benchmark"): read_measured(tmp_path)


def test_measurements_agree_with_what_is_known(measured):
    assert measured.photo_flop/1e9 == pytest.approx(2*4.4, abs=0.1)  # 4.4 billion multiply-adds are quoted for ViT-B/32
    assert measured.checkpoint_bytes == pytest.approx(4*NETWORK, abs=1e6)  # float32
    assert measured.resume_bytes == pytest.approx(3*4*NETWORK, abs=2e6)  # and AdamW's two moments


def test_arithmetic_predicts_the_machine_that_was_measured(measured):
    here = Assumed(gpu_flops=measured.cpu_flops, gpu_share=measured.cpu_share, gpus_a_machine=1, cores_a_gpu=2)
    assert 1/3600/together(train_hours(1, 1, measured, here, Recipe(epochs=1))) == pytest.approx(measured.cpu_captions, rel=0.02)
    assert 1/3600/together(encode_hours(1, 1, measured, here)) == pytest.approx(measured.cpu_photos, rel=0.25)


# --- by hand

def test_hours_of_encoding_by_hand():
    found = in_seconds(encode_hours(1e6, 2, SIMPLE, PLAIN))
    assert found == pytest.approx({"GPU": 1e6*1e10/1e12, "JPEG decoding": 1e6/800, "reading photos": 1e6*5e4/1e9})
    assert [machines(n, PLAIN) for n in (1, 2, 3, 64)] == [1, 1, 2, 32]


def test_hours_of_training_by_hand():  # 4 GPUs in 2 machines, 3·10⁶ captions in 3·10⁴ steps of 4 × 25; the network is the slower link
    found = in_seconds(train_hours(1e6, 4, SIMPLE, PLAIN, SMALL))
    assert found == pytest.approx({"GPU": 3e6*1e10/(4*5e11), "making batches": 3e6/4000, "adding up gradients": 3e6/100*max(4e7/1e11, 4e7/1e9),
                                   "reading embeddings": 1e6*100*4/1e9})
    assert memory_needed(1e6, 4, SIMPLE, PLAIN, SMALL) == {"processes": 2*(4e9 + 1e6*1200), "embeddings": 4e8}


def test_embeddings_that_do_not_fit_are_read_row_by_row():  # 10.6 GB per machine, of which 10.4 are taken
    assert train_hours(1e6, 4, SIMPLE, replace(PLAIN, memory_a_gpu=5.3e9), SMALL)["reading embeddings"]*3600 == pytest.approx(3e6/(2*1e4))


def test_one_gpu_sends_no_gradients():
    assert gradient_bytes(1, 10**7) == 0 == train_hours(1e6, 1, SIMPLE, PLAIN, SMALL)["adding up gradients"]


@pytest.mark.parametrize("gradients, binds, seconds", [(1200., "GPU", 15750), (15700., "GPU", 15750), (15800., "adding up gradients", 15800)])
def test_the_slowest_part_binds(gradients, binds, seconds):
    parts = in_seconds(train_hours(1e6, 4, SIMPLE, PLAIN, SMALL)) | {"adding up gradients": gradients}
    assert slowest(parts) == binds and together(parts) == pytest.approx(seconds)  # GPU and batches take turns: 15,000 + 750


# --- the plan

def test_every_number_is_labelled_as_arithmetic(measured):
    assert set(plan(measured).columns.get_level_values(0)) == {LABEL} == {"arithmetic, not measured"}


@pytest.mark.parametrize("column", GROWING)
def test_more_photos_take_more(table, column):
    by_gpus = table[column].unstack("GPUs").loc[["8,000", "600,000", "12,000,000", "400,000,000"]]
    assert by_gpus.shape == (4, 3) and (by_gpus.diff().dropna() > 0).all().all()
    if column == "encoding, hours": assert (by_gpus.diff(axis=1).dropna(axis=1) <= 0).all().all()


def test_twice_as_fast_is_half_the_time(measured, table):
    fields = ("gpu_flops", "disk_read", "random_reads", "network", "link")
    machine = replace(Assumed(), **{field: 2*getattr(Assumed(), field) for field in fields})
    faster = plan(replace(measured, photos_decoded=2*measured.photos_decoded, captions_collated=2*measured.captions_collated), machine)[LABEL]
    for column, factor in zip(table, (1/2, 1/2, 1, 1, 1, 2, 2)): assert faster[column].tolist() == pytest.approx((factor*table[column]).tolist())
    assert faster["binds first"].tolist() == table["binds first"].tolist()


def test_nothing_is_faster_than_disk_and_network(table):
    assert table["gradients of a machine, GB/s"].max() <= Assumed().network/1e9*1.0001
    assert table["photos, GB/s"].max() <= Assumed().disk_read/1e9*1.0001


@pytest.mark.parametrize("changes, binds", [(dict(disk=1e12, memory_a_gpu=1e13), "disk: too small"),
                                            (dict(memory_a_gpu=1e10), "memory: the table; use a store")])
def test_what_does_not_fit_is_named_before_what_is_slow(measured, changes, binds):
    assert plan_row(400e6, 8, measured, replace(Assumed(), **changes), Recipe())["binds first"] == binds


def test_larger_batches_and_smaller_numbers_help(measured):
    plain, batch, half = (plan_row(12e6, 64, measured, Assumed(), Recipe(**changes)) for changes in ({}, dict(batch=256), dict(number_bytes=2)))
    assert batch["training, hours"] < plain["training, hours"] and half["embeddings, GB"] == plain["embeddings, GB"]/2


def test_the_figure_draws_what_the_table_says(measured, table):
    figure = plot_plan(measured)
    drawn = {line.get_label(): line.get_ydata()[-1] for line in figure.axes[-1].lines}
    assert together(drawn) == pytest.approx(table["training, hours"]["400,000,000", 64]) and LABEL in figure.get_suptitle()
    plt.close(figure)
