"""Teachers from outside: a Hugging Face folder, and what is refused."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as settings_of
from hypothesis import strategies as st
from train_toys import make_outside_model, make_shards, settings, train

from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.data.pretrained import PretrainedConfig
from megatron_r1.data.shards import ShardSet
from megatron_r1.model.pretrained import HeadApart
from megatron_r1.parallel.vocab import VocabShard
from megatron_r1.train.teacher import HuggingFaceTeacher, identity, top_k
from megatron_r1.utils.errors import ConfigError, DataError, EnvironmentProblem

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(shards, tmp_path_factory):
    return make_outside_model(tmp_path_factory.mktemp("teacher") / "llama", shards)


def whole(rows, tokens):
    """What a teacher's answer comes to for all positions: [b, s, v]."""
    b, s = tokens.shape
    return rows(0, b * s).view(s, b, -1).transpose(0, 1)


def test_documents_are_kept_apart_exactly_when_asked(folder):
    teacher = HuggingFaceTeacher(PretrainedConfig(hf_folder=str(folder)), CPU)
    model = teacher.model.model
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 512, (2, 12)))
    segments = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    apart = whole(teacher.logits(tokens, segments, VocabShard(0, 512, 1)), tokens)
    assert apart.shape == (2, 12, 512)
    with torch.no_grad():
        alone = torch.cat([model(tokens[:1, :5]).logits, model(tokens[:1, 5:]).logits], 1)[..., :512]
        together = model(tokens).logits[..., :512]
    assert torch.allclose(apart[:1], alone, atol=1e-4)
    assert torch.allclose(apart[1:], together[1:], atol=1e-4)
    assert torch.allclose(whole(teacher.logits(tokens, None, VocabShard(128, 256, 4)), tokens), together[..., 128:256], atol=1e-4)
    assert not torch.allclose(apart[:1, 6:], together[:1, 6:], atol=1e-2)


@settings_of(max_examples=20, deadline=None)
@given(lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=3), seed=st.integers(0, 9))
def test_documents_of_any_lengths_are_run_as_if_each_were_alone(lengths, seed, model):
    """Also what a group of them holds: never more tokens than the batch, never more padding than text."""
    longest = max(sum(row) for row in lengths)
    lengths = [[*row, longest - sum(row)] if sum(row) < longest else row for row in lengths]
    segments = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    tokens = torch.randint(0, 96, segments.shape, generator=torch.Generator().manual_seed(seed))
    shapes = []
    hook = model.decoder.register_forward_pre_hook(lambda _, __, kw: shapes.append(kw["input_ids"].shape), with_kwargs=True)
    found = model.states(tokens, segments)
    hook.remove()
    assert all(rows * width <= tokens.numel() for rows, width in shapes)
    assert sum(rows * width for rows, width in shapes) <= 2 * tokens.numel()
    for row, pieces in enumerate(lengths):
        for a, b in itertools.pairwise(np.cumsum([0, *pieces])):
            alone = model.states(tokens[row : row + 1, a:b])[0]
            assert (found[row, a:b] - alone).abs().max() < 1e-5


@pytest.fixture(scope="module")
def model():
    return HeadApart(tiny("Llama"))


