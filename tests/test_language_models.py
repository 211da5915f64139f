"""Folders of language models: what they bring along, what they lack, and every causal architecture of transformers (clipcap.networks.language_models).

The expected values are of transformers alone: its own forward and `generate`, with its plain ("eager") attention."""
import json
import random
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from clipcap.attention import record_attention
from clipcap.core import make_config
from clipcap.formats.tokenizer import load_tokenizer
from clipcap.model import ClipCapModel, caption_losses, generate_from_embeddings, generate_ids, ids_to_text, load_gpt2, load_model, tune_gpt2
from clipcap.networks import packing
from clipcap.networks.language_models import last_logits, tiny_language_model, to_precision
from clipcap.runs.files import asset_path

P, LENGTHS, IMAGE_OF = 4, [9, 1, 5], [0, 0, 1]  # prefix embeddings; tokens of three captions of two images
MINI = asset_path("mini/gpt2")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    "transformers' reports of loading stay off the terminal."
    from transformers.utils import logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


class Given(torch.nn.Module):
    "Stands in for a mapping network: embedding [k] becomes the k-th of these prefixes."
    def __init__(self, prefixes): super().__init__(); self.table = torch.nn.Parameter(prefixes)
    def forward(self, embeddings): return self.table[embeddings[:, 0].long()]


def draw(table, ids):
    "Prefixes as long as word embeddings, and captions, of a model."
    generator = torch.Generator().manual_seed(1)
    prefix = table.std()*torch.randn(2, P, table.shape[1], generator=generator)
    return prefix, [torch.randint(ids, (n,), generator=generator) for n in LENGTHS]


def library_losses(model, prefix, captions):
    "Caption by caption, from all logits."
    losses = []
    for image, ids in zip(IMAGE_OF, captions):
        vectors = torch.cat([prefix[image], model.get_input_embeddings()(ids)])
        losses.append(F.cross_entropy(model(inputs_embeds=vectors[None]).logits[0, P - 1:-1].double(), ids, reduction="sum"))
    return torch.stack(losses)


def library_ids(model, prefix, tokenizer, beams):
    "Of transformers' `generate`, whose options are all given."
    model.generation_config = GenerationConfig()
    unknown = [*range(len(tokenizer), len(model.get_output_embeddings().weight))]  # rows without a token
    return model.generate(inputs_embeds=prefix, attention_mask=prefix.new_ones(prefix.shape[:2]).long(), max_new_tokens=6, num_beams=beams,
                          early_stopping=beams > 1, do_sample=False, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                          pad_token_id=tokenizer.pad_token_id, suppress_tokens=unknown or None)


def our_losses(gpt2, prefix, captions):
    padded = torch.nn.utils.rnn.pad_sequence(captions, True, 0)
    mask = (torch.arange(padded.shape[1]) < torch.tensor(LENGTHS)[:, None]).long()
    return caption_losses(gpt2, prefix, padded, mask, torch.tensor(IMAGE_OF))


def our_ids(gpt2, prefix, tokenizer, beams):
    return generate_ids(torch.arange(2.)[:, None], ClipCapModel(gpt2, tokenizer, Given(prefix)).eval(), 6, beams)


def compare(folder, tokenizer, **changes):
    "Assert that losses, their gradient, greedy and beam ids of a folder are transformers'."
    gpt2 = load_gpt2(str(folder), tokenizer, 0)
    library = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval().requires_grad_(False)
    prefix, captions = draw(library.get_input_embeddings().weight, len(tokenizer) - 2)
    def both(losses, model):
        x = prefix.clone().requires_grad_()
        found = losses(model, x, captions)
        return [found.detach(), torch.autograd.grad(found.sum(), x)[0]]
    for found, wanted in zip(both(our_losses, gpt2), both(library_losses, library)):
        assert (found - wanted).abs().max() < 1e-4*wanted.abs().max()  # float32, since experts have no float64; largest seen: 1e-5
    with torch.no_grad():
        for beams in (1, 3): assert our_ids(gpt2, prefix, tokenizer, beams).equal(library_ids(library, prefix, tokenizer, beams)), beams


