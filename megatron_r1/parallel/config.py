"""How a model is spread over processes. Torch-free: recipes are checked without importing torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from megatron_r1.config.base import Frozen
from megatron_r1.utils.errors import ParallelError

Precision = Literal["fp32", "bf16", "fp8"]
"""Number format of a training step. fp8: bf16 weights and activations, whose matrix products inside the layers are FP8."""


class LayoutConfig(Frozen):
    """Degrees of parallelism. The data-parallel degree is what is left: world size / (tensor x pipeline x context)."""

    device: Literal["auto", "cpu", "gpu"] = Field(
        "auto", description="where to compute: gpu is an error without one, auto takes a GPU if there is one"
    )
    tensor: int = Field(1, ge=1, description="tensor-parallel degree: each weight matrix is cut into this many pieces")
    pipeline: int = Field(1, ge=1, description="pipeline degree: the layers are cut into this many stages")
    context: int = Field(1, ge=1, description="context-parallel degree: each sequence is cut into this many pieces")
    virtual_pipeline: int | None = Field(
        None, ge=2, description="model chunks per pipeline stage (interleaved schedule); None for one chunk"
    )
    sequence_parallel: bool = Field(
        False, description="also cut norms and residuals along the sequence inside a tensor-parallel group"
    )
    distributed_optimizer: bool = Field(
        False, description="shard the optimizer state (and fp32 weights under bf16) over the data-parallel group"
    )
    overlap: bool = Field(False, description="overlap gradient reduction and parameter gathering with computation")

    def model_parallel(self) -> int:
        """Processes that hold one copy of the model together."""
        return self.tensor * self.pipeline * self.context

    def data_size(self, world_size: int) -> int:
        """Number of model copies in `world_size` processes.

        Raises ParallelError when the layout is impossible or not supported, or does not divide the world.
        """
        self.check()
        if world_size % self.model_parallel():
            raise ParallelError(
                expected=f"a number of processes divisible by tensor x pipeline x context = {self.model_parallel()}",
                found=f"{world_size} process{'es' if world_size > 1 else ''}",
                fix=f"start {self.model_parallel()} processes (torchrun --nproc-per-node {self.model_parallel()} ...) "
                "or a multiple of it, or lower the degrees in `layout`",
            )
        return world_size // self.model_parallel()

    @property
    def sequence_multiple(self) -> int:
        """Sequences are cut into pieces of equal length: two for each context-parallel process, each cut again under sequence parallelism."""
        return (2 * self.context if self.context > 1 else 1) * (self.tensor if self.sequence_parallel else 1)

    def check(self) -> None:
        """Refuse combinations that cannot work. Raises ParallelError."""
        if self.sequence_parallel and self.tensor == 1:
            raise ParallelError(
                expected="tensor >= 2 with sequence_parallel (it cuts sequences inside a tensor-parallel group)",
                found="sequence_parallel: true with tensor: 1",
                fix="set sequence_parallel: false or raise tensor",
            )
        if self.virtual_pipeline and self.pipeline == 1:
            raise ParallelError(
                expected="pipeline >= 2 with virtual_pipeline (chunks are interleaved between stages)",
                found=f"virtual_pipeline: {self.virtual_pipeline} with pipeline: 1",
                fix="remove virtual_pipeline or raise pipeline",
            )

    def check_model(self, model: Any, seq_length: int | None = None) -> None:
        """Refuse a model whose shapes cannot be cut this way.

        `model`: anything with the fields of `ModelConfig`. Raises ParallelError naming the size and the degree.
        """
        self.check()
        stages = self.pipeline * (self.virtual_pipeline or 1)
        if stages > model.num_layers:
            raise ParallelError(
                expected=f"at least as many layers as pipeline stages ({stages})",
                found=f"{model.num_layers} layers",
                fix=f"lower pipeline x virtual_pipeline to a divisor of {model.num_layers}",
            )
        cuts = [("num_layers", model.num_layers, "pipeline x virtual_pipeline", stages)] + [
            (name, getattr(model, name), "tensor", self.tensor)
            for name in ("num_heads", "num_kv_heads", "ffn_size", "vocab_size", "hidden_size")
        ]
        if seq_length is not None:
            factors = ["2 x context"] * (self.context > 1) + ["tensor (sequence_parallel)"] * self.sequence_parallel
            cuts.append(("seq_length", seq_length, " x ".join(factors), self.sequence_multiple))
        for name, size, degree_name, degree in cuts:
            if size % degree:
                raise ParallelError(
                    expected=f"{name} divisible by {degree_name} = {degree}",
                    found=f"{name} = {size}",
                    fix=f"choose {degree_name} among the divisors of {size}, or change {name}",
                )

    def check_fp8(self, model: Any, tokens: int) -> None:
        """Refuse shapes that FP8 products do not take: in each process all sizes of a product are multiples of 16.

        `model`: as in `check_model`; `tokens`: of one micro-batch. Raises ParallelError naming the size.
        """
        cuts = self.context * (self.tensor if self.sequence_parallel else 1)
        sizes = {
            "hidden_size": (model.hidden_size, 1),
            "query, key and value columns": (model.query_size + 2 * model.kv_size, self.tensor),
            "attention's output": (model.query_size, self.tensor),
            "ffn_size": (model.ffn_size, self.tensor),
            "micro_batch x seq_length": (tokens, cuts),
        }
        for name, (size, degree) in sizes.items():
            if size % (16 * degree):
                raise ParallelError(
                    expected=f"with precision: fp8, {name} in each process to be a multiple of 16",
                    found=f"{size} / {degree}",
                    fix=f"choose {name} divisible by {16 * degree}, a lower degree of parallelism, or precision: bf16",
                )
