"""Settings of the probe stage (torch-free)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from megatron_r1.config.base import Frozen, StageConfig, StepName
from megatron_r1.config.units import Tokens
from megatron_r1.data.pretrained import PretrainedConfig

ABOUT = {
    "code": "source code and programming",
    "math": "mathematics",
    "knowledge": "general knowledge: facts about the world, science, history or people",
}


class ProbeInputs(Frozen):
    """The steps a probe is made from."""

    shards: StepName = Field(description="corpus step whose `probe` split holds the candidates")


class CapabilityConfig(Frozen):
    """Where one capability's probe documents come from."""

    sources: dict[str, float] = Field(
        min_length=1,
        description="source -> share of the capability's probe documents (relative numbers; they need not sum to 1). "
        "Several sources per capability keep one corpus' style from standing for the capability.",
    )
    documents: int | None = Field(default=None, ge=2, description="probe windows of this capability; none: the step's `documents`")

    @field_validator("sources")
    @classmethod
    def _positive(cls, sources: dict[str, float]) -> dict[str, float]:
        if any(not share > 0 for share in sources.values()):
            raise ValueError("every share must be above 0; leave a source out instead of giving it 0")
        return sources


class ExampleConfig(Frozen):
    """A text with the answers a person gives, which the judge is shown before every document."""

    text: str = Field(min_length=1, description="the text; of your own, never of a benchmark")
    yes: list[str] = Field(default=[], description="what it is answered with 1 for: quality, reasoning, a capability's name; 0 for all else")


class JudgeConfig(Frozen):
    """The language model that answers questions about documents with 1 or 0 (Ask-LLM, arXiv 2402.09668).

    The paper publishes neither its judge nor its prompts nor how much of a document it shows; all three are settings here.
    """

    model: PretrainedConfig = Field(description="any Hugging Face causal language model; one trained to follow instructions answers best")
    template: Literal["chat", "plain"] = Field(
        default="chat", description="chat: the tokenizer's own chat template; plain: text, question and an empty answer line, for a base model"
    )
    examples: list[ExampleConfig] = Field(
        default=[], description="answered examples shown before every document; a small judge answers at random without (docs/data.md)"
    )
    tokens: int = Field(default=1024, ge=8, description="tokens of the window (the judge's own) that it is shown, from the window's beginning")
    batch: Tokens = Field(default=Tokens(8192), description="tokens read at once, padding included; bounds the memory")
    checked: int = Field(
        default=64,
        ge=8,
        description="documents on which the judge itself is measured first: does it prefer them to their own words in random order, and tell the "
        "capabilities apart? The area under the curve is recorded with its interval",
    )


class QualityConfig(Frozen):
    """The first of the paper's sieves: a classifier's score."""

    classifier: str | None = Field(
        default=None,
        description="folder of the published FineWeb-Edu classifier (BERT with one output, 512 tokens). none: a small one is trained in the run on "
        "the judge's answers; its scores are no FineWeb-Edu scores, so no threshold applies and the best `fewest` documents are kept",
    )
    above: float = Field(default=4.0, description="a document passes when its raw score is above this (paper: 4)")
    relaxed: float = Field(default=3.5, description="where fewer than `fewest` pass, a raw score of this or more is enough; it rounds to 4")
    fewest: int = Field(ge=1, description="documents of each source that must be left; where the relaxed threshold leaves fewer, the best ones by score")
    labels: int = Field(default=1000, ge=20, le=5000, description="documents the judge labels to train a classifier on, evenly from all sources")
    question: str = Field(
        default="Is the text above well written and of high educational value? Answer 1 for yes or 0 for no.",
        min_length=1,
        description="what the judge is asked for a label; the published classifier was trained on a large model's marks for educational value",
    )


class AskConfig(Frozen):
    """One question to the judge. A document's score is p("1") / (p("1") + p("0"))."""

    keep: float = Field(default=0.1, gt=0, le=1, description="share of each source's documents that passes, the highest scores (paper: the top 10 %)")
    fewest: int = Field(ge=1, description="documents of each source that must be left; where the share is fewer, the best ones by score")
    question: str = Field(min_length=1, description="what the judge is asked after it has read the document")


class ReasoningConfig(AskConfig):
    """The paper's reasoning prompt, in our words: its own are not published."""

    question: str = Field(
        default="Does the text above belong in a dataset that tests reasoning: does it draw conclusions step by step, explain or solve something? "
        "Answer 1 for yes or 0 for no.",
        min_length=1,
        description="what the judge is asked after it has read the document",
    )


class DomainConfig(AskConfig):
    """The paper's domain prompt, in our words: its own are not published."""

    question: str = Field(
        default="Is the text above about {about}? Answer 1 for yes or 0 for no.",
        min_length=1,
        description="what the judge is asked; {about} becomes the capability's words below, for a source of several capabilities all of them, joined by 'or'",
    )
    about: dict[str, str] = Field(default=ABOUT, description="capability -> what its documents are about")


class SemanticConfig(Frozen):
    """Semantic de-duplication across all sources, then a cut to the best."""

    cosine: float = Field(
        default=0.95,
        gt=0,
        le=1,
        description="of two windows whose embeddings (the judge's last hidden states, mean over tokens, less the mean over all windows) have a cosine "
        "above this, the one with the lower score is dropped",
    )
    keep: int = Field(default=10_000, ge=1, description="documents of each source that are left at most, the highest scores (paper: about 10,000)")


