"""Operations of a step, timing, and the benchmark at reduced size (clipcap.studies.flops, timing, benchmark)."""
import json
import shutil
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import papermill
import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clipcap.checks.literal import literal_loss, literal_model, loss_and_gradients
from clipcap.core import make_config
from clipcap.formats.tokenizer import encode_captions
from clipcap.model import load_model
from clipcap.studies.benchmark import benchmark_rows, benchmark_table, check_steps, choose_captions, load_workload, plot_benchmark, step_results
from clipcap.studies.flops import (CLIP_SIZES, GPT2_SIZES, NETWORK_SIZES, REFERENCE_SIZES, model_sizes, publish_clip, publish_gpt2, step_flops)
from clipcap.studies.timing import _kind, matmul_functions, matmul_limit, matmul_shapes, measure, profile_step, spread, training_memory

TEXTS = ["A dog runs .", "Two cats sleep on a bench .", "A bird .", "Three horses stand under a tree ."]


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    "A model on backbones of reduced size, in evaluation mode; its sizes, and the lengths of `TEXTS`."
    folder = tmp_path_factory.mktemp("backbones")
    publish_clip(folder, **CLIP_SIZES["reduced"])
    publish_gpt2(folder/"gpt2", **GPT2_SIZES["reduced"])
    model = load_model(make_config("flickr8k", clip_model=str(folder/"clip-state.pt"), gpt2_model=str(folder/"gpt2"), device="cpu",
                                   precision="float32", **NETWORK_SIZES["reduced"])).eval()
    return model, model_sizes(model, CLIP_SIZES["reduced"]), [len(ids) for ids in encode_captions(model.tokenizer, TEXTS)]


def counted(work):
    "Operations that PyTorch counts in `work()`."
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter: work()
    return counter.get_total_flops()


# --- operations

def test_the_reference_step_has_the_operations_of_the_formula(little):
    model, sizes, lengths = little
    reference = literal_model(model).train()
    def step():
        with torch.no_grad(): embeddings = reference.clip.encode_image(torch.zeros(4, 3, 64, 64))
        literal_loss(reference, embeddings, TEXTS).backward()
    assert counted(step) == step_flops(sizes, lengths)["reference"]["total"]


def frugal_prefix(network, embedding):
    "Prefix of one image (1, P, d) without dropout; cross-attention as what it is, a constant."
    memory, x = network.project(embedding[None, None]), network.prefix_constants[None]
    for layer in network.decoder.layers:
        value = layer.multihead_attn
        bias = value.in_proj_bias.chunk(3)[2]
        x = layer.norm1(x + layer.self_attn(x, x, x, need_weights=False)[0])
        x = layer.norm2(x + value.out_proj(F.linear(memory, value.in_proj_weight.chunk(3)[2], bias)))
        x = layer.norm3(x + layer.linear2(layer.linear1(x).relu()))
    return x


def frugal_loss(model, embedding, ids):
    "Sum of -log p of one image's captions, which follow their common prefix in one row; written apart from `networks.packing`, as a check."
    read = [row[:-1] for row in ids]
    prefix, words = frugal_prefix(model.mapping_network, embedding), torch.tensor(sum(read, []))
    p, n = prefix.shape[1], len(words)
    owner = torch.tensor([-1]*p + [k for k, row in enumerate(read) for _ in row])
    position = torch.tensor([*range(p), *(p + i for row in read for i in range(len(row)))])
    allowed = ((owner[:, None] == owner) | (owner == -1)) & torch.ones(p + n, p + n).tril().bool()
    mask = torch.where(allowed, 0., torch.finfo(torch.float32).min).to(prefix.dtype)[None, None]
    inputs = torch.cat([prefix, model.gpt2.get_input_embeddings()(words)[None]], 1)
    states = model.gpt2.transformer(inputs_embeds=inputs, position_ids=position[None], attention_mask=mask).last_hidden_state[0]
    log_p = model.gpt2.lm_head(states[p - 1:]).log_softmax(-1)  # the last of the prefix, and all words
    row = iter(range(1, n + 1))
    return -sum(log_p[0 if i == 0 else next(row), token] for tokens in ids for i, token in enumerate(tokens))


