"""Tokenizers: what goes in comes out, nothing spelled out becomes special, long texts take linear time."""

import json

import pytest
from data_toys import TEXTS, toy_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data import tokenizer as module
from megatron_r1.data.bpe import SPECIALS, train_bpe
from megatron_r1.data.long_text import PIECE
from megatron_r1.data.tokenizer import Tokenizer, write_info
from megatron_r1.utils.errors import ArtifactError, DataError


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_training_is_deterministic_and_exactly_as_large_as_asked(tmp_path):
    first, second = toy_tokenizer(tmp_path / "a"), toy_tokenizer(tmp_path / "b")
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    assert first.vocab_size == second.vocab_size == 400
    assert train_bpe(TEXTS, 2000, tmp_path / "c").vocab_size == 2000  # the texts do not hold so many pairs


def test_too_small_a_vocabulary(tmp_path):
    with pytest.raises(DataError, match="at least 262"):
        train_bpe(TEXTS, 100, tmp_path)


def test_single_digits(toy):
    assert [toy.decode([i]) for i in toy.encode("31415")] == list("31415")


@given(st.text(max_size=80))
@settings(max_examples=60, deadline=None)
def test_round_trip(toy, text):
    assert toy.decode(toy.encode(text)) == text


def test_special_tokens_in_text_stay_text(toy):
    specials = {toy.bos_id, toy.eos_id, toy.pad_id, toy.end_of_turn_id}
    assert len(specials) == 4
    for name in SPECIALS:
        ids = toy.encode(f"a {name} b")
        assert not specials & set(ids)
        assert toy.decode(ids) == f"a {name} b"


@pytest.mark.parametrize("unit", ["a", "word 7 "])
def test_a_long_text_never_reaches_the_library_whole(toy, unit, monkeypatch):
    """So that time and memory are linear in its length, whatever the library does with a word of a million letters."""
    sizes = []
    encode = toy.backend.encode
    monkeypatch.setattr(toy.backend, "encode", lambda texts: sizes.append(sum(map(len, texts))) or encode(texts))
    text = unit * (module.LONG // len(unit) + 1)
    ids = toy.encode(text)
    assert max(sizes) <= module.TOGETHER * PIECE < 5 * module.LONG
    assert sum(sizes) < 1.2 * len(text)
    assert toy.decode(ids) == text


def test_half_a_surrogate_pair_is_no_text(toy):
    with pytest.raises(DataError, match="surrogate"):
        toy.encode("a\ud800b")


def test_a_changed_file_is_refused(tmp_path):
    toy_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace("\n", " \n", 1))
    with pytest.raises(DataError, match="SHA-256"):
        Tokenizer.load(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="no such file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_info.json").write_text(json.dumps({"backend": "tokenizers"}))
    with pytest.raises(ArtifactError, match="missing fields"):
        Tokenizer.load(tmp_path)


def test_not_a_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        write_info(tmp_path, "tokenizer.json", "tokenizers", {})


def test_unknown_special_token(tmp_path):
    toy_tokenizer(tmp_path)
    with pytest.raises(DataError, match="eos token"):
        write_info(tmp_path, "tokenizer.json", "tokenizers", {}, eos="</end>")


def test_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=160, hard_vocab_limit=False, byte_fallback=False, minloglevel=2
    )
    toy = write_info(tmp_path, "tokenizer.model", "sentencepiece", {})
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert toy.encode("The lazy dog") == oracle.encode("The lazy dog")
    assert toy.decode(toy.encode("The lazy dog")) == "The lazy dog"
    assert (toy.bos_id, toy.eos_id, toy.pad_id) == (oracle.bos_id(), oracle.eos_id(), None)
    assert toy.vocab_size == oracle.get_piece_size()
    assert not {toy.bos_id, toy.eos_id} & set(toy.encode("<s> </s>"))
    assert toy.info.chat_style is None
    assert Tokenizer.load(tmp_path).encode("dog") == toy.encode("dog")


def test_hugging_face_opens_it(toy):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(toy.folder))
    text = "Hello, 12 naïve cafés!\n  x"
    assert theirs(text, add_special_tokens=False)["input_ids"] == toy.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (toy.bos_id, toy.eos_id, toy.pad_id)
    assert theirs.decode(toy.encode(text)) == text
    assert sorted(path.name for path in toy.hf_files) == ["tokenizer.json", "tokenizer_config.json"]
