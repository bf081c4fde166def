"""Four-way multiple choice about countries by likelihood, with a control of countries no training text was about.

Questions come in blocks of four countries with four different values of one field; all four questions of a block offer the
same four values. A model that prefers some values whatever the country (because they are common words) is right in exactly
one of four, so chance is 25 % for any such preference, and the control tests leakage and nothing else. For the same reason
facts that the country's own name or adjective gives away ("Algeria": "Algiers") are not asked, nor the region, which the articles about
neighbours give away. Asked twice: as a text to go on with, and as a user's question in the chat template.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_r1.data.chat import render
from megatron_r1.data.factbook import control_countries, country_facts, country_group
from megatron_r1.data.tasks import ANSWER_MARK
from megatron_r1.evaluate.config import CountryMcqSettings
from megatron_r1.evaluate.results import Measurement, Outcome, prompt_hash, share
from megatron_r1.evaluate.task import Bench, TaskDropped, continuation_nats
from megatron_r1.utils.errors import DataError, EnvironmentProblem
from megatron_r1.utils.logging import get_logger

log = get_logger("evaluate.country_mcq")
OPTIONS = 4
CHANCE = 1 / OPTIONS
SHARED_LETTERS = 3
_WORD = re.compile(r"\w+")

CONTROL, TRAINED = "held-out countries", "countries"

# field -> (text to go on with, question of a user), worded as in the training text: recall is tested, not paraphrase.
FIELDS = {
    "capital": ("The capital of {country} is", "What is the capital of {country}?"),
    "currency": ("The currency of {country} is called", "What is the currency of {country}?"),
    "language": ("A main language of {country} is", "What is the main language of {country}?"),
}


@dataclass(frozen=True)
class Question:
    """One question: `options[right]` is the answer. `block` numbers the four questions that share their options."""

    country: str
    field: str
    options: tuple[str, ...]
    right: int
    block: int


class CountryMcq:
    """See the module."""

    name = "country_mcq"

    def __init__(self, settings: CountryMcqSettings) -> None:
        self.settings = settings

    def run(self, bench: Bench) -> Outcome:
        """Accuracy on countries of the training split and on control countries, as text and as chat."""
        try:
            facts, held_out = country_facts(), set(control_countries())
        except EnvironmentProblem as problem:
            raise TaskDropped(str(problem)) from problem
        measurements: list[Measurement] = []
        samples: list[dict[str, Any]] = []
        trained, control = countries(bench.shards, {fact["country"] for fact in facts}, held_out)
        pools = {
            TRAINED: ([fact for fact in facts if fact["country"] in trained], self.settings.questions),
            CONTROL: ([fact for fact in facts if fact["country"] in control], self.settings.control_questions),
        }
        for pool, (pool_facts, wanted) in pools.items():
            questions = blocks(pool_facts, wanted, bench.rng(self.name, pool))
            if len(questions) < wanted - wanted % OPTIONS:
                log.info("%s: %d questions can be asked, %d were wanted", pool, len(questions), wanted)
            if not questions:
                continue
            group = "control" if pool == CONTROL else "knowledge"
            for form in ("text", "chat") if bench.tokenizer.chat_template is not None else ("text",):
                asked = self._ask(bench, questions, form)
                shown = prompt_hash([FIELDS[q.field][form == "chat"], q.country, *q.options] for q in questions)
                note = "capital, currency, language; mean nats per token of four options"
                measurements.append(share(f"{pool}, {form}", group, "accuracy", [s["correct"] for s in asked], CHANCE, shown, note))
                samples += [{"pool": pool, "form": form, **sample} for sample in asked]
        return Outcome(measurements, samples)

    def _ask(self, bench: Bench, questions: list[Question], form: str) -> list[dict[str, Any]]:
        pairs = [(context(bench.tokenizer, q, form), continuation(bench, option, form)) for q in questions for option in q.options]
        nats = continuation_nats(bench.subject, pairs)
        means = np.array([total / len(tokens) for total, (_, tokens) in zip(nats, pairs, strict=True)]).reshape(-1, OPTIONS)
        asked = []
        for q, scores in zip(questions, means, strict=True):
            # A tie is not a right answer.
            correct = bool(scores[q.right] < np.delete(scores, q.right).min())
            asked.append(
                {"country": q.country, "field": q.field, "options": list(q.options), "right": q.right, "nats_per_token": scores.tolist(), "block": q.block, "correct": correct}
            )
        return asked


def countries(shards: Any | None, known: set[str], held_out: set[str]) -> tuple[set[str], set[str]]:
    """(countries the model may have read about, countries it may not have), by the shards' own document groups.

    Without shards, or when no training document is about a country, the list of held-out countries alone decides.
    Raises DataError when a held-out country has training documents: the control would be void.
    """
    seen: set[str] = set()
    for name in shards.sources if shards is not None else ():
        seen |= set(shards.split(name, "train").groups)
    read = {country for country in known if country_group(country) in seen}
    if not read:
        return known - held_out, held_out
    control = {country for country in held_out if country_group(country) in set(shards.control_groups)} if shards is not None else held_out
    if leaked := control & read:
        raise DataError(
            expected="no training document about a held-out country", found=f"some about {', '.join(sorted(leaked)[:4])}",
            fix="make the shards again with this release, or switch the task off with `tasks: {country_mcq: null}`",
        )
    if not control:
        log.warning("the shards hold no country out (splits.control_countries: 0): the control is left out")
    return read, control


def blocks(facts: list[dict[str, str]], wanted: int, rng: np.random.Generator) -> list[Question]:
    """At most `wanted` questions in blocks of four; each fact is asked at most once, fields take turns."""
    by_field: dict[str, list[dict[str, str]]] = defaultdict(list)
    adjective = {fact["country"]: fact["value"] for fact in facts if fact["field"] == "demonym"}
    for fact in facts:
        if fact["field"] in FIELDS and not given_away(f"{fact['country']} {adjective.get(fact['country'], '')}", fact["value"]):
            by_field[fact["field"]].append(fact)
    for field in by_field:
        by_field[field] = [by_field[field][i] for i in rng.permutation(len(by_field[field]))]
    questions: list[Question] = []
    while len(questions) + OPTIONS <= wanted:
        before = len(questions)
        for field in FIELDS:
            chosen = _four(by_field[field]) if len(questions) + OPTIONS <= wanted else []
            values = tuple(fact["value"] for fact in chosen)
            block = len(questions) // OPTIONS
            questions += [Question(fact["country"], field, values, i, block) for i, fact in enumerate(chosen)]
        if len(questions) == before:
            break
    return questions


def _four(facts: list[dict[str, str]]) -> list[dict[str, str]]:
    """Take four facts with different values off the list; the commonest values first, so that few facts are left over."""
    by_value: dict[str, list[dict[str, str]]] = defaultdict(list)
    for fact in facts:
        by_value[fact["value"]].append(fact)
    chosen = [group[0] for group in sorted(by_value.values(), key=len, reverse=True)[:OPTIONS]]
    if len(chosen) < OPTIONS:
        return []
    for fact in chosen:
        facts.remove(fact)
    return chosen


def given_away(names: str, value: str) -> bool:
    """Whether a word of the value begins like a word of the country's names (its name and the adjective made of it)."""
    stems = {word[:SHARED_LETTERS].casefold() for word in _WORD.findall(names) if len(word) >= SHARED_LETTERS}
    return any(word[:SHARED_LETTERS].casefold() in stems for word in _WORD.findall(value) if len(word) >= SHARED_LETTERS)


def context(tokenizer: Any, question: Question, form: str) -> list[int]:
    """What stands before the options."""
    text, asked = FIELDS[question.field]
    if form == "text":
        return tokenizer.encode(text.format(country=question.country))
    return render([{"role": "user", "content": asked.format(country=question.country)}], tokenizer, add_generation_prompt=True)[0]


def continuation(bench: Bench, option: str, form: str) -> list[int]:
    """One option as the model would write it."""
    return bench.tokenizer.encode(f" {option}." if form == "text" else f"{ANSWER_MARK} {option}")
