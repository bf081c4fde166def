"""megatron-core GPT names and shapes <-> Hugging Face `llama4_text`, both directions from one table.

Shapes (d hidden, f feed-forward, h head size, q query heads, g key/value heads, V vocabulary):

| megatron-core (one rank)                             | Hugging Face                                      |
|------------------------------------------------------|---------------------------------------------------|
| embedding.word_embeddings.weight [V, d]              | model.embed_tokens.weight                         |
| decoder.layers.N.input_layernorm.weight [d]          | model.layers.N.input_layernorm.weight             |
| decoder.layers.N.self_attention.linear_qkv.weight    | model.layers.N.self_attn.{q,k,v}_proj.weight      |
| decoder.layers.N.self_attention.linear_proj.weight   | model.layers.N.self_attn.o_proj.weight [d, q*h]   |
| decoder.layers.N.pre_mlp_layernorm.weight [d]        | model.layers.N.post_attention_layernorm.weight    |
| decoder.layers.N.mlp.linear_fc1.weight [2f, d]       | model.layers.N.feed_forward.{gate,up}_proj.weight |
| decoder.layers.N.mlp.linear_fc2.weight [d, f]        | model.layers.N.feed_forward.down_proj.weight      |
| decoder.final_layernorm.weight [d]                   | model.norm.weight                                 |
| output_layer.weight [V, d] (untied only)             | lm_head.weight                                    |

linear_qkv [(q + 2g)*h, d] is stored per key/value group as [q/g query heads, key, value]; linear_fc1 is [gate; up].
Both sides rotate adjacent pairs (RoPE as complex multiplication) and both normalise queries and keys without a gain, so
no row is permuted and nothing is rescaled: every value is copied, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_r1.model.config import ModelConfig
from megatron_r1.utils.errors import CheckpointError

ARCHITECTURE = "Llama4ForCausalLM"
MODEL_TYPE = "llama4_text"
_IGNORED_SUFFIXES = ("_extra_state",)
# State-dict names under Transformer Engine layers, whose linear layers own the norm before them. Same tensors.
_SYNONYMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class Entry:
    """One row of the table: one megatron-core tensor is one or several Hugging Face tensors."""

    mcore: str
    hf: tuple[str, ...]
    split: Callable[[Tensor, ModelConfig], tuple[Tensor, ...]]
    join: Callable[[tuple[Tensor, ...], ModelConfig], Tensor]
    shape: Callable[[ModelConfig], tuple[int, ...]]


def _copy_out(tensor: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
    return (tensor,)


def _copy_in(tensors: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
    return tensors[0]


def split_qkv(weight: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """[(q + 2g)*h, d] grouped as [q..q k v] -> q [q*h, d], k [g*h, d], v [g*h, d]."""
    per_group = config.num_heads // config.num_kv_heads
    grouped = weight.reshape(config.num_kv_heads, per_group + 2, config.head_dim, weight.shape[-1])
    q, k, v = grouped[:, :per_group], grouped[:, per_group], grouped[:, per_group + 1]
    return q.reshape(config.query_size, -1), k.reshape(config.kv_size, -1), v.reshape(config.kv_size, -1)


def join_qkv(parts: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
    """The inverse of `split_qkv`."""
    q, k, v = (part.reshape(config.num_kv_heads, -1, config.head_dim, part.shape[-1]) for part in parts)
    return torch.cat([q, k, v], dim=1).reshape(-1, q.shape[-1])


def _split_halves(weight: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
    return tuple(weight.chunk(2, dim=0))


def _join_halves(parts: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
    return torch.cat(parts, dim=0)


def _plain(mcore: str, hf: str, shape: Callable[[ModelConfig], tuple[int, ...]]) -> Entry:
    return Entry(mcore, (hf,), _copy_out, _copy_in, shape)


_LAYER = (
    _plain("input_layernorm.weight", "input_layernorm.weight", lambda c: (c.hidden_size,)),
    Entry(
        "self_attention.linear_qkv.weight", ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        split_qkv, join_qkv, lambda c: (c.query_size + 2 * c.kv_size, c.hidden_size),
    ),
    _plain("self_attention.linear_proj.weight", "self_attn.o_proj.weight", lambda c: (c.hidden_size, c.query_size)),
    _plain("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", lambda c: (c.hidden_size,)),
    Entry(
        "mlp.linear_fc1.weight", ("feed_forward.gate_proj.weight", "feed_forward.up_proj.weight"),
        _split_halves, _join_halves, lambda c: (2 * c.ffn_size, c.hidden_size),
    ),
    _plain("mlp.linear_fc2.weight", "feed_forward.down_proj.weight", lambda c: (c.hidden_size, c.ffn_size)),
)


def table(config: ModelConfig) -> list[Entry]:
    """Every tensor of a model of this shape, in Hugging Face order, with full names."""
    entries = [_plain("embedding.word_embeddings.weight", "model.embed_tokens.weight", lambda c: (c.vocab_size, c.hidden_size))]
    for layer in range(config.num_layers):
        entries += [
            Entry(f"decoder.layers.{layer}.{row.mcore}", tuple(f"model.layers.{layer}.{name}" for name in row.hf), row.split, row.join, row.shape)
            for row in _LAYER
        ]
    entries.append(_plain("decoder.final_layernorm.weight", "model.norm.weight", lambda c: (c.hidden_size,)))
    if not config.tied_embeddings:
        entries.append(_plain("output_layer.weight", "lm_head.weight", lambda c: (c.vocab_size, c.hidden_size)))
    return entries


def canonical(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A megatron-core state dict with extra states dropped and Transformer Engine's norm names turned into the local ones."""
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(_IGNORED_SUFFIXES) or not isinstance(value, Tensor):
            continue
        for synonym, local in _SYNONYMS.items():
            if name.endswith(synonym):
                name = name[: -len(synonym)] + local
        result[name] = value
    return result


