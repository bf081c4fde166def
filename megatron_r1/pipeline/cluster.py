"""`megatron-r1 plan`: what a recipe needs of a cluster. Memory, tokens a second, days, GPU-hours and cost of every step. Torch-free.

Memory comes from `pipeline.memory`, FLOPs from `pipeline.derive`; how fast a GPU really is can only be measured, so the plan states the
speed it assumes (a share of the peak, or what a training log says) and derives everything else from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table

from megatron_r1.config.base import Frozen
from megatron_r1.config.load import read_yaml, validate
from megatron_r1.config.units import Bytes
from megatron_r1.model.config import ModelConfig
from megatron_r1.pipeline.derive import StepPlan, derive, model_of, right, size, teacher_of, together
from megatron_r1.pipeline.memory import StageMemory, largest, shape_of
from megatron_r1.pipeline.recipe import Recipe
from megatron_r1.utils.devices import device
from megatron_r1.utils.errors import ConfigError, ParallelError
from megatron_r1.utils.logging import human

DEFAULT_MFU = 0.35
"""Between what the published run's table implies (0.23 to 0.29) and what well-tuned code of this size reaches (0.5)."""


class Cluster(Frozen):
    """The machines of a plan: a YAML file of these fields, or the same on the command line."""

    gpus: int = Field(gt=0, description="GPUs that work on one step")
    per_node: int = Field(8, gt=0, description="GPUs of one machine; tensor parallelism stays inside")
    gpu: str = Field("h100", description="device, a name of utils/devices.py; another one, such as cpu, needs memory and peak_tflops or tflops")
    peak_tflops: float | None = Field(None, gt=0, description="10^12 FLOP/s of dense products at best, at the steps' precision; none: the data sheet's")
    memory: Bytes | None = Field(None, gt=0, description="memory of one GPU, such as '80 GiB'; none: the data sheet's")
    reserve: Bytes = Field(Bytes(4 << 30), ge=0, description="memory of a GPU that is not the training step's: runtime, communication buffers, fragmentation")
    mfu: float = Field(DEFAULT_MFU, gt=0, le=1, description="share of the peak that training sustains, in the sense of ModelConfig.flops_per_token (causal attention)")
    tflops: float | None = Field(None, gt=0, allow_inf_nan=False, description="10^12 FLOP/s that one GPU sustains, measured; instead of mfu")
    price: float | None = Field(None, ge=0, description="of one GPU for one hour, in any currency; none: no costs")

    @model_validator(mode="after")
    def _known(self) -> Cluster:
        if self.tflops is not None and "mfu" in self.model_fields_set:
            raise ValueError(f"expected mfu or tflops; found {self.mfu:g} and {self.tflops:g}; the speed is stated by one of them")
        if self.gpus > self.per_node and self.gpus % self.per_node:
            raise ValueError(f"expected gpus to be a multiple of per_node; found {self.gpus} and {self.per_node}; count whole machines")
        if self.memory is None or (self.peak_tflops is None and self.tflops is None):
            device(self.gpu)
        if self.usable <= 0:
            raise ValueError(f"expected more memory than reserve keeps back ({size(int(self.reserve))}); found {size(self.usable + int(self.reserve))}; state a smaller reserve in a cluster file")
        return self

    def peak(self, precision: str | None = "bf16") -> float:
        """10^12 FLOP/s of one GPU at best."""
        return self.peak_tflops or (device(self.gpu).fp32 if precision == "fp32" else device(self.gpu).bf16)

    def sustained(self, precision: str | None = "bf16") -> float:
        """FLOP/s of all GPUs together."""
        return self.gpus * (self.tflops or self.mfu * self.peak(precision)) * 1e12

    @property
    def usable(self) -> int:
        """Bytes of one GPU that a training step may take."""
        return int(self.memory or device(self.gpu).memory) - int(self.reserve)

    def hours(self, flops: float, precision: str | None = "bf16") -> float:
        """All GPUs working together, without waiting for each other."""
        return flops / self.sustained(precision) / 3600

    def describe(self) -> str:
        """One line."""
        speed = f"{self.tflops:g} TFLOP/s each (given)" if self.tflops else f"{self.sustained() / self.gpus / 1e12:.0f} TFLOP/s each (assumed: {100 * self.mfu:g} % of the peak)"
        nodes = -(-self.gpus // self.per_node)
        return f"{self.gpus} x {self.gpu} ({nodes} node{'s' * (nodes > 1)}), {speed}, {size(self.usable)} of memory for a step"


def load_cluster(path: Path | None, **given: Any) -> Cluster:
    """A cluster from a file, or from what was given on the command line; what is None was not given. Raises ConfigError."""
    given = {name: value for name, value in given.items() if value is not None}
    if path is None and "gpus" not in given:
        raise ConfigError(expected="--cluster FILE or --gpus N", found="neither", fix="say what the recipe is to run on, e.g. --gpus 128 --gpu h100")
    if path is not None and not path.is_file():
        raise ConfigError(expected=f"a cluster file at {path}", found="no such file", fix="write one (docs/clusters.md), or give --gpus and --gpu")
    layer = read_yaml(path) if path is not None else None
    if layer is None:
        try:
            return Cluster.model_validate(given)
        except ValueError as error:
            reasons = [str(item["msg"]).removeprefix("Value error, ") + f" ({'.'.join(map(str, item['loc'])) or 'cluster'})" for item in error.errors()]  # type: ignore[attr-defined]
            raise ConfigError(expected="a possible cluster", found="; ".join(reasons), fix="correct the options (docs/clusters.md)") from None
    layer.data.update(given)
    return validate(Cluster, layer.data, layer)


# -------------------------------------------------------------------- one step


@dataclass(frozen=True)
class Need:
    """What a train step needs of one GPU. `changes`: settings by which it fits where it does not as it stands; None: nothing fits."""

    config: Any
    changes: dict[str, Any] | None
    memory: StageMemory
    recomputed: StageMemory
    data_size: int

    @property
    def microbatches(self) -> int:
        """Of one step and model copy."""
        return self.config.sequences_per_step // (int(self.config.micro_batch) * self.data_size)


def need(recipe: Recipe, step: str, cluster: Cluster) -> Need:
    """The step as it stands if that fits, else with the first change that makes it fit.

    Raises ParallelError when the layout or the batch can not be spread over the cluster.
    """
    config: Any = recipe.steps[step]
    model, teacher = model_of(recipe, step), teacher_of(recipe, config) if config.objective == "distill" else None
    first = _need(config, {}, model, teacher, cluster)
    if first.memory.peak <= cluster.usable:
        return first
    for changes in _changes(config, cluster):
        try:
            found = _need(config, changes, model, teacher, cluster)
        except ParallelError:
            continue
        if found.memory.peak <= cluster.usable:
            return found
    return Need(first.config, None, first.memory, first.recomputed, first.data_size)


def _need(config: Any, changes: dict[str, Any], model: ModelConfig, teacher: ModelConfig | None, cluster: Cluster) -> Need:
    layout = config.layout.model_copy(update={key.removeprefix("layout."): value for key, value in changes.items() if key.startswith("layout.")})
    plain = {key: value for key, value in changes.items() if not key.startswith("layout.")}
    config = config.model_copy(update={**plain, "layout": layout})
    layout.check_model(model, int(config.seq_length))
    copies = layout.data_size(cluster.gpus)
    if config.sequences_per_step % (int(config.micro_batch) * copies):
        fits = [n for n in range(int(config.micro_batch), 0, -1) if config.sequences_per_step % (n * copies) == 0]
        raise ParallelError(
            expected=f"{config.sequences_per_step} sequences a step to be a multiple of micro_batch x model copies",
            found=f"{int(config.micro_batch)} x {copies} ({cluster.gpus} GPUs)",
            fix=f"set micro_batch to {fits[0]}" if fits else f"the number of model copies has to divide {config.sequences_per_step}: use {_fewer(config.sequences_per_step, copies) * layout.model_parallel()} GPUs, for example",
        )  # fmt: skip
    kind = "cpu" if cluster.gpu == "cpu" else "gpu"
    shapes = [shape_of(config.model_copy(update={"recompute": again}), model, copies, kind, teacher) for again in (config.recompute, True)]
    return Need(config, changes, largest(shapes[0]), largest(shapes[1]), copies)


def _fewer(sequences: int, copies: int) -> int:
    """The largest number of model copies, up to `copies`, that shares the sequences out evenly."""
    return next(n for n in range(min(copies, sequences), 0, -1) if sequences % n == 0)


def _changes(config: Any, cluster: Cluster) -> Iterator[dict[str, Any]]:
    """From what costs nothing to what costs most: sharded optimizer, smaller micro-batches, recomputation, tensor parallelism."""
    sharded = {} if config.layout.distributed_optimizer else {"layout.distributed_optimizer": True}
    smaller = [type(config.micro_batch)(n) for n in range(int(config.micro_batch) - 1, 0, -1)]
    if sharded:
        yield sharded
    for again in ({}, {"recompute": True}) if not config.recompute else ({},):
        if again:
            yield {**sharded, **again}
        yield from ({**sharded, "micro_batch": micro, **again} for micro in smaller)
    for degree in (2, 4, 8):
        if config.layout.tensor < degree <= cluster.per_node:
            cut = {**sharded, "layout.tensor": degree, "layout.sequence_parallel": True, "recompute": True}
            yield from ({**cut, "micro_batch": micro} for micro in (config.micro_batch, *smaller))


# -------------------------------------------------------------------- printing


def print_cluster_plan(recipe: Recipe, cluster: Cluster, console: Console | None = None) -> None:
    """Tables of time and cost and of memory; then, step by step, what does not fit and what would."""
    if console is None:
        console = Console()
        console = console if console.is_terminal else Console(width=170)  # nothing is cut in a log
    console.print(f"{recipe.name} on {cluster.describe()}", markup=False, soft_wrap=True)
    plans = derive(recipe)
    needs: dict[str, Need] = {}
    notes = []
    for plan in (plan for plan in plans if plan.stage == "train"):
        try:
            needs[plan.step] = need(recipe, plan.step, cluster)
            notes += _remarks(plan.step, needs[plan.step], cluster, recipe)
        except ParallelError as error:
            notes.append(f"{plan.step} can not run like this: expected {error.expected}; found {error.found}; {error.fix}")
    notes += [f"{plan.step}: {note}" for plan in plans if plan.stage == "train" and plan.flops is None for note in plan.notes if "steps known" in note]
    slow = [plan.step for plan in together(plans, recipe.families) if plan.flops and plan.precision == "fp32"]
    if slow and cluster.tflops is None and cluster.peak_tflops is None:
        notes.append(f"in fp32, so at {100 * cluster.mfu:g} % of {cluster.peak('fp32'):g} TFLOP/s: {', '.join(slow)}")
    # What can not run has no hours; a family is shown when any of its steps can.
    possible = [plan for plan in plans if plan.stage != "train" or plan.step in needs]
    if needs:
        console.print(_times(together(possible, recipe.families), needs, cluster, complete=len(possible) == len(plans)))
        console.print(_memories(needs, recipe, cluster))
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)
    console.print(
        "hours: FLOPs of matrix products over the speed stated above; without reading data, validation, saving and waiting; `>` where a part is not known, as said above. "
        "Corpus, probe, mixture and report are work for CPUs.",
        markup=False, soft_wrap=True,
    )  # fmt: skip


