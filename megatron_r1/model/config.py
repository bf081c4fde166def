"""Model shapes, presets and closed-form counts. Torch-free, so that `--dry-run` and every stage config can use it.

Legend: V vocabulary, d hidden size, L layers, Hq query heads, Hkv key/value heads, h head size, f feed-forward size,
s sequence length. The architecture itself (what the shapes are the shapes *of*) is MobileLLM-R1's: pre-norm decoder,
RMSNorm, SwiGLU, grouped-query attention, QK-norm without gain on every layer, RoPE in adjacent pairs on every layer,
no biases, embedding and output head shared (arXiv 2509.24945, section 3.1 and Table 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from megatron_r1.config.base import Frozen


class ModelConfig(Frozen):
    """Shape of one decoder.

    In YAML either the name of a preset (`model: tiny`) or a mapping, optionally starting from a preset
    (`model: {preset: tiny, vocab_size: 49152}`).
    """

    vocab_size: int = Field(gt=0, description="Rows of the embedding matrix; at least the tokenizer's vocabulary.")
    hidden_size: int = Field(gt=0, description="Width d of the residual stream.")
    num_layers: int = Field(gt=0, description="Number of decoder layers.")
    num_heads: int = Field(gt=0, description="Query heads per layer.")
    num_kv_heads: int = Field(gt=0, description="Key/value heads per layer (grouped-query attention); divides num_heads.")
    head_dim: int = Field(default=64, gt=0, description="Size of one attention head; even, because RoPE turns pairs.")
    ffn_size: int = Field(gt=0, description="Inner width of the SwiGLU feed-forward block.")
    rms_eps: float = Field(default=1e-5, gt=0, description="Epsilon of every RMSNorm, the weightless QK-norm included.")
    rope_theta: float = Field(default=1e6, gt=1, description="Base of the rotary position embedding.")
    max_positions: int = Field(default=2048, gt=0, description="Longest sequence the model is declared (exported) for.")
    tied_embeddings: bool = Field(default=True, description="Input embedding and output head are one matrix.")
    init_std: float = Field(
        default=0.02, gt=0, description="Standard deviation of the normal init of all linear and embedding weights."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, value: Any) -> Any:
        if isinstance(value, str):
            return preset_values(value)
        if isinstance(value, Mapping) and "preset" in value:
            overrides = {key: item for key, item in value.items() if key != "preset"}
            return preset_values(value["preset"]) | overrides
        return value

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"expected num_heads to be a multiple of num_kv_heads; found num_heads={self.num_heads} and "
                f"num_kv_heads={self.num_kv_heads}; each key/value head serves the same number of query heads, "
                f"so use one of num_kv_heads={_divisors(self.num_heads)}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"expected an even head_dim; found {self.head_dim}; RoPE rotates adjacent pairs, use an even size (64)"
            )
        if self.num_heads * self.head_dim != self.hidden_size:
            raise ValueError(
                f"expected hidden_size = num_heads x head_dim; found hidden_size={self.hidden_size} and "
                f"{self.num_heads} x {self.head_dim} = {self.num_heads * self.head_dim}; change one of the three"
            )
        return self

    def replace(self, **changes: Any) -> ModelConfig:
        """A validated copy with some fields changed (pydantic's `model_copy(update=...)` would not validate)."""
        return ModelConfig.model_validate(self.model_dump() | changes)

    # ---------------------------------------------------------------- shapes

    @property
    def query_size(self) -> int:
        """Columns of the query projection, Hq x h."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of the key (and of the value) projection, Hkv x h."""
        return self.num_kv_heads * self.head_dim

    # ---------------------------------------------------------------- parameters

    def embedding_parameters(self) -> int:
        """V*d, once when tied and twice otherwise."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    def layer_parameters(self) -> int:
        """Parameters of one layer: 2*d*Hq*h + 2*d*Hkv*h (q, o and k, v) + 3*d*f (SwiGLU) + 2*d (two norm gains)."""
        return self._layer_matrix_parameters() + 2 * self.hidden_size

    def non_embedding_parameters(self) -> int:
        """Layers and the final norm's gain: everything except the embedding (and the head)."""
        return self.num_layers * self.layer_parameters() + self.hidden_size

    def parameters(self) -> int:
        """All trainable parameters; equal to the count of the exported Hugging Face module. QK-norm has none."""
        return self.embedding_parameters() + self.non_embedding_parameters()

    # ---------------------------------------------------------------- compute and memory

    def matmul_parameters(self) -> int:
        """N of the FLOP formula: weights that multiply every token. The head counts once (tied or not), the embedding
        look-up and the norm gains do no matrix product."""
        return self.num_layers * self._layer_matrix_parameters() + self.vocab_size * self.hidden_size

    def flops_per_token(self, seq_length: int, training: bool = True, causal: bool = True) -> int:
        """Floating-point operations of the matrix products, per token of a sequence of `seq_length` tokens.

        Forward: 2*N + 4*L*Hq*h*c with N = `matmul_parameters()` (a multiply and an add per weight) and c the number of
        keys a query meets: Q K^T and P V cost 2*Hq*h*c each. Causal: c = (s+1)/2, the mean over the sequence;
        `causal=False` gives the full square c = s, which is what PaLM's MFU convention and profilers count. Training is
        three forwards (backward = gradients of inputs and of weights): the usual 6*N + 12*L*Hq*h*c.
        Norms, softmax, RoPE and the loss are not matrix products and are left out.
        """
        if seq_length < 1:
            raise ValueError(f"expected seq_length >= 1; found {seq_length}; give the length of one training sequence")
        twice_keys = seq_length + 1 if causal else 2 * seq_length
        forward = 2 * self.matmul_parameters() + 2 * self.num_layers * self.query_size * twice_keys
        return forward * (3 if training else 1)

    def kv_cache_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes of keys and values kept per generated token over all layers (default: bf16, 2 bytes per value)."""
        return 2 * self.num_layers * self.kv_size * bytes_per_value

    def _layer_matrix_parameters(self) -> int:
        d = self.hidden_size
        return 2 * d * self.query_size + 2 * d * self.kv_size + 3 * d * self.ffn_size


def preset_values(name: Any) -> dict[str, Any]:
    """The fields of a preset.

    Raises ValueError (which pydantic reports with the key's place) when there is no such preset.
    """
    if isinstance(name, str) and name in PRESETS:
        return PRESETS[name].model_dump()
    near = difflib.get_close_matches(str(name), PRESETS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "use one of these or give the sizes"
    raise ValueError(f"expected the name of a model preset ({', '.join(PRESETS)}); found {name!r}; {hint}")


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]


# LLaMA-3.2's tokenizer (arXiv 2509.24945, section 3.1).
_LLAMA_VOCABULARY = 128256

PRESETS: dict[str, ModelConfig] = {
    # Tests.
    "nano": ModelConfig(
        vocab_size=512, hidden_size=128, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=256
    ),
    # The quickstart's student and its teacher: what two CPU cores train in minutes.
    "tiny": ModelConfig(vocab_size=8192, hidden_size=128, num_layers=4, num_heads=2, num_kv_heads=1, ffn_size=384),
    "small": ModelConfig(vocab_size=8192, hidden_size=256, num_layers=6, num_heads=4, num_kv_heads=2, ffn_size=768),
    # arXiv 2509.24945, Table 1: layers, heads, KV heads, dim, FFN dim.
    "mobilellm_r1_140m": ModelConfig(
        vocab_size=_LLAMA_VOCABULARY, hidden_size=576, num_layers=15, num_heads=9, num_kv_heads=3, ffn_size=2048
    ),
    "mobilellm_r1_360m": ModelConfig(
        vocab_size=_LLAMA_VOCABULARY, hidden_size=1024, num_layers=15, num_heads=16, num_kv_heads=4, ffn_size=4096
    ),
    "mobilellm_r1_950m": ModelConfig(
        vocab_size=_LLAMA_VOCABULARY, hidden_size=1536, num_layers=22, num_heads=24, num_kv_heads=6, ffn_size=6144
    ),
}
