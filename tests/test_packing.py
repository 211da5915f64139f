"""Packed batches, losses in chunks, and the layers that replace those of the libraries (clipcap.networks.packing)."""
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.activations import NewGELUActivation

from clipcap.networks import packing
from clipcap.networks.packing import OneTokenMemoryLayer, exact_float32, first_fit, fuse_gelu, has_bf16, hidden_states, pack, pack_attention, packed_attention, pick_dtype, token_losses

LENGTHS, IMAGE_OF = [4, 3, 5], [0, 0, 1]  # P P a b c d e, P P f g h i


def draw(*shape, dtype=torch.float64, seed=0): return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def assert_close(found, wanted, tolerance=1e-9): torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


def test_slots_of_two_images_the_first_with_two_captions():
    packed = pack(LENGTHS, IMAGE_OF, prefix_length=2, longest=5)
    assert packed.position.tolist() == [0, 1, 2, 3, 4, 2, 3, 0, 1, 2, 3, 4, 5]
    assert packed.source.tolist() == [0, 1, 4, 5, 6, 9, 10, 2, 3, 14, 15, 16, 17]  # four prefix embeddings, then words in rows of five
    assert packed.place.tolist() == list(range(13))  # two rows of seven
    assert packed.predictor[0, :4].tolist() == [1, 2, 3, 4]  # the prefix's last slot predicts the first token
    assert packed.predictor[1, :3].tolist() == [1, 5, 6]  # of both captions
    assert packed.predictor[2].tolist() == [8, 9, 10, 11, 12]


@pytest.mark.parametrize("row, place, attends_to", [
    (0, 4, [0, 1, 2, 3, 4]),  # c: prefix and its own caption
    (0, 6, [0, 1, 5, 6]),  # e: not the first caption
    (1, 2, [0, 1, 2]),  # f: not the other photo
    (1, 6, [6]),  # an empty place: itself, so that softmax has something
])
def test_mask_separates_captions_and_images(row, place, attends_to):
    packed = pack(LENGTHS, IMAGE_OF, prefix_length=2, longest=5)
    assert packed.mask[row, 0, place].nonzero()[:, 0].tolist() == attends_to


def test_groups_go_into_the_first_row_with_room(): assert first_fit([3, 9, 4, 8], 12) == [(0, 9), (0, 0), (1, 8), (1, 0)]


@pytest.mark.numerics
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.bfloat16, 0.3)])
@pytest.mark.parametrize("config", [
    GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.2),
    LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2),
], ids=["GPT-2", "Llama: heads share keys, positions are rotations"])
def test_every_slot_is_read_as_if_its_caption_were_alone(config, dtype, tolerance):
    torch.manual_seed(0)
    model = pack_attention(AutoModelForCausalLM.from_config(config).eval()).to(dtype)
    packed, prefixes, words = pack(LENGTHS, IMAGE_OF, 2, 5), draw(2, 2, 32).to(dtype), draw(3, 5, 32, seed=1).to(dtype)
    together = hidden_states(model, torch.cat([prefixes.flatten(0, 1), words.flatten(0, 1)]), packed)
    for c, (image, length) in enumerate(zip(IMAGE_OF, LENGTHS)):
        alone = model.base_model(inputs_embeds=torch.cat([prefixes[image], words[c, :length - 1]])[None])[0][0]
        assert_close(together[packed.predictor[c, :length]], alone[1:], tolerance)


@pytest.mark.parametrize("option", ["softcap", "s_aux"])
def test_options_that_fused_attention_would_leave_out_are_named(option):
    x = draw(1, 2, 3, 4)
    with pytest.raises(ValueError, match=f"fused attention computes no {option}"): packed_attention(nn.Module(), x, x, x, None, **{option: 1.})


@pytest.mark.numerics
@pytest.mark.parametrize("bias, smoothing", [(False, 0.), (True, 0.), (True, 0.1)])
@pytest.mark.parametrize("frozen", [True, False])
def test_losses_and_gradients_are_those_of_cross_entropy(frozen, bias, smoothing):
    torch.manual_seed(0)
    hidden, targets, head = draw(7, 8).requires_grad_(), torch.randint(20, (7,)), nn.Linear(8, 20, bias=bias).double()
    wanted = F.cross_entropy(head(hidden), targets, reduction="none", label_smoothing=smoothing)
    found = token_losses(hidden, head.requires_grad_(not frozen), targets, chunk=3, smoothing=smoothing)
    assert_close(found, wanted.detach() if frozen and not found.requires_grad else wanted)
    def by_hidden(losses): return torch.autograd.grad((losses*torch.arange(7.)).sum(), hidden)[0]
    assert_close(by_hidden(found), by_hidden(wanted))


def test_losses_of_bfloat16_are_float32():
    head = nn.Linear(8, 20).bfloat16().requires_grad_(False)
    assert token_losses(draw(7, 8).bfloat16(), head, torch.zeros(7, dtype=torch.long)).dtype == torch.float32


