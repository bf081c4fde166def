"""A SentencePiece model exported as tokenizer.json against the SentencePiece library itself."""

from __future__ import annotations

import io

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_r1.data.tokenizer import write_info
from megatron_r1.export.sentencepiece_json import convert
from megatron_r1.export.to_hf import write_tokenizer
from megatron_r1.model.config import PRESETS
from megatron_r1.utils.errors import DataError

TEXT = ["The capital of France is Paris.", "def add(a, b):\n    return a + b\n", "12 + 30 = 42", "Ünïcode — naïve café ✓ 日本"] * 50
IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS = {
    "bpe": {"model_type": "bpe"}, "bpe-identity": {"model_type": "bpe", **IDENTITY}, "bpe-no-prefix": {"model_type": "bpe", "add_dummy_prefix": False},
    "bpe-digits": {"model_type": "bpe", "split_digits": True, "byte_fallback": False, **IDENTITY},
    "unigram": {"model_type": "unigram"}, "unigram-identity": {"model_type": "unigram", **IDENTITY},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("sp"), {}
    for name, options in KINDS.items():
        buffer = io.BytesIO()
        settings_ = {"byte_fallback": True, "vocab_size": 340, "hard_vocab_limit": False, "pad_id": 3, "minloglevel": 2} | options
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXT), model_writer=buffer, **settings_)
        path = folder / f"{name}.model"
        path.write_bytes(buffer.getvalue())
        made[name] = (path, sentencepiece.SentencePieceProcessor(model_file=str(path)), convert(path))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_librarys(trained, kind):
    _, library, ours = trained[kind]

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.sampled_from(["The", " capital", "  ", "\n", "\t", "12", "naïve", "ﬁ", "①", "日", "🙂", "x", ".", "aa"]) | st.text(max_size=4), max_size=12))
    def check(parts):
        text = "".join(parts)
        if "\x00" not in text and "▁" not in text:
            assert ours.encode(text, add_special_tokens=False).ids == library.encode(text)

    check()


def test_auto_tokenizer_reads_the_written_folder(trained, tmp_path):
    path, library, _ = trained["bpe-identity"]
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.model").write_bytes(path.read_bytes())
    (tmp_path / "hf").mkdir()
    write_tokenizer(tmp_path / "hf", write_info(source, "tokenizer.model", "sentencepiece", {}), PRESETS["nano"])
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "def add(a, b):\n    return 12"
    assert loaded(text, add_special_tokens=False)["input_ids"] == library.encode(text)
    assert loaded.decode(library.encode(text)) == text
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 2, 3)


def test_a_word_model_is_refused(tmp_path):
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXT), model_writer=buffer, vocab_size=20, model_type="word", hard_vocab_limit=False, minloglevel=2)
    (tmp_path / "m.model").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="unigram or BPE"):
        convert(tmp_path / "m.model")