def _remarks(step: str, found: Need, cluster: Cluster, recipe: Recipe) -> Iterable[str]:
    if found.changes is None:
        yield f"{step} does not fit: {size(found.memory.peak)} of {size(cluster.usable)}, and no smaller micro-batch, recomputation or tensor degree up to {cluster.per_node} helps"
    elif found.changes:
        values = {key: str(int(value)) if key == "micro_batch" else str(value).lower() for key, value in found.changes.items()}
        yield f"{step} does not fit as it stands; it fits with " + " ".join(f"--set steps.{step}.{key}={value}" for key, value in values.items())
    layout = found.config.layout
    if found.config.precision == "fp8":
        yield f"{step}: memory and hours are those of bf16: what FP8 copies take and what FP8 products save was not measured"
    if layout.pipeline > 1:
        idle = (layout.pipeline - 1) / (found.microbatches * (layout.virtual_pipeline or 1))
        yield f"{step}: the pipeline's bubble adds {100 * idle:.0f} % to its hours"
    if found.config.objective == "distill" and teacher_of(recipe, found.config) is None:
        folder = found.config.distill.teacher.hf_folder
        where = f"{Path(folder) / 'config.json'} is not on this machine, or is that of another kind of model; the file alone is enough" if folder else "it comes from a package"
        yield f"{step}: {'hours' if found.config.distill.cache_top_k else 'memory and hours'} without the teacher, whose size is not known here ({where})"


