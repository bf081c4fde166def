"""Generated tasks: the verifier, the constant guesser, and reasoning-gym as a second opinion."""

from __future__ import annotations

import importlib.util

import pytest
from evaluate_fakes import ByteTokenizer, FakeSubject
from pydantic import ValidationError

from megatron_r1.data.tasks import TASKS, solution, task_items
from megatron_r1.evaluate.config import GeneratedSettings
from megatron_r1.evaluate.results import bits_per_byte, prompt_hash
from megatron_r1.evaluate.tasks.generated import POOLED, Generated, gym_scorer, prompt

pytestmark = pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
NAMES = ["chain_sum", "gcd", "spell_backward", "gsm_symbolic", "calendar_arithmetic", "syllogism"]


def run(bench, names=NAMES, samples=12, **settings):
    outcome = Generated(GeneratedSettings(names=names, samples=samples, max_new_tokens=2000, **settings)).run(bench)
    return outcome, {m.result.task: m.result for m in outcome.measurements}


class Solver:
    """Answers with the reference solution of any test item; counts what it was asked."""

    def __init__(self, style=lambda item: solution(item)):
        self._style = style
        self._known = {}

    def __call__(self, text):
        if not self._known:
            for name in TASKS:
                for seed in (SEED,):
                    self._known |= {item["question"]: item for item in task_items(name, "test", 60, seed)}
        question = text.removeprefix("Question: ").removesuffix("\nAnswer:")
        return self._style(self._known[question])


@pytest.fixture(autouse=True)
def _seed(make_bench):
    from megatron_r1.utils.seeding import derive_seed

    global SEED
    SEED = derive_seed(make_bench().seed, "evaluate", "generated")


STYLES = {
    "reference": lambda item: solution(item),
    "boxed": lambda item: f"Let me think. So \\boxed{{{item['answer']}}}.",
    "phrase": lambda item: f"The answer is {item['answer']}.",
    "bare": lambda item: item["answer"],
}


@pytest.mark.parametrize("style", STYLES)
def test_right_answers_count_in_every_form(make_bench, style):
    outcome, found = run(make_bench(FakeSubject(answers=Solver(STYLES[style]))))
    for name in NAMES:
        assert found[name].value == 1.0, [s for s in outcome.samples if not s["correct"]][:2]
        assert found[name].n == 12
        assert found[name].group == "generated"
    assert found[POOLED].n == 12 * len(NAMES)
    assert all(sample["gym_score"] == 1.0 for sample in outcome.samples)


def test_wrong_answers_do_not_count(make_bench):
    def wrong(item):
        return f"#### {int(item['answer']) + 1}" if item["numeric"] else f"#### not {item['answer']}"

    outcome, found = run(make_bench(FakeSubject(answers=Solver(wrong))))
    assert found[POOLED].value == 0
    assert all(sample["gym_score"] < 1 for sample in outcome.samples)
    assert run(make_bench(FakeSubject(answers=lambda prompt: "")))[1][POOLED].value == 0


def test_chance_is_what_a_constant_guesser_gets(make_bench):
    guess = {"syllogism": "Yes", "gcd": "1"}
    for name, answer in guess.items():
        outcome, found = run(make_bench(FakeSubject(answers=lambda prompt, a=answer: f"#### {a}")), names=[name], samples=40)
        assert found[name].value <= found[name].chance
        common = max(set(truths := [s["truth"] for s in outcome.samples]), key=truths.count)
        best = run(make_bench(FakeSubject(answers=lambda prompt, a=common: f"#### {a}")), names=[name], samples=40)[1][name]
        assert best.value == best.chance


def test_only_held_out_questions_are_asked(make_bench):
    outcome, _ = run(make_bench(), samples=30)
    asked = {sample["question"] for sample in outcome.samples}
    for name in NAMES:
        assert not asked & {item["question"] for seed in (0, 1) for item in task_items(name, "train", 300, seed)}


def test_cost_of_the_solution_is_that_of_the_subject(make_bench):
    _, found = run(make_bench(FakeSubject(nats=lambda context, token: 1.0)), names=["chain_sum"])
    items = list(task_items("chain_sum", "test", 12, SEED))
    sizes = [len(solution(item).encode()) for item in items]
    expected = bits_per_byte("x", "x", [size + 1 for size in sizes], sizes, 100, make_bench().rng("x"), "")
    assert found["chain_sum: solution"].value == pytest.approx(expected.result.value)
    assert found["chain_sum: solution"].prompt_sha256 == prompt_hash(solution(item) for item in items)


def test_everyone_is_asked_the_same(make_bench):
    first, second = FakeSubject(), FakeSubject(answers=lambda prompt: "12")
    (_, a), (_, b) = run(make_bench(first)), run(make_bench(second))
    assert first.asked == second.asked
    assert {name: r.prompt_sha256 for name, r in a.items()} == {name: r.prompt_sha256 for name, r in b.items()}


def test_cut_answers_are_noted(make_bench):
    outcome = Generated(GeneratedSettings(names=["gcd"], samples=4, max_new_tokens=3)).run(make_bench(FakeSubject(answers=lambda prompt: "1234567")))
    assert outcome.measurements[0].result.note.endswith("4 of 4 answers cut")


def test_prompt_without_chat_tokens_is_plain_text():
    assert ByteTokenizer().decode(prompt(ByteTokenizer(), "1 + 1 =")) == "Question: 1 + 1 =\nAnswer:"


@pytest.mark.parametrize("names", [[], ["gcd", "gcd"], ["gdc"]])
def test_bad_names_are_refused_before_anything_runs(names):
    with pytest.raises(ValidationError) as caught:
        GeneratedSettings(names=names)
    assert names != ["gdc"] or "did you mean 'gcd'" in str(caught.value)


def test_the_second_opinion_is_strict_about_none():
    assert gym_scorer("chain_sum")(None, {"question": "q", "answer": "3", "template": "chain_sum"}) == 0.0