@pytest.mark.numerics
def test_needed_operations_suffice_for_loss_and_gradients(little):
    model, sizes, lengths = little
    model, ids = literal_model(model).double(), encode_captions(model.tokenizer, TEXTS)
    embedding = torch.randn(32, generator=torch.Generator().manual_seed(0)).double()
    frugal = loss_and_gradients(frugal_loss(model, embedding, ids)/sum(lengths), model.mapping_network)
    literal = loss_and_gradients(literal_loss(model, embedding.expand(4, -1), TEXTS), model.mapping_network)
    torch.testing.assert_close(frugal[1:], literal[1:], rtol=0, atol=1e-8)
    assert frugal[0].item() == pytest.approx(literal[0].item(), rel=1e-5)  # transformers' own loss is float32
    found, p, n = counted(lambda: frugal_loss(model, embedding, ids).backward()), sizes.prefix, sum(lengths) - len(lengths)
    allowed = p*(p + 1)//2 + sum(p*k + k*(k + 1)//2 for k in (length - 1 for length in lengths))
    thrown_away = 3*4*sizes.layers*sizes.width*((p + n)**2 - allowed)  # pairs that the mask forbids are computed all the same
    assert found - thrown_away == step_flops(sizes, lengths, 1)["needed"]["total"]


def test_operations_grow_in_straight_lines():
    def flop(count=32, length=14, **changes): return step_flops(replace(REFERENCE_SIZES, **changes), [length]*count)["needed"]["total"]
    assert flop(64) == 2*flop(32)
    assert flop(network_layers=12) - flop(network_layers=8) == flop(network_layers=8) - flop(network_layers=4)
    assert step_flops(REFERENCE_SIZES, [14]*35, 7)["needed"]["CLIP"] == 0


# --- timing

