"""What a recipe implies: parameters, steps, tokens and epochs per source, bytes, FLOPs. Torch-free, for `--dry-run`.

Every number comes from the settings alone; what only a run can tell (how many tokens a corpus has, what influence weighs) is
named in `notes` instead of being guessed. FLOPs count matrix products (`ModelConfig.flops_per_token`) of full sequences with
causal attention; they leave out validation, RankMe and norms, and with `reset_documents` they are an upper bound.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_r1.config.units import Epochs
from megatron_r1.model.config import ModelConfig
from megatron_r1.pipeline.recipe import Recipe
from megatron_r1.utils.errors import R1Error
from megatron_r1.utils.logging import human

FP32, FLOAT64 = 4, 8
BYTES_PER_TRAINED_PARAMETER = {"fp32": 3 * FP32, "bf16": 2 + 3 * FP32, "fp8": 2 + 3 * FP32}
"""A checkpoint holds the fp32 weights and Adam's two fp32 moments, and the model's own weights where they are not fp32."""
TOP_K_BYTES = 4 + 4
"""One cached teacher entry: float32 log-probability and int32 token."""
SMALL_VOCABULARY = 65500
"""Megatron's rule for `.bin` files: below this, tokens are stored in 2 bytes, otherwise in 4."""


OPEN = {
    "random": "shares are drawn around the natural ones",
    "regmix": "shares follow the proxies' losses",
    "doremi": "shares follow the group-DRO training",
    "perplexity": "shares follow the reference model's perplexities",
}
"""Method of a mixture -> why its shares are known only when it runs."""


@dataclass(frozen=True)
class SourcePlan:
    """What one source contributes to a training phase."""

    share: float
    tokens: int | None = None
    pool: int | None = None
    """Tokens the source has for training, when the recipe states its size (`expected_tokens`)."""

    @property
    def epochs(self) -> float | None:
        """Passes over the source."""
        return self.tokens / self.pool if self.tokens is not None and self.pool else None


@dataclass(frozen=True)
class StepPlan:
    """Derived values of one step; None where a value does not apply or is known only after an earlier step ran."""

    step: str
    stage: str
    does: str
    parameters: int | None = None
    non_embedding_parameters: int | None = None
    sequences_per_step: int | None = None
    tokens_per_step: int | None = None
    steps: int | None = None
    tokens: int | None = None
    flops: int | None = None
    precision: str | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    """What is written -> bytes."""
    sources: dict[str, SourcePlan] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int | None:
        """All that is written, as far as it is known."""
        return sum(self.sizes.values()) if self.sizes else None


def derive(recipe: Recipe) -> list[StepPlan]:
    """One plan per step, in the order of the recipe. Raises ConfigError only through the recipe's own lookups."""
    by_stage: dict[str, Callable[[Recipe, str], dict[str, Any]]] = {
        "corpus": _corpus, "probe": _probe, "mixture": _mixture, "train": _train, "influence": _influence, "evaluate": _model_only, "export": _export,
    }
    plans = []
    for step, config in recipe.steps.items():
        found = by_stage.get(config.stage, lambda recipe, step: {})(recipe, step)
        plans.append(StepPlan(step, config.stage, recipe.stage(step).describe(config), **found))
    return plans


# -------------------------------------------------------------------- models and data of a step


def model_of(recipe: Recipe, step: str) -> ModelConfig:
    """The model of a train step: its own, or the one it starts from with its changes."""
    config: Any = recipe.steps[step]
    if config.model is not None:
        return config.model
    changes = {name: value for name, value in config.model_changes.model_dump().items() if value is not None}
    return model_of(recipe, config.inputs.checkpoint).replace(**changes)


def pools(recipe: Recipe, step: str) -> dict[str, int | None]:
    """Source -> tokens it is expected to have for training (None: not stated) of a corpus step, held-out shares taken off."""
    config: Any = recipe.steps[step]
    kept = 1 - config.splits.probe - config.splits.test
    return {name: None if source.expected_tokens is None else round(source.expected_tokens * kept) for name, source in config.sources.items()}