@pytest.fixture
def save(tmp_path, tokenizer):
    "A function that writes a model with the tokenizer's vocabulary into a folder."
    def write(kind, **changes):
        tiny_language_model(kind, len(tokenizer), **changes).save_pretrained(tmp_path/"lm")
        return tmp_path/"lm"
    return write


# --- architectures

PACKED = [("gpt2", {}), ("llama", {}), ("opt", {}), ("gpt_neox", {}), ("qwen2", {}), ("mistral", {}), ("gpt_bigcode", {})]
PADDED = [("gemma2", {"attn_logit_softcapping": 1., "final_logit_softcapping": 1.}), ("cohere", {}), ("granite", {"logits_scaling": 4.}), ("gpt_oss", {}),
          ("gpt_neo", {}), ("gptj", {}), ("codegen", {}), ("bloom", {}), ("xglm", {}), ("mpt", {}), ("falcon", {}), ("stablelm", {}), ("bart", {}),
          ("gemma2", {"attn_logit_softcapping": 1., "final_logit_softcapping": None, "initializer_range": 0.02})]
WINDOWED = [("mistral", {"sliding_window": 5}), ("gemma3_text", {"sliding_window": 5}), ("gpt_neo", {"window_size": 5}),
            ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0})]
REFUSED = [("bert", "BertLMHeadModel"), ("roberta", "RobertaForCausalLM"), ("openai-gpt", "OpenAIGPTLMHeadModel"), ("xlnet", "XLNetLMHeadModel"),
           ("ctrl", "CTRLLMHeadModel"), ("rwkv", "RwkvForCausalLM")]
EITHER = [("mamba", {}), ("gpt2", {"scale_attn_by_inverse_layer_idx": True}), ("gpt2", {"scale_attn_weights": False})]  # depends on the version of transformers


def name(case): return "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())])


def warned(folder, tokenizer):
    "The note on the terminal that a folder's loss is padded, or None."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_gpt2(str(folder), tokenizer, 0)
    return next((str(w.message) for w in caught if "padded" in str(w.message)), None)


@pytest.mark.numerics
@pytest.mark.parametrize("case", PACKED, ids=name)
def test_plain_architectures_are_packed_and_equal_to_the_library(case, save, tokenizer):
    folder = save(case[0], **case[1])
    compare(folder, tokenizer)
    assert warned(folder, tokenizer) is None


@pytest.mark.numerics
@pytest.mark.parametrize("case", PADDED, ids=name)
def test_other_architectures_are_padded_with_a_note_and_equal_to_the_library(case, save, tokenizer):
    folder = save(case[0], **case[1])
    compare(folder, tokenizer)
    note = warned(folder, tokenizer)
    assert str(folder) in note and json.loads((folder/"config.json").read_text())["architectures"][0] in note


@pytest.mark.parametrize("kind, recorded", [("gpt2", True), ("cohere", True), ("granite", True), ("gptj", False)])
def test_attention_stays_fused_where_that_is_right_so_that_it_can_be_explained(kind, recorded, save, tokenizer):
    gpt2 = load_gpt2(str(save(kind, **{"logits_scaling": 4.} if kind == "granite" else {})), tokenizer, 0)
    with record_attention() as weights: our_losses(gpt2, *draw(gpt2.get_input_embeddings().weight, 50))
    assert (len(weights) > 0) == recorded


@pytest.mark.numerics
@pytest.mark.parametrize("case", WINDOWED, ids=name)
def test_attention_of_a_window_shorter_than_the_captions_is_the_librarys(case, save, tokenizer): compare(save(case[0], **case[1]), tokenizer)


@pytest.mark.numerics
@pytest.mark.parametrize("case", EITHER, ids=name)
def test_architectures_whose_code_changes_are_equal_or_named(case, save, tokenizer):
    folder = save(case[0], **case[1])
    try: compare(folder, tokenizer)
    except ValueError as error: assert "is a MambaForCausalLM, which can't be used" in str(error)


@pytest.mark.parametrize("kind, architecture", REFUSED)
def test_architectures_that_cannot_be_used_are_named(kind, architecture, save, tokenizer):
    with pytest.raises(ValueError, match=rf"lm' is a {architecture}, .*(not causal|can't|does not|cannot)"): load_gpt2(str(save(kind)), tokenizer, 0)


