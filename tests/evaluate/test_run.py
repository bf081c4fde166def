"""The stage: results are stored per task, an interruption costs one task, and the bytes are the same in the end."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from megatron_r1.artifacts.base import open_workspace
from megatron_r1.data.shards import ShardWriter
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.evaluate import run as stage
from megatron_r1.evaluate.config import EvaluateConfig, TaskSettings, describe, enabled
from megatron_r1.evaluate.results import Outcome, share
from megatron_r1.evaluate.task import TaskDropped
from megatron_r1.evaluate.tasks import TASKS
from megatron_r1.utils import io
from megatron_r1.utils.errors import ArtifactError

_spec = importlib.util.spec_from_file_location("export_conftest", Path(__file__).parents[1] / "export" / "conftest.py")
_export = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_export)

OFF = {name: None for name in TaskSettings.model_fields}
TEXTS = {"wiki": "The capital of France is Paris. ", "stdlib": "def add(a, b):\n    return a + b\n"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return _export.make_checkpoint(tmp_path_factory.mktemp("run"))


def make_shards(folder, checkpoint, salt=""):
    """A shards artifact with held-out documents only, of two sources."""
    work = open_workspace(folder, "corpus", "shards", {"salt": salt})
    tokenizer = Tokenizer.load(checkpoint.path / "tokenizer")
    (work.path / "tokenizer").mkdir()
    for file in (checkpoint.path / "tokenizer").iterdir():
        (work.path / "tokenizer" / file.name).write_bytes(file.read_bytes())
    sources = {}
    for name, domain in (("wiki", "web"), ("stdlib", "code")):
        (work.path / "sources" / name).mkdir(parents=True)
        writer = ShardWriter(work.path / "sources" / name / "test", tokenizer.vocab_size)
        for i in range(6):
            text = TEXTS[name] * (i + 1) + salt
            writer.add([*tokenizer.encode(text), tokenizer.eos_id], len(text.encode()), f"{name}/{i}")
        sources[name] = {"name": name, "domain": domain, "splits": {"test": writer.close().plain()}}
    io.atomic_write_json(work.path / "sources.json", {"sources": sources, "tokenizer": {"sha256": tokenizer.sha256}})
    return work.complete({})


@pytest.fixture(scope="module")
def shards(checkpoint, tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"), checkpoint)


def configured(**changes):
    tasks = OFF | {"bits_per_byte": {"documents": 4, "seq_length": 32}} | changes.pop("tasks", {})
    return EvaluateConfig.model_validate({"inputs": {"checkpoint": "sft", "shards": "corpus"}, "seed": 1, "tasks": tasks, "bootstrap": 100, **changes})


def run(config, folder, checkpoint, shards, baseline=None, name="eval"):
    inputs = {"checkpoint": checkpoint, "shards": shards, "baseline": baseline}
    return stage.run(config, inputs, open_workspace(folder, name, "evaluation", config, inputs))


def test_a_real_model_on_real_shards(checkpoint, shards, tmp_path):
    artifact = run(configured(), tmp_path, checkpoint, shards)
    record = artifact.json("evaluation.json")
    assert record["checkpoint"] == {"name": "sft", "fingerprint": checkpoint.fingerprint, "step": 7, "tokens": 700}
    assert [(r["task"], r["metric"], r["n"]) for r in record["results"]] == [("stdlib", "bits_per_byte", 4), ("wiki", "bits_per_byte", 4)]
    for r in record["results"]:
        assert r["low"] <= r["value"] <= r["high"]
        assert 0.5 < r["value"] < 60
    samples = io.read_jsonl(artifact.file("samples/bits_per_byte.jsonl"))
    assert len(samples) == 8
    assert record["dropped"] == []


class Counted:
    """Stands in for a task; `before` may raise, to interrupt."""

    def __init__(self, name, log, before=lambda: None):
        self.name, self._log, self._before = name, log, before

    def run(self, bench):
        self._before()
        self._log.append(self.name)
        return Outcome([share(self.name, "code", "accuracy", [True, False], 0.25, "0" * 64)], [{"q": 1}])


def test_an_interruption_costs_one_task_and_changes_nothing(checkpoint, shards, tmp_path, monkeypatch):
    config = configured(tasks={"humaneval_ranking": {}, "humaneval_pass": {}})
    log: list[str] = []
    interrupted = {"humaneval_pass": True}

    def build(config, name):
        def before():
            if interrupted.pop(name, False):
                raise KeyboardInterrupt

        return Counted(name, log, before)

    monkeypatch.setattr(stage, "build", build)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "a", checkpoint, shards)
    assert log == ["bits_per_byte", "humaneval_ranking"]
    resumed = run(config, tmp_path / "a", checkpoint, shards)
    assert log == ["bits_per_byte", "humaneval_ranking", "humaneval_pass"]
    straight = run(config, tmp_path / "b", checkpoint, shards)
    assert {n: f.sha256 for n, f in resumed.manifest.files.items()} == {n: f.sha256 for n, f in straight.manifest.files.items()}


def test_a_task_that_cannot_run_is_dropped_loudly_and_recorded(checkpoint, shards, tmp_path, capsys):
    artifact = run(configured(tasks={"humaneval_pass": {}}), tmp_path, checkpoint, shards)
    record = artifact.json("evaluation.json")
    assert record["dropped"] == [{"task": "humaneval_pass", "reason": "running generated code was not allowed (allow_code_execution: false)"}]
    assert len(record["results"]) == 2
    assert artifact.manifest.summary["dropped"] == ["humaneval_pass"]


def test_nothing_left_to_measure_is_an_error(checkpoint, shards, tmp_path):
    with pytest.raises(ArtifactError, match="allow_code_execution"):
        run(configured(tasks={"bits_per_byte": None, "humaneval_pass": {}}), tmp_path, checkpoint, shards)


def test_comparison_with_itself_is_zero_and_with_other_prompts_refused(checkpoint, shards, tmp_path):
    first = run(configured(), tmp_path / "a", checkpoint, shards)
    second = run(configured(), tmp_path / "b", checkpoint, shards, baseline=first)
    comparison = second.json("evaluation.json")["comparison"]
    assert [(d["task"], d["difference"], d["low"], d["high"]) for d in comparison] == [("stdlib", 0, 0, 0), ("wiki", 0, 0, 0)]
    other = run(configured(), tmp_path / "c", checkpoint, make_shards(tmp_path / "other", checkpoint, salt="!"))
    with pytest.raises(ArtifactError, match="same prompts"):
        run(configured(), tmp_path / "d", checkpoint, shards, baseline=other)
    with pytest.raises(ArtifactError, match="evaluation artifact as baseline"):
        run(configured(), tmp_path / "e", checkpoint, shards, baseline=shards)


def test_a_better_model_is_seen_in_the_comparison(checkpoint, shards, tmp_path, monkeypatch):
    worse = [False] * 40 + [True] * 10
    better = [False] * 25 + [True] * 25

    def building(flags):
        class Fixed:
            def run(self, bench):
                return Outcome([share("t", "generated", "accuracy", flags, None, "0" * 64)], [])

        return lambda config, name: Fixed()

    monkeypatch.setattr(stage, "build", building(worse))
    first = run(configured(), tmp_path / "a", checkpoint, shards)
    monkeypatch.setattr(stage, "build", building(better))
    (difference,) = run(configured(), tmp_path / "b", checkpoint, shards, baseline=first).json("evaluation.json")["comparison"]
    assert difference["difference"] == pytest.approx(0.3)
    # Paired: 15 of 50 items change, all for the better, so the interval is far from 0 and narrower than unpaired (about 0.12 to 0.48).
    assert 0.15 < difference["low"] < 0.3 < difference["high"] < 0.45


def test_another_tokenizer_is_refused(shards, tmp_path):
    config = _export.CONFIG.replace(vocab_size=320)
    other = _export.make_checkpoint(tmp_path / "run", config=config, name="other")
    with pytest.raises(ArtifactError, match="the model's tokenizer"):
        run(configured(), tmp_path, other, shards)


def test_every_setting_has_a_task_and_null_switches_it_off():
    assert list(TASKS) == list(TaskSettings.model_fields)
    assert enabled(configured()) == ["bits_per_byte"]
    assert "not run" in describe(configured(tasks={"humaneval_pass": {}}))
    assert issubclass(TaskDropped, Exception)
