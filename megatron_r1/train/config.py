"""Settings of the train stage: pre-training, mid-training with distillation, supervised fine-tuning, training on rewards. Torch-free."""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from megatron_r1.config.base import HOW, Frozen, StageConfig, StepName
from megatron_r1.config.units import Duration, Epochs, Samples, Steps, Tokens
from megatron_r1.data.pretrained import PretrainedConfig
from megatron_r1.model.config import ModelConfig
from megatron_r1.parallel.config import LayoutConfig, Precision
from megatron_r1.utils.logging import human

Objective = Literal["next_token", "distill", "sft", "group_dro", "grpo"]
CONVERSATIONS = ("sft", "grpo")
"""Objectives whose samples are conversations: no cursors are carried, shares need not be stated."""
Every = Steps | Tokens


def _count(value: Any) -> Any:
    """A micro-batch is always counted in sequences, so here (and only here) a bare integer is unambiguous."""
    return Samples(value) if type(value) is int else value


def _positive(value: Any) -> Any:
    if value is not None and value <= 0:
        raise ValueError(f"expected a quantity above zero; found {value}; give at least 1")
    return value


class TrainInputs(Frozen):
    """Steps whose artifacts this step reads."""

    shards: StepName = Field(description="corpus step whose token shards are trained on")
    mixture: StepName | None = Field(None, description="mixture step that gives the share of every source (or set `sources`)")
    checkpoint: StepName | None = Field(None, description="train step to start from (its final checkpoint); none: random weights")
    teacher: StepName | None = Field(None, description="train step whose final checkpoint is the teacher of the distill objective")
    reference: StepName | None = Field(None, description="train step whose final checkpoint is the reference model of group_dro, or of grpo with a kl_weight")
    probe: StepName | None = Field(
        None, description="probe step whose documents, per capability, are the validation set of the `probe` curves and what `scores` are measured against"
    )


class ModelChanges(Frozen):
    """What a new phase may change of the model it starts from: nothing that has weights."""

    rope_theta: float | None = Field(None, gt=1, description="new RoPE base (long-context phases multiply it)")
    max_positions: int | None = Field(None, gt=0, description="new longest sequence the model is declared for")


class LRConfig(Frozen):
    """Learning rate as a pure function of the step. Step t (first step t=0) with W warm-up steps, N steps in all."""

    peak: float = Field(gt=0, description="highest learning rate, reached at the end of warm-up")
    schedule: Literal["linear", "cosine", "constant", "wsd"] = Field(
        "linear", description="shape after warm-up; wsd is warm-up, stable, then linear decay over the last `decay_ratio` of the steps"
    )
    warmup: Steps | Tokens | Annotated[float, Field(ge=0, lt=1)] = Field(
        Steps(0), union_mode="left_to_right", description="linear warm-up: '2k steps', '8B tokens', or a share of all steps such as 0.03"
    )
    final_ratio: float = Field(0.0, ge=0, le=1, description="learning rate at the end of the schedule divided by the peak")
    decay_ratio: float = Field(0.2, gt=0, le=1, description="share of all steps in which wsd decays; unused by the other schedules")


class OptimizerConfig(Frozen):
    """AdamW with decoupled weight decay (none on norm gains) and global gradient-norm clipping."""

    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay of all matrices, embedding included")
    clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0 turns clipping off")


class CheckpointsConfig(Frozen):
    """Which steps are saved and kept. The last step is always saved and kept."""

    every: Every | None = Field(None, description="save this often for resuming; none: only `evenly` ones and the last")
    keep: Annotated[int, Field(ge=1)] = Field(2, description="how many of the newest `every` checkpoints stay on disk besides the even ones")
    evenly: int = Field(0, ge=0, description="T checkpoints at steps N*1/T ... N*T/T, all kept: what influence is measured at")
    background: bool = Field(True, json_schema_extra=HOW, description="copy the state to host memory and write it while training goes on; false: wait, and need no memory for the copy")


