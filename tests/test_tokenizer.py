"""Captions as GPT-2's tokens (clipcap.formats.tokenizer)."""
import pytest
from data_files import fails
from transformers import AutoTokenizer

from clipcap.formats.tokenizer import encode_captions, gpt2_path, load_tokenizer

CAPTION = "a dog runs on the snow ."


def test_caption_stands_between_start_and_end(tokenizer):
    ids, = encode_captions(tokenizer, [CAPTION])
    assert tokenizer.decode(ids) == f"<|startoftext|>{CAPTION}<|endoftext|>"


def test_long_caption_keeps_its_end(tokenizer):
    (ids,), (cut,) = encode_captions(tokenizer, [CAPTION]), encode_captions(tokenizer, [CAPTION], max_length=5)
    assert cut == ids[:4] + [tokenizer.eos_token_id]


def test_spelled_end_token_does_not_end_a_caption(tokenizer):
    ids, = encode_captions(tokenizer, ["a <|endoftext|> b"])
    assert ids.count(tokenizer.eos_token_id) == 1


def test_other_models_keep_their_end_token(tmp_path):
    AutoTokenizer.from_pretrained(gpt2_path("mini"), eos_token="</s>").save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).eos_token == "</s>"


@pytest.mark.parametrize("name, text", [("../no/such/model", "gpt2_model='../no/such/model' can't be loaded: there is no folder"), (None, "holds none of tokenizer.json, vocab.json, ")])
def test_tokenizer_that_cannot_be_loaded_is_named(tmp_path, name, text):
    with fails(text): load_tokenizer(name or str(tmp_path))


def test_real_vocabulary_has_the_recipes_numbers(shared):
    tokenizer = load_tokenizer(str(shared/"gpt2_tokenizer"))
    assert (len(tokenizer), tokenizer.eos_token_id, {tokenizer.bos_token_id, tokenizer.pad_token_id}) == (50259, 50256, {50257, 50258})
    assert encode_captions(tokenizer, ["A dog runs ."])[0][1:-1] == [32, 3290, 4539, 764]  # GPT-2's own ids