def _times(plans: Iterable[StepPlan], needs: dict[str, Need], cluster: Cluster, complete: bool) -> Table:
    """`complete`: no step is left out of `plans`."""
    cost = [] if cluster.price is None else ["cost"]
    table = Table("step", "layout", *right("micro-batch", "GPU memory", "tokens/s", "tokens", "hours", "days", "GPU-hours", *cost), title="time", title_justify="left")
    whole = 0.0
    for plan in plans:
        found = needs.get(plan.step)
        if found is None and plan.flops is None:
            continue
        hours = None if plan.flops is None else cluster.hours(plan.flops, plan.precision)
        known = not any("without the teacher" in note for note in plan.notes)
        complete &= known and hours is not None
        whole += hours or 0.0
        speed = f"{'' if known else '< '}{(plan.tokens or 0) / hours / 3600:,.0f}" if hours and plan.tokens and plan.stage == "train" else ""
        table.add_row(
            plan.step, "" if found is None else _layout(found), "" if found is None else f"{int(found.config.micro_batch)} x {found.microbatches}",
            "" if found is None else f"{size(found.memory.peak)}{'' if found.changes is not None else ' !'}", speed,
            "" if plan.tokens is None else human(plan.tokens), *_spent(hours, cluster, known),
        )  # fmt: skip
    table.add_section()
    table.add_row("together", "", "", "", "", "", *_spent(whole, cluster, complete))
    return table