def tiny(name, **changes):
    """A small random model of a family of transformers."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "initializer_range": 0.4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }
    config = getattr(transformers, f"{name}Config")(**{**sizes, **changes})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {"tie_word_embeddings": True}), ("Qwen2", {}), ("Phi", {}), ("Gemma2", {"final_logit_softcapping": 3.0}), ("Cohere", {"logit_scale": 0.3}),
        ("Granite", {"logits_scaling": 5.0}),
    ],
)
def test_heads_that_scale_cap_or_have_a_bias(family, changes):
    there = tiny(family, **changes)
    if family == "Phi":
        torch.nn.init.normal_(there.lm_head.bias)
    apart = HeadApart(there)
    tokens = torch.randint(0, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    expected = there(tokens).logits[..., 16:48].flatten(0, 1)
    found = apart.logits(apart.states(tokens).flatten(0, 1), 16, 48)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert apart.bias is None or family == "Phi"


def test_a_head_of_another_kind_is_refused_by_name():
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, *arguments, **named):
            out = super().forward(*arguments, **named)
            out.logits = out.logits.sin()
            return out

    odd = Odd(tiny("Llama").config).eval()
    with pytest.raises(EnvironmentProblem, match=r"found: Odd, whose logits differ(?s:.)*choose a model with another head"):
        HeadApart(odd)


@pytest.mark.parametrize("chunk", [1 << 20, 3 * 512 * 4])
def test_top_k_is_that_of_the_whole_logits(folder, chunk, monkeypatch):
    monkeypatch.setattr("megatron_r1.ops.linear_loss._CHUNK_BYTES", {"cpu": chunk})
    monkeypatch.setattr("megatron_r1.ops.linear_loss._FEWEST_ROWS", 1)
    teacher = HuggingFaceTeacher(PretrainedConfig(hf_folder=str(folder)), CPU)
    batch = {"tokens": torch.randint(0, 512, (3, 11), generator=torch.Generator().manual_seed(2)), "segment_ids": torch.zeros(3, 11)}
    values, ids = top_k(teacher, batch, False, VocabShard(0, 512, 1), 7, 2.0)
    with torch.no_grad():
        expected = torch.log_softmax(teacher.model.model(batch["tokens"]).logits[..., :512].double() / 2, -1).topk(7, -1)
    assert torch.equal(ids, expected.indices)
    assert (values - expected.values).abs().max() < 1e-5


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
    with pytest.raises(ConfigError, match=r"up to the teacher's longest sequence \(16\)"):
        train(tmp_path, settings(**base, distill={"teacher": {"hf_folder": str(make_outside_model(tmp_path / "short", shards, max_position_embeddings=16))}}), shards=shards)
    with pytest.raises(ConfigError, match=r"no such folder(?s:.)*correct distill.teacher.hf_folder"):
        identity(settings(**base, distill={"teacher": {"hf_folder": str(tmp_path / "nowhere")}}).distill, None, "fp32")
    with pytest.raises(ConfigError, match=r"'no-such-teacher'(?s:.)*correct distill.teacher.package"):
        identity(settings(**base, distill={"teacher": {"package": "no-such-teacher"}}).distill, None, "fp32")
    assert identity(settings(**base, distill={"teacher": {"hf_folder": str(folder)}}).distill, None, "fp32")["precision"] == "fp32"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda path: shutil.rmtree(path), ConfigError, "no such folder"),
        (lambda path: (path / "model.safetensors").unlink(), ConfigError, "no such files"),
        (lambda path: (path / "tokenizer.json").unlink(), DataError, "and its tokenizer that transformers can load"),
        (lambda path: (path / "config.json").write_text("{"), DataError, "transformers can load"),
        (lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:5000]), DataError, "transformers can load"),
        (lambda path: without(path, "model.layers.1.mlp.up_proj.weight"), DataError, r"all weights of LlamaForCausalLM(?s:.)*no model.layers.1.mlp.up_proj.weight"),
        (lambda path: without(path, "model.embed_tokens.weight"), DataError, r"all weights of LlamaForCausalLM(?s:.)*no model.embed_tokens.weight"),
    ],
    ids=["folder", "weights", "tokenizer", "config", "cut short", "one tensor", "the embedding"],
)
def test_teachers_with_missing_or_damaged_files_are_refused_before_the_first_step(tmp_path, shards, folder, damage, error, message):
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    damage(mine)
    with pytest.raises(error, match=message):
        train(tmp_path, settings(objective="distill", budget="1 steps", distill={"teacher": {"hf_folder": str(mine)}}), shards=shards)
    assert not list(tmp_path.glob("train-*/manifest.json"))
    assert not list(tmp_path.glob("**/checkpoints/*"))


def without(path, name):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    del tensors[name]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_a_teacher_with_a_tied_head_has_to_have_its_embedding(tmp_path, shards):
    """One name of a tied tensor is enough, but none is not."""
    tied = make_outside_model(tmp_path / "tied", shards, tie_word_embeddings=True)
    teacher = HuggingFaceTeacher(PretrainedConfig(hf_folder=str(tied)), CPU)
    assert teacher.model.weight is teacher.model.model.get_input_embeddings().weight
    without(tied, "model.embed_tokens.weight")
    with pytest.raises(DataError, match=r"all weights of LlamaForCausalLM(?s:.)*no (lm_head.weight, )?model.embed_tokens.weight"):
        HuggingFaceTeacher(PretrainedConfig(hf_folder=str(tied)), CPU)


def test_trained_teachers_that_do_not_fit_are_refused(tmp_path, shards):
    other = make_shards(tmp_path, documents=20, seed=3, vocab_size=480)
    foreign = train(tmp_path, settings(budget="1 steps"), "foreign", shards=other)
    wide = train(tmp_path, settings(budget="1 steps", model={"preset": "nano", "vocab_size": 640}), "wide", shards=shards)
    short = train(tmp_path, settings(budget="1 steps", model={"preset": "nano", "max_positions": 32}), "short", shards=shards)
    base = {"objective": "distill", "budget": "1 steps", "inputs": {"shards": "corpus", "teacher": "t"}}
    long = {"seq_length": "64 tokens", "micro_batch": 1}
    for teacher, changes, error, message in (
        (foreign, {}, DataError, r"trained on the shards' tokenizer(?s:.)*train the teacher on these shards"),
        (wide, {}, DataError, "with the student's 512 vocabulary entries"),
        (short, long, ConfigError, r"up to the teacher's longest sequence \(32\)"),
    ):
        with pytest.raises(error, match=message):
            train(tmp_path, settings(**base, **changes), "student", shards=shards, teacher=teacher)
    assert not list(tmp_path.glob("student-*/manifest.json"))
