"""The one layer specification, on CPU and GPU alike: megatron-core's parallel linears around our own operations. For FP8 the linears
are Transformer Engine's, and nothing else differs.

Parameter names are megatron-core's, so that its gradient reductions and checkpoints treat them as they should.

Legend: s tokens, b rows, d hidden size, f feed-forward size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_r1.ops.attention import qknorm_attention
from megatron_r1.ops.norm import rms_norm
from megatron_r1.ops.swiglu import swiglu
from megatron_r1.parallel.mcore import (
    MLP,
    AttnMaskType,
    ColumnParallelLinear,
    IdentityOp,
    MLPSubmodules,
    ModuleSpec,
    RowParallelLinear,
    SelfAttention,
    SelfAttentionSubmodules,
    TransformerBlockSubmodules,
    TransformerConfig,
    TransformerLayer,
    TransformerLayerSubmodules,
    get_bias_dropout_add,
    get_num_layers_to_build,
    transformer_engine_linears,
)
from megatron_r1.parallel.sequence import context_piece


class RMSNorm(nn.Module):
    """RMSNorm with a gain (arXiv 1910.07467). Its gain is marked for reduction when sequences are cut (sequence parallel)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        return rms_norm(x, self.weight, self.eps)


class FusedSelfAttention(SelfAttention):
    """QKV projection, then one operation from packed qkv to attention output, then the output projection.

    What megatron-core calls `attention_mask` carries the document numbers here ([b, S] of whole sequences, or None for plain causal).
    """

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, d] (with sequence parallelism this rank's s / tensor tokens) -> the same shape, and no bias."""
        qkv, _bias = self.linear_qkv(hidden_states)
        attended = qknorm_attention(
            qkv,
            num_heads=self.num_attention_heads_per_partition,
            num_kv_heads=self.num_query_groups_per_partition,
            head_dim=self.hidden_size_per_attention_head,
            rope_theta=self.config.r1_rope_theta,
            eps=self.config.layernorm_epsilon,
            segment_ids=attention_mask,
            context=context_piece(),
        )
        return self.linear_proj(attended)


class SwiGLUMLP(MLP):
    """Gate and up projection in one matrix, SwiGLU, down projection."""

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules, tensor_group: Any, **_: Any) -> None:
        # Older megatron-core hands process groups to its own MLP only, newer ones all of them and more: the specification brings ours.
        super().__init__(config, submodules, tp_group=tensor_group)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, d] -> [s, b, d], and no bias."""
        gate_up, _bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(swiglu(gate_up))


def layer_spec(tensor_group: Any, column: type = ColumnParallelLinear, row: type = RowParallelLinear) -> ModuleSpec:
    """One decoder layer: norm, attention, residual, norm, SwiGLU, residual. No biases. `tensor_group`: processes its matrices are cut
    over; `column`, `row`: the linear layers."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=FusedSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column, core_attention=IdentityOp, linear_proj=row
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=SwiGLUMLP, params={"tensor_group": tensor_group}, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)
            ),
            mlp_bda=get_bias_dropout_add,
            # The names Transformer Engine's fused norm-and-linear modules use in checkpoints: both kinds can be exchanged.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def block_spec(config: TransformerConfig, vp_stage: int | None, tensor_group: Any) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage (and interleaved chunk) and the final norm. Raises EnvironmentProblem for FP8 without Transformer Engine."""
    spec = layer_spec(tensor_group, *transformer_engine_linears()) if config.fp8 else layer_spec(tensor_group)
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)