class RulesConfig(Frozen):
    """The sieves, in the order they are applied. Each one's counts in and out are recorded."""

    candidates: int = Field(
        default=4000,
        ge=1,
        description="documents per source drawn from the probe split before any rule; bounds the cost on large corpora",
    )
    min_tokens: int = Field(
        default=64, ge=2, description="shorter documents are left out: a few tokens say little about a capability"
    )
    max_tokens: int | None = Field(
        default=None, ge=2, description="longer documents are left out (data files in disguise); no limit by default"
    )
    near_duplicate: float = Field(
        default=0.7,
        gt=0,
        le=1,
        description="a window that has this share of its different token 5-grams or more in common with an already kept window is dropped (estimated; "
        "of two windows the share of the one with more n-grams counts)",
    )
    ngram: int = Field(
        default=13,
        ge=3,
        le=64,
        description="length in tokens of the n-grams compared with the training and held-out documents",
    )
    max_overlap: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="a window is dropped when more than this share of its n-grams occurs in the training split of "
        "any source, "
        "or in a held-out split (evaluation documents). Templated corpora share phrases between documents, so 0 "
        "would empty them; "
        "benchmark items themselves are removed by the corpus stage at a single shared n-gram.",
    )
    compare: Tokens = Field(
        default=Tokens(1_000_000_000),
        description="tokens per source and split that windows are compared with for overlap; of a larger one its first "
        "tokens, which the result says",
    )
    quality: QualityConfig | None = Field(default=None, description="sieve by a classifier's score; none: left out")
    reasoning: ReasoningConfig | None = Field(default=None, description="sieve by the judge's answer to the reasoning prompt; none: left out")
    domain: DomainConfig | None = Field(default=None, description="sieve by the judge's answer to the domain prompt; none: left out")
    semantic: SemanticConfig | None = Field(default=None, description="semantic de-duplication across sources; none: left out")


class ProbeConfig(StageConfig):
    """Which held-out documents stand for which capability."""

    stage: Literal["probe"] = Field(default="probe", description="Which stage this step runs.")
    inputs: ProbeInputs = Field(description="The steps the probe reads.")
    capabilities: dict[str, CapabilityConfig] = Field(
        min_length=1, description="capability -> its sources, such as code, math, knowledge"
    )
    documents: int = Field(
        default=64,
        ge=2,
        description="probe windows per capability. Rankings from few windows are noise: 8 of 64 agree with Spearman "
        "0.36, 32 with 0.79",
    )
    tokens_per_document: int = Field(
        default=256, ge=8, description="predicted tokens per window; use the sequence length the model trains with"
    )
    window: Literal["random", "first"] = Field(
        default="random",
        description="random: the window begins anywhere in the document, as training blocks do; first: at its "
        "beginning (headers and licences)",
    )
    rules: RulesConfig = Field(default=RulesConfig(), description="the sieves")
    judge: JudgeConfig | None = Field(default=None, description="language model that rules.quality, reasoning, domain and semantic ask")

    @field_validator("capabilities")
    @classmethod
    def _names(cls, capabilities: dict[str, CapabilityConfig]) -> dict[str, CapabilityConfig]:
        for name in capabilities:
            if not name or any(mark in name for mark in "@#/"):
                raise ValueError(
                    f"capability name {name!r} must be non-empty and free of '@', '#' and '/': it becomes a column name"
                )
        return capabilities

    @model_validator(mode="after")
    def _judged(self) -> ProbeConfig:
        rules = self.rules
        asking = [name for name in ("reasoning", "domain", "semantic") if getattr(rules, name) is not None]
        if rules.quality is not None and rules.quality.classifier is None:
            asking.insert(0, "quality without a classifier")
        if asking and self.judge is None:
            raise ValueError(f"expected a judge, because rules ask one ({', '.join(asking)}); found none; name its model under `judge`, or set those rules to null")
        if self.judge is not None and not asking:
            raise ValueError("expected a rule that asks the judge (quality, reasoning, domain, semantic); found none; turn one on, or set judge to null")
        if rules.domain is not None and (unnamed := sorted(set(self.capabilities) - set(rules.domain.about))):
            raise ValueError(f"expected what {', '.join(unnamed)} is about; found nothing; add it to rules.domain.about")
        known = {"quality", "reasoning", *self.capabilities}
        if self.judge is not None and (strange := sorted({name for example in self.judge.examples for name in example.yes} - known)):
            raise ValueError(f"expected examples that answer {', '.join(sorted(known))}; found {', '.join(strange)}; correct judge.examples")
        if rules.domain is not None and "{about}" not in rules.domain.question:
            raise ValueError(f"expected {{about}} in rules.domain.question; found {rules.domain.question!r}; write {{about}} where the domain's name belongs")
        return self

    @property
    def windows(self) -> dict[str, int]:
        """Capability -> how many probe windows it is to have."""
        return {name: capability.documents or self.documents for name, capability in self.capabilities.items()}

    @property
    def needs_model(self) -> bool:
        """Whether the step runs a model, so that all processes of a job take part."""
        return self.judge is not None or self.rules.quality is not None


def describe(config: ProbeConfig) -> str:
    """Return one line that says what this step would do."""
    sources = len({source for capability in config.capabilities.values() for source in capability.sources})
    counts = sorted(set(config.windows.values()))
    documents = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    asked = [name for name in ("quality", "reasoning", "domain", "semantic") if getattr(config.rules, name) is not None]
    by = f", sieved by {', '.join(asked)}" if asked else ""
    judge = f" (judge: {config.judge.model.name})" if config.judge is not None else ""
    return (
        f"pick {documents} held-out windows of up to {config.tokens_per_document} tokens for each of "
        f"{', '.join(config.capabilities)} from {sources} source{'' if sources == 1 else 's'}{by}{judge}"
    )
