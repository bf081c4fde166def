"""Teachers from outside: a Hugging Face folder, and what is refused."""

import shutil

import numpy as np
import pytest
import torch
from train_toys import make_shards, settings, train

from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.data.pretrained import PretrainedConfig
from megatron_r1.data.shards import ShardSet
from megatron_r1.parallel.vocab import VocabShard
from megatron_r1.train.teacher import HuggingFaceTeacher, identity
from megatron_r1.utils.errors import ConfigError, DataError

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(shards, tmp_path_factory):
    """A random Llama with the shards' tokenizer and a few vocabulary rows to spare."""
    path = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=520, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    for file in ShardSet.open(shards).tokenizer.hf_files:
        shutil.copy(file, path)
    return path


def test_documents_are_kept_apart_exactly_when_asked(folder):
    teacher = HuggingFaceTeacher(PretrainedConfig(hf_folder=str(folder)), CPU)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 512, (2, 12)))
    segments = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    positions = torch.tensor([[*range(5), *range(7)], list(range(12))])
    apart = teacher.logits(tokens, segments, positions, VocabShard(0, 512, 1))
    assert apart.shape == (2, 12, 512)
    with torch.no_grad():
        alone = torch.cat([teacher.model(tokens[:1, :5]).logits, teacher.model(tokens[:1, 5:]).logits], 1)[..., :512]
        whole = teacher.model(tokens).logits[..., :512]
    assert torch.allclose(apart[:1], alone, atol=1e-4)
    assert torch.allclose(apart[1:], whole[1:], atol=1e-4)
    together = teacher.logits(tokens, None, torch.arange(12).expand(2, 12), VocabShard(128, 256, 4))
    assert torch.allclose(together, whole[..., 128:256], atol=1e-4)
    assert not torch.allclose(apart[:1, 6:], whole[:1, 6:], atol=1e-2)


@pytest.mark.parametrize("top_k", [None, 512])
def test_training_from_a_folder_live_and_cached(tmp_path, shards, folder, top_k):
    config = settings(objective="distill", distill={"teacher": {"hf_folder": str(folder)}, "cache_top_k": top_k}, budget="3 steps")
    losses = [record["loss"] for record in CheckpointSet.open(train(tmp_path, config, shards=shards)).metrics()]
    assert losses[-1] < losses[0]
    reference = [record["loss"] for record in CheckpointSet.open(train(tmp_path, settings(
        objective="distill", distill={"teacher": {"hf_folder": str(folder)}}, budget="3 steps"), "live", shards=shards)).metrics()]
    assert losses == pytest.approx(reference, rel=0 if top_k is None else 1e-5)


def test_teachers_that_do_not_fit_are_refused(tmp_path, shards, folder):
    other = make_shards(tmp_path, documents=20, seed=3, vocab_size=480)
    foreign = tmp_path / "foreign"
    shutil.copytree(folder, foreign)
    for file in ShardSet.open(other).tokenizer.hf_files:
        shutil.copy(file, foreign)
    words = (foreign / "tokenizer.json").read_text()
    (foreign / "tokenizer.json").write_text(words.replace('"merges": [', '"merges": [], "ignored": ['))
    base = {"objective": "distill", "budget": "1 steps"}
    with pytest.raises(DataError, match=r"whose tokenizer is the shards'(?s:.)*mean nothing"):
        train(tmp_path, settings(**base, distill={"teacher": {"hf_folder": str(foreign)}}), shards=shards)
    with pytest.raises(DataError, match=r"with the student's 1024 vocabulary entries"):
        train(tmp_path, settings(**base, model={"preset": "nano", "vocab_size": 1024}, distill={"teacher": {"hf_folder": str(folder)}}), shards=shards)
    with pytest.raises(ConfigError, match=r"no such folder(?s:.)*correct distill.teacher.hf_folder"):
        identity(settings(**base, distill={"teacher": {"hf_folder": str(tmp_path / "nowhere")}}).distill, None, "fp32")
    with pytest.raises(ConfigError, match=r"'no-such-teacher'(?s:.)*correct distill.teacher.package"):
        identity(settings(**base, distill={"teacher": {"package": "no-such-teacher"}}).distill, None, "fp32")
    assert identity(settings(**base, distill={"teacher": {"hf_folder": str(folder)}}).distill, None, "fp32")["precision"] == "fp32"
