"""Generated problems with verified solutions, training split only (data/tasks.py): as text and as conversations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_r1.corpus.embedded import MB, Context, Corpus
from megatron_r1.data.document import Document
from megatron_r1.data.tasks import TASKS, solution, task_items

GYM = ("reasoning_gym",)
GSM_TEXTS = 8000
GSM_CONVERSATIONS = 4000
TASK_CONVERSATIONS = 2000
"""Per task, at most."""


def _messages(item: dict[str, Any]) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": item["question"]}, {"role": "assistant", "content": solution(item)})


def gsm_cot(context: Context) -> Iterator[Document]:
    """Word problems with their reasoning; a template and all its numbers are one group."""
    for number, item in enumerate(task_items("gsm_symbolic", "train", GSM_TEXTS, context.seed)):
        text = f"Question: {item['question']}\nAnswer: {solution(item)}\n"
        yield Document(f"gsm:{number}", "gsm_cot", text=text, group=item["template"])


def sft_gsm(context: Context) -> Iterator[Document]:
    """Word problems as conversations."""
    for number, item in enumerate(task_items("gsm_symbolic", "train", GSM_CONVERSATIONS, context.seed + 1)):
        yield Document(f"gsm:{number}", "sft_gsm", messages=_messages(item), group=item["template"])


def sft_tasks(context: Context) -> Iterator[Document]:
    """All other tasks as conversations."""
    for task in TASKS:
        if task != "gsm_symbolic":
            for number, item in enumerate(task_items(task, "train", TASK_CONVERSATIONS, context.seed)):
                yield Document(f"{task}:{number}", "sft_tasks", messages=_messages(item), metadata={"task": task})


CORPORA = (
    Corpus("gsm_cot", "math", gsm_cot, "generated word problems with reasoning, training templates only", installed=GYM, max_bytes=4 * MB, min_chars=60),
    Corpus("sft_gsm", "math", sft_gsm, "generated word problems as conversations, training templates only", installed=GYM, format="chat", max_bytes=2 * MB),
    Corpus("sft_tasks", "math", sft_tasks, "generated short tasks as conversations, training keys only", installed=GYM, format="chat", max_bytes=4 * MB),
)
