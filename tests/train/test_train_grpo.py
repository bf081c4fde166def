"""Training on rewards: advantages by hand, loss and gradient against another implementation in float64, draws, resumption, learning."""

import math
import signal

import numpy as np
import pytest
import torch
from test_train_objectives import live_teacher
from test_train_resume import Interrupt, victim
from train_toys import REWARDED, final_bytes, make_questions, make_shards, resumable, settings, timeless, train
from transformers import Llama4ForCausalLM
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig

from megatron_r1.artifacts.base import open_artifact, open_workspace
from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.data.shards import ShardSet
from megatron_r1.model.build import build_model
from megatron_r1.model.config import ModelConfig
from megatron_r1.model.forward import logits, token_losses
from megatron_r1.model.generate import decoder_of
from megatron_r1.model.hf_map import canonical, hf_config, to_hf
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import initialize
from megatron_r1.parallel.ddp import unwrap, wrap
from megatron_r1.parallel.optimizer import build_optimizer
from megatron_r1.parallel.schedule import forward_backward
from megatron_r1.train import grpo, loop
from megatron_r1.train.grpo import GRPO
from megatron_r1.utils.errors import DataError
from megatron_r1.utils.seeding import derive_seed, generator

MODEL = ModelConfig.model_validate(REWARDED["model"])


@pytest.fixture
def ctx():
    return initialize(LayoutConfig(), 0)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return make_questions(tmp_path_factory.mktemp("questions"))


class Spelled:
    """A tokenizer whose tokens are numbers: an answer of tokens 5 17 reads "#### 5 17"."""

    vocab_size, eos_id, end_of_turn_id = 300, 0, 1

    def decode(self, ids):
        return "#### " + " ".join(map(str, ids))


def objective(ctx, tokenizer=None, reference=None, **changes):
    config = settings(**{**REWARDED, "grpo": {**REWARDED["grpo"], **changes}}, **({"inputs": {"shards": "c", "reference": "r"}} if reference else {}))
    return GRPO(config, ctx, ["copy"], tokenizer or Spelled(), reference)


def test_advantages_by_hand(ctx):
    """Two groups of three: rewards 1, 0, 0.5 and a tie."""
    rewards, lengths = np.array([1.0, 0.0, 0.5, 0.5, 0.5, 0.5]), np.array([2.0, 4, 8, 1, 1, 4])
    advantage, scale, tied = objective(ctx).advantages(rewards, lengths)
    deviation = math.sqrt((0.25 + 0.25) / 2)
    assert advantage.tolist() == pytest.approx([0.5 / (deviation + 1e-4), -0.5 / (deviation + 1e-4), 0, 0, 0, 0])
    assert scale.tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 8, 1, 1, 1 / 4])
    assert tied.tolist() == [0, 0, 0, 1, 1, 1]
    advantage, scale, _ = objective(ctx, variant="dapo").advantages(rewards, lengths)
    assert advantage[0] == pytest.approx(0.5 / (deviation + 1e-4))
    assert scale.tolist() == pytest.approx([6 / 20] * 6)
    advantage, scale, _ = objective(ctx, variant="dr_grpo").advantages(rewards, lengths)
    assert advantage.tolist() == pytest.approx([0.5, -0.5, 0, 0, 0, 0])
    assert scale.tolist() == pytest.approx([1 / 8] * 6)


