"""The sieves that run a model, in the paper's order (arXiv 2509.24945 v1, section 5.1.1): quality, reasoning, domain, semantic.

Each asks only about what the one before left, so the expensive ones read a small part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_r1.artifacts.probe import JudgeCheck, JudgeRecord, QualityRecord
from megatron_r1.data.shards import ShardSet
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.probe.config import ProbeConfig, SemanticConfig
from megatron_r1.probe.judge import Judge, Question
from megatron_r1.probe.quality import CLASSIFIER_TOKENS, Published, features, train
from megatron_r1.probe.scores import Scores
from megatron_r1.probe.semantic import distinct
from megatron_r1.probe.sieves import SourceSieve, above, best, split, top
from megatron_r1.utils.logging import duration, get_logger, human
from megatron_r1.utils.seeding import generator
from megatron_r1.utils.statistics import auc

FOLDS = 5
CLASSIFIER_PART = 1024  # a classifier reads millions
WEAK = 0.5
log = get_logger(__name__)


@dataclass
class Judged:
    """What was found out besides the scores."""

    judge: JudgeRecord | None = None
    quality: QualityRecord | None = None
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """A remark a reader must know: kept, and said now."""
        self.notes.append(text)
        log.warning("probe: %s", text)


class Sieving:
    """The sieves that run a model, over the candidates of all sources. Collective: every process calls the same methods."""

    def __init__(self, config: ProbeConfig, shards: ShardSet, members: Mapping[str, Sequence[str]], store: Scores, ctx: ParallelContext) -> None:
        """members: source -> the capabilities it belongs to."""
        self.config, self.shards, self.members, self.store, self.ctx = config, shards, members, store, ctx
        self.found = Judged()
        self.judge = Judge(config.judge, ctx.device) if config.judge is not None else None

    def score(self, sieves: Sequence[SourceSieve]) -> None:
        """Measure the judge, then apply quality, reasoning and domain to every source."""
        rules = self.config.rules
        self._plan(sieves)
        if self.judge is not None:
            self._check(sieves)
        if rules.quality is not None:
            scores = self._quality(sieves)
            rule = rules.quality
            for sieve, values in zip(sieves, split(scores, sieves)):
                if rule.classifier is not None:
                    passed, threshold, relaxed = above(values, rule.above, rule.relaxed, rule.fewest)
                else:
                    passed, threshold, relaxed = top(values, 0.0, rule.fewest)
                    relaxed = f"no FineWeb-Edu score, so no threshold of its applies: the best {int(passed.sum())} of {len(values)} by the classifier trained here"
                self._keep(sieve, "quality", values, passed, threshold, relaxed, "raise rules.quality.fewest")
        for name in ("reasoning", "domain"):
            rule = getattr(rules, name)
            if rule is None:
                continue
            scores = self._ask(name, sieves, {sieve.source: self._question(name, sieve.source) for sieve in sieves})
            for sieve, values in zip(sieves, split(scores, sieves)):
                self._keep(sieve, name, values, *top(values, rule.keep, rule.fewest), f"raise rules.{name}.fewest")

    def deduplicate(self, rule: SemanticConfig, sieves: Sequence[SourceSieve]) -> None:
        """Drop windows that mean the same as a better one of any source, then keep the best of each source."""
        judge = self._judge()
        asked = {"embedding": 1, **self._identity()}
        pool = Pool(sieves)
        embeddings = self.store.of("semantic", asked, pool.windows, lambda rows: judge.embed(self._texts(pool, rows)))
        fresh = distinct(embeddings, np.concatenate([sieve.score for sieve in sieves]), rule.cosine)
        for sieve, passed in zip(sieves, split(fresh, sieves)):
            sieve.keep("semantic duplicates", passed, "raise rules.semantic.cosine", f"cosine <= {rule.cosine:g}")
            sieve.keep("best by score", best(sieve.score, rule.keep), "raise rules.semantic.keep", f"best {rule.keep}")

    def _keep(self, sieve: SourceSieve, name: str, scores: np.ndarray, passed: np.ndarray, threshold: str, relaxed: str, fix: str) -> None:
        sieve.score = scores
        sieve.keep(name, passed, fix, threshold, relaxed)
        log.info("probe: %s, %s: %s%s", name, sieve.source, threshold, f" (relaxed: {relaxed})" if relaxed else "")

    def _quality(self, sieves: Sequence[SourceSieve]) -> np.ndarray:
        rule, pool = self.config.rules.quality, Pool(sieves)
        assert rule is not None
        if rule.classifier is not None:
            published = Published(rule.classifier, self.ctx.device)
            self.found.quality = QualityRecord(kind="published", name=published.model.name_or_path.rstrip("/").rsplit("/", 1)[-1], sha256=published.sha256)
            asked = {"classifier": published.sha256, "tokenizer": self.shards.tokenizer.sha256}
            return self.store.of("quality", asked, pool.windows, lambda rows: published.scores(self._texts(pool, rows)), CLASSIFIER_PART)
        rows = pool.evenly(rule.labels)
        answers = self._ask_rows("quality labels", pool, rows, Question(rule.question, ("quality",)))
        labels = np.log(np.clip(answers, 1e-9, 1)) - np.log(np.clip(1 - answers, 1e-9, 1))
        fold = generator(self.config.seed or 0, "quality folds").permutation(len(rows)) % FOLDS
        trained = train(features(pool.tokens(rows), len(rows)), labels, fold)
        self.found.quality = QualityRecord(
            kind="trained", name="ridge regression of the judge's log-odds on hashed token 1- and 2-grams", labels=len(rows), ridge=trained.ridge,
            pearson=trained.pearson, spearman=trained.spearman,
        )
        said = "undefined" if trained.spearman is None else f"{trained.spearman:+.2f}"
        log.info("probe: quality: a classifier was trained here on %d answers of the judge; rank correlation with it on unseen documents %s", len(rows), said)
        if trained.spearman is None or trained.spearman < WEAK:
            self.found.note(
                f"quality: the classifier trained here on {len(rows)} answers foretells the judge's answers on unseen documents with a rank correlation of {said} only"
            )
        scores = [trained.scores(sieve.windows(), len(sieve)) for sieve in sieves]
        return np.concatenate(scores)

    def _question(self, name: str, source: str) -> Question:
        """What is asked about a source's documents."""
        rule = getattr(self.config.rules, name)
        return Question(rule.question, (name,)) if name != "domain" else self._domain(self.members[source])

    def _domain(self, capabilities: Sequence[str]) -> Question:
        """Whether a text belongs to one of the capabilities."""
        rule = self.config.rules.domain
        assert rule is not None
        return Question(rule.question.replace("{about}", " or ".join(rule.about[capability] for capability in capabilities)), tuple(capabilities))

    def _ask(self, name: str, sieves: Sequence[SourceSieve], questions: Mapping[str, Question]) -> np.ndarray:
        """The judge's scores for every candidate, [N]: those of sources with the same question together."""
        pool = Pool(sieves)
        scores = np.zeros(len(pool))
        for question in dict.fromkeys(questions.values()):
            rows = np.flatnonzero(np.array([questions[sieve.source] == question for sieve in sieves])[pool.owner])
            label = name if name != "domain" else f"domain {' or '.join(question.names)}"
            scores[rows] = self._ask_rows(label, pool, rows, question)
        return scores

    def _ask_rows(self, label: str, pool: Pool, rows: np.ndarray, question: Question) -> np.ndarray:
        judge = self._judge()
        asked = {"question": [question.text, *question.names], **self._identity()}
        if judge.rate() > 0:
            tokens = self._shown(pool.sizes[rows]) + len(rows) * judge.overhead(question)
            seconds = tokens / judge.rate() / self.ctx.data_size
            log.info("probe: %s: %d documents, about %s tokens, at most %s at the %s tokens/s measured", label, len(rows), human(tokens), duration(seconds), human(judge.rate()))
        return self.store.of(label, asked, pool.windows[rows], lambda part: judge.ask(self._texts(pool, rows[part]), [question])[0][:, 0])

    def _plan(self, sieves: Sequence[SourceSieve]) -> None:
        """What the models will read, at most, before they do."""
        rules, sizes = self.config.rules, np.concatenate([sieve.size for sieve in sieves])
        tokens = self._shown(sizes) / len(sizes)
        counts, said = {sieve.source: len(sieve) for sieve in sieves}, []
        if rules.quality is not None and rules.quality.classifier is not None:
            said.append(f"the quality classifier {sum(counts.values()):,} documents of up to {CLASSIFIER_TOKENS} tokens")
        elif rules.quality is not None:
            said.append(f"the judge {min(rules.quality.labels, len(sizes)):,} documents for labels")
            counts = {source: min(n, rules.quality.fewest) for source, n in counts.items()}
        for name in ("reasoning", "domain"):
            rule = getattr(rules, name)
            if rule is not None:
                said.append(f"the judge up to {sum(counts.values()):,} for {name} (about {human(sum(counts.values()) * tokens)} tokens and the question)")
                counts = {source: min(n, max(round(rule.keep * n), rule.fewest)) for source, n in counts.items()}
        if rules.semantic is not None:
            said.append(f"its embedding of up to {sum(counts.values()):,} for semantic duplicates")
        log.info("probe: to be read, of %d sources: %s", len(sieves), "; ".join(said))

    def _check(self, sieves: Sequence[SourceSieve]) -> None:
        """Measure the judge on documents of this run: against their own words in random order, and across capabilities."""
        config, judge, rules = self.config, self._judge(), self.config.rules
        assert config.judge is not None
        questions: dict[str, Question] = {}
        if rules.quality is not None and rules.quality.classifier is None:
            questions["quality"] = Question(rules.quality.question, ("quality",))
        if rules.reasoning is not None:
            questions["reasoning"] = Question(rules.reasoning.question, ("reasoning",))
        against_shuffled = list(questions)
        if rules.domain is not None:
            questions |= {f"domain {name}": self._domain([name]) for name in config.capabilities}
        record = JudgeRecord(
            model=config.judge.model.name, sha256=judge.sha256, precision=config.judge.model.precision, template=config.judge.template, tokens=config.judge.tokens,
            questions={name: question.text for name, question in questions.items()}, examples=len(config.judge.examples), checks=[],
        )
        if questions:
            pool = Pool(sieves)
            rows = pool.evenly(config.judge.checked)
            texts = self._texts(pool, rows)
            rng = generator(config.seed or 0, "judge check")
            shuffled = [" ".join(rng.permutation(text.split())) for text in texts]

            def measure(label: str, whose: list[str], asked: dict[str, Question]) -> dict[str, np.ndarray]:
                """question -> [n, 2]: score, and p of both answers together"""
                key = {"check": label, "questions": [[question.text, *question.names] for question in asked.values()], **self._identity()}
                found = self.store.of(
                    f"check {label}", key, pool.windows[rows], lambda part: np.stack(judge.ask([whose[i] for i in part], list(asked.values())), -1)
                )
                return {name: found[:, q] for q, name in enumerate(asked)}

            real = measure("documents", texts, questions)
            mixed = measure("shuffled", shuffled, {name: questions[name] for name in against_shuffled}) if against_shuffled else {}
            checks = [_compared(f"{name}: documents against their own words in random order", real[name], mixed[name]) for name in against_shuffled]
            for capability in config.capabilities if rules.domain is not None else ():
                inside = np.array([capability in self.members[sieves[o].source] for o in pool.owner[rows]])
                if inside.any() and not inside.all():
                    found = real[f"domain {capability}"]
                    checks.append(_compared(f"domain {capability}: documents of its sources against those of the others", found[inside], found[~inside]))
            record = record.model_copy(update={"checks": checks})
        self.found.judge = record
        for check in record.checks:
            said = f"judge {record.model}, {check.name}: AUC {check.auc:.2f} [{check.low:.2f}, {check.high:.2f}] (n = {check.first} and {check.second})"
            if check.verdict == "better than chance":
                log.info("probe: %s", said)
            else:
                self.found.note(f"{said} is {check.verdict}: this sieve does not choose what it is meant to")

    def _judge(self) -> Judge:
        assert self.judge is not None  # ProbeConfig checked that rules that ask have a judge
        return self.judge

    def _identity(self) -> dict[str, Any]:
        """What the judge's numbers depend on besides text and question."""
        assert self.config.judge is not None
        shown = self.config.judge.model_dump(mode="json", include={"template", "examples", "tokens", "batch"})
        return {**shown, "precision": self.config.judge.model.precision, "sha256": self._judge().sha256, "tokenizer": self.shards.tokenizer.sha256}

    def _shown(self, sizes: np.ndarray) -> int:
        """Tokens of windows as far as they are shown, counted in the shards' own."""
        return int(np.minimum(sizes, self.config.judge.tokens if self.config.judge is not None else CLASSIFIER_TOKENS).sum())

    def _texts(self, pool: Pool, rows: np.ndarray) -> list[str]:
        """Text of windows, by their numbers over all sources. Half characters at the edges are cut off."""
        info = self.shards.tokenizer.info
        special = [i for i in (info.bos_id, info.eos_id, info.pad_id, *info.chat_ids.values()) if i is not None]
        decode = self.shards.tokenizer.decode
        return [decode(tokens[~np.isin(tokens, special)].tolist()).strip("\ufffd") for tokens in pool.tokens(rows)]


