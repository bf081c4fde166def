"""HumanEval (arXiv 2107.03374), two ways: ranking of solutions by likelihood, and pass@1 by running what the model writes.

Ranking moves at sizes where pass@1 is still zero: the true solution against the solutions of three other problems, by mean
nats per token given the problem's prompt. A guesser is right in one of four. pass@1 is reported even when it is 0.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from megatron_r1.evaluate.config import HumanEvalPassSettings, HumanEvalRankingSettings
from megatron_r1.evaluate.results import Outcome, prompt_hash, share
from megatron_r1.evaluate.sandbox import Execution, guards, run_program
from megatron_r1.evaluate.task import Bench, TaskDropped, continuation_nats
from megatron_r1.utils.errors import EnvironmentProblem

WRONG_SOLUTIONS = 3
# A top-level statement after the function body: what a base model goes on with (arXiv 2107.03374, section 2.1).
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\nimport ", "\nfrom ", "\n```")


@dataclass(frozen=True)
class Problem:
    """One of the 164: a signature with docstring, the true body, and a `check` function."""

    id: str
    prompt: str
    solution: str
    test: str
    entry_point: str

    def program(self, completion: str) -> str:
        """What is run to judge a completion."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})\n"


def load_problems(limit: int) -> list[Problem]:
    """The first `limit` problems, in the order of the set. Raises TaskDropped when the package can not be had."""
    from megatron_r1.data.packages import humaneval_records

    try:
        records = humaneval_records()
    except EnvironmentProblem as problem:
        raise TaskDropped(str(problem)) from problem
    return [Problem(r["task_id"], r["prompt"], r["canonical_solution"], r["test"], r["entry_point"]) for r in records[:limit]]


class Ranking:
    """Accuracy of picking the true solution among four."""

    name = "humaneval_ranking"

    def __init__(self, settings: HumanEvalRankingSettings) -> None:
        self.settings = settings

    def run(self, bench: Bench) -> Outcome:
        """One result."""
        problems = load_problems(self.settings.problems)
        encoded = [bench.tokenizer.encode(p.prompt) for p in problems]
        solutions = [bench.tokenizer.encode(p.solution) for p in problems]
        options = [[i, *others] for i, others in enumerate(self._others(bench, len(problems)))]
        pairs = [cut(encoded[i], solutions[j], self.settings.max_tokens) for i, row in enumerate(options) for j in row]
        nats = continuation_nats(bench.subject, pairs)
        means = [total / len(solution) for total, (_, solution) in zip(nats, pairs, strict=True)]
        samples, correct = [], []
        for i, row in enumerate(options):
            scores = means[i * len(row) : (i + 1) * len(row)]
            correct.append(scores[0] < min(scores[1:]))  # a tie is not a right answer
            samples.append({"id": problems[i].id, "options": [problems[j].id for j in row], "nats_per_token": scores, "correct": correct[-1]})
        shown = prompt_hash([[problems[i].prompt, *(problems[j].solution for j in row)] for i, row in enumerate(options)])
        note = f"true solution against {WRONG_SOLUTIONS} of other problems, mean nats per token; at most {self.settings.max_tokens} tokens seen"
        return Outcome([share("HumanEval ranking", "code", "accuracy", correct, 1 / (1 + WRONG_SOLUTIONS), shown, note)], samples)

    def _others(self, bench: Bench, n: int) -> list[list[int]]:
        """Three other problems for each, drawn without replacement."""
        drawn = []
        for i in range(n):
            rng = bench.rng(self.name, i)
            drawn.append([int(j) + (j >= i) for j in rng.choice(n - 1, size=WRONG_SOLUTIONS, replace=False)])
        return drawn


def cut(prompt: Sequence[int], solution: Sequence[int], max_tokens: int) -> tuple[list[int], list[int]]:
    """At most `max_tokens` together: the solution keeps its first half's worth at least, the prompt its end, one token at least."""
    solution = list(solution[: max(max_tokens // 2, max_tokens - len(prompt))])
    return list(prompt[max(0, len(prompt) - (max_tokens - len(solution))) :]), solution


class PassAtOne:
    """Share of problems whose tests pass with the greedy completion."""

    name = "humaneval_pass"

    def __init__(self, settings: HumanEvalPassSettings) -> None:
        self.settings = settings

    def run(self, bench: Bench) -> Outcome:
        """One result. Dropped unless running generated code was allowed."""
        if not bench.allow_code_execution:
            raise TaskDropped("running generated code was not allowed (allow_code_execution: false)")
        problems = load_problems(self.settings.problems)
        try:
            held = guards()
        except EnvironmentProblem as problem:
            raise TaskDropped(str(problem)) from problem
        written = bench.subject.generate([bench.tokenizer.encode(p.prompt) for p in problems], self.settings.max_new_tokens, bench.stop_ids)
        completions = [first_block(bench.tokenizer.decode(tokens)) for tokens in written]
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            judged = list(pool.map(self._judge, problems, completions))
        correct = [execution.status == "passed" for execution in judged]
        samples = [
            {"id": problem.id, "completion": completion, "status": execution.status, "detail": execution.detail, "correct": execution.status == "passed"}
            for problem, completion, execution in zip(problems, completions, judged, strict=True)
        ]
        note = f"greedy, at most {self.settings.max_new_tokens} tokens; run with limits and {', '.join(held) or 'no kernel guard'}"
        return Outcome([share("HumanEval", "code", "pass@1", correct, None, prompt_hash(p.prompt for p in problems), note)], samples)

    def _judge(self, problem: Problem, completion: str) -> Execution:
        program = problem.program(completion)
        error = syntax_error(program)
        if error is not None:  # most of what a small model writes: no process needed
            return Execution("failed", error, ())
        return run_program(program, self.settings.timeout_seconds, self.settings.memory_mib)


def syntax_error(source: str) -> str | None:
    """Why `source` is not a Python program, or None. Parses only; runs nothing."""
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"[:500]
    return None


def first_block(text: str) -> str:
    """The function body: the text up to the next top-level statement."""
    ends = [at for stop in STOPS if (at := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
