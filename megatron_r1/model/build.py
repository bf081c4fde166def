"""Construction of the model, in one function: every layout starts from the same weights.

Each tensor is drawn whole from a generator of its own, seeded by (seed, global tensor name), and then cut: neither the
degrees of parallelism nor the order of construction can change a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_r1.model.config import ModelConfig
from megatron_r1.model.spec import block_spec
from megatron_r1.parallel import device
from megatron_r1.parallel.config import Precision
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.parallel.mcore import (
    ColumnParallelLinear,
    GPTModel,
    TransformerConfig,
    gather_from_sequence_parallel_region,
    p2p_settings,
    process_groups,
    quietly,
    tensor_parallel,
)
from megatron_r1.parallel.sequence import context_piece
from megatron_r1.parallel.vocab import VocabShard, vocab_shard
from megatron_r1.utils.seeding import derive_seed


class OutputHead(ColumnParallelLinear):
    """The output layer, which can also lend its weight to an operation that needs it.

    Whatever uses the weight has to go through a call of the module: with overlapped parameter gathering it is the call that
    waits for the weight to arrive.
    """

    def forward(self, input_: Any, weight: Tensor | None = None, runtime_gather_output: bool | None = None) -> Any:
        """Logits of a tensor, or what a function makes of the weight [V/p, d]."""
        if callable(input_):
            return input_(self.weight if weight is None else weight)
        return super().forward(input_, weight, runtime_gather_output)


class R1Model(GPTModel):
    """One chunk of the decoder: megatron-core's GPTModel with a forward pass of its own.

    Legend: b rows, s tokens, d hidden size, V vocabulary, p tensor-parallel degree.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            self.output_layer.__class__ = OutputHead

    def forward(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        head: Callable[[R1Model, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Run this chunk. input_ids, segment_ids: [b, s], under context parallelism of whole sequences; from there on s counts the
        tokens of this process's piece.

        Not on the last stage: activations [s, b, d]. On the last stage: what `head` makes of the states after the final norm
        ([s, b, d], cut along s under sequence parallelism), or those states without one.
        """
        if self.pre_process and (piece := context_piece()) is not None:
            input_ids = piece.cut(input_ids.t()).t().contiguous()
        hidden = self.embedding(input_ids=input_ids, position_ids=None) if self.pre_process else None
        hidden = self.decoder(hidden_states=hidden, attention_mask=segment_ids)
        return head(self, hidden) if self.post_process and head is not None else hidden

    def to_head(self, hidden: Tensor) -> Tensor:
        """States after the final norm -> whole sequences [s, b, d] whose gradient adds up over the pieces of the vocabulary."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        return tensor_parallel.copy_to_tensor_model_parallel_region(hidden) if self.config.tensor_model_parallel_size > 1 else hidden

    def whole_sequence(self, hidden: Tensor) -> Tensor:
        """States after the final norm -> whole sequences [s, b, d], the same on every tensor-parallel rank."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden

    def head_weight(self) -> Tensor:
        """The output matrix [V/p, d] of this rank; last stage only. To compute with it use `with_head_weight`."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight

    def with_head_weight(self, use: Callable[[Tensor], Tensor]) -> Tensor:
        """`use(head_weight())`, when the weight is there."""
        return self.output_layer(use, self.head_weight())

    @property
    def vocabulary(self) -> VocabShard:
        """What this rank's embedding and head have of the vocabulary."""
        return vocab_shard(self.vocab_size) if self.config.tensor_model_parallel_size > 1 else VocabShard(0, self.vocab_size, 1)


def build_model(
    config: ModelConfig, ctx: ParallelContext, *, seed: int, precision: Precision = "fp32", recompute: bool = False
) -> list[R1Model]:
    """The chunks of this process (one, or one per interleaved pipeline chunk), on its device, not wrapped.

    Linear and embedding weights are normal(0, init_std), gains 1; the same numbers under every layout.
    `recompute` trades computation for memory: each layer's activations are computed again in the backward pass.
    Raises ParallelError when the shapes do not fit the layout, EnvironmentProblem when FP8 is asked for and can not be had.
    """
    ctx.layout.check_model(config)
    if precision == "fp8":
        device.require_fp8(ctx.device)
    core, groups = transformer_config(config, ctx, precision, recompute), process_groups(ctx.layout.tensor)
    stages = ctx.layout.virtual_pipeline
    chunks = []
    for index in range(stages or 1):
        vp_stage = index if stages else None
        model = R1Model(
            config=core,
            transformer_layer_spec=block_spec(core, vp_stage, groups.tp),
            vocab_size=config.vocab_size,
            max_sequence_length=config.max_positions,
            pre_process=ctx.is_first_stage and index == 0,
            post_process=ctx.is_last_stage and index == (stages or 1) - 1,
            share_embeddings_and_output_weights=config.tied_embeddings,
            position_embedding_type="none",  # RoPE is part of our attention
            rotary_base=config.rope_theta,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        _initialise(model, config, ctx, seed)
        chunks.append(model.to(ctx.device))
    return chunks


def transformer_config(config: ModelConfig, ctx: ParallelContext, precision: Precision, recompute: bool = False) -> TransformerConfig:
    """ModelConfig in megatron-core's terms. Its compiled fusions are off: they take tens of seconds per process on a CPU."""
    layout, half = ctx.layout, precision != "fp32"
    dtype = torch.bfloat16 if half else torch.float32
    fields: dict[str, Any] = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1} if recompute else {}
    if precision == "fp8":
        # Scales are taken from the tensor at hand: none depends on earlier steps, so a checkpoint needs none. Weights are turned to FP8 anew for
        # every micro-batch: what is kept between them would be stale wherever weights change without a call of megatron-core's schedule.
        fields |= {"fp8": "hybrid", "fp8_recipe": "tensorwise", "disable_parameter_transpose_cache": True}
    with quietly():
        core = TransformerConfig(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_heads,
            num_query_groups=config.num_kv_heads,
            kv_channels=config.head_dim,
            ffn_hidden_size=config.ffn_size,
            normalization="RMSNorm",
            layernorm_epsilon=config.rms_eps,
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            init_method=_leave_empty,
            output_layer_init_method=_leave_empty,
            init_method_std=config.init_std,
            use_cpu_initialization=True,
            bf16=half,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            tensor_model_parallel_size=layout.tensor,
            context_parallel_size=layout.context,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
            sequence_parallel=layout.sequence_parallel,
            calculate_per_token_loss=True,
            gradient_accumulation_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            apply_rope_fusion=False,
            persist_layer_norm=False,
            **p2p_settings(layout.virtual_pipeline),
            **fields,
        )
    core.r1_rope_theta = config.rope_theta
    return core


def global_names(model: GPTModel) -> dict[str, str]:
    """Name of each parameter in this chunk -> its name in the whole model (layers counted from the first stage's).

    The last stage's copy of a tied embedding is the embedding.
    """
    names = {}
    layers = {f"decoder.layers.{i}.": f"decoder.layers.{layer.layer_number - 1}." for i, layer in enumerate(model.decoder.layers)}
    for name, _ in model.named_parameters():
        whole = name
        for local, overall in layers.items():
            if name.startswith(local):
                whole = overall + name[len(local) :]
        if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            whole = "embedding.word_embeddings.weight"
        names[name] = whole
    return names


def _leave_empty(weight: Tensor) -> Tensor:
    """Initialisation happens afterwards, by name; megatron-core still has to see an init so that it marks cut tensors."""
    return weight


@torch.no_grad()
def _initialise(model: GPTModel, config: ModelConfig, ctx: ParallelContext, seed: int) -> None:
    names = global_names(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        generator = torch.Generator().manual_seed(derive_seed(seed, "init", names[name]))
        parameter.copy_(cut(_normal(_whole_shape(parameter, ctx), config.init_std, generator), parameter, ctx))


def _normal(shape: list[int], std: float, generator: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)


def _whole_shape(parameter: nn.Parameter, ctx: ParallelContext) -> list[int]:
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= ctx.tensor_size
    return shape


def cut(whole: Tensor, parameter: nn.Parameter, ctx: ParallelContext) -> Tensor:
    """This rank's piece of a whole tensor, as megatron-core lays it out (gate and up halves are cut separately)."""
    if not getattr(parameter, "tensor_model_parallel", False) or ctx.tensor_size == 1:
        return whole
    size = parameter.shape[parameter.partition_dim] // parameter.partition_stride
    pieces = torch.split(whole, size, dim=parameter.partition_dim)[ctx.tensor_rank :: ctx.tensor_size]
    return torch.cat(pieces, dim=parameter.partition_dim)