def test_functions_are_measured_in_turns_in_alternating_order():
    calls = []
    seconds = measure({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab" and seconds.shape == (3, 2) and list(seconds) == ["a", "b"]


def test_median_and_quartiles(): assert spread([5, 1, 2, 3, 4]) == {"median": 3., "low": 2., "high": 4.}


def test_the_limit_is_the_fastest_product():
    seconds = pd.DataFrame({"matmul 2048×2048×2048 float32": [0.2, 0.1, 0.1], "matmul 10×10×10 float32": [1., 1., 1.], "a step": [1., 1., 1.]})
    assert matmul_limit(seconds) == pytest.approx(2*2048**3/0.1)
    with pytest.raises(ValueError, match="no product in bfloat16 among"): matmul_limit(seconds, "bfloat16")
    assert matmul_shapes(REFERENCE_SIZES, 768, 448)[-1] == (448, 768, 50259)
    (name, product), = matmul_functions([(2, 3, 4)], torch.bfloat16, "cpu").items()
    assert name == "matmul 2×3×4 bfloat16" and product().shape == (2, 4)


def test_a_profile_adds_up_and_names_what_takes_longest():
    a, layer = torch.randn(700, 700), torch.nn.LayerNorm(8)
    found = profile_step(lambda: layer((a @ a)[:2, :8]))
    assert sum(found.values()) == pytest.approx(1) and next(iter(found)) == "matrix products" and {"layer norm", "everything else"} <= set(found)
    kinds = {"aten::addmm": "matrix products", "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attention", "aten::gelu_backward": "GELU",
             "aten::bernoulli_": "dropout", "aten::_fused_adamw_": "AdamW", "aten::index_select": "copies and conversions", "aten::mul": "everything else"}
    assert {name: _kind(name) for name in kinds} == kinds


def test_results_of_a_step_by_hand():
    seconds = pd.DataFrame({"original": [4., 4.], "ours": [1., 2.], "ours, five": [0.5, 0.5], "matmul 2048×2048×2048 float32": [0.1, 0.1]})
    found = step_results(seconds, {"original": 10, "ours": 10, "ours, five": 5}, {"ours": 2*2048**3, "ours, five": 2*2048**3})
    assert [found["ratio_one_caption"], *found["spread"]["ratio_one_caption"]] == pytest.approx([3, 2.5, 3.5])
    assert [found[name] for name in ("ratio_five_captions", "share_of_limit_five", "captions_per_second_five")] == pytest.approx([4, 0.2, 10])


# --- the benchmark

def test_too_few_photos_are_named(tmp_path, tokenizer, scenes, scene_captions):
    names = sorted(scene_captions.image.unique())[:5]
    (tmp_path/"Images").mkdir()
    for name in names: shutil.copy(scenes.photos/name, tmp_path/"Images")
    scene_captions[scene_captions.image.isin(names)].to_csv(tmp_path/"captions.txt", index=False)
    captions, photos = choose_captions(tokenizer, tmp_path, 4)
    assert len(photos) == 4 and len(captions) == 20 and set(captions.image) == set(photos)
    with pytest.raises(ValueError, match="expected 12 photos with five captions of fewer than 40 tokens, found 5; choose another data_root"):
        choose_captions(tokenizer, tmp_path, 12)


@pytest.mark.numerics
def test_steps_that_differ_are_not_compared(outputs, tmp_path):
    work = load_workload(tmp_path, "reduced", "nowhere", "nowhere")
    check_steps(work)
    work.five.texts[0] = "A cat and a dog ."
    with pytest.raises(ValueError, match="expected the reference's to 1e-04, found a relative difference of"): check_steps(work)


@pytest.mark.slow
def test_peak_memory_counts_what_is_held(little, outputs):
    config = make_config("mini", device="cpu")
    batch = {"embedding": torch.zeros(2, 16), "input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 5, dtype=torch.long),
             "image_of": torch.arange(2), "unused": torch.zeros(100_000_000)}
    with_more, alone = (training_memory(vars(config), 16, {k: v for k, v in batch.items() if k != left_out}, 1) for left_out in ("", "unused"))
    if alone is None: pytest.skip("memory of a process is read on Linux alone")
    assert with_more > alone + 0.3  # of 0.4 GB


@pytest.mark.slow
def test_the_notebook_measures_at_reduced_size(outputs, tmp_path):
    papermill.execute_notebook(ROOT/"nbs/studies/benchmark.ipynb", tmp_path/"out.ipynb", kernel_name="python3", progress_bar=False, cwd=ROOT,
                               parameters=dict(size="reduced", data_root="nowhere", vocabulary="nowhere", rounds=1, device="cpu"))
    folder = outputs/"reduced-benchmark"
    step, captioning = (json.loads((folder/f"{name}.json").read_text("utf-8")) for name in ("step", "captioning"))
    committed = [json.loads((ROOT/f"outputs/benchmark/{name}.json").read_text("utf-8")) for name in ("step", "captioning")]
    assert [{*found} | {"bf16"} for found in (step, captioning)] == [{*found} | {"bf16"} for found in committed]  # what README and planning read
    assert captioning["same_token_ids"] == "6 of 6 photos" and len(step["scaling"]) == 8
    rows = benchmark_rows(folder)
    assert rows.job.unique().tolist() == ["training", "captioning", "beam search, real lengths"] and rows.groupby("job").ratio.first().round(6).tolist() == [1, 1, 1]
    assert benchmark_table(folder).shape == (len(rows), 3) and len(plot_benchmark(rows).axes) == 3
    assert (folder/"benchmark.png").is_file() and (folder/"scaling.png").is_file()
    plt.close("all")


def test_the_table_of_scaling_has_one_process_and_two():
    table = pd.read_csv(ROOT/"outputs/scaling.csv")
    assert set(table.what) == {"training, captions/s", "embedding, photos/s"}
    assert {*zip(table.processes, table.cores)} == {(1, 1), (1, 2), (2, 2)} and (table.rate > 0).all()
