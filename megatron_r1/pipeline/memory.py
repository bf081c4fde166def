"""Memory one process needs for a training step, from the settings alone. Torch-free.

What is counted is what the code allocates, tensor by tensor: the state that is always there, what each layer keeps for the backward
pass, and the moments at which the rest is largest. `benchmarks/plan_memory.py` measures the same step and prints both. Not counted:
the device's runtime, communication buffers and what an allocator loses to fragmentation; `cluster.Cluster.reserve` stands for those.

Legend: V vocabulary, d hidden size, f feed-forward size, q query columns, kv key (and value) columns, nq query heads; n tokens of a
micro-batch in this process, t tensor-parallel degree; e bytes of an activation, 4 bytes where fp32 is used at any precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_r1.model.config import ModelConfig
from megatron_r1.parallel.config import LayoutConfig, Precision

FP32 = 4
BYTES = {"fp32": 4, "bf16": 2, "fp8": 2}
LOSS_CHUNK = {"cpu": 8 << 20, "gpu": 256 << 20}
"""Logits made at a time (ops/linear_loss.py)."""
FEWEST_ROWS = 128
BATCH_BYTES = 3 * 8 + 3 * 4
"""Of one token of a batch: number, label and position in 64 bits; mask, document and source in 32."""


@dataclass(frozen=True)
class Shape:
    """A training step as memory sees it. `micro_batch`: sequences; `microbatches`: of one step and process."""

    model: ModelConfig
    layout: LayoutConfig
    data_size: int
    micro_batch: int
    seq_length: int
    microbatches: int
    precision: Precision = "fp32"
    recompute: bool = False
    device: Literal["cpu", "gpu"] = "gpu"
    teacher: ModelConfig | None = None
    teacher_precision: Literal["fp32", "bf16"] = "bf16"
    foreign_teacher: bool = False
    """It comes from Hugging Face: whole in every process that sees the loss, and run on whole sequences (train/teacher.py)."""

    @property
    def tokens(self) -> int:
        """n."""
        return self.micro_batch * self.seq_length // self.layout.context

    @property
    def row_tokens(self) -> int:
        """Tokens of a residual stream: fewer under sequence parallelism."""
        return self.tokens // (self.layout.tensor if self.layout.sequence_parallel else 1)


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one process of pipeline stage `stage`. `per_layer`: what one layer keeps of one micro-batch; `in_flight`: how many
    layers' worth of that exist at once. `moments`: what exists besides, at the three times when it is largest."""

    stage: int
    layers: int
    weights: int
    gradients: int
    optimizer: int
    per_layer: int
    in_flight: int
    stream: int
    teacher: int
    loss_chunk: int
    moments: dict[str, int]

    @property
    def activations(self) -> int:
        """Kept for the backward pass: by the layers, and the residual stream and batches around them."""
        return self.per_layer * self.in_flight + self.stream

    @property
    def state(self) -> int:
        """Always there."""
        return self.weights + self.gradients + self.optimizer + self.teacher

    @property
    def moment(self) -> str:
        """When the peak is."""
        return max(self.moments, key=self.moments.__getitem__)

    @property
    def working(self) -> int:
        """What is there at the peak besides state and activations."""
        return self.moments[self.moment]

    @property
    def peak(self) -> int:
        """All of it."""
        return self.state + self.activations + self.working


def layer_bytes(shape: Shape, recompute: bool) -> int:
    """What one layer keeps of one micro-batch.

    Without recomputation: the inputs of both norms with a scale each, their outputs (inputs of the next product), packed qkv, the
    attention's output with a log-sum-exp per head, gate and up, and SwiGLU's output. With it: the layer's input.
    """
    model, t, e = shape.model, shape.layout.tensor, BYTES[shape.precision]
    n, rows = shape.tokens, shape.row_tokens
    if recompute:
        return rows * model.hidden_size * e
    streams = rows * 4 * model.hidden_size * e + rows * 2 * FP32
    attention = n * (2 * model.query_size + 2 * model.kv_size) * e // t + n * model.num_heads * FP32 // t
    return streams + attention + n * 3 * model.ffn_size * e // t


def layer_working(shape: Shape) -> int:
    """What a layer's backward pass holds for a moment: at SwiGLU its two gradients and two products of one half's size, less the
    activation just used; then the gradient of the largest matrix."""
    model, e = shape.model, BYTES[shape.precision]
    n, f = shape.tokens, shape.model.ffn_size // shape.layout.tensor
    streams = 2 * shape.row_tokens * model.hidden_size * e
    swiglu = n * 3 * f * e
    matrix = n * f * e + 2 * f * model.hidden_size * e + n * model.hidden_size * e
    return streams + gathered(shape) + max(swiglu, matrix)


def gathered(shape: Shape) -> int:
    """megatron-core's one buffer for whole sequences under sequence parallelism, kept from the first forward pass on."""
    return shape.tokens * shape.model.hidden_size * BYTES[shape.precision] if shape.layout.sequence_parallel else 0