class ValidationConfig(Frozen):
    """Loss on held-out text per capability, domain and source, on the same tokens every time."""

    every: Every | None = Field(None, description="how often the probe and source curves are measured besides the first and last step (the test curves only there)")
    tokens: Tokens = Field(Tokens(16384), description="at most this many tokens per curve (capability or domain, and split); '0 tokens' turns validation off")
    source_tokens: Tokens = Field(Tokens(2048), description="at most this many tokens of the probe split of each source with a share (curves source/<name>); '0 tokens': none")


class RankMeConfig(Frozen):
    """Effective rank of the final hidden states (Garrido et al. 2023; MobileLLM-R1 v1 Eq. 9)."""

    every: Every | None = Field(None, description="how often; none: only after the last step")
    samples: Samples = Field(Samples(0), description="number of sequences, one token of each; '0 samples' turns it off; published protocol: 25600")
    warn_below: Annotated[float, Field(gt=0)] | None = Field(
        None, description="a warning when it is lower; in MobileLLM-R1 v1 App. B runs that did well later lie at 20, others at 14 and below; none: no warning"
    )


class ScoresConfig(Frozen):
    """Scores of every document while it is trained on, along a probe gradient of some steps ago (docs/influence.md, In training)."""

    every: Every = Field(Steps(20), description="how often the probe gradients are taken anew; in between they lag behind the weights")
    rank: Annotated[int, Field(ge=1)] | None = Field(
        16, description="rank the probe gradient of every matrix is cut down to, with the error recorded; none: the whole gradient, at a higher price"
    )
    documents: Annotated[int, Field(ge=1)] | None = Field(16, description="at most this many probe windows per capability, shared between its sources; none: all")
    preconditioner: Literal["adam", "none"] = Field(
        "adam", description="adam: what the optimizer's own second moment, bias correction and eps make of the probe gradient; none: the gradient itself"
    )


class DistillConfig(Frozen):
    """Loss = kd_weight * T^2 * KL(teacher || student at temperature T) + (1 - kd_weight) * next-token loss."""

    temperature: float = Field(1.0, gt=0, description="T: both distributions are softmax(logits / T)")
    kd_weight: float = Field(1.0, ge=0, le=1, description="share of the KL term; 1.0 is pure KL, the published recipe")
    cache_top_k: Annotated[int, Field(gt=0)] | None = Field(
        None, description="store the teacher's k largest logits of every training position once, before training; none: run the teacher in every step"
    )
    teacher: PretrainedConfig | None = Field(
        None, description="teacher from outside the recipe, with the very tokenizer of the shards; none: the step named in inputs.teacher"
    )


class SftConfig(Frozen):
    """Fine-tuning on conversations."""

    mask: Literal["assistant", "all"] = Field("assistant", description="tokens that are targets: the assistant's (with its <|eot_id|>) or all of a conversation")
    too_long: Literal["cut", "error"] = Field("cut", description="conversations longer than seq_length: cut, they lose their end, counted in the log and the summary; error, nothing is trained")


class GroupDroConfig(Frozen):
    """Domain weights that follow the excess loss over a reference model (DoReMi, arXiv 2305.10429, Algorithm 1)."""

    step_size: float = Field(1.0, gt=0, description="eta of the exponentiated gradient, per nat of excess loss (paper: 1)")
    smoothing: float = Field(1e-3, gt=0, lt=1, description="c: share of the uniform mixture mixed in after every update (paper: 0.001)")