def to_hf(state: Mapping[str, Any], config: ModelConfig) -> dict[str, Tensor]:
    """megatron-core state dict of the whole model (one rank) -> Hugging Face state dict; values are copied, not cast.

    With tied embeddings `lm_head.weight` is left out, as transformers does; a stored `output_layer.weight` must then equal
    the embedding. A vocabulary padded for tensor parallelism is cut to `config.vocab_size` rows.
    Raises CheckpointError on a missing, unexpected or wrongly shaped tensor.
    """
    source = canonical(state)
    if config.tied_embeddings and (head := source.pop("output_layer.weight", None)) is not None:
        embedding = source.get("embedding.word_embeddings.weight")
        if embedding is None or not torch.equal(head, embedding):
            raise CheckpointError(
                expected="output_layer.weight equal to the embedding (tied_embeddings is true)", found="two different matrices",
                fix="set tied_embeddings to false in the model's configuration, or check which checkpoint this is",
            )
    result: dict[str, Tensor] = {}
    for entry in table(config):
        tensor = _take(source, entry.mcore, "megatron-core")
        expected = entry.shape(config)
        if entry.mcore in ("embedding.word_embeddings.weight", "output_layer.weight") and tensor.ndim == 2 and tensor.shape[0] > config.vocab_size:
            tensor = tensor[: config.vocab_size]
        _check_shape(entry.mcore, tensor, expected)
        for name, part in zip(entry.hf, entry.split(tensor, config), strict=True):
            result[name] = part.detach().clone(memory_format=torch.contiguous_format)
    _none_left(source, "megatron-core")
    return result