def parameters_of(shape: Shape, stage: int) -> int:
    """Parameters in one process of a stage; the last stage has its own copy of a tied embedding."""
    model, layout = shape.model, shape.layout
    layers = model.num_layers // layout.pipeline
    gains = 2 * model.hidden_size
    total = layers * ((model.layer_parameters() - gains) // layout.tensor + gains)
    vocabulary = model.vocab_size * model.hidden_size // layout.tensor
    first, last = stage == 0, stage == layout.pipeline - 1
    total += vocabulary * first + model.hidden_size * last
    return total + vocabulary * (last and not (first and model.tied_embeddings))


def layers_in_flight(shape: Shape, stage: int) -> int:
    """Layers whose activations exist at once. One stage: its own. 1F1B: a micro-batch for every stage from this one on. Interleaved:
    the warm-up of megatron-core's schedule, 2 (p - i - 1) + (v - 1) p chunks and the one at work."""
    layout = shape.layout
    layers = shape.model.num_layers // layout.pipeline
    if layout.virtual_pipeline is None:
        return layers * min(layout.pipeline - stage, shape.microbatches)
    chunks = min(2 * (layout.pipeline - stage - 1) + (layout.virtual_pipeline - 1) * layout.pipeline + 1, shape.microbatches * layout.virtual_pipeline)
    return layers // layout.virtual_pipeline * chunks


def stage_memory(shape: Shape, stage: int) -> StageMemory:
    """Of one process of pipeline stage `stage` (from 0)."""
    model, layout, e = shape.model, shape.layout, BYTES[shape.precision]
    parameters = parameters_of(shape, stage)
    owned = -(-parameters // (shape.data_size * layout.context)) if layout.distributed_optimizer else parameters
    main = FP32 * (shape.precision != "fp32")  # fp32 weights beside those in half precision
    per_layer, in_flight = layer_bytes(shape, shape.recompute), layers_in_flight(shape, stage)
    micros = -(-in_flight // (model.num_layers // layout.pipeline))
    stream = shape.row_tokens * model.hidden_size * e
    # Of every micro-batch in flight: its batch and, between stages, what is sent and received.
    around = micros * (shape.tokens * layout.context * BATCH_BYTES + (stream * 2 if layout.pipeline > 1 else 0))
    last, first = stage == layout.pipeline - 1, stage == 0
    vocabulary = model.vocab_size // layout.tensor
    rows = min(max(LOSS_CHUNK[shape.device] // (e * vocabulary), FEWEST_ROWS), shape.tokens)
    chunk = rows * vocabulary * e if last else 0
    matrix = vocabulary * model.hidden_size
    again = layer_bytes(shape, False) if shape.recompute else 0
    teacher, teaching = _teacher(shape) if last else (0, 0)
    # A tied embedding's gradient from the head waits for the one from the look-up until the end of the backward pass.
    waiting = matrix * e if last and first and model.tied_embeddings else 0
    moments = {"a layer's backward pass": again + layer_working(shape) + waiting}
    if last:
        # What the final norm and the head keep; under sequence parallelism the norm's output is there beside the whole sequences.
        states = stream + shape.tokens * model.hidden_size * e + (gathered(shape) + stream if layout.sequence_parallel else 0)
        # The head's gradients are made with the losses: of the states, and of the matrix in fp32. In half precision a chunk's product is
        # made before it is added; torch widens it first on a CPU.
        product = matrix * (e + (FP32 if shape.device == "cpu" else 0)) if e < FP32 else 0
        moments["loss"] = states + shape.tokens * model.hidden_size * e + matrix * FP32 + product + chunk + teaching
    if first:
        moments["the embedding's gradient"] = waiting + matrix * e + 2 * stream - per_layer * in_flight
    return StageMemory(
        stage, model.num_layers // layout.pipeline, parameters * e, parameters * FP32, owned * (2 * FP32 + main), per_layer, in_flight, around, teacher, chunk, moments,
    )  # fmt: skip


def _teacher(shape: Shape) -> tuple[int, int]:
    """(weights, what is there of its answer beside the student's loss) of a live teacher."""
    teacher, layout = shape.teacher, shape.layout
    if teacher is None:
        return 0, 0
    e, cut = BYTES[shape.teacher_precision], 1
    if not shape.foreign_teacher and not any(size % layout.tensor for size in (teacher.num_heads, teacher.num_kv_heads, teacher.ffn_size, teacher.hidden_size)):
        cut = layout.tensor  # like the student
    tokens = shape.micro_batch * shape.seq_length if shape.foreign_teacher else shape.tokens
    vocabulary = shape.model.vocab_size // layout.tensor
    rows = min(max(LOSS_CHUNK[shape.device] // (BYTES[shape.precision] * vocabulary), FEWEST_ROWS), shape.tokens)
    return teacher.parameters() * e // cut, rows * vocabulary * e + tokens * teacher.hidden_size * e


def largest(shape: Shape) -> StageMemory:
    """The stage that needs most."""
    return max((stage_memory(shape, stage) for stage in range(shape.layout.pipeline)), key=lambda memory: memory.peak)


def shape_of(config: Any, model: ModelConfig, data_size: int, device: Literal["cpu", "gpu"], teacher: ModelConfig | None = None) -> Shape:
    """Of a train step's settings. `data_size`: copies of the model."""
    per_copy = max(config.sequences_per_step // (int(config.micro_batch) * data_size), 1)
    live = config.objective == "distill" and not config.distill.cache_top_k
    foreign = live and config.distill.teacher is not None
    return Shape(
        model, config.layout, data_size, int(config.micro_batch), int(config.seq_length), per_copy, config.precision, config.recompute, device,
        teacher if live else None, "fp32" if (config.distill.teacher.precision if foreign else config.precision) == "fp32" else "bf16", foreign,
    )  # fmt: skip
