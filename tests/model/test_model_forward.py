"""The model against an independent one: transformers' Llama 4 text decoder, and documents run alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_r1.model.build import R1Model, build_model
from megatron_r1.model.config import ModelConfig
from megatron_r1.model.forward import distill_losses, distill_topk_losses, hidden, logits, position_logits, token_losses
from megatron_r1.model.hf_map import hf_config, to_hf
from megatron_r1.model.loss import cross_entropy, distill_kl, distill_topk_kl, masked_sum, next_token
from megatron_r1.parallel import context, ddp
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.utils.errors import DataError, ParallelError

CONFIG = ModelConfig(vocab_size=199, hidden_size=96, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=16, ffn_size=160, rope_theta=1e4, init_std=0.08)


@pytest.fixture(scope="module")
def ctx() -> context.ParallelContext:
    return context.initialize(LayoutConfig(), seed=0)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, ctx: context.ParallelContext) -> R1Model:
    (chunk,) = build_model(CONFIG.replace(tied_embeddings=request.param), ctx, seed=4)
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            if parameter.ndim == 1:  # gains of 1 would hide a missing one
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return chunk


def tokens(rows: int = 3, length: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def oracle(model: R1Model) -> torch.nn.Module:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = CONFIG.replace(tied_embeddings=model.share_embeddings_and_output_weights)
    theirs = Llama4ForCausalLM(Llama4TextConfig(**hf_config(config))).eval()
    state = to_hf(model.state_dict(), config)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing in ([], ["lm_head.weight"])
    theirs.tie_weights()
    return theirs


@torch.no_grad()
def test_logits_equal_llama4(model: R1Model, oracle: torch.nn.Module) -> None:
    x = tokens()
    ours, theirs = logits(model, x), oracle(input_ids=x).logits
    assert ours.shape == (3, 40, CONFIG.vocab_size)
    assert theirs.std() > 0.1, "the comparison must be of something"
    assert (ours - theirs).abs().max() < 1e-4


@torch.no_grad()
def test_documents_equal_llama4_on_each_document(model: R1Model, oracle: torch.nn.Module) -> None:
    x = tokens(2, 30, 1)
    lengths = [[11, 1, 18], [5, 25]]
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    ours = logits(model, x, ids)
    assert (ours - logits(model, x)).abs().max() > 1e-2, "the boundaries must matter"
    for row, parts in enumerate(lengths):
        start = 0
        for length in parts:
            alone = oracle(input_ids=x[row : row + 1, start : start + length]).logits[0]
            assert (ours[row, start : start + length] - alone).abs().max() < 1e-4
            start += length


def test_gradients_equal_llama4(model: R1Model, oracle: torch.nn.Module) -> None:
    x = tokens(2, 24, 2)
    model.zero_grad()
    oracle.zero_grad()
    token_losses(model, {"tokens": x[:, :-1], "labels": x[:, 1:]}).mean().backward()
    F.cross_entropy(oracle(input_ids=x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten()).backward()
    ours, theirs = model.embedding.word_embeddings.weight.grad, oracle.model.embed_tokens.weight.grad
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)
    ours, theirs = model.decoder.layers[0].mlp.linear_fc2.weight.grad, oracle.model.layers[0].feed_forward.down_proj.weight.grad
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)
    model.zero_grad()


@torch.no_grad()
def test_losses_are_those_of_the_logits(model: R1Model) -> None:
    x = tokens(2, 20, 3)
    batch = {"tokens": x[:, :-1], "labels": x[:, 1:]}
    z = logits(model, batch["tokens"])
    expected = F.cross_entropy(z.flatten(0, 1), batch["labels"].flatten(), reduction="none").view(2, 19)
    torch.testing.assert_close(token_losses(model, batch), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cross_entropy(z, batch["labels"]), expected, atol=1e-5, rtol=1e-5)
    mask = torch.zeros(2, 19)
    mask[1, 3:5] = 1
    assert next_token(expected, mask) == pytest.approx(float(expected[1, 3:5].mean()))
    assert [float(v) for v in masked_sum(expected, mask)] == pytest.approx([float(expected[1, 3:5].sum()), 2.0])
    assert next_token(expected, 0 * mask) == 0.0


@torch.no_grad()
def test_hidden_states_make_the_logits(model: R1Model) -> None:
    x = tokens(2, 9, 4)
    states = hidden(model, x)
    assert states.shape == (2, 9, CONFIG.hidden_size)
    torch.testing.assert_close(states @ model.head_weight().t(), logits(model, x), atol=1e-5, rtol=1e-5)


def test_distillation_equals_the_definition(model: R1Model, ctx: context.ParallelContext) -> None:
    (teacher,) = build_model(CONFIG.replace(num_layers=2), ctx, seed=8)
    x = tokens(2, 17, 5)
    batch = {"tokens": x[:, :-1], "labels": x[:, 1:], "loss_mask": torch.ones(2, 16), "segment_ids": torch.arange(16).expand(2, 16) // 7}
    z = logits(model, batch["tokens"], batch["segment_ids"])
    with torch.no_grad():
        t = logits(teacher, batch["tokens"], batch["segment_ids"])
    p = torch.softmax(t / 3, -1)
    soft = 9 * (p * (p.log() - torch.log_softmax(z / 3, -1))).sum(-1)
    expected = 0.2 * F.cross_entropy(z.transpose(1, 2), batch["labels"], reduction="none") + 0.8 * soft
    ours = distill_losses(model, position_logits([teacher], batch), batch, 3.0, 0.2)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(distill_kl(z, t, 3.0), soft, atol=1e-5, rtol=1e-4)
    weight = model.decoder.layers[1].self_attention.linear_qkv.weight
    a, b = (torch.autograd.grad(loss.mean(), weight, retain_graph=True)[0] for loss in (ours, expected))
    torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-3)

    logp, indices = torch.log_softmax(t, -1).topk(12, -1)
    stored = distill_topk_losses(model, indices, logp, batch)
    torch.testing.assert_close(stored, distill_topk_kl(z, indices, logp), atol=1e-5, rtol=1e-4)
    assert (stored <= distill_kl(z, t) + 1e-5).all()


def test_a_teacher_of_itself_teaches_nothing(model: R1Model) -> None:
    x = tokens(2, 11, 6)
    batch = {"tokens": x[:, :-1], "labels": x[:, 1:]}
    losses = distill_losses(model, position_logits(model, batch), batch)
    assert losses.abs().max() < 1e-5
    (grad,) = torch.autograd.grad(losses.sum(), model.embedding.word_embeddings.weight)
    assert grad.abs().max() < 1e-5


def test_vocabularies_must_match(model: R1Model, ctx: context.ParallelContext) -> None:
    teacher = build_model(CONFIG.replace(vocab_size=64), ctx, seed=8)
    x = tokens(1, 5) % 64
    with pytest.raises(DataError, match="same tokenizer"):
        distill_losses(model, position_logits(teacher, {"tokens": x}), {"tokens": x, "labels": x})
    with pytest.raises(DataError, match="same tokenizer"):
        distill_kl(torch.zeros(1, 5, 199), torch.zeros(1, 5, 64))


def test_wrapping_changes_nothing(model: R1Model, ctx: context.ParallelContext) -> None:
    x = tokens(2, 8)
    with torch.no_grad():
        plain = logits(model, x)
        wrapped = ddp.wrap(build_model(CONFIG, ctx, seed=4), ctx.layout, ctx)
        bare = build_model(CONFIG, ctx, seed=4)
        assert torch.equal(logits(wrapped, x), logits(bare, x))
    assert ddp.unwrap(wrapped[0]).vocab_size == CONFIG.vocab_size
    assert plain.shape == (2, 8, CONFIG.vocab_size)
    with pytest.raises(ParallelError, match="chunk"):
        logits([wrapped[0], wrapped[0]], x)


def test_bf16_follows_fp32(ctx: context.ParallelContext) -> None:
    x = tokens(2, 30)
    batch = {"tokens": x[:, :-1], "labels": x[:, 1:]}
    exact, half = (build_model(CONFIG, ctx, seed=4, precision=precision) for precision in ("fp32", "bf16"))
    assert next(half[0].parameters()).dtype == torch.bfloat16
    with torch.no_grad():
        a, b = token_losses(exact, batch), token_losses(ddp.wrap(half, ctx.layout, ctx), batch)
    assert b.dtype == torch.float32
    assert (a - b).abs().max() < 0.1
    assert abs(float(a.mean() - b.mean())) < 0.01


def test_recomputing_activations_changes_nothing(ctx: context.ParallelContext) -> None:
    x = tokens(2, 12)
    batch = {"tokens": x[:, :-1], "labels": x[:, 1:], "segment_ids": torch.arange(11).expand(2, 11) // 4}
    grads = []
    for recompute in (False, True):
        (chunk,) = build_model(CONFIG, ctx, seed=4, recompute=recompute)
        token_losses(chunk, batch).mean().backward()
        grads.append([p.grad for p in chunk.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_initial_loss_is_that_of_a_uniform_guess(ctx: context.ParallelContext) -> None:
    config = CONFIG.replace(init_std=0.02, tied_embeddings=False)
    x = tokens(4, 33)
    with torch.no_grad():
        loss = token_losses(build_model(config, ctx, seed=1), {"tokens": x[:, :-1], "labels": x[:, 1:]}).mean()
    assert float(loss) == pytest.approx(math.log(config.vocab_size), abs=0.05)
