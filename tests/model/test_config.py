"""Model shapes: the closed forms against the published counts, against a term-by-term count and against real modules."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_r1.model.config import PRESETS, ModelConfig

# arXiv 2509.24945 Table 1, typed in again, with the exact counts of the released models.
# layers, heads, KV heads, dim, FFN, parameters, non-embedding, KV cache per token in bf16 (bytes).
PUBLISHED = {
    "mobilellm_r1_140m": (15, 9, 3, 576, 2048, 140_248_512, 66_373_056, 11_520),
    "mobilellm_r1_360m": (15, 16, 4, 1024, 4096, 359_431_168, 228_097_024, 15_360),
    "mobilellm_r1_950m": (22, 24, 6, 1536, 6144, 949_685_760, 752_684_544, 33_792),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    layers, heads, kv_heads, dim, ffn, parameters, non_embedding, kv_bytes = PUBLISHED[name]
    config = PRESETS[name]
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (layers, heads, kv_heads)
    assert (config.hidden_size, config.ffn_size, config.head_dim, config.vocab_size) == (dim, ffn, 64, 128256)
    assert config.parameters() == parameters
    assert config.non_embedding_parameters() == non_embedding
    assert config.embedding_parameters() == parameters - non_embedding == 128256 * dim
    assert config.kv_cache_bytes_per_token() == kv_bytes
    assert (config.tied_embeddings, config.rms_eps, config.init_std, config.rope_theta) == (True, 1e-5, 0.02, 1e6)


def test_kv_cache_at_32k_is_the_published_size() -> None:
    mebibytes = [PRESETS[name].kv_cache_bytes_per_token() * 32768 / 2**20 for name in PUBLISHED]
    assert mebibytes == [360, 480, 1056]


def _weights(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of the exported model with its shape, written out (the names of Hugging Face's llama4_text)."""
    d, f, q, kv = config.hidden_size, config.ffn_size, config.num_heads * 64, config.num_kv_heads * 64
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (config.vocab_size, d), "norm": (d,)}
    if not config.tied_embeddings:
        shapes["lm_head"] = (config.vocab_size, d)
    for layer in range(config.num_layers):
        shapes |= {
            f"{layer}.q": (q, d),
            f"{layer}.k": (kv, d),
            f"{layer}.v": (kv, d),
            f"{layer}.o": (d, q),
            f"{layer}.gate": (f, d),
            f"{layer}.up": (f, d),
            f"{layer}.down": (d, f),
            f"{layer}.input_norm": (d,),
            f"{layer}.post_norm": (d,),
        }
    return shapes


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("tied", [True, False])
def test_counts_equal_the_sum_over_weights(name: str, tied: bool) -> None:
    config = PRESETS[name].replace(tied_embeddings=tied)
    shapes = _weights(config)
    assert config.parameters() == sum(_product(shape) for shape in shapes.values())
    outside = sum(_product(shape) for key, shape in shapes.items() if key not in ("embed_tokens", "lm_head"))
    assert config.non_embedding_parameters() == outside
    matrices = sum(_product(shape) for key, shape in shapes.items() if len(shape) == 2 and key not in ("lm_head",))
    assert config.matmul_parameters() == matrices  # the head once, whether it is the embedding or its own matrix


def test_flops_hand_count() -> None:
    config = PRESETS["nano"]
    # 2 layers of q 128x128, o 128x128, k and v 128x64, SwiGLU 3x128x256; head 512x128. Two operations per weight.
    linear = 2 * (2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256) + 512 * 128)
    # Q K^T and P V over a square of 10 x 10 for 2 heads of 64, per token of 10: 2 products x 2 operations x 10 keys.
    square = 2 * (2 * 2 * (2 * 64) * 10)
    assert config.flops_per_token(10, training=False, causal=False) == linear + square
    # Causal: token t meets t keys; mean over 1..10 is 5.5.
    assert config.flops_per_token(10, training=False) == linear + square * 55 // 100
    assert config.flops_per_token(10) == 3 * config.flops_per_token(10, training=False)