def shares(recipe: Recipe, step: str) -> tuple[dict[str, float], str]:
    """(source -> share of the tokens, "") of a train or mixture step; ({}, reason) when only the run can tell."""
    config: Any = recipe.steps[step]
    if config.stage == "train" and config.inputs.mixture is not None:
        return shares(recipe, config.inputs.mixture)
    names = list(pools(recipe, config.inputs.shards))
    if config.stage == "mixture":
        stated = config.method if config.stated is None else config.stated
        names = config.sources or names
    else:
        stated = config.sources
    if isinstance(stated, dict):
        return _normalised(stated), ""
    if stated == "uniform":
        return _normalised(dict.fromkeys(names, 1.0)), ""
    if stated == "natural":
        known = {name: tokens for name, tokens in pools(recipe, config.inputs.shards).items() if name in names}
        if all(known.values()):
            return _normalised({name: float(tokens or 0) for name, tokens in known.items()}), ""
        return {}, f"shares follow the sizes {config.inputs.shards} will find"
    if stated in ("influence", "kl"):
        steps = config.inputs.influence
        return {}, f"shares follow the influence {steps if isinstance(steps, str) else ', '.join(steps)} will measure"
    if stated == "without":
        return _left_out(recipe, step, names)
    if stated in OPEN:
        return {}, OPEN[stated]
    return {}, "every conversation once per epoch"


def _left_out(recipe: Recipe, step: str, names: Iterable[str]) -> tuple[dict[str, float], str]:
    """Shares of method without, where those it starts from are known."""
    config: Any = recipe.steps[step]
    if config.inputs.base is not None:
        before, reason = shares(recipe, config.inputs.base)
    else:
        known = pools(recipe, config.inputs.shards)
        before = {name: float(known[name] or 0) for name in names} if all(known.get(name) for name in names) else {}
        reason = f"shares follow the sizes {config.inputs.shards} will find"
    rest = {name: share for name, share in before.items() if name != config.without}
    return (_normalised(rest), "") if sum(rest.values()) > 0 else ({}, reason)


