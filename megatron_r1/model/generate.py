"""Batched generation with a key/value cache, greedy or by temperature.

Why not megatron-core's static inference context: our attention is one operation from packed qkv to output and keeps no keys,
and that context has one length for the whole batch, so prompts of different lengths would have to be padded on the left or
generated group by group. Here each row has its own length: prompts are padded on the right, row i writes its next key at its
own position and sees exactly the positions up to it, so padding can not reach a result.

The arithmetic is that of `model/spec.py` on the same tensors (no copy except the packed qkv matrix), for a model that is
whole on this rank. Every call first compares its logits with the model's own forward pass on a prompt and refuses to go
on when they differ, so the two can not drift apart unnoticed.

Legend: b rows, n new positions, S cached positions, L layers, q query heads, g key/value heads, h head size, d hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_r1.model.config import ModelConfig
from megatron_r1.model.hf_map import canonical, split_qkv, table
from megatron_r1.utils.errors import CheckpointError, DataError, ParallelError
from megatron_r1.utils.seeding import generator

# Rows are dropped from the batch once this share of them has finished: copying the cache costs about one decoding step.
_COMPACT_BELOW = 0.7
_PROBE_TOKENS = 16
_ROWS = 128  # positions whose probabilities are looked at together


@dataclass(frozen=True)
class _Layer:
    norm1: Tensor
    qkv: Tensor  # [(q + 2g)*h, d] as [all q, all k, all v]
    out: Tensor  # [d, q*h]
    norm2: Tensor
    gate_up: Tensor  # [2f, d]
    down: Tensor  # [d, f]


class Cache:
    """Keys (rotated, normalised) and values: two tensors [L, b, g, capacity, h]."""

    def __init__(self, config: ModelConfig, rows: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_layers, rows, config.num_kv_heads, capacity, config.head_dim)
        # Zeros, not empty: a masked position has weight 0, and 0 x (whatever memory held) could be NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


class Decoder:
    """The decoder of `model/spec.py` over a megatron-core state dict, one position (or one prompt) at a time."""

    def __init__(self, state: Mapping[str, Any], config: ModelConfig) -> None:
        state = canonical(state)
        missing = [entry.mcore for entry in table(config) if entry.mcore not in state]
        if missing:
            raise CheckpointError(
                expected="all tensors of the model on this rank", found=f"{len(missing)} missing, such as {missing[0]}",
                fix="generate from a model that is neither tensor- nor pipeline-parallel (load it with the default layout)",
            )
        for entry in table(config):
            if tuple(state[entry.mcore].shape) != entry.shape(config):
                raise CheckpointError(
                    expected=f"{entry.mcore} of shape {entry.shape(config)}", found=f"{tuple(state[entry.mcore].shape)}",
                    fix="check that the model configuration belongs to this checkpoint, and that it is not tensor-parallel",
                )
        self.config = config
        self.embedding = state["embedding.word_embeddings.weight"].detach()
        self.head = self.embedding if config.tied_embeddings else state["output_layer.weight"].detach()
        self.final_norm = state["decoder.final_layernorm.weight"].detach()
        self.layers = []
        for index in range(config.num_layers):
            prefix = f"decoder.layers.{index}."
            self.layers.append(
                _Layer(
                    norm1=state[prefix + "input_layernorm.weight"].detach(),
                    qkv=torch.cat(split_qkv(state[prefix + "self_attention.linear_qkv.weight"].detach(), config)),
                    out=state[prefix + "self_attention.linear_proj.weight"].detach(),
                    norm2=state[prefix + "pre_mlp_layernorm.weight"].detach(),
                    gate_up=state[prefix + "mlp.linear_fc1.weight"].detach(),
                    down=state[prefix + "mlp.linear_fc2.weight"].detach(),
                )
            )
        # In fp32 and in this order, as megatron-core and transformers do: angles are multiplied by positions, so a last bit counts.
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self.inverse_frequencies = (1.0 / (config.rope_theta**exponents)).to(self.embedding.device)  # [h/2]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    def cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache for `rows` sequences of at most `capacity` tokens."""
        return Cache(self.config, rows, capacity, self.embedding.dtype, self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] of the last layer -> fp32 logits [..., V]."""
        return F.linear(self._norm(hidden, self.final_norm), self.head).float()

    def prefill(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Prompts [b, n], padded on the right, from position 0 -> hidden states [b, n, d]; fills the cache.

        Rows see only their past, so padding changes nothing before it; what it writes into the cache lies beyond the row's
        length and is overwritten before it is ever seen.
        """
        positions = torch.arange(tokens.shape[1], device=self.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.keys[layer, :, :, : k.shape[2]], cache.values[layer, :, :, : v.shape[2]] = k, v
            repeats = self.config.num_heads // self.config.num_kv_heads
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return self._run(tokens, positions.expand_as(tokens), attend)

    def step(self, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """One more token per row: tokens [b] at positions [b] -> hidden states [b, d]."""
        rows = torch.arange(tokens.shape[0], device=self.device)
        longest = int(positions.max()) + 1
        visible = (torch.arange(longest, device=self.device) <= positions[:, None])[:, None, None]  # [b, 1, 1, S]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.keys[layer, rows, :, positions], cache.values[layer, rows, :, positions] = k[:, :, 0], v[:, :, 0]
            # The query heads of a group play the part of query positions, so keys and values need no copy per head.
            grouped = q.reshape(q.shape[0], self.config.num_kv_heads, -1, self.config.head_dim)
            keys, values = cache.keys[layer, :, :, :longest], cache.values[layer, :, :, :longest]
            return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible).reshape(q.shape)

        return self._run(tokens[:, None], positions[:, None], attend)[:, 0]

    def _run(self, tokens: Tensor, positions: Tensor, attend: Any) -> Tensor:
        c = self.config
        b, n = tokens.shape
        angles = positions[..., None].float() * self.inverse_frequencies  # [b, n, h/2]
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        x = F.embedding(tokens, self.embedding)
        for index, layer in enumerate(self.layers):
            qkv = F.linear(self._norm(x, layer.norm1), layer.qkv).view(b, n, -1, c.head_dim).transpose(1, 2)  # [b, q + 2g, n, h]
            q, k, v = qkv.split([c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
            attended = attend(index, self._rotate(self._norm(q), cos, sin), self._rotate(self._norm(k), cos, sin), v)
            x = x + F.linear(attended.transpose(1, 2).reshape(b, n, -1), layer.out)
            gate, up = F.linear(self._norm(x, layer.norm2), layer.gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        return x

    def _norm(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], None, self.config.rms_eps).to(x.dtype) * (1 if gain is None else gain)

    @staticmethod
    def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """RoPE on adjacent pairs (arXiv 2104.09864, equation 34): x [b, heads, n, h], cos and sin [b, 1, n, h/2]."""
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def config_of(model: nn.Module) -> ModelConfig:
    """The shape of a megatron-core GPTModel.

    Raises ParallelError when the model is split over ranks.
    """
    c = model.config
    if c.tensor_model_parallel_size > 1 or c.pipeline_model_parallel_size > 1:
        raise ParallelError(
            expected="a model that is whole on this rank",
            found=f"tensor={c.tensor_model_parallel_size}, pipeline={c.pipeline_model_parallel_size}",
            fix="load the checkpoint with the default layout (checkpoints load under any layout), then generate",
        )
    return ModelConfig(
        vocab_size=model.vocab_size, hidden_size=c.hidden_size, num_layers=c.num_layers, num_heads=c.num_attention_heads,
        num_kv_heads=c.num_query_groups, head_dim=c.kv_channels, ffn_size=c.ffn_hidden_size, rms_eps=c.layernorm_epsilon,
        rope_theta=float(model.rotary_base), max_positions=model.max_sequence_length, tied_embeddings=model.share_embeddings_and_output_weights,
    )


def whole(model: Any) -> nn.Module:
    """The one chunk of a model given as a chunk or a list of chunks."""
    if isinstance(model, Sequence):
        if len(model) != 1:
            raise ParallelError(
                expected="one model chunk", found=f"{len(model)} (virtual pipeline)", fix="load the checkpoint with the default layout, then generate"
            )
        model = model[0]
    return model


@torch.no_grad()
def decoder_of(model: Any) -> Decoder:
    """A Decoder over the weights of a GPTModel (or a list with one), checked against the model's own forward pass.

    Raises CheckpointError when the logits differ by more than rounding, ParallelError when the model is split.
    """
    from megatron_r1.model.forward import logits as model_logits

    model = whole(model)
    config = config_of(model)
    probe = torch.arange(_PROBE_TOKENS, device=next(model.parameters()).device)[None] * 7919 % config.vocab_size
    # First: under overlapped parameter gathering it is the model's own pass that waits for the weights of the last update.
    expected = model_logits(model, probe).float()
    decoder = Decoder(model.state_dict(), config)
    found = decoder.logits(decoder.prefill(probe, decoder.cache(1, _PROBE_TOKENS)))
    scale = max(float(expected.abs().max()), 1.0)
    tolerance = scale * (1e-3 if decoder.embedding.dtype == torch.float32 else 5e-2)
    if not float((found - expected).abs().max()) <= tolerance:
        raise CheckpointError(
            expected=f"generation to reproduce the model's own logits within {tolerance:.2g}",
            found=f"a difference of {float((found - expected).abs().max()):.3g}",
            fix="the layer specification (model/spec.py) and model/generate.py describe different models; report this",
        )
    return decoder


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Sequence[int] = (), greedy: bool = True, *,
    temperature: float = 1.0, seed: int = 0, numbers: Sequence[int] | None = None, keep_stop: bool = False, batch_size: int = 64,
) -> list[list[int]]:
    """Continue every prompt; the result for a prompt does not depend on the other prompts (up to rounding of matrix products).

    `model`: a GPTModel, a list with one, or a `Decoder`. Returns the new tokens of each prompt in order, up to (not
    including, without `keep_stop`) the first of `stop_ids`; a list of length `max_new_tokens` without one was cut. With `greedy=False` a token is drawn from
    softmax(logits / temperature) by the inverse of its distribution, with uniform numbers that depend only on `seed` and
    the prompt's number: its place in the list unless `numbers` say otherwise. Raises DataError on an empty prompt or a token outside the vocabulary.
    """
    decoder = model if isinstance(model, Decoder) else decoder_of(model)
    _check(prompts, decoder.config.vocab_size)
    if not greedy and temperature <= 0:
        raise DataError(expected="temperature > 0 when sampling", found=f"{temperature}", fix="use greedy=True for the limit of temperature 0")
    results: list[list[int]] = [[] for _ in prompts]
    if max_new_tokens < 1:
        return results
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    stops = torch.tensor(sorted(set(stop_ids)), dtype=torch.long, device=decoder.device)
    for start in range(0, len(by_length), batch_size):
        indices = by_length[start : start + batch_size]
        uniforms = None
        if not greedy:
            draws = [generator(seed, "generate", index if numbers is None else int(numbers[index])).random(max_new_tokens) for index in indices]
            uniforms = torch.from_numpy(np.stack(draws)).to(decoder.device)
        batch = _generate_batch(decoder, [prompts[index] for index in indices], max_new_tokens, stops, uniforms, temperature, keep_stop)
        for index, tokens in zip(indices, batch, strict=True):
            results[index] = tokens
    return results


def _generate_batch(
    decoder: Decoder, prompts: list[Sequence[int]], max_new_tokens: int, stops: Tensor, uniforms: Tensor | None, temperature: float, keep_stop: bool
) -> list[list[int]]:
    """`generate` for prompts that fit one batch; uniforms [b, max_new_tokens] or None for greedy."""
    device = decoder.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.long)
    cache = decoder.cache(len(prompts), longest + max_new_tokens)
    rows = torch.arange(len(prompts), device=device)
    hidden = decoder.prefill(tokens, cache)[rows, lengths - 1]  # [b, d]
    written = torch.full((len(prompts), max_new_tokens), -1, dtype=torch.long, device=device)
    counts = torch.zeros(len(prompts), dtype=torch.long, device=device)
    alive, active, positions = rows, torch.ones_like(rows, dtype=torch.bool), lengths  # `alive`: rows still in the cache
    for new in range(max_new_tokens):
        chosen = _choose(decoder.logits(hidden), None if uniforms is None else uniforms[alive, new], temperature)
        active = active & ~torch.isin(chosen, stops)
        written[alive, new] = chosen
        counts[alive[active]] = new + 1
        remaining = int(active.sum())
        if remaining == 0 or new + 1 == max_new_tokens:
            break
        if remaining < _COMPACT_BELOW * len(alive):
            cache.keep(active)
            alive, chosen, positions, active = alive[active], chosen[active], positions[active], active[active]
        hidden = decoder.step(chosen, positions, cache)
        positions = positions + 1
    return [row[: count + keep_stop] for row, count in zip(written.tolist(), counts.tolist(), strict=True)]


@torch.no_grad()
def drawn_labels(model: Any, tokens: Tensor, uniforms: Tensor) -> Tensor:
    """A token from the model's own distribution after every position of given text: int64 [b, s].

    tokens [b, s]; uniforms fp64 [b, s] in [0, 1): equal ones give equal tokens. The probabilities of all positions are never held at
    once. The model must be whole on this rank (ParallelError).
    """

    def head(bare: Any, states: Tensor) -> Tensor:
        def choose(weight: Tensor) -> Tensor:
            pieces = zip(states.flatten(0, 1).split(_ROWS), uniforms.t().flatten().to(states.device).split(_ROWS))
            return torch.cat([_choose(some @ weight.t(), places, 1.0) for some, places in pieces])

        return bare.with_head_weight(choose).view(states.shape[:2]).t()

    bare = whole(model)
    config_of(bare)  # refuses a model that is split
    return bare(tokens, None, head)


def _choose(logits: Tensor, uniforms: Tensor | None, temperature: float) -> Tensor:
    """[b, V] -> [b]: the first of the largest logits, or the inverse of the distribution function at `uniforms`."""
    if uniforms is None:
        return logits.argmax(dim=-1)
    cumulative = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return drawn.clamp(max=logits.shape[-1] - 1)


def _check(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(expected="at least one token in every prompt", found=f"prompt {index} is empty", fix="begin it with the end-of-text token")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise DataError(
                expected=f"tokens from 0 to {vocab_size - 1}", found=f"token {max(max(prompt), -min(prompt))} in prompt {index}",
                fix="use the tokenizer the model was trained with",
            )


