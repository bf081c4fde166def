"""HumanEval tasks on four tiny problems with models that know, or do not know, the solutions."""

from __future__ import annotations

import pytest
from evaluate_fakes import ByteTokenizer, FakeSubject

from megatron_r1.evaluate.config import HumanEvalPassSettings, HumanEvalRankingSettings
from megatron_r1.evaluate.task import TaskDropped
from megatron_r1.evaluate.tasks import humaneval
from megatron_r1.evaluate.tasks.humaneval import PassAtOne, Problem, Ranking, cut, first_block

NAMES = ("add", "sub", "mul", "neg", "inc", "dec")
BODIES = ("a + b", "a - b", "a * b", "-a - b", "a + 1 + 0 * b", "a - 1 + 0 * b")
PROBLEMS = [
    Problem(
        f"T/{name}", f'def {name}(a, b):\n    """Do {name}."""\n', f"    return {body}\n",
        f"def check(candidate):\n    assert candidate(7, 5) == (lambda a, b: {body})(7, 5)\n", name,
    )
    for name, body in zip(NAMES, BODIES, strict=True)
]


@pytest.fixture(autouse=True)
def problems(monkeypatch):
    monkeypatch.setattr(humaneval, "load_problems", lambda limit: PROBLEMS[:limit])


def solution_of(prompt):
    return next(problem.solution for problem in PROBLEMS if problem.prompt == prompt)


def result(outcome):
    (measurement,) = outcome.measurements
    return measurement.result


def test_a_model_that_knows_the_solutions_passes(make_bench):
    knows = FakeSubject(answers=solution_of)
    found = result(PassAtOne(HumanEvalPassSettings()).run(make_bench(knows, allow_code_execution=True)))
    assert (found.value, found.n, found.metric) == (1.0, 6, "pass@1")
    assert found.low > 0.5


def test_zero_is_reported_with_its_interval(make_bench):
    outcome = PassAtOne(HumanEvalPassSettings()).run(make_bench(FakeSubject(answers=lambda prompt: "    return 'wrong'\n"), allow_code_execution=True))
    found = result(outcome)
    assert (found.value, found.low) == (0.0, 0.0)
    assert 0.3 < found.high < 0.5
    assert {sample["status"] for sample in outcome.samples} == {"failed"}
    assert all("AssertionError" in sample["detail"] for sample in outcome.samples)


def test_text_after_the_function_is_not_run(make_bench):
    talks = FakeSubject(answers=lambda prompt: solution_of(prompt) + "\nprint(open('/etc/passwd').read())\nraise ValueError\n")
    assert result(PassAtOne(HumanEvalPassSettings()).run(make_bench(talks, allow_code_execution=True))).value == 1.0


def test_code_is_not_run_unless_allowed(make_bench, monkeypatch):
    monkeypatch.setattr(humaneval, "run_program", lambda *a: pytest.fail("ran generated code"))
    with pytest.raises(TaskDropped, match="allow_code_execution"):
        PassAtOne(HumanEvalPassSettings()).run(make_bench())


def test_ranking_finds_a_model_that_knows(make_bench):
    tokenizer = ByteTokenizer()

    def nats(context, token):
        text = tokenizer.decode(context)
        right = next((p for p in PROBLEMS if text.startswith(p.prompt)), None)
        rest = (right.prompt + right.solution).encode() if right else b""
        return 0.1 if len(context) < len(rest) and rest[len(context)] == token else 2.0

    outcome = Ranking(HumanEvalRankingSettings()).run(make_bench(FakeSubject(nats=nats)))
    found = result(outcome)
    assert (found.value, found.n, found.chance) == (1.0, 6, 0.25)
    for sample in outcome.samples:
        assert len(set(sample["options"])) == 4
        assert sample["options"][0] == sample["id"]


def test_ties_do_not_count_as_knowledge(make_bench):
    """A model without any preference scores 0, not 1/4 or 1: 'the first option' must not win."""
    assert result(Ranking(HumanEvalRankingSettings()).run(make_bench(FakeSubject(nats=lambda context, token: 1.0)))).value == 0.0


def test_long_solutions_are_not_punished_for_their_length(make_bench):
    """Mean nats per token, not the sum: with noise that ignores the content each option wins about equally often."""
    subject = FakeSubject(nats=lambda context, token: (hash((len(context), token, sum(context))) % 1000) / 1000)
    outcome = Ranking(HumanEvalRankingSettings()).run(make_bench(subject))
    assert all(0.2 < score < 0.8 for sample in outcome.samples for score in sample["nats_per_token"])


@pytest.mark.parametrize(
    ("prompt", "solution", "limit", "kept"),
    [(10, 5, 20, (10, 5)), (100, 5, 20, (15, 5)), (5, 100, 20, (5, 15)), (100, 100, 20, (10, 10)), (3, 100, 20, (3, 17))],
)
def test_cut(prompt, solution, limit, kept):
    head, tail = cut(list(range(prompt)), list(range(1000, 1000 + solution)), limit)
    assert (len(head), len(tail)) == kept
    assert head == list(range(prompt))[-kept[0] :]
    assert tail == list(range(1000, 1000 + kept[1]))


@pytest.mark.parametrize(
    ("text", "block"),
    [("    return 1\n\nprint(2)", "    return 1\n"), ("    x = 1\n    if x:\n        pass\n", "    x = 1\n    if x:\n        pass\n"), ("    a\n# end\n    b", "    a"), ("", "")],
)
def test_first_block(text, block):
    assert first_block(text) == block
