"""Long texts in pieces: the ids of the whole text, wherever a place to cut exists, whatever library tokenises."""

import numpy as np
import pytest
from data_toys import TEXTS, toy_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data import long_text
from megatron_r1.data import tokenizer as module
from megatron_r1.data.long_text import pieces
from megatron_r1.data.tokenizer import write_info

WORDS = ["word", "a", " ", "\n", "\n\n", "  x", "1.5", "!?", "naïve", "東京", ", and", "\t", " \n ", "\u0301", "don't", "\u3000", "0"]


def sentencepiece_tokenizer(folder, **settings):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder.mkdir(exist_ok=True)
    (folder / "corpus.txt").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=500, hard_vocab_limit=False, byte_fallback=True, minloglevel=2, **settings
    )
    return write_info(folder, "tokenizer.model", "sentencepiece", {})


@pytest.fixture(scope="module", params=["bpe", "gpt2", "sentencepiece as llama-2", "unigram"])
def any_tokenizer(request, tmp_path_factory):
    """Ours; GPT-2's splitting, where line feeds before a word belong together; a dummy prefix with spaces kept; and one with spaces collapsed."""
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "bpe":
        return toy_tokenizer(folder)
    if request.param == "gpt2":
        from tokenizers import Tokenizer as Fast
        from tokenizers import models, pre_tokenizers, trainers

        fast = Fast(models.BPE())
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=500, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        fast.save(str(folder / "tokenizer.json"))
        return write_info(folder, "tokenizer.json", "tokenizers", {})
    if request.param == "unigram":
        return sentencepiece_tokenizer(folder)
    return sentencepiece_tokenizer(folder, model_type="bpe", remove_extra_whitespaces=False, normalization_rule_name="identity", split_digits=True)


@given(st.lists(st.sampled_from(WORDS), max_size=400))
@settings(max_examples=60, deadline=None)
def test_ids_of_the_pieces_are_those_of_the_text(any_tokenizer, parts):
    text = "".join(parts)
    cut = list(pieces(text, any_tokenizer.backend.encode, 300))
    assert all(len(piece) <= 300 for piece, _ in cut)
    if all(exact for _, exact in cut):
        ids = [token for piece, _ in cut for token in any_tokenizer.encode(piece)]
        assert ids == any_tokenizer.encode(text)


@given(st.lists(st.sampled_from(WORDS), max_size=300), st.integers(50, 120))
@settings(max_examples=30, deadline=None)
def test_untried_pieces_are_the_text(parts, size):
    text = "".join(parts)
    assert "".join(piece for piece, _ in pieces(text, None, size)) == text


def test_natural_text_is_always_cut_exactly(any_tokenizer, monkeypatch):
    text = "".join(TEXTS) * 20
    whole = any_tokenizer.encode(text)
    monkeypatch.setattr(module, "LONG", 1000)
    monkeypatch.setattr(long_text.pieces, "__defaults__", (500,))
    assert any_tokenizer.encode_batch(["x", text, ""]) == [any_tokenizer.encode("x"), whole, []]
    assert any_tokenizer.inexact_cuts == 0


def test_what_has_no_place_to_cut_is_cut_and_counted(tmp_path, monkeypatch):
    toy = toy_tokenizer(tmp_path)
    monkeypatch.setattr(module, "LONG", 1000)
    monkeypatch.setattr(long_text.pieces, "__defaults__", (500,))
    ids = toy.encode("a" * 2750)
    assert toy.inexact_cuts == 5
    assert toy.decode(ids) == "a" * 2750


def test_a_cut_that_changes_ids_is_not_taken():
    """A library to which every word is one token whatever stands in it, up to a full stop."""
    def encode(texts):
        return [np.array([sum(map(ord, part)) for part in text.split(".")], np.int32) for text in texts]

    text = "one two three. four five six seven" * 20
    assert all(not exact for _, exact in list(pieces(text, encode, 100))[:-1])