@pytest.mark.slow
@pytest.mark.numerics
def test_zoo_every_causal_architecture_is_the_librarys_or_refused_by_name(tmp_path, tokenizer):
    outcomes = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try: model = tiny_language_model(kind, len(tokenizer))
        except Exception: continue  # not at this size
        try:
            model.save_pretrained(tmp_path/kind)
            compare(tmp_path/kind, tokenizer)
            outcomes[kind] = "equal"
        except Exception as error: outcomes[kind] = f"{type(error).__name__}: {error}"
        refused = isinstance(outcomes[kind], str) and outcomes[kind].startswith("ValueError: gpt2_model=") and type(model).__name__ in outcomes[kind]
        if refused: outcomes[kind] = "refused"
        shutil.rmtree(tmp_path/kind, ignore_errors=True)
    wrong = {kind: outcome for kind, outcome in outcomes.items() if outcome not in ("equal", "refused")}
    assert not wrong and len(outcomes) >= 25 and list(outcomes.values()).count("equal") >= 25, wrong


@pytest.mark.parametrize("case, wanted", [("gemma2", "padded"), ("bloom", "padded"), ("gpt-neo", "padded"), ("bert", "not causal")])
def test_case_of_other_language_models(case, wanted, shared, tmp_path, tokenizer):
    from transformers import AutoConfig
    config = AutoConfig.from_pretrained(shared/"cases/05-other-language-models"/case)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path/"lm")
    if wanted == "padded":
        compare(tmp_path/"lm", tokenizer)
        assert warned(tmp_path/"lm", tokenizer)
    else:
        with pytest.raises(ValueError, match=f"BertLMHeadModel, .*{wanted}"): load_gpt2(str(tmp_path/"lm"), tokenizer, 0)


@pytest.mark.numerics
@pytest.mark.parametrize("changes", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}], ids=str)
def test_gpt2_whose_scaling_the_fused_attention_does_not_get(changes, save, tokenizer, monkeypatch):
    "transformers 5.0 gives GPT-2's own scaling to its eager attention alone."
    real = packing.packed_attention
    def unscaled(*args, scaling=None, **options): return real(*args, **options)
    monkeypatch.setattr(packing, "packed_attention", unscaled)
    for std in (0.2, 0.02): compare(save("gpt2", initializer_range=std, **changes), tokenizer)


@pytest.mark.parametrize("seed", range(8))
def test_any_change_of_the_head_or_of_attention_is_noticed(seed, save, tokenizer, monkeypatch):
    "Architectures that nobody has written yet: a GPT-2 with something after its head, or another attention in the fused path."
    rng = random.Random(seed)
    kind, factor = rng.choice(["head", "attention"]), rng.choice([0.5, 0.9, 1.1, 2.])
    folder = save("gpt2", num_hidden_layers=rng.choice([1, 2, 3]), initializer_range=rng.choice([0.02, 0.2]))
    if kind == "head":
        from transformers import GPT2LMHeadModel
        forward = GPT2LMHeadModel.forward
        def scaled(self, *args, **kwargs):
            out = forward(self, *args, **kwargs)
            out.logits = out.logits*factor
            return out
        monkeypatch.setattr(GPT2LMHeadModel, "forward", scaled)
    else:
        real = packing.packed_attention
        def other(module, query, *args, **options): return real(module, query*factor, *args, **options)
        monkeypatch.setattr(packing, "packed_attention", other)
    assert "padded" in (warned(folder, tokenizer) or "")


def test_loading_draws_nothing_and_needs_no_gradients_switched_on(tokenizer):
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    with torch.no_grad(): gpt2 = load_gpt2("mini", tokenizer, 1)
    assert torch.rand(3).equal(wanted) and gpt2.packed_up_to == float("inf") and not any(p.grad is not None for p in gpt2.parameters())


# --- folders that lack something

def damaged(tmp_path, change, **settings):
    "A copy of the miniature GPT-2 whose weights, or settings, are changed."
    folder = tmp_path/"damaged"
    shutil.copytree(MINI, folder)
    weights = load_file(folder/"model.safetensors")
    weights = change(weights) or weights
    save_file(weights, folder/"model.safetensors", {"format": "pt"})
    config = json.loads((folder/"config.json").read_text()) | settings
    (folder/"config.json").write_text(json.dumps(config))
    return folder


