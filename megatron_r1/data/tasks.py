"""Small generated problems with answers that can be checked: arithmetic, spelling, dates, logic, word problems.

Training and test questions never meet. A question's key is what makes it the problem it is (its operands, the word to spell,
the date), and the key's hash decides the split, whatever the seed: one problem space, cut once. Word problems
(gsm_symbolic) are cut by template: a test template is never generated for training, with any numbers. Needs reasoning-gym.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

from megatron_r1.utils.errors import DataError, EnvironmentProblem
from megatron_r1.utils.logging import get_logger
from megatron_r1.utils.seeding import derive_seed

log = get_logger("data.tasks")
TaskSplit = Literal["train", "test"]
ANSWER_MARK = "####"
TEST_SHARE = 5
"""One key in so many belongs to the test split."""
GSM_TEST_TEMPLATES = 15
PATIENCE = 300
"""Questions in a row that were seen before, or belong to the other split, until a task counts as exhausted."""


@dataclass(frozen=True)
class Task:
    """How one task is generated. key and cot get the item of reasoning-gym."""

    numeric: bool
    """Whether the answer is a number."""
    key: Callable[[dict[str, Any]], str]
    cot: Callable[[dict[str, Any]], str] = lambda item: ""
    options: dict[str, Any] = field(default_factory=dict)


def _numbers(text: str) -> list[int]:
    return sorted(int(number) for number in re.findall(r"\d+", text))


def _operands(item: dict[str, Any]) -> str:
    # chain_sum and basic_arithmetic share this key: 3 + 4, 4 + 3 and 4 - 3 are on the same side in both.
    return f"arithmetic {_numbers(item['metadata']['expression'])}"


def _arithmetic_cot(item: dict[str, Any]) -> str:
    return f"{item['metadata']['expression']} = {item['answer']}"


def _gcd_cot(item: dict[str, Any]) -> str:
    a, b = sorted(item["metadata"]["numbers"], reverse=True)
    lines = []
    while b:
        lines.append(f"{a} mod {b} = {a % b}")
        a, b = b, a % b
    return "\n".join(lines)


def _bits_cot(item: dict[str, Any]) -> str:
    return f"{item['metadata']['number']} in binary is {item['metadata']['number']:b}."


def _letters_cot(item: dict[str, Any]) -> str:
    letter = item["metadata"]["target_letter"].lower()
    words = [" ".join(word) for word in item["metadata"]["span"]]
    found = " ".join(char for word in item["metadata"]["span"] for char in word if char.lower() == letter)
    return "\n".join([*words, f"{letter}: {found or 'none'}"])


def _spell_cot(item: dict[str, Any]) -> str:
    return f"{' '.join(item['metadata']['word'])}\n{' '.join(item['answer'])}"


def _equation_cot(item: dict[str, Any]) -> str:
    """Collect: slope * x + constant = right side, then solve."""
    left, right = item["metadata"]["equation"].split("=")
    slope = constant = 0
    for sign, term in re.findall(r"([+-]?)\s*([^+\-\s]+)", left):
        factor = -1 if sign == "-" else 1
        for number in re.findall(r"\d+", term):
            factor *= int(number)
        if item["metadata"]["variable"] in term:
            slope += factor
        else:
            constant += factor
    value, name = int(right), item["metadata"]["variable"]
    if slope * int(item["answer"]) + constant != value:
        return ""
    lines = [] if constant == 0 else [f"{slope}*{name} = {value} - {constant}" if constant > 0 else f"{slope}*{name} = {value} + {-constant}"]
    return "\n".join([*lines, f"{slope}*{name} = {value - constant}", f"{name} = {item['answer']}"])


TASKS = {
    "chain_sum": Task(True, _operands, _arithmetic_cot, {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}),
    "basic_arithmetic": Task(
        True, _operands, _arithmetic_cot,
        {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1, "operators": ["+", "-", "*"], "allow_parentheses": False, "allow_negation": False},
    ),
    "gcd": Task(True, lambda item: f"gcd {sorted(item['metadata']['numbers'])}", _gcd_cot, {"min_value": 2, "max_value": 99}),
    "count_bits": Task(True, lambda item: f"bits {item['metadata']['number']}", _bits_cot, {"min_n": 1, "max_n": 2047}),
    "letter_counting": Task(True, lambda item: f"letters {' '.join(item['metadata']['span']).lower()}", _letters_cot, {"min_words": 1, "max_words": 2}),
    "spell_backward": Task(False, lambda item: f"spell {item['metadata']['word'].lower()}", _spell_cot, {"min_word_len": 3, "max_word_len": 7}),
    "simple_equations": Task(
        True, lambda item: f"equation {_numbers(item['metadata']['equation'])}", _equation_cot, {"min_terms": 2, "max_terms": 2, "min_value": 1, "max_value": 12},
    ),
    "calendar_arithmetic": Task(
        False, lambda item: f"calendar {item['metadata'].get('target_date') or item['metadata'].get('year')}",
        options={"tasks": ["weekday_of_date", "is_leap_year"]},
    ),
    "syllogism": Task(
        False, lambda item: f"syllogism {sorted(set(re.findall('[a-z]{4,}', item['metadata']['premise1'] + ' ' + item['metadata']['premise2'])))}",
    ),
    "gsm_symbolic": Task(True, lambda item: item["template"], lambda item: item["metadata"]["answer_cot"]),
}
"""Every task; the answer of all of them is short and stands alone after ANSWER_MARK."""


def _test_key(key: str) -> bool:
    return int.from_bytes(hashlib.sha256(f"task split/{key}".encode()).digest()[:8], "little") % TEST_SHARE == 0


def _gym() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise EnvironmentProblem(expected="the package reasoning-gym, which generates the problems", found="it is not installed", fix="pip install reasoning-gym==0.1.25") from error
    return reasoning_gym


def gsm_templates(split: TaskSplit) -> list[int]:
    """Numbers of the word-problem templates of a split; the two never share one."""
    _gym()
    from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import tasks_ok

    ranked = sorted(tasks_ok, key=lambda number: hashlib.sha256(f"gsm template/{number}".encode()).hexdigest())
    return sorted(ranked[:GSM_TEST_TEMPLATES] if split == "test" else ranked[GSM_TEST_TEMPLATES:])


def _gsm(split: TaskSplit, seed: int) -> Iterator[dict[str, Any]]:
    gym = _gym()
    generators, templates = gym.create_dataset("gsm_symbolic", size=1, seed=0).generators, gsm_templates(split)
    index = 0
    while True:
        rng = Random(derive_seed(seed, "gsm_symbolic", split, index))
        # Templates in turn: every one is equally common however few questions are asked for.
        number = templates[index % len(templates)]
        yield {**generators[number](rng, 1.0), "template": f"gsm_symbolic/{number}"}
        index += 1


def _generated(task: str, split: TaskSplit, seed: int) -> Iterator[dict[str, Any]]:
    gym, spec, chunk = _gym(), TASKS[task], 0
    while True:
        # 31 bits: reasoning-gym adds item numbers to the seed.
        data = gym.create_dataset(task, size=1024, seed=derive_seed(seed, task, split, chunk) % (1 << 31), **spec.options)
        for item in data:
            kind = item["metadata"].get("task")
            yield {**item, "template": f"{task}/{kind}" if isinstance(kind, str) else task}
        chunk += 1


def task_items(task: str, split: TaskSplit, n: int, seed: int) -> Iterator[dict[str, Any]]:
    """Up to `n` distinct problems: {"question", "answer", "cot" (may be ""), "task", "template", "numeric"}.

    The same arguments give the same items on every machine; no test key is ever a training key, for any seeds. Fewer
    than `n` come when the split holds no more (logged). Raises DataError for an unknown task or split, EnvironmentProblem without
    reasoning-gym.
    """
    if task not in TASKS or split not in ("train", "test"):
        raise DataError(expected=f"a task among {', '.join(TASKS)} and split train or test", found=f"{task!r}, {split!r}", fix="correct the name")
    spec, seen, dry, given = TASKS[task], set(), 0, 0
    source = _gsm(split, seed) if task == "gsm_symbolic" else _generated(task, split, seed)
    while given < n:
        item = next(source)
        question = " ".join(item["question"].split()) if task != "syllogism" else item["question"].strip()
        wrong = task != "gsm_symbolic" and _test_key(spec.key(item)) != (split == "test")
        if wrong or question in seen:
            dry += 1
            if dry > PATIENCE:
                log.info("%s/%s holds %d distinct questions within reach; %d were asked for", task, split, given, n)
                return
            continue
        seen.add(question)
        dry, given = 0, given + 1
        cot = spec.cot(item).split(f"\n{ANSWER_MARK}")[0].strip()
        yield {
            "question": question, "answer": str(item["answer"]), "cot": cot, "task": task, "template": item["template"], "numeric": spec.numeric,
        }


def solution(item: dict[str, Any]) -> str:
    """What a model is taught to write: the reasoning, then the answer after the mark."""
    return f"{item['cot']}\n{ANSWER_MARK} {item['answer']}" if item["cot"] else f"{ANSWER_MARK} {item['answer']}"