def _normalised(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _planned(recipe: Recipe, corpus: str, split: Mapping[str, float], tokens: int | None) -> dict[str, SourcePlan]:
    known = pools(recipe, corpus)
    return {name: SourcePlan(share, None if tokens is None else round(tokens * share), known.get(name)) for name, share in split.items()}


# -------------------------------------------------------------------- stages


def _corpus(recipe: Recipe, step: str) -> dict[str, Any]:
    config: Any = recipe.steps[step]
    known = {name: source.expected_tokens for name, source in config.sources.items()}
    total = sum(int(tokens or 0) for tokens in known.values())
    unknown = [name for name, tokens in known.items() if tokens is None]
    vocabulary = next((model_of(recipe, name).vocab_size for name in _trained_on(recipe, step)), None)
    found: dict[str, Any] = {"sources": {name: SourcePlan(tokens / total, None, int(tokens)) for name, tokens in known.items() if tokens}}
    if total:
        found["tokens"] = total
        if vocabulary is not None:
            found["sizes"] = {"shards": total * (2 if vocabulary < SMALL_VOCABULARY else 4)}
    if unknown:
        found["notes"] = (f"size known after the step: {', '.join(unknown)}",)
    return found


def _trained_on(recipe: Recipe, corpus: str) -> Iterable[str]:
    return (name for name, config in recipe.steps.items() if config.stage == "train" and config.inputs.shards == corpus)  # type: ignore[attr-defined]


def _probe(recipe: Recipe, step: str) -> dict[str, Any]:
    config: Any = recipe.steps[step]
    return {"tokens": sum(config.windows.values()) * config.tokens_per_document, "notes": ("tokens: at most, for windows of full length",)}


def _mixture(recipe: Recipe, step: str) -> dict[str, Any]:
    config: Any = recipe.steps[step]
    split, reason = shares(recipe, step)
    tokens = None if config.budget is None else int(config.budget)
    return {"sources": _planned(recipe, config.inputs.shards, split, tokens), "notes": (reason,) if reason else ()}


def _train(recipe: Recipe, step: str) -> dict[str, Any]:
    config: Any = recipe.steps[step]
    model = model_of(recipe, step)
    length, per_step = int(config.seq_length), config.sequences_per_step
    notes: list[str] = []
    split, reason = shares(recipe, step)
    if reason:
        notes.append(reason)
    pool = pools(recipe, config.inputs.shards)
    steps = config.steps()
    if isinstance(config.budget, Epochs):
        used = [pool.get(name) for name in (split or pool)]
        if config.objective == "grpo":
            rows = _expected_rows(recipe, config.inputs.shards)
            most = f", at most {config.steps(rows * config.grpo.generations)}" if rows else ""
            notes.append(f"steps known when {config.inputs.shards} is read: {config.budget} of the questions whose answer can be checked{most}")
        elif used and all(used):
            steps = config.steps(sum(tokens or 0 for tokens in used) // length)
            notes.append("steps from the expected tokens; exact after packing")
        else:
            rows = _expected_rows(recipe, config.inputs.shards)
            most = f", at most {config.steps(rows)} (one conversation per sequence)" if rows else ""
            notes.append(f"steps known after {config.inputs.shards}: {config.budget} of what it packs into{most}")
    tokens = None if steps is None else steps * int(config.global_batch)
    flops = None
    if tokens is not None:
        flops = tokens * model.flops_per_token(length, training=True)
        if config.objective == "distill":
            teacher = teacher_of(recipe, config)
            if teacher is None:
                notes.append("FLOPs without the teacher's forward passes: its size is not known here")
            else:
                flops += tokens * teacher.flops_per_token(length, training=False)
        if config.objective == "grpo":
            flops += tokens * model.flops_per_token(length, training=False)
            notes.append("tokens and FLOPs: at most, for answers that fill their sequences; with the passes that write them")
        if config.inputs.reference is not None:
            flops += tokens * model_of(recipe, config.inputs.reference).flops_per_token(length, training=False)
    if not model.max_positions >= length:
        notes.append(f"seq_length {length} is longer than the model's max_positions {model.max_positions}")
    kept = max(config.checkpoints.evenly, 1) + (config.checkpoints.keep if config.checkpoints.every is not None else 0)
    sizes = {"checkpoints": kept * model.parameters() * BYTES_PER_TRAINED_PARAMETER[config.precision]}
    if config.objective == "distill" and config.distill.cache_top_k and tokens is not None:
        sizes["teacher cache (temporary)"] = tokens * config.distill.cache_top_k * TOP_K_BYTES
    return {
        "parameters": model.parameters(), "non_embedding_parameters": model.non_embedding_parameters(), "sequences_per_step": per_step,
        "tokens_per_step": int(config.global_batch), "steps": steps, "tokens": tokens, "flops": flops, "precision": config.precision, "sizes": sizes,
        "sources": _planned(recipe, config.inputs.shards, split, tokens), "notes": tuple(notes),
    }


def _expected_rows(recipe: Recipe, corpus: str) -> int | None:
    config: Any = recipe.steps[corpus]
    rows = [source.expected_documents for source in config.sources.values()]
    return round(sum(rows) * (1 - config.splits.probe - config.splits.test)) if all(rows) else None


def teacher_of(recipe: Recipe, config: Any) -> ModelConfig | None:
    """The teacher's shape: a train step's, or that of a Hugging Face folder when it lies on this machine."""
    if config.inputs.teacher is not None:
        return model_of(recipe, config.inputs.teacher)
    folder = config.distill.teacher.hf_folder
    path = Path(folder) / "config.json" if folder else None
    if path is None or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
        heads = found["num_attention_heads"]
        head_dim = found.get("head_dim") or found["hidden_size"] // heads
        return ModelConfig(
            vocab_size=found["vocab_size"], hidden_size=found["hidden_size"], num_layers=found["num_hidden_layers"], num_heads=heads,
            num_kv_heads=found.get("num_key_value_heads", heads), head_dim=head_dim,
            ffn_size=found.get("intermediate_size_mlp") or found["intermediate_size"], tied_embeddings=found.get("tie_word_embeddings", False),
        )
    except (ValueError, KeyError, TypeError, OSError):
        return None  # a decoder of another make: its FLOPs are named as unknown in the notes


def _influence(recipe: Recipe, step: str) -> dict[str, Any]:
    """Forwards of the engine: per checkpoint, a gradient of the probes (3), those of every document (folds: see `fold_documents`), of
    the rows scored twice or by kinds of parameters, of the curvature's documents, and the receipt."""
    config: Any = recipe.steps[step]
    probe: Any = recipe.steps[config.inputs.probe]
    model = model_of(recipe, config.inputs.checkpoint)
    named = config.capabilities or list(probe.capabilities)
    capabilities, length = len(named), config.tokens_per_document
    documents = config.documents * len(config.sources or pools(recipe, config.inputs.shards))
    look = sum(probe.windows[name] for name in named) * probe.tokens_per_document
    split = 0 if config.probe_folds == 1 else documents // config.documents * (config.fold_documents or config.documents)
    receipt = config.validity.batches * (3 * config.validity.documents * length + look) + (look if config.validity.batches else 0)
    check = config.check_forwards(capabilities) * min(config.fd_check_documents, documents)
    check += config.share_forwards(capabilities) * min(config.share_documents, documents)
    estimated = config.curvature_forwards(capabilities * (config.probe_folds + (config.probe_folds > 1)))
    check += estimated * config.curvature.documents * documents // config.documents
    scores = config.scoring_forwards(capabilities * config.probe_folds) * split + config.scoring_forwards(capabilities) * (documents - split)
    forwards = config.checkpoints * (3 * look + (scores + check) * length + receipt)
    notes = ["FLOPs: at most, for documents of full length"]
    folds = config.probe_folds if config.probe_folds > 1 else 0
    stored = documents * config.checkpoints * capabilities * (1 + folds) * FLOAT64
    if config.score_unit == "document":
        notes = ["FLOPs: whole documents are scored; counted here as one window each, so more in proportion to their length"]
    if config.checkpoint_choice != "evenly":
        notes.append("FLOPs: without the probe losses of all checkpoints, by which some are chosen")
    return {
        "parameters": model.parameters(), "non_embedding_parameters": model.non_embedding_parameters(), "tokens": documents * length,
        "flops": forwards * model.flops_per_token(length, training=False), "precision": config.precision, "sizes": {"scores": stored}, "notes": tuple(notes),
    }


def _model_only(recipe: Recipe, step: str) -> dict[str, Any]:
    model = model_of(recipe, recipe.steps[step].inputs.checkpoint)  # type: ignore[attr-defined]
    return {"parameters": model.parameters(), "non_embedding_parameters": model.non_embedding_parameters()}


def _export(recipe: Recipe, step: str) -> dict[str, Any]:
    config: Any = recipe.steps[step]
    found = _model_only(recipe, step)
    return {**found, "sizes": {"weights": found["parameters"] * (FP32 if config.dtype == "float32" else 2)}}


# -------------------------------------------------------------------- printing


def together(plans: Iterable[StepPlan], families: Mapping[str, list[str]]) -> list[StepPlan]:
    """One plan per family in the place of its first step: tokens, FLOPs and bytes of all that are given, the rest where all agree."""
    family_of = {name: (family, names) for family, names in families.items() for name in names}
    by_step = {plan.step: plan for plan in plans}
    found = []
    for plan in by_step.values():
        family, names = family_of.get(plan.step, ("", [plan.step]))
        names = [name for name in names if name in by_step]
        if not family:
            found.append(plan)
        elif plan.step == min(names, key=list(by_step).index):
            found.append(_summed(f"{family}-* ({len(names)})", [by_step[name] for name in names]))
    return found


def _summed(label: str, plans: list[StepPlan]) -> StepPlan:
    def total(values: list[int | None]) -> int | None:
        return None if None in values else sum(value or 0 for value in values)

    def agreed(values: list[Any]) -> Any:
        return values[0] if all(value == values[0] for value in values) else None

    first = plans[0]
    same = agreed([plan.sources for plan in plans])
    notes = first.notes if same is not None else (*first.notes, "shares differ between these steps")
    sizes = {name: sum(plan.sizes.get(name, 0) for plan in plans) for name in first.sizes}
    return StepPlan(
        label, first.stage, f"{first.does}" + (f"  (so {first.step}, the others alike)" if len(plans) > 1 else ""),
        *(agreed([getattr(plan, name) for plan in plans]) for name in ("parameters", "non_embedding_parameters", "sequences_per_step", "tokens_per_step", "steps")),
        tokens=total([plan.tokens for plan in plans]), flops=total([plan.flops for plan in plans]), precision=agreed([plan.precision for plan in plans]), sizes=sizes, sources=same or {}, notes=notes,
    )  # fmt: skip


def print_plans(plans: Iterable[StepPlan], console: Console, families: Mapping[str, list[str]] | None = None) -> None:
    """Two tables: the steps, and what every source gives to every phase; then one line per step on what it would do. A family
    is one line with the sums of its steps."""
    plans = together(plans, families or {})
    columns = right("parameters", "sequences a step", "steps", "tokens", "FLOPs", "on disk")
    steps = Table("step", "stage", *columns, title="derived values", title_justify="left")
    for plan in plans:
        batch = "" if plan.sequences_per_step is None else f"{plan.sequences_per_step:,}"
        steps.add_row(
            plan.step, plan.stage, _count(plan.parameters), batch, _count(plan.steps), "" if plan.tokens is None else human(plan.tokens),
            "" if plan.flops is None else f"{plan.flops:.3g}", "" if plan.bytes is None else size(plan.bytes),
        )
    console.print(steps)
    data = Table("step", "source", *right("share", "tokens", "pool", "epochs"), title="sources", title_justify="left")
    trained = [_shares(plan) for plan in plans if plan.stage == "train"]
    for plan in plans:
        if plan.stage == "mixture" and _shares(plan) in trained:
            continue  # the phase that trains on it says the same
        for number, (name, source) in enumerate(plan.sources.items()):
            data.add_row(
                plan.step if number == 0 else "", name, f"{100 * source.share:.2f} %", "" if source.tokens is None else human(source.tokens),
                "" if source.pool is None else human(source.pool), "" if source.epochs is None else f"{source.epochs:.2f}",
                end_section=number == len(plan.sources) - 1,
            )
    if data.row_count:
        console.print(data)
    for plan in plans:
        console.print(f"{plan.step}: {plan.does}", markup=False, soft_wrap=True)
        for note in plan.notes:
            console.print(f"    {note}", markup=False, soft_wrap=True)


def _shares(plan: StepPlan) -> dict[str, float]:
    return {name: source.share for name, source in plan.sources.items()}


def right(*titles: str) -> list[Any]:
    """Columns of numbers."""
    from rich.table import Column

    return [Column(title, justify="right") for title in titles]


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def size(nbytes: float) -> str:
    """Bytes for people: 1536 -> '1.5 KiB'."""
    if nbytes < 0:
        raise R1Error(expected="a size of 0 bytes or more", found=str(nbytes), fix="report this as a defect")
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if nbytes < 1024 or unit == "TiB":
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}" if nbytes < 1000 else f"{nbytes:.0f} {unit}"
        nbytes /= 1024
    return ""