def without(pattern): return lambda weights: {k: v for k, v in weights.items() if pattern not in k}


def with_more(**more): return lambda weights: weights | more


@pytest.mark.parametrize("change, settings, error", [
    (without(".h.1."), {}, r"transformer\.h\.1\."),  # a layer
    (without("wpe"), {}, r"transformer\.wpe\.weight"),
    (lambda w: None, {"tie_word_embeddings": False}, r"lm_head\.weight"),  # its head
    (lambda w: None, {"n_layer": 3}, r"transformer\.h\.2\."),
    (lambda w: None, {"n_layer": 1}, r"transformer\.h\.1\."),  # more layers than config.json knows
    (with_more(**{"score.weight": torch.zeros(3, 128)}), {"architectures": ["GPT2ForSequenceClassification"]}, r"score\.weight"),
    (lambda w: None, {"vocab_size": 99}, r"wte\.weight"),
], ids=["a layer", "positions", "its head", "a layer of config.json", "a layer of the file", "a classifier", "another vocabulary"])
def test_folder_that_is_not_whole_is_named_with_its_tensors(change, settings, error, tmp_path, tokenizer):
    folder = damaged(tmp_path, change, **settings)
    with pytest.raises(ValueError, match=rf"(?s)damaged'.*{error}"): load_gpt2(str(folder), tokenizer, 1)


def test_weights_without_a_head_that_is_tied_are_whole_and_those_without_any_tensor_are_not(tmp_path, tokenizer):
    "Each tensor in turn is left out, renamed or cut: the folder is refused, naming it."
    weights = load_file(MINI/"model.safetensors")
    load_gpt2(str(damaged(tmp_path, without("lm_head"))), tokenizer, 1)
    for number, key in enumerate(sorted(weights)):
        if "lm_head" in key: continue
        change = random.Random(number).choice(["left out", "renamed", "cut"])
        shutil.rmtree(tmp_path/"damaged")
        others = {k: v for k, v in weights.items() if k != key}
        damaged(tmp_path, lambda _: others | {"left out": {}, "renamed": {f"{key}_": weights[key]}, "cut": {key: weights[key][1:].clone()}}[change])
        with pytest.raises(ValueError, match=f"(?s)damaged'.*{key}"): load_gpt2(str(tmp_path/"damaged"), tokenizer, 1)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_layout_of_gpt2_on_the_hub_is_whole(file, tmp_path, tokenizer):
    "Names without the head's prefix, and the masks that older versions stored."
    folder = damaged(tmp_path, lambda weights: {k.removeprefix("transformer."): v for k, v in weights.items() if k != "lm_head.weight"} | {
        f"h.{layer}.attn.{name}": torch.ones(shape) for layer in (0, 1) for name, shape in (("bias", (1, 1, 128, 128)), ("masked_bias", ()))})
    if file == "pytorch_model.bin":
        torch.save(load_file(folder/"model.safetensors"), folder/file)
        (folder/"model.safetensors").unlink()
    found, wanted = (load_gpt2(name, tokenizer, 1).state_dict() for name in (str(folder), "mini"))
    assert found.keys() == wanted.keys() and all(found[key].equal(wanted[key]) for key in wanted)


def test_pickle_with_code_is_not_opened_and_no_advice_to_open_it_is_passed_on(tmp_path, tokenizer):
    folder = damaged(tmp_path, lambda weights: None)
    torch.save({"x": random.Random(0)}, folder/"pytorch_model.bin")
    (folder/"model.safetensors").unlink()
    with pytest.raises(ValueError, match="damaged' can't be loaded as a causal language model .*pytorch_model.bin holds more than weights.*write it as safetensors") as error:
        load_gpt2(str(folder), tokenizer, 1)
    assert "weights_only" not in str(error.value)


def test_code_of_a_folder_is_not_run_and_no_advice_to_run_it_is_passed_on(tmp_path, tokenizer):
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    folder = damaged(tmp_path, lambda weights: None, model_type="evil", auto_map=auto)
    with pytest.raises(ValueError, match="damaged' can't be loaded as a causal language model .*code of its own") as error: load_gpt2(str(folder), tokenizer, 1)
    assert "trust_remote_code" not in str(error.value)


