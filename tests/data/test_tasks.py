"""Generated tasks: right answers, and a split that no seed crosses."""

import math

import pytest

pytest.importorskip("reasoning_gym")
from megatron_r1.data.tasks import TASKS, gsm_templates, solution, task_items
from megatron_r1.utils.errors import DataError


@pytest.mark.parametrize("task", TASKS)
def test_train_and_test_never_meet(task):
    train = [item for seed in (0, 1) for item in task_items(task, "train", 150, seed)]
    test = [item for seed in (0, 2) for item in task_items(task, "test", 60, seed)]
    assert len(test) >= 60
    assert not {item["question"] for item in train} & {item["question"] for item in test}
    for item in train + test:
        assert item["task"] == task
        assert item["template"].startswith(task)
        assert item["answer"]
        assert solution(item).endswith(f"#### {item['answer']}")
        assert solution(item).count("####") == 1


@pytest.mark.parametrize("task", ["chain_sum", "gsm_symbolic", "spell_backward"])
def test_questions_are_distinct_and_reproducible(task):
    first = list(task_items(task, "train", 100, 7))
    assert first == list(task_items(task, "train", 100, 7))
    assert first[:40] == list(task_items(task, "train", 40, 7))
    assert len({item["question"] for item in first}) == 100
    assert first != list(task_items(task, "train", 100, 8))


def test_word_problems_are_split_by_template():
    train, test = set(gsm_templates("train")), set(gsm_templates("test"))
    assert (len(train), len(test), train & test) == (70, 15, set())
    templates = {item["template"] for item in task_items("gsm_symbolic", "test", 30, 0)}
    assert templates == {f"gsm_symbolic/{number}" for number in test}


def test_sums_share_operands_across_tasks_only_within_a_split():
    import re

    def operands(task, split):
        return {tuple(sorted(re.findall(r"\d+", item["cot"].split("=")[0]))) for item in task_items(task, split, 150, 0)}

    assert not operands("chain_sum", "test") & operands("basic_arithmetic", "train")
    assert not operands("basic_arithmetic", "test") & operands("chain_sum", "train")


def test_reasoning_is_right():
    for item in task_items("gcd", "train", 40, 0):
        a, b = (int(n) for n in item["question"].split(": ")[1].split(".")[0].split(", "))
        assert item["answer"] == str(math.gcd(a, b))
        for line in item["cot"].split("\n"):
            left, right = line.split(" = ")
            x, y = left.split(" mod ")
            assert int(x) % int(y) == int(right)
    for item in task_items("spell_backward", "train", 40, 0):
        word, reversed_word = (line.replace(" ", "") for line in item["cot"].split("\n"))
        assert word[::-1] == reversed_word == item["answer"]
    for item in task_items("count_bits", "train", 40, 0):
        assert item["cot"].rstrip(".").rsplit(" ", 1)[1].count("1") == int(item["answer"])
    for item in task_items("simple_equations", "train", 40, 0):
        assert item["cot"].endswith(f"= {item['answer']}")


def test_an_exhausted_task_gives_what_it_has():
    assert 200 < len(list(task_items("count_bits", "test", 10_000, 0))) < 600


@pytest.mark.parametrize(("task", "split"), [("chess", "train"), ("gcd", "probe")])
def test_unknown_names(task, split):
    with pytest.raises(DataError, match="chain_sum"):
        next(task_items(task, split, 1, 0))