def from_hf(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Hugging Face state dict -> megatron-core state dict (local layer names); the inverse of `to_hf`, bit for bit.

    Raises CheckpointError on a missing, unexpected or wrongly shaped tensor.
    """
    source = dict(state)
    if config.tied_embeddings:
        source.pop("lm_head.weight", None)
    result: dict[str, Tensor] = {}
    for entry in table(config):
        parts = tuple(_take(source, name, "Hugging Face") for name in entry.hf)
        wanted = [tuple(part.shape) for part in entry.split(torch.empty(entry.shape(config), device="meta"), config)]
        for name, part, shape in zip(entry.hf, parts, wanted, strict=True):
            _check_shape(name, part, shape)
        result[entry.mcore] = entry.join(parts, config).detach().clone(memory_format=torch.contiguous_format)
    _none_left(source, "Hugging Face")
    return result


def hf_config(
    config: ModelConfig, *, bos_token_id: int | None = None, eos_token_id: int | list[int] | None = None, pad_token_id: int | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """The content of `config.json`.

    Three keys must not be left to their defaults, which describe another model without any error: `moe_layers` (must be an
    empty list), `no_rope_layers` (ones mean "uses RoPE"; an empty list turns RoPE off in every fourth layer) and
    `layer_types` (absent means chunked attention).
    """
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size_mlp": config.ffn_size,
        "intermediate_size": config.ffn_size,
        "hidden_act": "silu",
        "moe_layers": [],
        "interleave_moe_layer_step": 0,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "no_rope_layers": [1] * config.num_layers,
        "layer_types": ["full_attention"] * config.num_layers,
        "attention_chunk_size": 32768,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_qk_norm": True,
        "attn_temperature_tuning": False,
        "attn_scale": 0.1,
        "floor_scale": 8192,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": config.rms_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.init_std,
        "output_router_logits": False,
        "use_cache": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The shape described by a `config.json`. Raises CheckpointError when it describes a model this project cannot hold."""

    def refuse(expected: str, found: Any) -> None:
        raise CheckpointError(expected=expected, found=str(found), fix="only dense llama4_text models with RoPE and QK-norm on every layer can be imported")

    if hf.get("model_type") != MODEL_TYPE:
        refuse(f"model_type {MODEL_TYPE!r} in config.json", hf.get("model_type"))
    layers = int(hf["num_hidden_layers"])
    required = {
        "moe_layers": ([], "moe_layers: [] (a dense model)"),
        "use_qk_norm": (True, "use_qk_norm: true"),
        "attention_bias": (False, "attention_bias: false"),
        "hidden_act": ("silu", "hidden_act: silu"),
    }
    # transformers' own defaults, where the key may be absent.
    defaults = {"use_qk_norm": True, "attention_bias": False, "hidden_act": "silu"}
    for key, (value, text) in required.items():
        if hf.get(key, defaults.get(key)) != value:
            refuse(text, f"{key}: {hf.get(key)}")
    rope = hf.get("no_rope_layers") or []
    if len(rope) < layers or not all(rope[:layers]):
        refuse(f"no_rope_layers with {layers} ones (RoPE on every layer)", rope)
    kinds = hf.get("layer_types") or []
    if len(kinds) != layers or set(kinds) != {"full_attention"}:
        refuse(f"layer_types with {layers} times full_attention", kinds)
    parameters = hf.get("rope_parameters") or {}
    scaling = hf.get("rope_scaling")
    if scaling or parameters.get("rope_type", "default") != "default":
        refuse("no RoPE scaling", scaling or parameters)
    theta = hf.get("rope_theta", parameters.get("rope_theta"))
    if theta is None:
        refuse("rope_theta (or rope_parameters.rope_theta)", "neither")
    try:
        return ModelConfig(
            vocab_size=hf["vocab_size"], hidden_size=hf["hidden_size"], num_layers=layers, num_heads=hf["num_attention_heads"],
            num_kv_heads=hf["num_key_value_heads"], head_dim=hf["head_dim"], ffn_size=hf["intermediate_size_mlp"], rms_eps=hf["rms_norm_eps"],
            rope_theta=theta, max_positions=hf["max_position_embeddings"], tied_embeddings=hf.get("tie_word_embeddings", False),
            init_std=hf.get("initializer_range", 0.02),
        )
    except KeyError as error:
        refuse(f"the key {error.args[0]!r} in config.json", "no such key")
        raise


def _take(source: dict[str, Tensor], name: str, side: str) -> Tensor:
    try:
        return source.pop(name)
    except KeyError:
        raise CheckpointError(
            expected=f"a tensor {name} in the {side} state", found=f"{len(source)} other tensors left ({', '.join(sorted(source)[:4])} ...)",
            fix="gather all tensor- and pipeline-parallel ranks into one model first, and check that the configuration fits the checkpoint",
        ) from None


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise CheckpointError(
            expected=f"{name} of shape {tuple(expected)}", found=f"shape {tuple(tensor.shape)}", fix="check that the model configuration belongs to this checkpoint"
        )


def _none_left(source: Mapping[str, Tensor], side: str) -> None:
    if source:
        raise CheckpointError(
            expected=f"only tensors of the table in the {side} state", found=f"also {', '.join(sorted(source)[:6])}",
            fix="a model with biases, learnable QK-norm gains or experts cannot be written as dense llama4_text",
        )
