"""Measuring memory and speed of a store (clipcap.studies.store_cost)."""
import sys

import pytest

from clipcap.studies.store_cost import measure_store


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_store_is_measured_and_removed(tmp_path):
    row = measure_store(tmp_path, 2000, "float16", repeats=1, batch_size=64, window=8)
    assert row["peak_mib"] >= row["before_mib"] > 0 and 1900 < row["epoch_items"] < 2000 and row["store_mib"] > 2000*512*2/2**20
    assert all(row[name] > 0 for name in ("store", "store_text", "dataloader", "dataloader_text", "array", "rows_only", "first_batch_s", "written_s"))
    assert [p.name.split(".")[1].split("-")[0] for p in tmp_path.iterdir()] == ["tokens"]  # kept for the same captions in another dtype