def asked(rng, rows, longest=9):
    """Micro-batches of two questions as the feed hands them out; in a group all are alike."""
    prompts = [rng.integers(2, 300, int(rng.integers(2, longest))).tolist() for _ in range(rows // 3)]
    batches = []
    for first in range(0, rows, 2):
        mine = [prompts[sample // 3] for sample in (first, first + 1)]
        tokens, segments = np.zeros((2, longest), np.int32), np.full((2, longest), -1, np.int32)
        for row, ids in enumerate(mine):
            tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 0
        batches.append({"tokens": tokens, "segment_ids": segments, "source_ids": np.zeros(2, np.int32), "answers": ["7", "7"], "first_sample": np.asarray(24 + first)})
    return batches


def hugging_face(model, precision=torch.float64):
    """The same weights in transformers' implementation."""
    other = Llama4ForCausalLM(Llama4TextConfig(**{k: v for k, v in hf_config(MODEL).items() if k not in ("model_type", "architectures", "torch_dtype")}))
    other.load_state_dict(to_hf(canonical(model.state_dict()), MODEL), strict=False)
    other.tie_weights()
    return other.to(precision)


def log_probabilities(other, prompt, answer):
    """log p of the answer's tokens, one sequence at a time, from whole logits."""
    scores = other(torch.tensor([[*prompt, *answer]])).logits[0].double()
    return scores.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]


@pytest.mark.parametrize(("variant", "kl_weight"), [("grpo", 0.0), ("grpo", 0.3), ("dapo", 0.0), ("dr_grpo", 0.2)])
def test_loss_and_gradient_against_another_implementation_in_float64(ctx, monkeypatch, variant, kl_weight):
    """Questions through `prepare`, schedule and DDP buffers; rewards, loss and its gradient written out from the paper's formula."""
    rng = np.random.default_rng(5)
    batches = asked(rng, 12)
    answers = [[*rng.integers(2, 300, int(rng.integers(0, 6))).tolist(), int(rng.integers(2, 300))] for _ in range(12)]
    for i, said in enumerate((7, None, 8, 7, 7, None, 9, 9, 9, 3, 7, 7)):  # right; cut; wrong; ...; a tie
        answers[i] = [*answers[i], 5] if said is None else [said, *answers[i][1:], 1]
    monkeypatch.setattr(grpo, "generate", lambda *_, **__: answers)
    chunks = wrap(build_model(MODEL, ctx, seed=1), LayoutConfig(), ctx)
    build_optimizer(chunks, lr=1e-3, layout=LayoutConfig())
    far = build_model(MODEL, ctx, seed=9)
    mine = objective(ctx, reference=live_teacher("trained", far) if kl_weight else None, variant=variant, kl_weight=kl_weight)
    made = mine.prepare(chunks, batches, 2)
    assert [batch["tokens"].shape[1] for batch in made] != [batches[0]["tokens"].shape[1]] * 6
    reports = forward_backward(ctx, chunks, mine.forward_step, iter(made), len(made), 32, 2)
    loss = sum(float(r["loss_sum"]) for r in reports) / sum(int(r["num_tokens"]) for r in reports)
    gradients = to_hf({name: p.main_grad for name, p in unwrap(chunks[0]).named_parameters()}, MODEL)

    prompts = [row[segments == 0].tolist() for batch in batches for row, segments in zip(batch["tokens"], batch["segment_ids"])]
    rewards = [(1.0 if [t for t in a if t != 1][:1] == [7] else 0.0) + (0.5 if a[-1] == 1 else 0.0) for a in answers]
    model, reference = hugging_face(unwrap(chunks[0])), hugging_face(far[0])
    total, everything = torch.zeros((), dtype=torch.float64), sum(map(len, answers))
    for first in range(0, 12, 3):
        group = torch.tensor(rewards[first : first + 3], dtype=torch.float64)
        advantages = (group - group.mean()) / (1.0 if variant == "dr_grpo" else group.std() + 1e-4)
        for i, advantage in zip(range(first, first + 3), advantages):
            logp = log_probabilities(model, prompts[i], answers[i])
            with torch.no_grad():
                logq = log_probabilities(reference, prompts[i], answers[i])
            surrogate = torch.minimum(torch.exp(logp - logp.detach()) * advantage, torch.clamp(torch.exp(logp - logp.detach()), 0.8, 1.2) * advantage)
            tokens = kl_weight * (torch.exp(logq - logp) - (logq - logp) - 1) - surrogate
            total = total + {"grpo": tokens.mean() / 12, "dapo": tokens.sum() / everything, "dr_grpo": tokens.sum() / 8 / 12}[variant]
    total.backward()
    assert loss == pytest.approx(float(total.detach()), abs=1e-6)
    assert max(float(p.grad.norm()) for p in model.parameters() if p.grad is not None) > 1e-2
    for name, parameter in model.named_parameters():
        if name in gradients:
            difference = float((gradients[name].double() - parameter.grad).norm())
            assert difference <= 2e-5 * float(parameter.grad.norm()) + 1e-8, name
    found = {key: sum(float(r[key]) for r in reports) for key in mine.reports}
    assert found["reward"] == pytest.approx(sum(rewards))
    assert (found["tied"], found["length"], found["source_tokens"]) == (3, everything, 12)


def test_answers_are_drawn_from_the_model_that_is_trained(ctx, questions):
    """Every token is the inverse of the distribution function that the training forward pass gives, at the uniform number of (seed, sample,
    place); and the generator's log-probabilities are the training's."""
    chunks = build_model(MODEL, ctx, seed=3)
    mine = objective(ctx, ShardSet.open(questions).tokenizer)
    batches = asked(np.random.default_rng(1), 12)
    made = mine.prepare(chunks, batches, 2)
    decoder = decoder_of(chunks)
    for batch, arrays in zip(batches, made):
        tensors = {key: torch.from_numpy(arrays[key]).long() for key in ("tokens", "labels", "segment_ids")}
        with torch.no_grad():
            cumulative = logits(chunks, tensors["tokens"], tensors["segment_ids"]).double().softmax(-1).cumsum(-1)
            losses = token_losses(chunks, tensors)
        for row in range(2):
            places = np.flatnonzero(arrays["loss_mask"][row])
            drawn = generator(derive_seed(7, "grpo"), "generate", int(batch["first_sample"]) + row).random(8)
            assert len(places) >= 1
            cache = decoder.cache(1, 32)
            for number, place in enumerate(places):
                token, function = int(arrays["labels"][row, place]), cumulative[row, place]
                assert (function[token - 1] if token else 0.0) - 1e-5 <= drawn[number] <= function[token] + 1e-5
                with torch.no_grad():
                    tokens = tensors["tokens"][row : row + 1]
                    hidden = decoder.prefill(tokens[:, : place + 1], cache)[:, -1] if number == 0 else decoder.step(tokens[:, place], torch.tensor([place]), cache)
                    generated = decoder.logits(hidden).log_softmax(-1)[0, token]
                assert -float(losses[row, place]) == pytest.approx(float(generated), abs=2e-5)


def test_whatever_is_written_is_judged(ctx, questions):
    """Also tokens that the tokenizer does not have, special ones, and nothing but the end."""
    tokenizer = ShardSet.open(questions).tokenizer
    mine = objective(ctx, tokenizer)
    rng = np.random.default_rng(0)
    for _ in range(200):
        found = mine.judge(rng.integers(0, 384, int(rng.integers(1, 9))).tolist(), "3")
        assert 0 <= found["reward"] <= 1.5
    assert mine.judge([tokenizer.end_of_turn_id], "3") == {"reward": 0, "correct": 0, "marked": 0, "ended": 1}
    right = tokenizer.encode("#### 3")
    assert mine.judge([*right, tokenizer.end_of_turn_id], "3")["reward"] == 1.5
    assert mine.judge(right, "3") == {"reward": 1.0, "correct": 1.0, "marked": 1.0, "ended": 0.0}


def same(resumed, straight):
    assert final_bytes(resumed) == final_bytes(straight)
    a, b = CheckpointSet.open(resumed), CheckpointSet.open(straight)
    assert a.manifest == b.manifest
    without = [[{k: v for k, v in record.items() if k != "generation_seconds"} for record in timeless(found.metrics())] for found in (a, b)]
    assert without[0] == without[1]
    assert a.ledger() == b.ledger()


@pytest.fixture(scope="module")
def rewarded(questions, tmp_path_factory):
    """The run every interrupted one must equal."""
    return train(tmp_path_factory.mktemp("rewarded"), resumable(**REWARDED), shards=questions)


def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path, questions, rewarded, monkeypatch):
    update = loop.Trainer._update

    def failing(self, *arguments):
        if self.step + 1 == 6:
            raise Interrupt
        return update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_update", failing)
        with pytest.raises(Interrupt):
            train(tmp_path, resumable(**REWARDED), shards=questions)
    same(train(tmp_path, resumable(**REWARDED), shards=questions), rewarded)
    record = CheckpointSet.open(rewarded).metrics()[-1]
    assert set(record["grpo"]) == {"correct", "marked", "ended", "tied", "length", "entropy", "source_reward"}
    assert record["generation_seconds"] > 0
    assert record["source_share"] == {"copy": 1.0}


@pytest.mark.slow
def test_sigkill_in_a_step_ends_in_the_same_bytes(tmp_path, questions, rewarded):
    killed = victim(tmp_path, questions, "step 4", "grpo")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    last = victim(tmp_path, questions, "none", "grpo")
    assert last.returncode == 0, last.stderr
    assert "resuming after step 2 of 7" in last.stderr
    finished = open_workspace(tmp_path, "train", "checkpoint", resumable(**REWARDED), {"shards": questions}).final
    same(open_artifact(finished, verify="full"), rewarded)


def test_rewards_are_learnt(tmp_path):
    """A model that fine-tuning has taught the format and six digits of ten gets nearly all right from rewards alone."""
    begun = train(
        tmp_path, settings(**{**REWARDED, "objective": "sft", "grpo": {}, "global_batch": "1024 tokens", "micro_batch": 32}, budget="80 steps", lr={"peak": 5e-3, "warmup": "5 steps"}),
        "begun", shards=make_questions(tmp_path / "some", right=0.6, count=400),
    )
    taught = settings(
        **{**REWARDED, "model": None, "global_batch": "2560 tokens", "micro_batch": 80, "grpo": {"generations": 8, "max_new_tokens": 8, "batch_size": 80}},
        inputs={"shards": "corpus", "checkpoint": "begun"}, budget="40 steps", log={"every": "5 steps", "tensorboard": False}, lr={"peak": 1e-3, "schedule": "constant"},
    )
    records = CheckpointSet.open(train(tmp_path, taught, "taught", shards=make_questions(tmp_path / "right"), checkpoint=begun)).metrics()
    right = [record["grpo"]["correct"] for record in records]
    assert 0.5 < right[0] < 0.8
    assert np.mean(right[-2:]) > 0.95
    assert records[-1]["grpo"]["entropy"] < 0.5 * records[0]["grpo"]["entropy"]


def test_a_reference_holds_the_model(tmp_path, questions):
    """A run whose reference is its start: no divergence in the first step, some later, less with a weight on it."""
    start = train(tmp_path, settings(**{**REWARDED, "objective": "sft", "grpo": {}}, budget="2 steps"), "start", shards=questions)
    divergence = {}
    for weight in (1e-6, 20.0):
        config = settings(
            **{**REWARDED, "model": None, "grpo": {**REWARDED["grpo"], "kl_weight": weight}}, inputs={"shards": "c", "checkpoint": "start", "reference": "start"},
            budget="6 steps", lr={"peak": 2e-3, "schedule": "constant"},
        )
        records = CheckpointSet.open(train(tmp_path, config, f"with{weight:g}", shards=questions, checkpoint=start, reference=start)).metrics()
        assert records[0]["grpo"]["kl"] == pytest.approx(0, abs=1e-6)
        divergence[weight] = records[-1]["grpo"]["kl"]
    assert divergence[1e-6] > 2 * divergence[20.0] > 0


def test_questions_without_answers_are_refused(tmp_path, shards):
    with pytest.raises(DataError, match="an answer behind a mark"):
        train(tmp_path, settings(**{**REWARDED, "model": "nano", "sources": {"chat": 1.0}}), shards=shards)
    other = make_shards(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match="shares of sources the shards hold"):
        train(tmp_path, settings(**{**REWARDED, "model": "nano"}), shards=other)
