"""Tokenizers: what goes in comes out, nothing spelled out becomes special, long texts take linear time."""

import json
import time

import pytest
from data_toys import TEXTS, toy_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data import tokenizer as module
from megatron_r1.data.bpe import SPECIALS, train_bpe
from megatron_r1.data.tokenizer import Tokenizer, pieces, write_info
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


@given(st.lists(st.sampled_from(["word", "a", " ", "\n", "\n\n", "  x", "1.5", "!?", "naïve", "東京", ", and", "\t"]), max_size=400))
@settings(max_examples=40, deadline=None)
def test_pieces_do_not_change_the_tokens_of_ordinary_text(toy, parts):
    text = "".join(parts)
    cut = pieces(text, 200)
    assert "".join(cut) == text
    assert all(0 < len(piece) <= 200 for piece in cut) or not text
    if all(piece[:1] == " " or (i and cut[i - 1].endswith("\n")) for i, piece in enumerate(cut) if i):
        assert [token for piece in cut for token in toy.encode(piece)] == toy.encode(text)


def test_a_long_natural_text_has_the_same_tokens_in_pieces(toy, monkeypatch):
    text = "".join(TEXTS) * 20
    whole = toy.encode(text)
    monkeypatch.setattr(module, "LONG", 1000)
    monkeypatch.setattr(module, "PIECE", 500)
    monkeypatch.setattr(module.pieces, "__defaults__", (500,))
    assert toy.encode_batch(["x", text, ""]) == [toy.encode("x"), whole, []]


@pytest.mark.parametrize("unit", ["a", "word 7 "])
def test_time_is_linear_even_without_a_space(toy, unit):
    def seconds(size):
        began = time.process_time()
        toy.encode((unit * size)[:size])
        return time.process_time() - began

    seconds(module.LONG)
    assert seconds(4 * module.LONG) < 4 * 3 * seconds(module.LONG + 1) + 0.2


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
