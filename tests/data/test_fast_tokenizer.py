"""The fast library: taken only where it gives the plain library's ids, watched while it works, left at the first difference."""

import json
import random

import numpy as np
import pytest
from data_toys import TEXTS, toy_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data import fast_tokenizer
from megatron_r1.data.bpe import SPECIALS
from megatron_r1.data.fast_tokenizer import SINCE_14, Refused, check_texts, open_fast, unsettled
from megatron_r1.data.tokenizer import SAMPLED, IdsDiffer, Tokenizer, write_info
from megatron_r1.utils.errors import EnvironmentProblem


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("gigatoken")
    return toy_tokenizer(tmp_path_factory.mktemp("tokenizer")).folder


def opened(folder):
    """Plain and fast."""
    fast = Tokenizer.load(folder)
    fast.choose_library("gigatoken")
    return Tokenizer.load(folder), fast


@pytest.fixture
def both(folder):
    return opened(folder)


@pytest.fixture(scope="module")
def pair(folder):
    return opened(folder)


def test_it_is_taken_and_recorded(both):
    plain, fast = both
    assert fast.library["library"].startswith("gigatoken ")
    assert fast.library["same_as"] == plain.library["library"]
    assert fast.library["checked_texts"] > 700


@given(text=st.text(max_size=60) | st.lists(st.sampled_from(["a", "'LL", " ", "\n", "\t", "12", "é", "e\u0301", "東京", "א", "👩\u200d🚀", "\0", "<|eot_id|>", "\U00016ff4", "__"]), max_size=30).map("".join))
@settings(max_examples=200, deadline=None)
def test_any_text_gets_the_plain_ids(pair, text):
    plain, fast = pair
    assert fast.encode(text) == plain.encode(text)


def test_special_tokens_in_text_stay_text(both):
    _, fast = both
    for name in SPECIALS:
        ids = fast.encode(f"a {name} b")
        assert not {fast.bos_id, fast.eos_id, fast.pad_id, fast.end_of_turn_id} & set(ids)
        assert fast.decode(ids) == f"a {name} b"


def test_plain_when_asked_for(folder):
    tokenizer = Tokenizer.load(folder)
    tokenizer.choose_library("plain")
    assert tokenizer.fast is None
    assert tokenizer.library["reason"] == "asked for"


class Wrong:
    """A library that is right except about one word."""

    def __init__(self, right, word):
        self.right, self.word = right, word

    def encode(self, text):
        ids = self.right.encode(text)
        return ids[::-1].copy() if self.word in text else ids


def test_other_ids_on_the_check_are_refused(folder, monkeypatch, caplog):
    plain = Tokenizer.load(folder)
    right = fast_tokenizer.Gigatoken
    monkeypatch.setattr(fast_tokenizer, "Gigatoken", lambda *args: Wrong(right(*args), "DON'T"))
    with pytest.raises(Refused, match="other ids"):
        open_fast(folder / "tokenizer.json", "tokenizers", plain.vocab_size, check_texts([], []), plain.backend.encode)
    plain.choose_library("auto")
    assert plain.fast is None
    assert "other ids" in plain.library["reason"]
    with pytest.raises(EnvironmentProblem, match="other ids"):
        plain.choose_library("gigatoken")


def test_a_difference_during_the_work_ends_its_use(both):
    plain, fast = both
    fast.fast = Wrong(fast.fast, "zebra")
    texts = [f"text {i}" for i in range(SAMPLED)]
    assert fast.encode_batch(texts) == plain.encode_batch(texts)
    with pytest.raises(IdsDiffer, match="zebra"):
        fast.encode_batch(["a zebra"])
    assert fast.fast is None
    assert "in the middle" in fast.library["reason"]
    assert fast.encode("a zebra") == plain.encode("a zebra")


def test_without_the_library(folder, monkeypatch):
    tokenizer = Tokenizer.load(folder)
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    tokenizer.choose_library("auto")
    assert tokenizer.library["reason"] == "gigatoken is not installed"
    with pytest.raises(EnvironmentProblem, match="pip install gigatoken"):
        tokenizer.choose_library("gigatoken")


def test_what_it_can_not_read(tmp_path):
    pytest.importorskip("gigatoken")
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "m"), vocab_size=160, hard_vocab_limit=False, minloglevel=2)
    with pytest.raises(Refused, match=r"m\.model"):
        open_fast(tmp_path / "m.model", "sentencepiece", 160, [], lambda texts: [])


def test_a_vocabulary_without_all_bytes(tmp_path):
    """As SmolLM2's: the plain library drops such a byte and joins its neighbours, so it does those texts itself."""
    pytest.importorskip("gigatoken")
    toy = toy_tokenizer(tmp_path / "whole")
    described = json.loads((toy.folder / "tokenizer.json").read_text())
    letters = fast_tokenizer.byte_letters()
    for byte in (4, 0xC0, 0xFF):
        del described["model"]["vocab"][letters[byte]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    lacking = write_info(tmp_path, "tokenizer.json", "tokenizers", {})
    expected = [lacking.encode("th\x04e dog"), lacking.encode("the dog")]
    lacking.choose_library("gigatoken")
    assert lacking.encode_batch(["th\x04e dog", "the dog"]) == expected
    assert lacking.fast.encode("th\x04e dog") is None
    assert lacking.decode(expected[0]) == "the dog"


def test_symbols_that_a_user_defined_are_left_to_the_plain_library(tmp_path):
    pytest.importorskip("gigatoken")
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"), model_type="bpe", vocab_size=400, hard_vocab_limit=False, byte_fallback=True,
        user_defined_symbols=["[DOC_1]"], normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )
    tokenizer = write_info(tmp_path, "tokenizer.model", "sentencepiece", {})
    texts = ["a fox[DOC_1]jumps", "a fox[DOC_1] jumps over", "a fox jumps [DOC_"]
    expected = tokenizer.encode_batch(texts)
    tokenizer.choose_library("gigatoken")
    assert tokenizer.encode_batch(texts) == expected
    assert [tokenizer.fast.encode(text) is None for text in texts] == [True, True, False]


def test_what_libraries_of_different_age_disagree_on():
    assert not unsettled("plain ASCII")
    assert not unsettled("Grüße 東京 👩\u200d🚀 אב \ufffd")
    assert all(unsettled("a" + chr(int(entry.partition("-")[0], 16))) for entry in SINCE_14.split())
    assert not unsettled("\U0010ffff")


def test_its_memory_of_words_is_bounded(both, monkeypatch):
    _, fast = both
    monkeypatch.setattr(fast_tokenizer, "LOOK_EVERY", 1000)
    monkeypatch.setattr(fast_tokenizer, "CACHE_BYTES", -1 << 60)
    library = fast.fast.library
    draw = random.Random(0)
    text = " ".join("".join(draw.choices("abcdef", k=8)) for _ in range(200))
    before = fast.fast.encode(text)
    assert fast.fast.library is not library
    assert np.array_equal(fast.fast.encode(text), before)
