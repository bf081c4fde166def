"""Generated questions with verified answers, held out by problem and by template (data/tasks.py).

Every model gets the same tokens: the question as a user's turn in the chat template, base models too, so that before and
after compare. Two measurements a task: the share of right answers, and bits per byte of the reference solution, which moves
long before the first right answer. Beside the share stands what a guesser gets who always says the commonest answer.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from megatron_r1.data.answers import extract, same
from megatron_r1.data.chat import render
from megatron_r1.data.tasks import TASKS, solution, task_items
from megatron_r1.evaluate.config import GeneratedSettings
from megatron_r1.evaluate.results import Measurement, Outcome, bits_per_byte, prompt_hash, share
from megatron_r1.evaluate.task import Bench, TaskDropped, continuation_nats
from megatron_r1.utils.errors import EnvironmentProblem
from megatron_r1.utils.logging import get_logger
from megatron_r1.utils.seeding import derive_seed

log = get_logger("evaluate.generated")
SPLIT = "test"
POOLED = "generated tasks together"


class Generated:
    """See the module."""

    name = "generated"

    def __init__(self, settings: GeneratedSettings) -> None:
        self.settings = settings

    def run(self, bench: Bench) -> Outcome:
        """Two results per task and the pooled share."""
        items = self._items(bench)
        prompts = [prompt(bench.tokenizer, item["question"]) for item in items]
        references = [solution(item) for item in items]
        written = bench.subject.generate(prompts, self.settings.max_new_tokens, bench.stop_ids)
        ends = bench.stop_ids[-1:]
        nats = continuation_nats(bench.subject, [(p, [*bench.tokenizer.encode(r), *ends]) for p, r in zip(prompts, references, strict=True)])
        scorers = {name: gym_scorer(name) for name in {item["task"] for item in items}}
        samples = []
        for item, tokens, reference, cost in zip(items, written, references, nats, strict=True):
            text = bench.tokenizer.decode(tokens)
            answer = extract(text, item["numeric"])
            samples.append(
                {
                    "task": item["task"], "template": item["template"], "question": item["question"], "text": text, "answer": answer,
                    "truth": item["answer"], "correct": same(answer, item["answer"]), "gym_score": scorers[item["task"]](answer, item),
                    "cut": len(tokens) == self.settings.max_new_tokens, "reference": reference, "reference_nats": cost,
                }
            )
        measurements = [m for name in dict.fromkeys(s["task"] for s in samples) for m in self._task(bench, name, [s for s in samples if s["task"] == name])]
        shown = prompt_hash(s["question"] for s in samples)
        measurements.append(share(POOLED, "pooled", "accuracy", [s["correct"] for s in samples], None, shown, "every question above, pooled"))
        return Outcome(measurements, samples)

    def _items(self, bench: Bench) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for name in self.settings.names:
            try:
                items = list(task_items(name, SPLIT, self.settings.samples, derive_seed(bench.seed, "evaluate", self.name)))
            except EnvironmentProblem as problem:
                raise TaskDropped(str(problem)) from problem
            if not items:
                log.warning("%s holds no held-out question; left out", name)
            found += items
        return found

    def _task(self, bench: Bench, name: str, samples: list[dict[str, Any]]) -> list[Measurement]:
        common, count = Counter(s["truth"] for s in samples).most_common(1)[0]
        cut = sum(s["cut"] for s in samples)
        note = f"chance: always answering {common!r}" + (f"; {cut} of {len(samples)} answers cut" if cut else "")
        references = [s["reference"] for s in samples]
        return [
            share(
                name, "generated", "accuracy", [s["correct"] for s in samples], count / len(samples), prompt_hash([s["question"], s["truth"]] for s in samples), note
            ),
            bits_per_byte(
                f"{name}: solution", "solutions", [s["reference_nats"] for s in samples], [len(r.encode("utf-8")) for r in references], bench.bootstrap,
                bench.rng(self.name, name), prompt_hash(references), "the reference solution, given the question",
            ),
        ]


def prompt(tokenizer: Any, question: str) -> list[int]:
    """The question as a user's turn; for a tokenizer without chat tokens as plain text."""
    if tokenizer.chat_template is None:
        return tokenizer.encode(f"Question: {question}\nAnswer:")
    return render([{"role": "user", "content": question}], tokenizer, add_generation_prompt=True)[0]


def gym_scorer(name: str) -> Any:
    """reasoning-gym's own verdict in [0, 1] on (answer, item): a second opinion kept with every sample, 1 = right."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(name, size=1, seed=0, **TASKS[name].options)

    def score(answer: str | None, item: dict[str, Any]) -> float:
        return float(dataset.score_answer(answer, {"question": item["question"], "answer": item["answer"], "metadata": {"task": item["template"].split("/")[-1]}}))

    return score