@pytest.mark.parametrize("size", [0, 5, 100, 0.5, 0.99])
def test_truncated_weights_are_named(size, tmp_path, tokenizer):
    folder = damaged(tmp_path, lambda weights: None)
    data = (folder/"model.safetensors").read_bytes()
    (folder/"model.safetensors").write_bytes(data[:size if size > 1 or not size else int(size*len(data))])
    with pytest.raises(ValueError, match="damaged' can't be loaded as a causal language model.*pass a folder with"): load_gpt2(str(folder), tokenizer, 1)


@pytest.mark.parametrize("make", [
    lambda: BartForConditionalGeneration(BartConfig(vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                                                    decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32)),
    lambda: BertForMaskedLM(BertConfig(vocab_size=607, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))], ids=["BART", "BERT"])
def test_models_of_another_task_are_named(make, tmp_path, tokenizer):
    make().save_pretrained(tmp_path/"other")
    with pytest.raises(ValueError, match="other' .*(BartForCausalLM|BertLMHeadModel)"): load_gpt2(str(tmp_path/"other"), tokenizer, 1)


# --- generation_config.json

FOREIGN = {"min_length": 20, "min_new_tokens": 9, "length_penalty": 2., "suppress_tokens": [3, 4, 5], "begin_suppress_tokens": [11], "repetition_penalty": 1.9,
           "no_repeat_ngram_size": 1, "max_new_tokens": 2, "max_length": 3, "num_beams": 4, "do_sample": True, "temperature": 2.5, "top_k": 3, "top_p": 0.2,
           "typical_p": 0.3, "min_p": 0.5, "forced_bos_token_id": 9, "forced_eos_token_id": 9, "eos_token_id": [5, 6], "bad_words_ids": [[5], [6, 7]],
           "early_stopping": "never", "renormalize_logits": True, "exponential_decay_length_penalty": [1, 3.], "encoder_no_repeat_ngram_size": 1,
           "num_return_sequences": 3, "remove_invalid_values": True, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "sequence_bias": [[[5], -9.]],
           "guidance_scale": 2., "use_cache": False, "cache_implementation": "static", "pad_token_id": 5, "bos_token_id": 5, "decoder_start_token_id": 5}


def foreign(tmp_path, settings, file="generation_config.json"):
    folder = tmp_path/"foreign"
    shutil.copytree(MINI, folder, dirs_exist_ok=True)
    own = json.loads((folder/file).read_text()) if file == "config.json" else {}
    (folder/file).write_text(json.dumps({**own, **settings}))
    return folder


@pytest.fixture(scope="module")
def captions_of(tokenizer):
    "A function from a folder to what its model writes, greedy, with beams and sampled."
    prefix = draw(load_gpt2("mini", tokenizer, 1).get_input_embeddings().weight, 9)[0]
    def write(folder):
        model, few = ClipCapModel(load_gpt2(str(folder), tokenizer, 1).double(), tokenizer, Given(3*prefix.double())).eval(), torch.arange(2.)[:, None]
        torch.manual_seed(0)
        return [generate_from_embeddings(few, model, 8, beams, temperature, **options)
                for beams, temperature, options in ((1, 0., {}), (3, 0., {}), (1, 1., {"top_k": 0}))]
    return write


@pytest.fixture(scope="module")
def wanted(captions_of): return captions_of("mini")


@pytest.mark.slow
def test_settings_that_a_folder_brings_along_change_nothing(tmp_path, captions_of, wanted):
    alone = {key: captions_of(foreign(tmp_path, {key: value})) == wanted for key, value in FOREIGN.items()}
    assert all(alone.values()), [key for key, same in alone.items() if not same]


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("seed", range(3))
def test_any_settings_together_change_nothing(file, seed, tmp_path, captions_of, wanted):
    rng = random.Random(seed)
    assert captions_of(foreign(tmp_path, {key: FOREIGN[key] for key in rng.sample(sorted(FOREIGN), 8)}, file)) == wanted


def test_case_of_a_generation_config(shared, tmp_path, captions_of, wanted):
    assert captions_of(foreign(tmp_path, json.loads((shared/"cases/01-generation-config/generation_config.json").read_text()))) == wanted