def _compared(name: str, first: np.ndarray, second: np.ndarray) -> JudgeCheck:
    """first [n, 2], second [m, 2]: score, and p of both answers together."""
    value, low, high = auc(first[:, 0], second[:, 0])
    return JudgeCheck(name=name, auc=value, low=low, high=high, first=len(first), second=len(second), answered=float(np.concatenate([first, second])[:, 1].mean()))


class Pool:
    """The candidates of all sources as they are now, end to end. `windows` int64 [N, 4]: number of the source, document, first token,
    tokens, which tell one from another; `owner` int64 [N]: number of the source."""

    def __init__(self, sieves: Sequence[SourceSieve]) -> None:
        self._shards = [sieve.shard for sieve in sieves]
        self._place = np.concatenate([sieve.place for sieve in sieves])
        self.owner = np.repeat(np.arange(len(sieves)), [len(sieve) for sieve in sieves])
        self.windows = np.stack([self.owner, *(np.concatenate([getattr(sieve, column) for sieve in sieves]) for column in ("index", "start", "size"))], 1)

    def __len__(self) -> int:
        return len(self.owner)

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of every window, int64 [N]."""
        return self.windows[:, 3]

    def tokens(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Tokens of some windows, one after the other."""
        return (np.asarray(self._shards[self.owner[row]].read(int(self._place[row]), int(self.sizes[row]))) for row in rows)

    def evenly(self, count: int) -> np.ndarray:
        """Numbers of `count` candidates (or all), as many of each source as there are: the first of each in keyed order."""
        first = np.searchsorted(self.owner, self.owner)  # of the same source
        order = np.lexsort((self.owner, np.arange(len(self)) - first))  # the first of every source, then the second of every source, ...
        return np.sort(order[:count])
