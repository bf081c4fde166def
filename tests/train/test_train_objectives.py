"""Losses and gradients of every objective against plain torch on whole logits, through the schedule and its DDP buffers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from train_toys import settings

from megatron_r1.model.build import build_model
from megatron_r1.model.config import ModelConfig
from megatron_r1.model.forward import logits
from megatron_r1.model.hf_map import hf_config, to_hf
from megatron_r1.model.pretrained import HeadApart
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import initialize
from megatron_r1.parallel.ddp import unwrap, wrap
from megatron_r1.parallel.optimizer import build_optimizer
from megatron_r1.parallel.schedule import forward_backward
from megatron_r1.train.config import DistillConfig
from megatron_r1.train.objectives import Distill, Objective
from megatron_r1.train.teacher import HuggingFaceTeacher, TrainedTeacher
from megatron_r1.train.topk_cache import TopKCache

transformers = pytest.importorskip("transformers")
V, S, B = 512, 24, 2
MODEL = ModelConfig.model_validate("nano")


def micro_batches(masks=(0.9, 0.2), seed=3):
    """Two micro-batches of packed documents with very different numbers of targets."""
    rng = np.random.default_rng(seed)
    batches = []
    for number, share in enumerate(masks):
        tokens = rng.integers(0, V, (B, S + 1))
        segments = np.cumsum(rng.random((B, S)) < 0.15, axis=1).astype(np.int32)
        batches.append({
            "tokens": tokens[:, :-1].copy(), "labels": tokens[:, 1:].copy(), "loss_mask": (rng.random((B, S)) < share).astype(np.float32),
            "segment_ids": segments, "position_ids": np.tile(np.arange(S), (B, 1)), "source_ids": np.asarray([0, 1], np.int32),
            "first_sample": np.asarray(number * B),
        })
    return batches


@pytest.fixture
def ctx():
    return initialize(LayoutConfig(), 0)


def live_teacher(kind, chunks):
    """A teacher without an artifact: our model, or the same weights in transformers' own."""
    if kind == "trained":
        teacher = TrainedTeacher.__new__(TrainedTeacher)
        teacher.chunks = chunks
    else:
        theirs = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**hf_config(MODEL))).eval()
        theirs.load_state_dict(to_hf(chunks[0].state_dict(), MODEL), strict=False)
        theirs.tie_weights()
        teacher = HuggingFaceTeacher.__new__(HuggingFaceTeacher)
        teacher.model = HeadApart(theirs)
    teacher.vocab_size = V
    return teacher


def through_the_schedule(ctx, objective, batches):
    """(loss, gradients by name, per-source sums) as the loop gets them."""
    chunks = wrap(build_model(MODEL, ctx, seed=1), LayoutConfig(), ctx)
    build_optimizer(chunks, lr=1e-3, layout=LayoutConfig())
    reports = forward_backward(ctx, chunks, objective.forward_step, iter(batches), len(batches), S, B)
    loss = sum(float(r["loss_sum"]) for r in reports) / sum(int(r["num_tokens"]) for r in reports)
    gradients = {name: parameter.main_grad.clone() for name, parameter in unwrap(chunks[0]).named_parameters()}
    return loss, gradients, [sum(r[key] for r in reports) for key in ("source_loss", "source_tokens")]


def by_hand(ctx, batches, per_token):
    """The same from whole logits: sum over all targets of all micro-batches / their number."""
    chunks = build_model(MODEL, ctx, seed=1)
    total, count = 0.0, 0.0
    sources = torch.zeros(2, 2, dtype=torch.float64)
    for batch in batches:
        tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
        scores = logits(chunks, tensors["tokens"], tensors["segment_ids"])
        losses = per_token(scores, tensors) * tensors["loss_mask"]
        total, count = total + losses.sum(), count + tensors["loss_mask"].sum()
        sources[0] += losses.detach().sum(1).double()
        sources[1] += tensors["loss_mask"].sum(1).double()
    loss = total / count
    loss.backward()
    return float(loss.detach()), {name: parameter.grad for name, parameter in chunks[0].named_parameters()}, sources