def _spent(hours: float | None, cluster: Cluster, known: bool) -> list[str]:
    """Hours, days, GPU-hours and cost; not `known`: that is the least."""
    if hours is None:
        return ["", "", ""] + ([] if cluster.price is None else [""])
    found = [_number(hours), _number(hours / 24), _number(hours * cluster.gpus)] + ([] if cluster.price is None else [f"{hours * cluster.gpus * cluster.price:,.0f}"])
    return [text if known else f"> {text}" for text in found]


def _number(value: float) -> str:
    """1234.5 -> '1,234' and 0.01234 -> '0.0123'."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _layout(found: Need) -> str:
    layout = found.config.layout
    cuts = [f"{name} {degree}" for name, degree in (("tensor", layout.tensor), ("pipeline", layout.pipeline), ("context", layout.context)) if degree > 1]
    extra = [word for word, on in (("sharded optimizer", layout.distributed_optimizer), ("recompute", found.config.recompute)) if on]
    return ", ".join([*cuts, f"{found.data_size} cop{'y' if found.data_size == 1 else 'ies'}", *extra])


def _memories(needs: dict[str, Need], recipe: Recipe, cluster: Cluster) -> Table:
    columns = ("weights", "gradients", "optimizer", "teacher", "a layer", "activations", "logits", "at the peak", "peak", "peak, recomputed")
    table = Table("step", *right(*columns), "peak is at", title="memory of one GPU", title_justify="left")
    before: tuple[str, ...] = ()
    for step, found in needs.items():
        memory = found.memory
        numbers = (memory.weights, memory.gradients, memory.optimizer, memory.teacher, memory.per_layer, memory.activations, memory.loss_chunk, memory.working)
        row = (*map(size, numbers), size(memory.peak), size(found.recomputed.peak), memory.moment)
        table.add_row(step, *(row if row != before else ("as above", *[""] * (len(row) - 1))))
        before = row
    return table