def test_flops_agree_with_torch_flop_counter() -> None:
    torch = pytest.importorskip("torch")
    from torch.nn import functional
    from torch.utils.flop_counter import FlopCounterMode

    config = PRESETS["nano"]
    b, s = 2, 24
    weights = {
        key: torch.randn(shape, requires_grad=True) for key, shape in _weights(config).items() if len(shape) == 2
    }
    heads, kv_heads = config.num_heads, config.num_kv_heads

    def block(x, layer: int):  # x [b, s, d]; norms and RoPE left out: they are no matrix products
        q = functional.linear(x, weights[f"{layer}.q"]).view(b, s, heads, 64).transpose(1, 2)
        k = functional.linear(x, weights[f"{layer}.k"]).view(b, s, kv_heads, 64).transpose(1, 2)
        v = functional.linear(x, weights[f"{layer}.v"]).view(b, s, kv_heads, 64).transpose(1, 2)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        attended = ((q @ k.transpose(-1, -2)) / 8).softmax(-1) @ v
        x = x + functional.linear(attended.transpose(1, 2).reshape(b, s, heads * 64), weights[f"{layer}.o"])
        gated = functional.silu(functional.linear(x, weights[f"{layer}.gate"]))
        return x + functional.linear(gated * functional.linear(x, weights[f"{layer}.up"]), weights[f"{layer}.down"])

    tokens = torch.randint(0, config.vocab_size, (b, s))
    with FlopCounterMode(display=False) as forward:
        x = functional.embedding(tokens, weights["embed_tokens"])
        for layer in range(config.num_layers):
            x = block(x, layer)
        loss = functional.cross_entropy(functional.linear(x, weights["embed_tokens"]).flatten(0, 1), tokens.flatten())
    assert forward.get_total_flops() == b * s * config.flops_per_token(s, training=False, causal=False)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    total = forward.get_total_flops() + backward.get_total_flops()
    assert total == b * s * config.flops_per_token(s, training=True, causal=False)


class _Holder(BaseModel):
    model_config = ConfigDict(frozen=True)
    model: ModelConfig = Field(description="as in a recipe")


def test_preset_name_and_preset_with_overrides() -> None:
    assert _Holder.model_validate({"model": "tiny"}).model == PRESETS["tiny"]
    changed = _Holder.model_validate({"model": {"preset": "tiny", "vocab_size": 49152, "rope_theta": 8e6}}).model
    assert changed == PRESETS["tiny"].replace(vocab_size=49152, rope_theta=8e6)
    assert changed.num_layers == PRESETS["tiny"].num_layers


def test_json_round_trip() -> None:
    for config in PRESETS.values():
        assert ModelConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("mobilellm_r1_140", ("expected the name of a model preset", "'mobilellm_r1_140'", "mobilellm_r1_140m")),
        ({"preset": "tiny", "num_kv_heads": 3}, ("multiple of num_kv_heads", "num_kv_heads=3", "[1, 2]")),
        ({"preset": "tiny", "hidden_size": 130}, ("hidden_size = num_heads x head_dim", "2 x 64 = 128")),
        ({"preset": "tiny", "head_dim": 33, "hidden_size": 66}, ("even head_dim", "33")),
        ({"preset": "tiny", "num_layers": 0}, ("num_layers", "greater than 0")),
        ({"preset": "tiny", "layers": 3}, ("layers",)),
    ],
)
def test_errors_say_what_to_do(value: object, words: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        _Holder.model_validate({"model": value})
    for word in words:
        assert word in str(caught.value)


def test_replace_validates() -> None:
    with pytest.raises(ValidationError, match="multiple of num_kv_heads"):
        PRESETS["small"].replace(num_kv_heads=3)


def test_sequence_length_must_be_positive() -> None:
    with pytest.raises(ValueError, match="seq_length"):
        PRESETS["nano"].flops_per_token(0)


def test_every_field_is_described_and_import_is_torch_free() -> None:
    assert all(field.description for field in ModelConfig.model_fields.values())
    code = "import sys, megatron_r1.model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