@pytest.mark.parametrize("chunk, widest", [(2, 2*20), (100, 7*20)])
def test_no_tensor_is_wider_than_a_chunk_of_logits(monkeypatch, chunk, widest):
    sizes, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda *a: sizes.append((out := linear(*a)).numel()) or out)
    token_losses(draw(7, 8, dtype=torch.float32).requires_grad_(), nn.Linear(8, 20).requires_grad_(False), torch.zeros(7, dtype=torch.long), chunk)
    assert max(sizes) == widest


@pytest.mark.numerics
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tokens", [1, 2])
def test_layer_for_one_memory_token_equals_pytorchs_with_the_same_dropout(tokens, training):
    torch.manual_seed(0)
    fast = OneTokenMemoryLayer(24, 3, 32, dropout=0.3, batch_first=True).double()
    plain = nn.TransformerDecoderLayer(24, 3, 32, dropout=0.3, batch_first=True).double()
    plain.load_state_dict(fast.state_dict())
    def seeded(layer):
        torch.manual_seed(1)
        out = layer(torch.ones(4, 5, 24).double(), draw(4, tokens, 24))
        return [out, *torch.autograd.grad((out*torch.arange(24.)).sum(), [*layer.parameters()])]
    for found, wanted in zip(seeded(fast.train(training)), seeded(plain.train(training))): assert_close(found, wanted)
    assert not training or (seeded(fast)[0] - seeded(fast.eval())[0]).abs().max() > 0.1  # there was something to drop


@pytest.mark.numerics
def test_fused_gelu_is_the_same_function():
    block, x = nn.Sequential(nn.Linear(1, 1), nn.Sequential(NewGELUActivation())), torch.linspace(-6, 6, 1001).double()
    assert_close(fuse_gelu(block)[1](x), NewGELUActivation()(x))
    assert type(block[1][0]) is nn.GELU


@pytest.mark.parametrize("hardware, precision, width, expected", [
    (False, "auto", 768, torch.float32), (False, "float32", 768, torch.float32), (True, "auto", 768, torch.bfloat16), (True, "float32", 768, torch.float32),
    (True, "auto", 256, torch.float32), (True, "bfloat16", 256, torch.bfloat16), (False, "bfloat16", 768, None)])
def test_bfloat16_is_used_where_there_is_hardware(monkeypatch, hardware, precision, width, expected):
    monkeypatch.setattr(packing, "has_bf16", lambda device: hardware)
    if expected: assert pick_dtype(precision, "cpu", width) == expected
    else:
        with pytest.raises(ValueError, match=r"precision='bfloat16' has no hardware here \(cpu\)"): pick_dtype(precision, "cpu", width)



@pytest.mark.parametrize("machine, avx512, amx, arm, expected", [("x86_64", True, False, True, True), ("x86_64", False, False, True, False),
                                                                 ("AMD64", False, True, True, True), ("aarch64", False, False, True, True), ("aarch64", True, True, False, False)])
def test_the_hardware_is_asked(monkeypatch, machine, avx512, amx, arm, expected):
    "On x86, oneDNN also says yes where it emulates."
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: arm)
    assert has_bf16("cpu") is expected and has_bf16("mps") is False


@pytest.mark.numerics
@pytest.mark.parametrize("smoothing, bias", [(0., True), (0.2, True), (0.1, False)])
def test_words_that_are_added_for_a_gpu_change_nothing(monkeypatch, smoothing, bias):
    head, targets = nn.Linear(7, 11, bias=bias).double().requires_grad_(False), torch.tensor([0, 10, 3, 3, 7])
    def losses():
        hidden = torch.linspace(-2, 2, 35, dtype=torch.float64).view(5, 7).requires_grad_()
        found = token_losses(hidden, head, targets, 2, smoothing)
        return found.detach(), torch.autograd.grad(found.sum(), hidden)[0]
    wanted = losses()
    monkeypatch.setattr(packing, "_aligned", packing._pad_words)
    assert packing._pad_words(head.weight, head.bias)[0].shape == (64, 7)
    for a, b in zip(losses(), wanted): assert_close(a, b)


def test_float32_is_float32():
    exact_float32()
    assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee" and not torch.backends.cuda.cudnn_sdp_enabled()


COUNT_PAGES = """
import resource, sys, torch
from clipcap.networks.packing import keep_freed_memory
if sys.argv[1] == "kept": keep_freed_memory()
def count(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(15): torch.ones(12_000_000)  # until memory has settled: more than 32 MB, which glibc would keep
before = count()
for _ in range(10): torch.ones(12_000_000)
print(count() - before)"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
@pytest.mark.slow
def test_freed_memory_is_kept():
    pages = {how: int(subprocess.run([sys.executable, "-c", COUNT_PAGES, how], capture_output=True, text=True, check=True).stdout) for how in ("kept", "given back")}
    assert pages["kept"] < pages["given back"]/5, pages
