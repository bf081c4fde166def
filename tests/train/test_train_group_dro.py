"""Group DRO (DoReMi's proxy training): the update against a hand-written loop, loss and gradient against plain torch, resumption."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_train_objectives import MODEL, B, equal, live_teacher, micro_batches, through_the_schedule
from test_train_resume import Interrupt
from train_toys import final_bytes, make_mixture, make_shards, resumable, settings, timeless, train

from megatron_r1.artifacts.base import open_workspace
from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.data.bpe import train_bpe
from megatron_r1.data.shards import SOURCES_FILE, ShardWriter, SourceRecord
from megatron_r1.mixture.config import MixtureConfig
from megatron_r1.mixture.run import run as run_mixture
from megatron_r1.model.build import build_model
from megatron_r1.model.forward import logits
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import initialize
from megatron_r1.train import loop
from megatron_r1.train.config import GroupDroConfig
from megatron_r1.train.group_dro import GroupDRO
from megatron_r1.train.objectives import Objective
from megatron_r1.utils.errors import DataError
from megatron_r1.utils.io import atomic_write_json

DRO = {"objective": "group_dro", "inputs": {"shards": "corpus", "reference": "reference"}}


@pytest.fixture
def ctx():
    return initialize(LayoutConfig(), 0)


@pytest.fixture(scope="module")
def reference(shards, tmp_path_factory):
    return train(tmp_path_factory.mktemp("reference"), settings(sources="uniform", budget="12 steps"), "reference", shards=shards)


def test_the_update_is_algorithm_1():
    """Written out with plain numbers, a source missing from a batch included."""
    eta, c, names = 0.7, 0.01, ["x", "y", "z"]
    objective = GroupDRO(dict.fromkeys(names, 1 / 3), torch.device("cpu"), GroupDroConfig(step_size=eta, smoothing=c), None, "ref")
    alpha, last, mean = {name: 1 / 3 for name in names}, dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    rng = np.random.default_rng(0)
    for step in range(6):
        tokens, excess = rng.integers(5, 50, 3).astype(float), rng.random(3) * 40
        if step == 3:
            tokens[1] = excess[1] = 0.0
        objective.update({"source_tokens": tokens.tolist(), "source_excess": excess.tolist(), "source_loss": [0.0] * 3})
        for name, n, e in zip(names, tokens, excess):
            last[name] = e / n if n else last[name]
        raised = {name: alpha[name] * math.exp(eta * last[name]) for name in names}
        alpha = {name: (1 - c) * value / sum(raised.values()) + c / 3 for name, value in raised.items()}
        mean = {name: mean[name] + alpha[name] / 6 for name in names}
    found = objective.result()
    assert found.last == pytest.approx(alpha)
    assert found.weights == pytest.approx(mean)
    assert found.excess == pytest.approx(last)
    assert (found.updates, found.reference) == (6, "ref")
    assert min(alpha.values()) >= c / 3


def test_loss_gradient_and_excess_against_plain_torch(ctx):
    """Rows of source 0 count alpha_0 / p_0; the divisor is the plain number of targets; excess is clipped token by token."""
    batches = micro_batches()
    other = build_model(MODEL.replace(init_std=0.2), ctx, seed=9)
    objective = GroupDRO({"x": 0.25, "y": 0.75}, ctx.device, GroupDroConfig(), live_teacher("trained", other), "ref")
    objective.weights = np.array([0.8, 0.2])
    found = through_the_schedule(ctx, objective, batches)

    def token_losses(model, batch):
        scores = logits(model, batch["tokens"], batch["segment_ids"])
        return F.cross_entropy(scores.flatten(0, 1), batch["labels"].flatten(), reduction="none").view(B, -1)

    chunks = build_model(MODEL, ctx, seed=1)
    ratio, total, count = torch.tensor([[0.8 / 0.25], [0.2 / 0.75]]), 0.0, 0.0
    plain, excess = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for arrays in batches:
        batch = {key: torch.from_numpy(value) for key, value in arrays.items()}
        mine, mask = token_losses(chunks, batch), batch["loss_mask"]
        total, count = total + (mine * mask * ratio).sum(), count + mask.sum()
        with torch.no_grad():
            excess += ((mine.double() - token_losses(other, batch).double()).clamp(min=0) * mask).sum(1)
        plain += torch.stack([(mine.detach() * mask).sum(1).double(), mask.sum(1).double()])
    loss = total / count
    loss.backward()
    equal(found, (float(loss.detach()), {name: p.grad for name, p in chunks[0].named_parameters()}, plain))
    reports = [objective.by_source(token_losses(chunks, b).detach(), b)["source_excess"] for b in ({k: torch.from_numpy(v) for k, v in a.items()} for a in batches)]
    assert sum(reports).tolist() == pytest.approx(excess.tolist(), rel=1e-4)
    assert (excess > 0).all()


def test_weights_that_are_the_shares_are_next_token_training(ctx):
    """alpha = p: every token counts once, so loss and gradient are those of the plain objective."""
    batches = micro_batches()
    dro = GroupDRO({"x": 0.5, "y": 0.5}, ctx.device, GroupDroConfig(), live_teacher("trained", build_model(MODEL, ctx, seed=9)), "ref")
    equal(through_the_schedule(ctx, dro, batches), through_the_schedule(ctx, Objective(2, ctx.device), batches), rel=1e-7)


def test_a_resumed_run_ends_in_the_same_bytes_and_weights(tmp_path, shards, reference, monkeypatch):
    config = resumable(**DRO)
    straight = train(tmp_path / "straight", config, shards=shards, reference=reference)
    update = loop.Trainer._update

    def failing(self, *arguments):
        if self.step + 1 == 6:
            raise Interrupt
        return update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_update", failing)
        with pytest.raises(Interrupt):
            train(tmp_path / "resumed", config, shards=shards, reference=reference)
    resumed = train(tmp_path / "resumed", config, shards=shards, reference=reference)
    assert final_bytes(resumed) == final_bytes(straight)
    a, b = CheckpointSet.open(resumed), CheckpointSet.open(straight)
    assert a.manifest == b.manifest
    assert timeless(a.metrics()) == timeless(b.metrics())
    assert a.manifest.group_dro.updates == 7
    assert sum(a.manifest.group_dro.weights.values()) == pytest.approx(1)
    logged = [record["group_dro"] for record in a.metrics() if "group_dro" in record]
    assert logged[-1]["mean_weights"] == a.manifest.group_dro.weights
    tags = {path for record in logged for path in record}
    assert tags == {"weights", "mean_weights", "excess"}


def test_it_prefers_what_can_be_learnt_over_noise(tmp_path):
    """chain: a Markov chain that a reference trained longer predicts better than the proxy all along; noise: uniformly random
    tokens, on which no model gets ahead of another. So the weight moves to the chain (the paper's section 2). The step size
    is below the paper's 1: with excesses of whole nats one source would have everything after a step or two."""
    made = make_noisy(tmp_path)
    plain = {"seed": 3, "seq_length": "32 tokens", "global_batch": "512 tokens", "micro_batch": 16, "sources": "uniform", "lr": {"peak": 5e-3, "warmup": "5 steps"}}
    reference = train(tmp_path, settings(**plain, budget="120 steps"), "reference", shards=made)
    proxy = train(tmp_path, settings(**{**plain, **DRO}, budget="40 steps", group_dro={"step_size": 0.2}), "proxy", shards=made, reference=reference)
    found = CheckpointSet.open(proxy).manifest.group_dro
    assert found.last["chain"] > found.weights["chain"] > 0.6
    assert found.excess["chain"] > found.excess["noise"]
    config = MixtureConfig.model_validate({"method": "doremi", "inputs": {"shards": "corpus", "proxies": ["proxy"]}, "seed": 1})
    inputs = {"shards": made, "proxies": [proxy]}
    mixed = run_mixture(config, inputs, open_workspace(tmp_path, "mix", "mixture", config, inputs))
    assert mixed.manifest.summary["weights"] == pytest.approx(found.weights)


def make_noisy(folder):
    """Shards of `chain` (each of 96 tokens has three successors) and `noise` (uniform tokens)."""
    rng, work = np.random.default_rng(0), open_workspace(folder, "corpus", "shards", {"kind": "noisy"})
    tokenizer = train_bpe(["a few words to train on"], 512, work.path / "tokenizer")
    successors = rng.integers(0, 96, (96, 3))
    sources = {}
    for name in ("chain", "noise"):
        (work.path / "sources" / name).mkdir(parents=True)
        writer = ShardWriter(work.path / "sources" / name / "train", tokenizer.vocab_size)
        for index in range(400):
            tokens = rng.integers(0, 96 if name == "chain" else 512, 90)
            for i in range(1, 90) if name == "chain" else ():
                tokens[i] = successors[tokens[i - 1], rng.integers(3)]
            writer.add(tokens, 4 * len(tokens), f"{name}-{index}")
        sources[name] = SourceRecord(name=name, domain="web", splits={"train": writer.close()}).plain()
    atomic_write_json(work.path / SOURCES_FILE, {"sources": sources, "tokenizer": {"sha256": tokenizer.sha256}})
    return work.complete({})


def test_what_does_not_fit_is_refused(tmp_path, shards, reference):
    with pytest.raises(ValueError, match=r"expected inputs.reference with objective group_dro"):
        settings(objective="group_dro")
    with pytest.raises(ValueError, match="only then; found objective next_token with it"):
        settings(inputs=DRO["inputs"])
    other = make_shards(tmp_path / "other", seed=1, vocab_size=480)
    with pytest.raises(DataError, match=r"a reference model trained on the shards' tokenizer[\s\S]*train the reference model on these shards"):
        train(tmp_path, settings(**DRO), "other", shards=other, reference=reference)
    wide = settings(**DRO, model={"preset": "nano", "vocab_size": 1024})
    with pytest.raises(DataError, match="a reference model with the student's 1024 vocabulary entries"):
        train(tmp_path, wide, "wide", shards=shards, reference=reference)


def test_sources_come_from_a_mixture_too(tmp_path, shards, reference):
    """Sampling shares other than equal ones: the weights still start equal, and tokens are reweighted."""
    config = settings(**{**DRO, "inputs": {**DRO["inputs"], "mixture": "mix"}}, sources=None, budget="2 steps")
    artifact = train(tmp_path, config, shards=shards, reference=reference, mixture=make_mixture(tmp_path, {"alpha": 0.75, "beta": 0.25}))
    found = CheckpointSet.open(artifact).manifest.group_dro
    assert set(found.weights) == {"alpha", "beta"}
    assert found.updates == 2