def cross_entropy(scores, batch):
    return F.cross_entropy(scores.flatten(0, 1), batch["labels"].flatten(), reduction="none").view(B, S)


def equal(found, wanted, rel=2e-5):
    assert found[0] == pytest.approx(wanted[0], abs=1e-5)
    assert found[1].keys() == wanted[1].keys()
    scale = max(float(gradient.abs().max()) for gradient in wanted[1].values())
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).abs().max() < rel * scale, name
    for mine, theirs in zip(found[2], wanted[2]):
        assert mine.tolist() == pytest.approx(theirs.tolist(), rel=1e-5)


def test_next_token_over_exact_token_counts(ctx):
    batches = micro_batches()
    found = through_the_schedule(ctx, Objective(2, ctx.device), batches)
    equal(found, by_hand(ctx, batches, cross_entropy))
    # Averaging per micro-batch first would be another number: the test can fail.
    alone = [through_the_schedule(ctx, Objective(2, ctx.device), [batch])[0] for batch in batches]
    assert abs(sum(alone) / 2 - found[0]) > 1e-4


@pytest.mark.parametrize("kind", ["trained", "outside", "cache"])
@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (2.0, 0.7)])
def test_distillation(ctx, kind, temperature, weight, tmp_path):
    batches, teacher = micro_batches(), build_model(MODEL.replace(init_std=0.2), ctx, seed=9)
    config = DistillConfig(temperature=temperature, kd_weight=weight)

    def teacher_logits(batch):
        with torch.no_grad():
            return logits(teacher, batch["tokens"], batch["segment_ids"])

    def per_token(scores, batch):
        """Dense, in float64."""
        target = torch.log_softmax(teacher_logits(batch).double() / temperature, -1)
        student = torch.log_softmax(scores.double() / temperature, -1)
        kl = F.kl_div(student, target, reduction="none", log_target=True).sum(-1) * temperature**2
        return weight * kl + (1 - weight) * cross_entropy(scores.double(), batch)

    if kind == "cache":
        cache = TopKCache(tmp_path, {}, samples=2 * B, seq_length=S, top_k=V, chunk=B)
        cache.prepare()
        for number, batch in enumerate(batches):
            tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
            cache.write(number, *torch.log_softmax(teacher_logits(tensors) / temperature, -1).sort(-1, descending=True))
        objective = Distill(2, ctx.device, config, cache=cache)
    else:
        objective = Distill(2, ctx.device, config, teacher=live_teacher(kind, teacher))
    equal(through_the_schedule(ctx, objective, batches), by_hand(ctx, batches, per_token))


def embedding_gradient(ctx, batch):
    """Gradient of the loss with respect to the embedded inputs, [b, s, d]."""
    chunks = build_model(MODEL, ctx, seed=1)
    kept = []
    chunks[0].embedding.register_forward_hook(lambda module, arguments, output: kept.append(output.requires_grad_()) or output.retain_grad())
    output, loss = Objective(2, ctx.device).forward_step(iter([batch]), chunks[0])
    loss(output)[0].backward()
    return kept[0].grad.transpose(0, 1)


def test_masked_loss_sends_no_gradient_into_other_documents(ctx):
    batch = micro_batches()[0]
    batch["segment_ids"] = np.repeat([[0, 1, 2]], 8, axis=1).reshape(1, 24).repeat(B, 0).astype(np.int32)
    batch["loss_mask"] = ((batch["segment_ids"] == 1) & (np.arange(S) % 2 == 0)).astype(np.float32)
    gradient = embedding_gradient(ctx, batch).abs().sum(-1)
    assert torch.equal(gradient[:, :8], torch.zeros(B, 8))
    assert torch.equal(gradient[:, 16:], torch.zeros(B, 8))
    assert (gradient[:, 8:15] > 0).all()
    batch["segment_ids"] = np.zeros((B, S), np.int32)
    assert (embedding_gradient(ctx, batch).abs().sum(-1)[:, :8] > 0).all()


def test_settings_of_the_objective_are_the_published_ones_by_default():
    config = settings(objective="distill", inputs={"shards": "a", "teacher": "t"})
    assert (config.distill.temperature, config.distill.kd_weight, config.distill.cache_top_k) == (1.0, 1.0, None)
