"""Joining a cluster, planning its workers, and a worker in this process: what needs no Ray (clipcap.scale.cluster)."""
import json
import os
import socket
import sys
import threading
from functools import partial

import pytest

from clipcap.formats.embeddings import Embeddings
from clipcap.scale.cluster import Worker, check_address, connected, over_cluster, plan_workers, worker_environment
from clipcap.scale.shards import embedder
from clipcap.scale.sources import find_units

GRPC = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # an answer as gRPC gives it
EIGHT, TWO = {"CPU": 8.0, "memory": 1e9}, {"CPU": 2.0}


def serve(answer):
    "Address of a server that gives this answer once; of none without an answer."
    server = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{server.getsockname()[1]}"
    def talk():
        with server, server.accept()[0] as peer: peer.recv(99), peer.sendall(answer)
    if answer: threading.Thread(target=talk, daemon=True).start()
    else: server.close()
    return address


@pytest.mark.parametrize("address", ["nowhere", "10.0.0.1", "ray://10.0.0.1:10001", "host:port", "10.0.0.1:99999", ":6379"])
def test_malformed_address_is_named(address):
    with pytest.raises(ValueError, match=f"--cluster {address} is no address of a cluster"): check_address(address)


@pytest.mark.parametrize("answer, message", [(None, "no cluster answers at 127.0.0.1:"), (b"HTTP/1.1 400 Bad Request\r\n\r\n", "what answers there is not Ray"),
                                             (GRPC, r"--cluster needs ray, .*pip install 'clipcap\[cluster\]'")])
def test_address_without_a_cluster_is_refused(monkeypatch, answer, message):
    monkeypatch.setitem(sys.modules, "ray", None)  # not installed
    with pytest.raises((ValueError, ImportError), match=message): connected(serve(answer)).__enter__()


def test_workers_get_package_path_and_outputs(outputs, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    found = worker_environment()
    assert found["PYTHONPATH"].split(os.pathsep)[-1] == "/theirs" and found["CLIPCAP_OUTPUTS"] == str(outputs)


@pytest.mark.parametrize("nodes, workers, number, needs", [
    ([EIGHT, TWO], None, 10, {"num_cpus": 1}),
    ([EIGHT, TWO], 2, 2, {"num_cpus": 4}),  # both on the large one
    ([EIGHT, TWO], 3, 3, {"num_cpus": 2}),
    ([EIGHT, EIGHT], 2, 2, {"num_cpus": 8}),
    ([TWO], 5, 5, {"num_cpus": 1}),  # three wait for machines that may come
    ([{"CPU": 96., "GPU": 8.}, {"CPU": 16., "GPU": 2.}, EIGHT], None, 10, {"num_gpus": 1, "num_cpus": 8})])
def test_cluster_is_divided_among_workers(nodes, workers, number, needs): assert plan_workers(nodes, workers) == (number, needs)


@pytest.mark.parametrize("nodes, workers, message", [([{"memory": 1.}], None, "neither CPUs nor GPUs"), ([TWO], 0, "workers=0 is too small")])
def test_impossible_plan_is_refused(nodes, workers, message):
    with pytest.raises(ValueError, match=message): plan_workers(nodes, workers)


def test_no_cluster_is_asked_where_nothing_is_left(): assert list(over_cluster(None, {}, [], "out")) == []


@pytest.fixture(scope="module")
def nine(scenes): return find_units([str(path) for path in sorted(scenes.photos.iterdir())[:9]], shard_size=4, relative=True)


def test_worker_writes_shards_once(nine, tmp_path):
    make = partial(embedder, "mini")
    worker = Worker(make, make().settings | {"source": "nine scenes"}, str(tmp_path), "cpu", os.getcwd())
    summaries = worker({"unit": [unit.to_json() for unit in nine]})["summary"]
    assert [(s["file"], s["rows"]) for s in map(json.loads, summaries)] == [("00000.safetensors", 4), ("00001.safetensors", 4), ("00002.safetensors", 1)]
    assert len(Embeddings(tmp_path)) == 9
    assert worker({"unit": [nine[1].to_json()]}) == {"summary": [summaries[1]]}


def test_worker_of_other_weights_refuses_to_begin(tmp_path):
    make = partial(embedder, "mini")
    encoder = make().settings["encoder"]
    with pytest.raises(ValueError, match=f"has encoder={encoder!r}, and the machine of the command 'mini@0123'; give all machines the same files"):
        Worker(make, make().settings | {"encoder": "mini@0123"}, str(tmp_path), "cpu", os.getcwd())


def test_worker_reports_a_unit_that_fails(nine, tmp_path):
    (tmp_path/"file").touch()  # no folder can be there
    make = partial(embedder, "mini")
    worker = Worker(make, make().settings, str(tmp_path/"file/out"), "cpu", os.getcwd())
    failed = json.loads(worker({"unit": [nine[0].to_json()]})["summary"][0])
    assert (failed["file"], failed["failed"].split(":")[0]) == ("00000.safetensors", "NotADirectoryError")
