"""Two Ray nodes on this machine, of which a worker and then a node are killed (clipcap.scale.cluster); run by `make test-cluster`."""
import json
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_stream import json_lines, save_run, varied_model

from clipcap.apps.cli import main
from clipcap.formats.embeddings import Embeddings
from clipcap.scale.cluster import connected, import_ray, over_cluster
from clipcap.scale.shards import captioner, embedder, write_shard, write_shards
from clipcap.scale.sources import find_units

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.cluster]

NODE = {"num_cpus": 1, "object_store_memory": 100*2**20}
HEALTH = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 5}
SIZE = 4  # photos per unit, and per batch: the same arithmetic everywhere
MAKE = {"embed": partial(embedder, "mini"), "caption": partial(captioner, "small", num_beams=2, batch_size=SIZE)}
OPTIONS = {"embed": ["--clip_model", "mini"], "caption": ["--run", "small", "--num_beams", "2", "--batch_size", str(SIZE)]}


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory, scenes):
    "A folder with an `album` of 62 files, two of which can't be read; the run `small`; one thread, as workers with one CPU have."
    folder, threads = tmp_path_factory.mktemp("cluster"), torch.get_num_threads()
    (folder/"album").mkdir()
    first, *_ = names = sorted(scenes.photos.iterdir())[:60]
    for path in names: shutil.copy(path, folder/"album"/path.name)
    (folder/"album/0_damaged.jpg").write_bytes(first.read_bytes()[:300])
    (folder/"album/zz_note.jpg").write_text("not a photo")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPCAP_OUTPUTS", str(folder/"outputs"))
        patch.setenv("OMP_NUM_THREADS", "1")
        save_run("small", varied_model(), max_length=10)
        yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def nodes(work):
    "A cluster of two nodes; its head has this process on it."
    import_ray()
    from ray.cluster_utils import Cluster
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import this file
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False, "_system_config": HEALTH})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def second(nodes):
    "The second node, for this test."
    node = nodes.add_node(**NODE)
    yield node
    with suppress(Exception): nodes.remove_node(node)


def rows(command, out):
    "What a command wrote: names and embeddings, or rows of captions."
    if command == "embed": return Embeddings(out).names, Embeddings(out).stack(Embeddings(out).names)
    files = sorted(out.glob("*.jsonl")) if out.is_dir() else [out]
    return [row for path in files for row in json_lines(path)[1:]], torch.zeros(1)


@pytest.fixture(scope="module")
def expected(work):
    "What the commands write on one machine, without Ray."
    found = {}
    for command, out in (("embed", "embeddings"), ("caption", "captions.jsonl")):
        size = ["--shard_size", str(SIZE)] if command == "embed" else []
        words = [command, work/"album", *(["--out"] if command == "caption" else []), work/out, *OPTIONS[command], *size, "--device", "cpu"]
        assert main([str(word) for word in words]) == 0
        found[command] = rows(command, work/out)
    return found


def assert_same(command, out, expected):
    "Embeddings up to rounding, everything else exactly."
    (names, values), (wanted, wanted_values) = rows(command, out), expected[command]
    assert names == wanted and torch.allclose(values, wanted_values, atol=1e-4)


@pytest.mark.parametrize("command", ["embed", "caption"])
def test_cluster_writes_the_same_rows(work, nodes, second, expected, command):
    words = [command, work/"album", *(["--out"] if command == "caption" else []), work/f"{command}-cluster", *OPTIONS[command],
             "--shard_size", SIZE, "--cluster", nodes.address]
    assert main([str(word) for word in words]) == 0
    assert_same(command, work/f"{command}-cluster", expected)
    index = json.loads((work/f"{command}-cluster/index.json").read_text())
    assert (index["rows"], index["bad"], len(index["shards"])) == (60, 2, 16)


def noted(log, make, **options):
    "A shard writer that notes when it begins and ends a unit, and where; it takes its time, so that it can be killed meanwhile."
    import ray
    writer, node = make(**options), ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    def note(**what):
        with open(log, "a") as file: file.write(json.dumps({**what, "pid": os.getpid(), "node": node}) + "\n")
    def write(unit, *args):
        note(unit=unit.number, what="begins")
        time.sleep(0.5)
        summary = writer.write(unit, *args)
        note(unit=unit.number, what="ends")
        return summary
    return writer._replace(write=write)


def in_hand(log, node):
    "The unit that a node's worker has begun and not ended, and its process; None if there is none."
    held = {}
    for row in json_lines(log):
        if row["node"] == node: held[row["pid"]] = row
    return next(((row["unit"], pid) for pid, row in held.items() if row["what"] == "begins" and Path(f"/proc/{pid}").exists()), None)


def wait_for(what):
    "Wait until something is found, and return it."
    for _ in range(2400):
        if found := what(): return found
        time.sleep(0.05)
    raise AssertionError("nothing after two minutes")


def kill_node(nodes, node, log):
    "Kill a node while its worker certainly has a unit in hand: the process is stopped first. Returns the unit."
    while True:
        _, pid = wait_for(lambda: in_hand(log, node.node_id))
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.1)
        if held := in_hand(log, node.node_id): break
        os.kill(pid, signal.SIGCONT)  # it had just finished
    nodes.remove_node(node, allow_graceful=False)
    with suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
    return held[0]


@pytest.mark.parametrize("command", ["embed", "caption"])
def test_killed_worker_and_killed_node_cost_no_row(work, nodes, second, expected, command):
    log, out, lost = work/f"{command}.log", work/f"{command}-killed", []
    units = find_units([str(work/"album")], SIZE, relative=command == "embed")
    def disturbed(make, settings, units, out):
        "After two shards a worker of the first node is killed, and half-way the second node."
        for done, found in enumerate(over_cluster(make, settings, units, out), 1):
            yield found
            if done == 2: os.kill(wait_for(lambda: in_hand(log, nodes.head_node.node_id))[1], signal.SIGKILL)
            if done == len(units)//2: lost.append(kill_node(nodes, second, log))
    writer = MAKE[command](device="cpu")
    write_shard(units[1], str(out), writer, writer.settings)  # finished: must not be written again
    with connected(nodes.address): write_shards(partial(noted, log, MAKE[command]), units, str(out), disturbed)
    assert_same(command, out, expected)
    notes = pd.DataFrame(json_lines(log))
    begins, ends = notes[notes.what == "begins"], notes[notes.what == "ends"]
    assert {*ends.unit} == {*range(16)} - {1}
    assert (begins.unit.value_counts() > 1).sum() >= 2  # the killed worker's unit, and the killed node's
    places = begins[begins.unit == lost[0]].node
    assert places.iloc[0] == second.node_id != places.iloc[-1]