def test_an_option_that_does_not_exist_is_named(tokenizer):
    gpt2 = load_gpt2("mini", tokenizer, 1)
    model = ClipCapModel(gpt2, tokenizer, Given(torch.zeros(1, 2, 128)))
    with pytest.raises(ValueError, match="lenght_penalty"): generate_ids(torch.zeros(1, 1), model, 3, 2, lenght_penalty=2.)


# --- vocabularies

def sentencepiece_bpe():
    "A tokenizer as Llama's: words begin with ▁, unknown characters are written in bytes, a start token of its own, no padding."
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz."]
    pairs = [("▁", "a"), ("d", "o"), ("do", "g"), ("▁", "dog"), ("r", "u"), ("ru", "n"), ("▁", "run"), ("▁run", "s")]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *letters, *("".join(pair) for pair in pairs)]
    own = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    own.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    own.add_special_tokens([AddedToken(word, special=True) for word in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def sentencepiece_unigram():
    "A tokenizer as XGLM's: pieces by their probability, no start token, a padding token of its own."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    pieces = [("<unk>", 0.), ("</s>", 0.), ("<pad>", 0.), ("▁a", -1.), ("▁dog", -2.), ("▁run", -2.), ("s", -3.), ("▁", -4.), *((letter, -6.) for letter in "abcdefghijklmnopqrtuvwxyz.")]
    own = Tokenizer(models.Unigram(pieces, 0, False))
    own.pre_tokenizer, own.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


VOCABULARIES = {"sentencepiece bpe": sentencepiece_bpe, "sentencepiece unigram": sentencepiece_unigram,
                "nothing special": lambda: PreTrainedTokenizerFast(tokenizer_object=AutoTokenizer.from_pretrained(MINI)._tokenizer)}


@pytest.fixture
def folder_of(tmp_path):
    "A function that saves a language model with a vocabulary of its own: folder."
    def write(vocabulary, kind="llama", more=0, **changes):
        own = VOCABULARIES[vocabulary]()
        own.save_pretrained(tmp_path/"lm")
        tiny_language_model(kind, len(own) + more, **changes).save_pretrained(tmp_path/"lm")
        return str(tmp_path/"lm")
    return write


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_captions_come_back_from_any_vocabulary_and_no_character_is_cut(vocabulary, folder_of):
    from clipcap.formats.tokenizer import encode_captions, token_ids
    tokenizer, known = load_tokenizer(folder_of(vocabulary)), ["a dog runs .", "a dog", "dogs"]
    texts = known + ["a köter 犬 runs 🐕 .", "</s> a dog [PAD]"]*(vocabulary == "sentencepiece bpe")
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    def text(ids): return ids_to_text(tokenizer, torch.tensor([ids]))[0]
    for caption, ids in zip(texts, token_ids(tokenizer, texts)):
        assert text(ids) == caption
        for most in range(2, len(ids) + 3):
            (start, *inner, end), = encode_captions(tokenizer, [caption], most)
            assert (start, end) == (tokenizer.bos_token_id, tokenizer.eos_token_id) and caption.startswith(text(inner)) and "\ufffd" not in text(inner)


@pytest.mark.numerics
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("vocabulary, kind", [("sentencepiece bpe", "llama"), ("nothing special", "gpt_neox"), ("sentencepiece unigram", "opt"), ("sentencepiece unigram", "phi")])
def test_rows_of_added_tokens_are_the_librarys_with_any_head(vocabulary, kind, tied, folder_of):
    folder = folder_of(vocabulary, kind, tie_word_embeddings=tied)
    tokenizer, rows = load_tokenizer(folder), len(VOCABULARIES[vocabulary]())
    gpt2, again, other = (load_gpt2(folder, tokenizer, seed) for seed in (1, 1, 2))
    table, head = gpt2.get_input_embeddings().weight, gpt2.get_output_embeddings().weight
    assert len(table) == len(head) == len(tokenizer) > rows and (table.data_ptr() == head.data_ptr()) == tied
    assert table.equal(again.get_input_embeddings().weight) and head.equal(again.get_output_embeddings().weight)
    assert table[:rows].equal(other.get_input_embeddings().weight[:rows]) and not table[rows:].equal(other.get_input_embeddings().weight[rows:])
    library = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    assert table[:rows].equal(library.get_input_embeddings().weight)
    library.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    library.load_state_dict(gpt2.state_dict())
    prefix, captions = draw(table, len(tokenizer))
    captions[0][3], captions[2][0] = tokenizer.bos_token_id, tokenizer.pad_token_id
    with torch.no_grad():
        torch.testing.assert_close(our_losses(gpt2, prefix, captions).double(), library_losses(library, prefix, captions), rtol=1e-4, atol=1e-4)
        for beams in (1, 3): assert our_ids(gpt2, prefix, tokenizer, beams).equal(library_ids(library, prefix, tokenizer, beams))


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_rows_without_a_token_are_used_for_added_ones_and_never_written(kind, folder_of):
    folder = folder_of("sentencepiece bpe", kind, more=40, tie_word_embeddings=False)
    tokenizer = load_tokenizer(folder)
    gpt2 = load_gpt2(folder, tokenizer, 0)
    rows = len(gpt2.get_input_embeddings().weight)
    assert rows == len(tokenizer) + 38 and gpt2.unknown_ids.tolist() == [*range(len(tokenizer), rows)]
    prefix, captions = draw(gpt2.get_input_embeddings().weight, len(tokenizer))
    with torch.no_grad():
        torch.testing.assert_close(our_losses(gpt2, prefix, captions).double(), library_losses(gpt2, prefix, captions), rtol=1e-4, atol=1e-4)
        gpt2.get_output_embeddings().weight[len(tokenizer):] *= 50  # the likeliest
        for beams in (1, 3): assert our_ids(gpt2, prefix, tokenizer, beams).max() < len(tokenizer)
        model = ClipCapModel(gpt2, tokenizer, Given(prefix)).eval()
        sampled = generate_ids(torch.arange(2.)[:, None], model, 6, 1, temperature=1., num_return_sequences=4)
    assert sampled.max() < len(tokenizer) and model.gpt2.unknown_ids.numel() == 38


def test_the_tokenizer_of_another_model_is_named(folder_of, tokenizer):
    folder = folder_of("sentencepiece unigram")
    with pytest.raises(ValueError, match=rf"lm': its tokenizer has {len(tokenizer)} tokens, and the model 3\d; put the tokenizer"): load_gpt2(folder, tokenizer, 0)


# --- sizes and precision

@pytest.mark.parametrize("kind", ["gpt2", "opt", "gptj", "mpt", "biogpt", "bart"])
def test_captions_that_need_more_positions_than_a_model_has_are_named(kind, save, tokenizer):
    folder = save(kind)
    tokenizer.save_pretrained(folder)
    settings = dict(gpt2_model=str(folder), device="cpu", num_layers=1)
    with pytest.raises(ValueError, match="prefix_length=10 and max_length=120 need 130 positions; .* has 128"): load_model(make_config("mini", max_length=120, **settings), 16)


@pytest.mark.numerics
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gemma3_text"])
def test_bfloat16_is_the_librarys(kind, save, tokenizer):
    folder = save(kind)
    gpt2 = to_precision(load_gpt2(str(folder), tokenizer, 0), torch.bfloat16)
    library = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=gpt2.config._attn_implementation).eval()
    buffers = dict(library.named_buffers())
    for name, buffer in gpt2.named_buffers():
        if "inv_freq" in name: assert buffer.dtype == torch.float32 and buffer.equal(buffers[name]), name
    prefix, _ = draw(load_gpt2(str(folder), tokenizer, 0).get_input_embeddings().weight, 9)
    vectors = prefix.bfloat16().repeat(1, 25, 1)  # up to position 100
    with torch.no_grad(): assert last_logits(gpt2, vectors, 100).equal(last_logits(library, vectors, 100))


def test_lora_of_an_architecture_that_has_none_is_named(save, tokenizer):
    with pytest.raises(ValueError, match="gpt2_tuning='lora' can't be used with a MambaForCausalLM .*choose 'full' or 'none'"):
        tune_gpt2(load_gpt2(str(save("mamba")), tokenizer, 0), "lora")
