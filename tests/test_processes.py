"""Several processes: parts of a batch, and the same random numbers in each (clipcap.optim.processes)."""
import pytest
import torch

from clipcap.core import MAPPING_NETWORKS, registered
from clipcap.networks.mapping import prepare_embeddings
from clipcap.optim.processes import WholeBatchRandomness, seed_process, shared_randomness, split_batch, start_accelerator, sum_over_processes

IMAGES = list("aaabbc")  # of a batch of six captions


@pytest.mark.parametrize("rank, captions, images", [(0, [0, 1], [0]), (1, [2, 3], [0, 1]), (2, [4, 5], [1, 2])])
def test_part_holds_its_captions_and_their_images(rank, captions, images):
    part = split_batch(IMAGES, rank, 3)
    assert ([*part.captions], part.image_rows.tolist(), part.all_captions, part.all_images) == (captions, images, 6, 3)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 9])
def test_each_caption_belongs_to_one_process(world):
    parts = [split_batch(IMAGES, rank, world) for rank in range(world)]
    assert [k for p in parts if p.weight for k in p.captions] == [0, 1, 2, 3, 4, 5]
    sizes = [len(p.captions)*p.weight for p in parts]
    assert max(sizes) - min(sizes) <= 1 and sum(p.weight for p in parts) == min(world, 6)
    assert all(len(p.captions) for p in parts)  # also where nothing is its own


@pytest.mark.numerics
@pytest.mark.parametrize("name", MAPPING_NETWORKS)
def test_prefixes_of_a_part_are_rows_of_the_whole_batch(name):
    "Dropout in the network, and noise and dropout on the embedding, draw the same numbers in every process."
    torch.manual_seed(0)
    network = prepare_embeddings(registered(MAPPING_NETWORKS, name)(16, 32, 4, num_layers=2, num_heads=2, feedforward_dim=8, dropout=0.3), 16, "none", 0.5, 0.2).double()
    embeddings = torch.randn(6, *((5, 16) if name == "grid" else (16,)), dtype=torch.float64)
    def prefixes(rows):
        torch.manual_seed(1)
        return network(embeddings[rows]), torch.get_rng_state()
    whole, state = prefixes(list(range(6)))
    for rows in ([1, 3, 4], [0, 1], [5], [0]):
        with WholeBatchRandomness(torch.tensor(rows), 6): own, own_state = prefixes(rows)
        assert torch.allclose(own, whole[rows], rtol=0, atol=1e-10)
        assert torch.equal(own_state, state)  # the next batch begins alike
    assert (prefixes([5])[0] - whole[[5]]).abs().max() > 0.1  # without it: other masks


@pytest.mark.parametrize("part, device, shared", [(split_batch(IMAGES), "cpu", False), (split_batch(IMAGES, 1, 2), "cpu", True),
                                                  (split_batch(IMAGES, 1, 2), "cuda", False)])
def test_randomness_is_shared_by_several_processes_on_the_cpu(part, device, shared):
    assert isinstance(shared_randomness(part, torch.device(device)), WholeBatchRandomness) == shared


def test_processes_are_seeded_alike_except_for_their_gpus(monkeypatch):
    gpu_seeds = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "manual_seed", gpu_seeds.append)
    drawn = [(seed_process(1, 2, rank), torch.rand(1).item())[1] for rank in range(3)]
    assert len(set(drawn)) == 1
    assert gpu_seeds[1] == gpu_seeds[0] + 1  # rank 0 draws as a process alone does


def test_a_process_alone(monkeypatch):
    alone = start_accelerator("cpu")
    assert (alone.num_processes, alone.is_main_process, sum_over_processes(0.1, 3)) == (1, True, [0.1, 3])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConnectionError, match=r"2 processes were started \(WORLD_SIZE\), and this one finds 1"): start_accelerator("cpu")