class GrpoConfig(Frozen):
    """Training on rewards: GRPO (arXiv 2402.03300) with one update per batch of generations (docs/training.md, On rewards)."""

    generations: int = Field(8, ge=2, description="answers written per question; global_batch / seq_length is questions x generations")
    max_new_tokens: int = Field(1024, gt=0, description="longest answer in tokens; questions longer than what seq_length leaves are left out")
    variant: Literal["grpo", "dapo", "dr_grpo"] = Field(
        "grpo", description="what a token weighs: grpo, the mean over each answer; dapo, the mean over all tokens of the step (arXiv 2503.14476); "
        "dr_grpo, the sum divided by max_new_tokens, and rewards not divided by their deviation (arXiv 2503.20783)"
    )
    format_reward: float = Field(0.1, ge=0, description="reward of an answer that ends by itself and gives its result behind a mark; the right result earns 1")
    kl_weight: float = Field(0.0, ge=0, description="weight of the divergence from inputs.reference (k3 estimate per token); published: 0, no reference")
    batch_size: int = Field(64, gt=0, description="answers written at once by one process")


class LoaderConfig(Frozen):
    """How batches get from the shards to the device. The samples are the same whatever is set here, and so is the step's fingerprint."""

    backend: Literal["threads", "dali"] = Field(
        "threads", description="threads: read by threads, uploaded from pinned memory beside the computation; dali: uploaded by NVIDIA DALI (an optional package)"
    )
    ahead: Annotated[int, Field(ge=1)] = Field(2, description="steps that are read before they are needed")
    workers: Annotated[int, Field(ge=1)] = Field(1, description="threads that read, each a whole step")


class ScheduledSources(Frozen):
    """Shares that hold from some token of the phase on."""

    start: Tokens = Field(gt=0, description="tokens of this phase after which these shares begin to hold (up to the next whole sequence)")
    sources: dict[str, float] | Literal["natural", "uniform"] = Field(description="share of every source: numbers, or natural (by tokens), or uniform")
    over: Tokens = Field(Tokens(0), description="span from `start` over which the shares move linearly from those before to these; '0 tokens': at once")
    jumps: int = Field(10, ge=1, description="in how many equal steps they move")


class LogConfig(Frozen):
    """What is written down while training."""

    every: Steps = Field(Steps(10), description="a record in metrics.jsonl (and TensorBoard) every so many steps")
    tensorboard: bool = Field(True, description="also write TensorBoard event files (needs the tensorboard package)")


class GuardConfig(Frozen):
    """What happens when a loss or gradient is not finite or leaps: skip, hold, roll back (docs/training.md, When a step goes wrong)."""

    spike: Annotated[float, Field(gt=0)] | None = Field(
        8.0, description="standard deviations above the median of the last `window` updates from which a loss, or a gradient norm on a logarithmic scale, is a spike; none: only what is not finite counts"
    )
    window: int = Field(128, ge=8, description="updates whose losses and gradient norms say what is usual; before a quarter of them nothing is a spike")
    skip: int = Field(3, ge=0, description="bad steps of an incident at which only the update is skipped")
    hold: int = Field(2, ge=0, description="bad steps after those at which the learning rate is held down too; the next one goes back to a checkpoint")
    hold_factor: float = Field(0.5, gt=0, le=1, description="what the scheduled learning rate is multiplied by while it is held down")
    hold_steps: Steps = Field(Steps(100), description="how long it is held down")
    recovery: int = Field(10, ge=1, description="good steps in a row that end an incident")
    rollbacks: int = Field(3, ge=0, description="how often a phase may go back to the last good checkpoint and leave data out before it gives up")
    skip_before: Steps = Field(Steps(0), description="steps before an incident's first that a rollback leaves out as well, as far as the checkpoint lets it")


class WatchConfig(Frozen):
    """What watches a run and changes nothing about it."""

    hang_after: Duration | None = Field(
        Duration(300), description="a step that takes longer is reported with its phase and this rank's Python stacks, in the log and in tmp/hangs; none: off"
    )
    stragglers_every: Steps = Field(Steps(100), description="how often the ranks compare their times; slow ones are named in the log; '0 steps': never")
    slow: float = Field(1.2, gt=1, description="a rank is slow whose own time is above so many times the median of all ranks")
    peak_tflops: Annotated[float, Field(gt=0)] | None = Field(
        None, description="peak of one device in 1e12 operations per second, dense, at the precision used: what mfu is a share of; none: known from the device's name"
    )
    wandb: str | None = Field(None, description="project of Weights & Biases that gets the metrics too (an optional package; WANDB_MODE=offline needs no network); none: off")


