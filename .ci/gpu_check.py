"""Does clipcap work on a CUDA GPU, and how fast is it there? One call, one JSON. Random weights of full size.

python gpu_check.py --data DATA --out OUT [--size full] [--budget 420] [--only part,part]
DATA holds captions.txt and Images/ (Kaggle's layout; Images may hold few photos) and gpt2_tokenizer/.
Each part is tried by itself: an error is noted under "errors" and the next part runs. OUT/gpu_check.json is written after each.
"""
import argparse
import contextlib
import gc
import hashlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from tempfile import mkdtemp

cli = argparse.ArgumentParser()
cli.add_argument("--data", required=True)
cli.add_argument("--out", default=os.environ.get("OUT", "."))
cli.add_argument("--size", default="full", choices=("full", "reduced"))
cli.add_argument("--device", default="auto")
cli.add_argument("--tokenizer", help="folder of GPT-2's vocabulary; DATA/gpt2_tokenizer where not given")
cli.add_argument("--budget", type=float, default=420, help="seconds after which no further part begins")
cli.add_argument("--only", default="")
args = cli.parse_args()
began = time.monotonic()
scratch = Path(mkdtemp(prefix="gpu_check-"))
os.environ.update(CLIPCAP_OUTPUTS=str(scratch/"outputs"), HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false", PYTHONWARNINGS="ignore")
warnings.simplefilter("ignore")

import pandas as pd
import torch
from safetensors.torch import save_file

import clipcap.train
from clipcap.attention import explain
from clipcap.checks.literal import literal_loss, literal_model, loss_and_gradients, mean_loss
from clipcap.core import make_config, pick_device, seed_everything
from clipcap.data import FlickrDataset, embed_photos, encode_images, load_clip
from clipcap.decoding.stream import caption_stream
from clipcap.formats.embeddings import Embeddings, write_embeddings
from clipcap.formats.photos import read_ahead, read_photo
from clipcap.model import generate_ids, load_model
from clipcap.networks.packing import has_bf16, pick_dtype
from clipcap.studies.flops import CLIP_SIZES, GPT2_SIZES, NETWORK_SIZES, model_sizes, publish_gpt2, step_flops
from clipcap.studies.timing import matmul_functions, matmul_limit, matmul_shapes, our_step
from clipcap.optim.captured import CapturedGradient
from clipcap.train import epoch_loader, train_stage

full, device = args.size == "full", pick_device(args.device)
cuda = device == "cuda"
data, out = Path(args.data).resolve(), Path(args.out)
out.mkdir(parents=True, exist_ok=True)
results, errors, seconds = {}, {}, {}
matmul = torch.backends.cuda.matmul


def sync():
    if cuda: torch.cuda.synchronize()


def table(name, **more):
    "A part's results, to be filled: what is there when an error comes is kept."
    return results.setdefault(name, {**more})


def write():
    told = {"size": args.size, "device": device, "seconds": round(time.monotonic() - began, 1), "part_seconds": seconds, "errors": errors, **results}
    (out/"gpu_check.json").write_text(json.dumps(told, indent=1, default=str) + "\n")
    return told


@contextlib.contextmanager
def precision(kind):
    "Products of float32 as IEEE or as TF32; clipcap itself asks for IEEE in `load_model`."
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    try: yield
    finally: matmul.fp32_precision = "ieee" if before == "none" else before


def relative(a, b): return ((a.double().cpu() - b.double().cpu()).norm()/b.double().cpu().norm()).item()


def timed(work, times, repeats=5):
    "Seconds a call: median of blocks of `times`, each waited for at its end alone, as a loop would."
    work(); sync()
    blocks = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(times): work()
        sync()
        blocks.append((time.perf_counter() - started)/times)
    return statistics.median(blocks)


def kernels(work, times=5):
    "Seconds that kernels take a call, how many there are, and the ten that take longest."
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile
    work(); sync()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        for _ in range(times): work()
        sync()
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    rows = [(e.self_device_time_total if cuda else e.self_cpu_time_total, e.count, e.key) for e in seen.key_averages() if e.device_type == kind]
    rows.sort(reverse=True)
    return {"gpu_seconds": sum(r[0] for r in rows)/1e6/times, "launches": sum(r[1] for r in rows)/times,
            "top": [f"{r[0]/1e3/times:.3f} ms {r[1]/times:.0f}x {r[2][:110]}" for r in rows[:10]],
            "attention": sorted({r[2][:110] for r in rows if any(w in r[2].lower() for w in ("fmha", "flash", "cudnn", "attention", "softmax"))})}


# what all parts need -------------------------------------------------------------------------------------------------------------------
clip_sizes, network_sizes = CLIP_SIZES[args.size], NETWORK_SIZES[args.size]
clip_dim, vocabulary = clip_sizes["embed_dim"], Path(args.tokenizer or data/"gpt2_tokenizer").resolve()
captions = pd.read_csv(data/"captions.txt").dropna()
if not full: captions = captions[captions.image.isin(captions.image.drop_duplicates()[:400])]
names = captions.image.drop_duplicates().tolist()
photos = sorted((data/"Images").iterdir())[:64]


def prepare():
    "Backbones and embeddings on disk."
    publish_gpt2(scratch/"gpt2", vocabulary, **GPT2_SIZES[args.size])
    from clip.model import CLIP
    seed_everything(0)
    sizes = {"input_resolution": "image_resolution", "context_length": "context_length", "vocab_size": "vocab_size"}  # OpenAI's files hold them
    save_file({k: v.contiguous() for k, v in CLIP(**clip_sizes).state_dict().items()} | {k: torch.tensor(clip_sizes[name]) for k, name in sizes.items()},
              scratch/"clip.safetensors")
    draw = torch.Generator().manual_seed(0)
    write_embeddings(scratch/"embeddings.safetensors", names, torch.randn(len(names), clip_dim, generator=draw), "random")
    few = names[:2400 if full else 160]
    write_embeddings(scratch/"few.safetensors", few, torch.randn(len(few), clip_dim, generator=draw), "random")
    (scratch/"captions").mkdir(exist_ok=True)
    captions.to_csv(scratch/"captions/captions.txt", index=False)


settings = dict(clip_model=str(scratch/"clip.safetensors"), gpt2_model=str(scratch/"gpt2"), **network_sizes)
def config_of(kind="float32", where=device, **more): return make_config("flickr8k", device=where, precision=kind, **settings, **more)


made = {}
def model_of(kind="float32", where=device, with_clip=False):
    "A model, made once. `kind` tf32 is float32, to be used within `precision`."
    key = "float32" if kind == "tf32" else kind, where, with_clip
    if key not in made:
        made[key] = load_model(config_of(key[0], where), None if with_clip else clip_dim).eval()
    return made[key]


def on(batch, where): return {k: v.to(where) if torch.is_tensor(v) else v for k, v in batch.items()}


def batches(count, each=1, size=32):
    "Batches of `size` captions: one of an image, or all five of each."
    if "train" not in made:
        made["train"] = FlickrDataset(captions, Embeddings(scratch/"embeddings.safetensors"), model_of(where="cpu").tokenizer, caption_sampling="all")
    every, order = made["train"], torch.Generator().manual_seed(1)
    if "place" not in made: made["place"] = {item: n for n, item in enumerate(every.items)}
    images = [every.images[n] for n in torch.randperm(len(every.images), generator=order)[:count*-(-size//each)].tolist()]
    per = -(-size//each)
    return [every.collate([every[made["place"][image, k]] for image in images[at:at + per] for k in range(min(each, len(every.tokens[image])))])
            for at in range(0, len(images), per)]


# parts ---------------------------------------------------------------------------------------------------------------------------------
def facts():
    import accelerate, transformers
    told = table("facts")
    told |= {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__, "accelerate": accelerate.__version__,
            "cpus": os.cpu_count(), "gpu": torch.cuda.get_device_name() if cuda else None, "capability": torch.cuda.get_device_capability() if cuda else None}
    told["has_bf16"] = has_bf16(device)
    told["auto_is"] = str(pick_dtype("auto", device, 768))
    try: told["bfloat16_is"] = str(pick_dtype("bfloat16", device, 768))
    except ValueError as error: told["bfloat16_is"] = f"ValueError: {error}"
    model_of()
    told["precision_of_convolutions"] = torch.backends.cudnn.conv.fp32_precision
    told["precision_of_products"] = matmul.fp32_precision


def limits():
    shapes = matmul_shapes(model_sizes(model_of(), clip_sizes), 747 if full else 60, 459 if full else 40, 8192 if cuda else 256)
    told = table("limits_tflops")
    for kind in ("float32", "tf32", "bfloat16"):
        with precision(kind):
            products = matmul_functions(shapes, torch.bfloat16 if kind == "bfloat16" else torch.float32, device)
            found = pd.DataFrame([{name: timed(work, 5 if cuda else 1, 3) for name, work in products.items()}])
        told[kind] = matmul_limit(found, "bfloat16" if kind == "bfloat16" else "float32")/1e12
        told[f"{kind} by shape"] = {f"{m}x{k}x{n}": round(2*m*k*n/found.iloc[0, i]/1e12, 1) for i, (m, k, n) in enumerate(shapes)}
    size = 2**30 if cuda else 2**22
    a, b = torch.randn(size//4, device=device), torch.empty(size//4, device=device)
    told["copy_TB_a_second"] = 2*size/timed(lambda: b.copy_(a), 10)/1e12


def equality():
    "Loss and gradient: CPU in float32 against the GPU in each precision; ours against the literal step on the GPU."
    told = table("equality")
    for name, each in (("one caption an image", 1), ("five", 5)):
        batch, rows = batches(1, each)[0], told.setdefault(name, {})
        reference = loss_and_gradients(mean_loss(model_of(where="cpu"), batch), model_of(where="cpu").mapping_network)
        rows["loss"] = reference[0].item()
        for kind in ("float32", "tf32", "bfloat16"):
            model = model_of(kind)
            with precision(kind): found = loss_and_gradients(mean_loss(model, on(batch, device)), model.mapping_network)
            rows[kind] = {"loss": relative(found[:1], reference[:1]), "gradient": relative(found[1:], reference[1:])}
        model, there = model_of(), on(batch, device)
        texts = [made["train"].references[image][k] for image, k in zip(batch["image"], [n % each for n in range(len(batch["image"]))])]
        original = literal_model(model)
        literal = loss_and_gradients(literal_loss(original, there["embedding"][there["image_of"]], texts), original.mapping_network)
        ours = loss_and_gradients(mean_loss(model, there), model.mapping_network)
        rows["ours against the literal step, float32"] = {"loss": relative(ours[:1], literal[:1]), "gradient": relative(ours[1:], literal[1:])}
        del original


def captions_equal():
    "Token ids of five beams: GPU against CPU; where they differ, how much likelier one is than the other."
    count, tokens = (8, 20) if full else (4, 8)
    embeddings, told = torch.randn(count, clip_dim, generator=torch.Generator().manual_seed(2)), table("captions_equal")
    cpu = model_of(where="cpu")
    expected = generate_ids(embeddings, cpu, tokens)
    for kind in ("float32", "bfloat16"):
        with precision(kind): found = generate_ids(embeddings.to(device), model_of(kind), tokens).cpu()
        same = [a.tolist() == b.tolist() for a, b in zip(found, expected)] if found.shape == expected.shape else [False]*count
        told[kind] = {"equal": f"{sum(same)} of {count}"}
        if not all(same) and found.shape == expected.shape:
            with torch.no_grad(): nats = [cpu(embeddings, ids, torch.ones_like(ids)) for ids in (expected, found)]
            told[kind]["nats_lost_where_not"] = [round(x, 5) for x, s in zip((nats[1] - nats[0]).tolist(), same) if not s]
    drawn = []
    for _ in range(2):
        seed_everything(3)
        drawn.append(generate_ids(embeddings, model_of(), tokens, 1, 1., 3, top_k=0))
    told["drawn twice with a seed"] = "equal" if torch.equal(*drawn) else "not equal"


def optimizer_of(model, **more):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5, weight_decay=1e-5, fused=True, **more)


def syncs(work):
    "How often a call makes the host wait, as PyTorch itself counts it, and where."
    if not cuda: return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            work()
    finally: torch.cuda.set_sync_debug_mode("default")
    where = pd.Series([f"{Path(w.filename).name}:{w.lineno}" for w in told if "synchroniz" in str(w.message)], dtype=str)
    return {"times": len(where), "where": where.value_counts().to_dict()}


def steps():
    "Training steps as `train` takes them, on batches that are on the GPU already."
    told, flops_of = table("steps"), model_sizes(model_of(), clip_sizes)
    for each, label in ((1, "one caption an image"), (5, "five")):
        given = [on(b, device) for b in batches(10 if full else 2, each)]
        lengths, images = given[0]["attention_mask"].sum(1).tolist(), len(given[0]["embedding"])
        flop = statistics.mean(step_flops(flops_of, b["attention_mask"].sum(1).tolist(), len(b["embedding"]))["needed"]["total"] for b in given)
        for kind in ("float32", "tf32", "bfloat16"):
            model = model_of(kind).train()
            if cuda: torch.cuda.reset_peak_memory_stats()
            optimizer, turn = optimizer_of(model), iter(range(10**9))
            def step(): our_step(model, optimizer, given[next(turn) % len(given)])
            def pass_ms(batches):
                "Milliseconds a step of the first pass over batches whose shapes are new: what an epoch is made of."
                our_step(model, optimizer, given[0]); sync()
                started = time.perf_counter()
                for b in batches: our_step(model, optimizer, b)
                sync()
                return (time.perf_counter() - started)/len(batches)*1e3
            with precision(kind):
                new = pass_ms(given[1:])
                took = timed(step, len(given), 3 if full else 2)
                row = told[f"{label}, {kind}"] = {"ms": took*1e3, "captions_a_second": len(lengths)/took, "gflop": flop/1e9,
                       "share_of_limit": flop/took/1e12/results.get("limits_tflops", {}).get(kind, float("nan"))}
                row["ms_on_new_shapes"] = new
                if cuda: row["peak_gb"] = torch.cuda.max_memory_allocated()/1e9
                if each == 1:
                    row["host_waits"] = syncs(step)
                    row |= kernels(step)
                    row["gpu_busy"] = row["gpu_seconds"]/took
            model.eval()
            del optimizer


def determinism():
    "The same step twice from the same seed: the same bits? And which operations PyTorch itself calls not deterministic."
    told = table("determinism")
    for each in (1, 5):
        batch = on(batches(1, each)[0], device)
        for kind in ("float32", "bfloat16"):
            model, found = model_of(kind).train(), []
            for _ in range(4):
                seed_everything(5)
                found.append(loss_and_gradients(mean_loss(model, batch), model.mapping_network))
            told[f"{each} caption(s) an image, {kind}"] = all(torch.equal(found[0], f) for f in found[1:])
            model.eval()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            loss_and_gradients(mean_loss(model_of(), batch), model_of().mapping_network)
    finally: torch.use_deterministic_algorithms(False)
    told["warned of"] = sorted({str(w.message)[:110] for w in warned if "determin" in str(w.message)})


def train_settings(store, epochs, kind):
    return dict(preset="flickr8k", data_root=str(scratch/"captions"), embeddings=str(scratch/f"{store}.safetensors"), epochs=epochs, precision=kind,
                device=args.device, **settings)


def epochs():
    "Two epochs of the recipe by `train_stage`, and in bfloat16 all 30: all 6,472 training images where captions.txt is Flickr8k's; and what an epoch waits for beside training."
    told = table("epochs")
    def timing(name, work):
        def run(*a, **k):
            sync(); started = time.perf_counter()
            try: return work(*a, **k)
            finally: sync(); parts.setdefault(name, []).append(round(time.perf_counter() - started, 3))
        return run
    for kind in ("float32", "bfloat16"):
        parts, started, own = {}, time.monotonic(), {name: getattr(clipcap.train, name) for name in ("validate", "finish_epoch", "load_model", "load_data")}
        for name, work in own.items(): setattr(clipcap.train, name, timing(name, work))
        try: metrics = train_stage(f"epochs-{kind}", **train_settings("embeddings", 30 if full and kind == "bfloat16" else 2, kind))
        finally:
            for name, work in own.items(): setattr(clipcap.train, name, work)
        told[kind] = {"training_seconds_an_epoch": metrics.seconds.tolist(), "captions_a_second": metrics.captions_per_second.tolist(),
                      "losses": metrics[["train_loss", "val_loss"]].round(4).values.tolist(), "wall_seconds_of_all": round(time.monotonic() - started, 1), "seconds": parts}
        shutil.rmtree(scratch/f"outputs/epochs-{kind}")


def resuming():
    "Three epochs at once, and three of which the second is killed; the same bits? By two processes side by side."
    code = "import json, sys; from clipcap.train import train_stage; train_stage(sys.argv[1], **json.loads(sys.argv[2]))"
    given = json.dumps(train_settings("few", 3, "float32"))
    def begin(run): return subprocess.Popen([sys.executable, "-c", code, run, given], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    folders = {run: scratch/"outputs"/run for run in ("whole", "killed")}
    whole, killed = begin("whole"), begin("killed")
    while not (folders["killed"]/"checkpoints/last.pt").is_file() and killed.poll() is None: time.sleep(0.02)
    time.sleep(0.4 if full else 0.1)
    alive = killed.poll() is None
    if alive: killed.send_signal(signal.SIGKILL)
    killed.wait()
    at = len((folders["killed"]/"metrics.jsonl").read_text().splitlines())
    again = begin("killed")
    said = again.communicate(timeout=150)[0], whole.communicate(timeout=150)[0]
    if again.returncode or whole.returncode: raise RuntimeError("\n".join(s[-800:] for s in said))
    hashes = {run: hashlib.sha256((f/"checkpoints/mapping_network_epoch_3.pth").read_bytes()).hexdigest()[:16] for run, f in folders.items()}
    losses = {run: [json.loads(line)["val_loss"] for line in (f/"metrics.jsonl").read_text().splitlines()] for run, f in folders.items()}
    results.update(resuming={"killed_alive_after_epochs": at if alive else "it had ended", "same_bytes": hashes["whole"] == hashes["killed"], "hashes": hashes, "val_losses": losses})
    for f in folders.values(): shutil.rmtree(f)


def captioning():
    "Photos a second by transformers' `generate`, from embeddings; random weights never end a caption, so all tokens are written."
    tokens, told = 40 if full else 8, table("captioning")
    for kind in ("float32", "bfloat16"):
        for count, beams in ((32, 5), (256, 5)) if full else ((4, 2),):
            embeddings = torch.randn(count, clip_dim, device=device)
            with precision(kind):
                model_of(kind); sync()
                started = time.perf_counter()
                generate_ids(embeddings, model_of(kind), tokens, beams, processors=(lambda written, scores: scores,)).cpu()
                first = time.perf_counter() - started
                took = timed(lambda: generate_ids(embeddings, model_of(kind), tokens, beams, processors=(lambda written, scores: scores,)), 1, 1)
                row = told[f"{kind}, {count} photos, {beams} beams, {tokens} tokens"] = {"photos_a_second": count/took, "ms_a_token": took/tokens*1e3, "first_call_seconds": first}
                if (count, kind) == (32, "bfloat16") or not full: row["kernels"] = (k := kernels(lambda: generate_ids(embeddings, model_of(kind), tokens, beams, processors=(lambda written, scores: scores,)), 1)); row["gpu_busy"] = k["gpu_seconds"]/took


class Pixels(torch.utils.data.Dataset):
    "Photos, preprocessed where they are read."

    def __init__(self, preprocess, paths): self.preprocess, self.paths = preprocess, paths
    def __len__(self): return len(self.paths)
    def __getitem__(self, n): return self.preprocess(read_photo(self.paths[n]))


def embedding():
    "CLIP alone, what reads photos, both after each other (01_data), and with reading threads."
    model, preprocess, encoder = load_clip(settings["clip_model"], device)
    cpu = load_clip(settings["clip_model"], "cpu")[0]
    side, told = clip_sizes["image_resolution"], table("photos_a_second")
    real = torch.stack([preprocess(read_photo(p)) for p in photos[:4]])
    reference = encode_images(cpu, real)
    told["difference from the CPU"] = relative(encode_images(model, real), reference)
    with torch.autocast(device, torch.bfloat16): told["cosine of bfloat16"] = torch.cosine_similarity(encode_images(model, real), reference).min().item()
    for count in (64, 512) if full else (4,):
        images = torch.randn(count, 3, side, side, device=device)
        for kind in ("float32", "tf32", "bfloat16"):
            def look():
                with torch.autocast(device, torch.bfloat16, enabled=kind == "bfloat16"): return encode_images(model, images)
            with precision(kind): told[f"CLIP alone, {count} at once, {kind}"] = count/timed(look, 2 if full else 1, 3)
    folder, copies = scratch/"photos", 24 if full else 3
    folder.mkdir(exist_ok=True)
    many = [f"{n}-{p.name}" for n in range(copies) for p in photos]
    for name in many: shutil.copy(data/"Images"/name.partition("-")[2], folder/name)
    started = time.perf_counter()
    for name in many[:64]: preprocess(read_photo(folder/name))
    told["reading, one thread"] = 64/(time.perf_counter() - started)
    started = time.perf_counter()
    embed_photos(folder, many, lambda images: encode_images(model, images), preprocess, encoder)
    told["embed_photos"] = len(many)/(time.perf_counter() - started)
    for workers in (4, 16):
        started = time.perf_counter()
        for batch in read_ahead([folder/name for name in many], lambda path: preprocess(read_photo(path)), 64, workers):
            encode_images(model, torch.stack([image for _, image in batch]))
        told[f"read_ahead, {workers} threads"] = len(many)/(time.perf_counter() - started)
    for workers in (8, 16) if full else (1,):
        loader = iter(torch.utils.data.DataLoader(Pixels(preprocess, [folder/name for name in many]), 64, num_workers=workers))
        encode_images(model, next(loader))
        started, seen = time.perf_counter(), 0
        for pixels in loader:
            encode_images(model, pixels)
            seen += len(pixels)
        told[f"processes that read, {workers}"] = seen/(time.perf_counter() - started)
    whole = model_of("bfloat16", with_clip=True)
    started = time.perf_counter()
    written = [c for _, c in caption_stream(whole, [folder/name for name in many[:256]], 64, 20 if full else 6)]
    told["caption_stream, bfloat16, 64 at once, 20 tokens"] = len(written)/(time.perf_counter() - started)


def explaining():
    "06_attention on the GPU: the same shares as on the CPU?"
    texts, embeddings = ["a dog runs on the grass .", "two men play ball"], torch.randn(2, clip_dim, generator=torch.Generator().manual_seed(4))
    shares = {where: torch.cat([e.shares.flatten() for e in explain(model_of(where=where), embeddings, texts)]) for where in ("cpu", device)}
    results.update(explaining=relative(shares[device], shares["cpu"]))


def devices():
    "A run whose settings say cpu, on a machine with a GPU: `train_stage` begins with 'auto'."
    code = "from clipcap.optim.processes import start_accelerator; a = start_accelerator('auto'); b = start_accelerator('cpu'); print(a.device, b.device)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    results.update(devices=done.stdout.strip() or done.stderr.strip().splitlines()[-1][:200])


# what a better design would reach ------------------------------------------------------------------------------------------------------
def captured():
    "The training step as it is recorded on a GPU: equality with the plain one, and milliseconds of its pieces."
    told, config = table("captured"), config_of()
    for each, label in ((1, "one caption an image"), (5, "five")):
        given = batches(10 if full else 2, each)
        for kind in ("float32", "tf32", "bfloat16"):
            model = model_of(kind)
            with precision(kind):
                gradient = CapturedGradient(model.eval(), 32, config.max_length)
                def found(batch):
                    total = gradient([batch])[0].float()
                    return torch.cat([total[None], *(p.grad.flatten() for p in model.mapping_network.parameters() if p.grad is not None)])
                with warnings.catch_warnings(record=True) as warned:
                    warnings.simplefilter("always")
                    found(given[0])
                rows, worst = [(found(b).clone(), loss_and_gradients(mean_loss(model, on(b, device)), model.mapping_network)) for b in given[:3]], [0, 0]
                for (a, b), batch in zip(rows, given):
                    tokens = batch["attention_mask"].sum()
                    worst = [max(worst[0], relative(a[:1]/tokens, b[:1])), max(worst[1], relative(a[1:], b[1:]))]
                row = told[f"{label}, {kind}"] = {"loss and gradient against the plain step": worst, "recorded": gradient.compute.records, "shapes": len(gradient.compute.graphs),
                                                  "told": [str(w.message)[:300] for w in warned]}
                model.train()
                gradient, optimizer, turn = CapturedGradient(model, 32, config.max_length), optimizer_of(model), iter(range(10**9))
                def step(update=True):
                    gradient([given[next(turn) % len(given)]])
                    if update: optimizer.step(); optimizer.zero_grad()
                for _ in given: step()
                row |= {"ms": timed(step, len(given), 3)*1e3, "ms_of_the_gradient": timed(lambda: step(False), len(given), 3)*1e3, "host_waits": syncs(step)}
                row |= kernels(step) if each == 1 else {}
                row |= {"captions_a_second": len(given[0]["input_ids"])/row["ms"]*1e3, "shapes": len(gradient.compute.graphs)}
                if cuda: row["peak_gb"] = torch.cuda.max_memory_allocated()/1e9
                model.eval()
                del gradient, optimizer
            gc.collect()
    started = time.perf_counter()
    row = [b["input_ids"].shape for b in epoch_loader(FlickrDataset(captions, Embeddings(scratch/"embeddings.safetensors"), model.tokenizer), config, 1)]
    told["ms_to_make_a_batch"] = (time.perf_counter() - started)/len(row)*1e3


def beams():
    "Our beam search: ids equal to those of `generate`, and photos a second; lengths of 40 tokens, and of captions (random weights never end one)."
    told, tokens = table("beams"), 40 if full else 8
    for kind in ("float32", "bfloat16"):
        for count in (32, 256, 1024) if full else (4,):
            embeddings = torch.randn(count, clip_dim, device=device, generator=torch.Generator(device).manual_seed(6))
            with precision(kind):
                row = told[f"{kind}, {count} photos, 5 beams, {tokens} tokens"] = {}
                started = time.perf_counter()
                found = generate_ids(embeddings, model_of(kind), tokens)
                row["first_call_seconds"] = time.perf_counter() - started
                if count <= 32:
                    expected = generate_ids(embeddings, model_of(kind), tokens, processors=(lambda written, scores: scores,))  # by transformers
                    row["equal to generate"] = f"{sum(a.tolist() == b.tolist() for a, b in zip(found, expected))} of {count}"
                took = timed(lambda: generate_ids(embeddings, model_of(kind), tokens), 1, 3)
                row |= {"photos_a_second": count/took, "ms_a_token": took/tokens*1e3*min(1, 256/count)}
                if count == 256: row |= kernels(lambda: generate_ids(embeddings, model_of(kind), tokens), 1)
                if cuda: row["peak_gb"] = torch.cuda.max_memory_allocated()/1e9
        model_of(kind).kept_search = [None]
        gc.collect()


parts = [prepare, facts, explaining, captured, beams, epochs, captioning, embedding, resuming, equality, captions_equal, limits, devices, determinism, steps]
for part in parts:
    name = part.__name__
    if args.only and name not in ("prepare", *args.only.split(",")): continue
    if time.monotonic() - began > args.budget:
        errors[name] = "not begun: the time was up"
        continue
    started = time.monotonic()
    try: part()
    except Exception as error:
        errors[name] = f"{type(error).__name__}: {str(error)[:600]} | {' < '.join(f'{Path(f.filename).name}:{f.lineno}' for f in traceback.extract_tb(error.__traceback__)[::-1][:6])}"
    seconds[name] = round(time.monotonic() - started, 1)
    print(f"{time.monotonic() - began:6.1f} s  {name}: {errors.get(name, 'done')}", flush=True)
    write()
    gc.collect()
    if cuda: torch.cuda.empty_cache()
def short(value):
    "Without lists of kernels, numbers to four digits."
    if isinstance(value, dict): return {k: short(v) for k, v in value.items() if k not in ("top", "graph_top", "by shape", "where")}
    if isinstance(value, list): return [short(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


print(json.dumps(short(write()), default=str))
shutil.rmtree(scratch, ignore_errors=True)