class TrainConfig(StageConfig):
    """One training phase. The learning rate belongs to `global_batch`, which is stated in tokens and independent of the machine."""

    stage: Literal["train"] = Field("train", description="which stage this step runs")
    inputs: TrainInputs = Field(description="steps this one reads")
    objective: Objective = Field("next_token", description="next_token, distill (KL to a teacher), sft (masked, packed conversations), group_dro (next token, sources weighted by their excess loss: DoReMi's proxy) or grpo (answers of the model's own, by their rewards)")
    model: ModelConfig | None = Field(None, description="model to initialise: a preset name or its sizes; none: the input checkpoint's model")
    model_changes: ModelChanges = Field(ModelChanges(), description="changes to the input checkpoint's model")
    budget: Tokens | Steps | Epochs = Field(description="how long: '2T tokens', '500k steps' or '2 epochs' (of all sources together)")
    global_batch: Tokens = Field(description="tokens per optimizer step over all ranks; a multiple of seq_length")
    micro_batch: Annotated[Samples, BeforeValidator(_count)] = Field(Samples(1), description="sequences one rank handles at a time: '16 samples' or 16")
    seq_length: Tokens = Field(description="tokens per training sequence")
    lr: LRConfig = Field(description="learning-rate schedule")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="AdamW's constants")
    reset_optimizer: bool = Field(True, description="start a new phase with fresh optimizer moments (false: carry the input checkpoint's)")
    layout: LayoutConfig = Field(LayoutConfig(), description="tensor, pipeline, context and data parallelism")
    precision: Precision = Field(
        "fp32", description="number format of forward and backward; optimizer state is fp32 in all. fp8: bf16 with the layers' matrix products by Transformer Engine in FP8, on GPUs (docs/training.md)"
    )
    recompute: bool = Field(False, description="compute each layer's activations again in the backward pass: less memory, a third more computation")
    reset_documents: bool = Field(True, description="no attention across documents of a packed sequence (false: allowed, as in the published recipe)")
    sources: dict[str, float] | Literal["natural", "uniform"] | None = Field(
        None, description="share of every source, instead of a mixture step: numbers, or natural (by tokens), or uniform"
    )
    schedule: list[ScheduledSources] = Field([], description="later shares, by their start; until the first of them the mixture step's or those of `sources` hold")
    max_epochs: dict[str, Annotated[float, Field(gt=0)]] | Annotated[float, Field(gt=0)] | None = Field(
        None, description="passes over a source since training began, of every source or by name, after which its share goes to the others in proportion"
    )
    carry_cursors: bool = Field(True, description="go on reading every source where the input checkpoint stopped (same shards)")
    checkpoints: CheckpointsConfig = Field(CheckpointsConfig(), description="which steps are saved")
    validation: ValidationConfig = Field(ValidationConfig(), description="held-out loss while training")
    rankme: RankMeConfig = Field(RankMeConfig(), description="effective rank while training")
    scores: ScoresConfig | None = Field(None, description="score every document while training on it; needs inputs.probe; none: off")
    distill: DistillConfig = Field(DistillConfig(), description="settings of the distill objective")
    sft: SftConfig = Field(SftConfig(), description="settings of the sft objective")
    group_dro: GroupDroConfig = Field(GroupDroConfig(), description="settings of the group_dro objective")
    grpo: GrpoConfig = Field(GrpoConfig(), description="settings of the grpo objective")
    loader: LoaderConfig = Field(LoaderConfig(), description="reading ahead and uploading", json_schema_extra=HOW)
    log: LogConfig = Field(LogConfig(), description="metrics and TensorBoard")
    guard: GuardConfig = Field(GuardConfig(), description="losses and gradients that are not finite or leap")
    deterministic: bool = Field(False, description="only operations that give the same bits every time, an error where there is none (docs/training.md says what it costs)")
    time_limit: Duration | None = Field(
        None, description="save and exit with status 85 after this time since the job began, such as '23.5 h'; none: no limit", json_schema_extra=HOW
    )
    watch: WatchConfig = Field(WatchConfig(), description="hangs, slow ranks, mfu, Weights & Biases", json_schema_extra=HOW)

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        for name in ("budget", "global_batch", "micro_batch", "seq_length"):
            _positive(getattr(self, name))
        _positive(self.log.every)
        if self.global_batch % self.seq_length:
            raise ValueError(
                f"expected global_batch to be a multiple of seq_length; found {int(self.global_batch)} and {int(self.seq_length)} tokens; "
                f"use {int(self.seq_length) * max(1, round(self.global_batch / self.seq_length))} tokens"
            )
        if self.layout.context > 1 and self.scores is not None:
            raise ValueError(f"layout: expected context: 1 with scores, which need whole sequences; found context: {self.layout.context}; use tensor, pipeline or data parallelism")
        if self.inputs.checkpoint is None and self.model is None:
            raise ValueError("expected a model or inputs.checkpoint; found neither; name a preset (model: tiny) or the train step to start from")
        if self.inputs.checkpoint is not None and self.model is not None:
            raise ValueError("expected a model or inputs.checkpoint; found both; remove model (use model_changes for rope_theta and max_positions)")
        if self.inputs.mixture is not None and self.sources is not None:
            raise ValueError("expected inputs.mixture or sources; found both; keep one")
        if self.objective not in CONVERSATIONS and self.inputs.mixture is None and self.sources is None:
            raise ValueError("expected inputs.mixture or sources; found neither; name a mixture step, give shares, or write sources: natural")
        for table in (self.sources, *(piece.sources for piece in self.schedule)):
            if isinstance(table, dict) and (not table or min(table.values()) < 0 or max(table.values()) <= 0):
                raise ValueError(f"expected shares >= 0 with a sum above 0; found {table}; they are divided by their sum")
        for before, piece in itertools.pairwise(self.schedule):
            if piece.start < max(before.start + 1, before.start + before.over):
                raise ValueError(
                    f"schedule: expected each start after the one before and after its `over`; found {int(piece.start)} after {int(before.start)} + {int(before.over)} tokens; move it"
                )
        if self.objective in (*CONVERSATIONS, "group_dro") and (self.schedule or self.max_epochs is not None):
            raise ValueError(f"expected neither schedule nor max_epochs with objective {self.objective}; found one; it has shares of its own, remove the setting")
        if self.objective == "distill" and (self.inputs.teacher is None) == (self.distill.teacher is None):
            raise ValueError("expected one teacher for objective distill: inputs.teacher or distill.teacher; found " + ("none" if self.inputs.teacher is None else "both") + "; give exactly one")
        if self.objective != "distill" and (self.inputs.teacher is not None or self.distill.teacher is not None):
            raise ValueError(f"expected no teacher with objective {self.objective}; found one; set objective: distill or remove it")
        if (self.objective == "group_dro" or (self.objective == "grpo" and self.grpo.kl_weight > 0)) != (self.inputs.reference is not None):
            raise ValueError(
                f"expected inputs.reference with objective group_dro or with grpo.kl_weight, and only then; found objective {self.objective} "
                f"{'without' if self.inputs.reference is None else 'with'} it; name the train step whose losses the excess, or the divergence, is over"
            )
        if self.objective == "grpo":
            self._check_grpo()
        if self.scores is not None and self.objective != "next_token":
            raise ValueError(
                f"expected objective next_token with scores; found {self.objective}, whose loss is not the one a probe gradient compares with; "
                "remove scores, or score its checkpoints with an influence step"
            )
        if self.scores is not None and self.precision == "fp8":
            raise ValueError("expected precision fp32 or bf16 with scores; found fp8, whose layers do not let their inputs be heard; remove scores, or score its checkpoints with an influence step")
        if self.scores is not None and self.inputs.probe is None:
            raise ValueError("expected inputs.probe with scores; found none; name the probe step whose documents stand for the capabilities")
        if self.scores is not None:
            _positive(self.scores.every)
        return self

    def _check_grpo(self) -> None:
        """Raises ValueError."""
        if self.precision == "fp8":
            raise ValueError("expected precision fp32 or bf16 with objective grpo; found fp8, whose products take no single tokens, which answers are written by; set precision: bf16")
        if self.sequences_per_step % self.grpo.generations:
            raise ValueError(
                f"expected global_batch / seq_length to be a multiple of grpo.generations; found {self.sequences_per_step} sequences and {self.grpo.generations}; "
                f"use {int(self.seq_length) * self.grpo.generations} tokens for every question of a step"
            )
        if self.grpo.max_new_tokens >= self.seq_length:
            raise ValueError(
                f"expected seq_length above grpo.max_new_tokens, with room for a question; found {int(self.seq_length)} and {self.grpo.max_new_tokens} tokens; raise seq_length"
            )
        for name in ("tensor", "pipeline", "context"):
            if (degree := getattr(self.layout, name)) > 1:
                raise ValueError(
                    f"layout: expected {name}: 1 with objective grpo, because every process writes its own answers with a model that is whole; found {name}: {degree}; "
                    "use data parallelism, with distributed_optimizer and recompute where memory is short"
                )

    @property
    def sequences_per_step(self) -> int:
        """Sequences in one optimizer step over all ranks."""
        return int(self.global_batch) // int(self.seq_length)

    def steps(self, sequences_per_epoch: int | None = None) -> int | None:
        """Optimizer steps of this phase: the smallest number that reaches the budget. None for an Epochs budget while the
        number of sequences per epoch is unknown."""
        if isinstance(self.budget, Steps):
            return int(self.budget)
        if isinstance(self.budget, Tokens):
            return max(1, -(-int(self.budget) // int(self.global_batch)))
        if sequences_per_epoch is None:
            return None
        return max(1, math.ceil(float(self.budget) * sequences_per_epoch / self.sequences_per_step - 1e-9))

    def in_steps(self, quantity: Steps | Tokens | float | None, total: int) -> int | None:
        """A span given in steps, tokens (rounded to the nearest step, at least one) or as a share of `total` steps."""
        if quantity is None:
            return None
        if isinstance(quantity, Steps):
            return int(quantity)
        if isinstance(quantity, Tokens):
            return max(1, round(int(quantity) / int(self.global_batch)))
        return math.ceil(quantity * total)


def describe(config: TrainConfig) -> str:
    """One line on what the step would do, for --dry-run."""
    model = f"{human(config.model.parameters())} parameters from scratch" if config.model is not None else f"from {config.inputs.checkpoint}"
    steps = config.steps()
    length = f"{config.budget}" if steps is None else f"{steps} steps = {human(steps * int(config.global_batch))} tokens"
    data = config.inputs.mixture or (config.sources if isinstance(config.sources, str) else "stated shares" if config.sources else "all conversations")
    data += f", {len(config.schedule)} later shares" if config.schedule else ""
    teacher = config.inputs.teacher or (config.distill.teacher and (config.distill.teacher.package or config.distill.teacher.hf_folder))
    if config.objective == "grpo":
        data += f", {config.sequences_per_step // config.grpo.generations} questions x {config.grpo.generations} answers a step"
    beside = f" with teacher {teacher}" if teacher else f" against {config.inputs.reference}" if config.inputs.reference else ""
    return (
        f"train {config.objective}{beside}: {model}, {length} of {int(config.global_batch)} tokens "
        f"({config.sequences_per_step} x {int(config.seq_length)}), lr {config.lr.peak:g} {config.lr.schedule}, data {data}"
    )
