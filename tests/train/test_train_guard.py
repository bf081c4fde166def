"""When losses and gradients go wrong: the ladder by property, and whole runs with injected faults, interrupted too."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_toys import SCORED, final_bytes, timeless, train
from train_toys import settings as train_settings

from megatron_r1.artifacts.base import open_workspace
from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.artifacts.training_scores import ScoresReader
from megatron_r1.train import loop
from megatron_r1.train.config import GuardConfig
from megatron_r1.train.guard import Guard
from megatron_r1.utils.errors import DataError

NAN, INF = float("nan"), float("inf")

# ---------------------------------------------------------------- the ladder


def oracle(bad, config):
    """The ladder written out a second time: an action for every step of a list of flags, up to the first rollback."""
    actions, in_incident, good = [], 0, 0
    for flag in bad:
        if not flag:
            good += 1
            if good >= config.recovery:
                in_incident = 0
            actions.append("accept")
            continue
        good, in_incident = 0, in_incident + 1
        actions.append("skip" if in_incident <= config.skip else "hold" if in_incident <= config.skip + config.hold else "rollback")
        if actions[-1] == "rollback":
            break
    return actions


@settings(max_examples=200, deadline=None)
@given(st.lists(st.booleans(), max_size=60), st.integers(0, 3), st.integers(0, 3), st.integers(1, 5), st.sampled_from([(NAN, 1.0), (2.0, INF), (-INF, NAN)]))
def test_ladder_of_numbers_that_are_not_finite(bad, skip, hold, recovery, wrong):
    config = GuardConfig(skip=skip, hold=hold, recovery=recovery)
    guard, found = Guard(config), []
    for step, flag in enumerate(bad, start=1):
        found.append(guard.decide(step, *(wrong if flag else (2.0, 1.0))))
        if found[-1].action == "rollback":
            break
    assert [decision.action for decision in found] == oracle(bad, config)
    assert all(bool(decision.reason) == (decision.action != "accept") for decision in found)
    assert guard.skipped == [step for step, decision in enumerate(found, start=1) if decision.action in ("skip", "hold")]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 0.3), st.floats(0.5, 9.0), st.integers(40, 120), st.booleans())
def test_a_leap_is_seen_and_noise_is_not(seed, noise, level, steps, of_norm):
    """Normal noise and a slow fall are never a spike; a leap of 20 deviations, and 10 least ones, always is, wherever it comes."""
    draw, guard = random.Random(seed), Guard(GuardConfig(window=64))
    for step in range(1, steps):
        assert guard.decide(step, level * 0.999**step + draw.gauss(0, noise), math.exp(draw.gauss(0, noise))).action == "accept"
    leap = 20 * noise * 1.5 + 10 * (0.2 if of_norm else 0.05) + 0.2 * level
    decision = guard.decide(steps, level + (0 if of_norm else leap), math.exp(leap) if of_norm else 1.0)
    assert decision.action == "skip"
    assert decision.reason.startswith("gradient norm" if of_norm else "loss")
    assert Guard(GuardConfig(window=64, spike=None)).decide(1, 1e9, 1e9).action == "accept"


def test_no_gradient_at_all_is_no_measure_of_the_next():
    """Answers that all earn the same leave none: the first that is rewarded must not be taken for a spike, nor may a wide range of norms overflow."""
    guard = Guard(GuardConfig(window=16))
    for step in range(1, 40):
        assert guard.decide(step, 0.0, 0.0).action == "accept"
    assert guard.decide(40, 0.0, 1.0).action == "accept"
    for step in range(41, 60):
        assert guard.decide(step, 0.0, float(step % 2)).action == "accept"
    assert guard.decide(60, 0.0, 1000.0).action == "skip"
    wide = Guard(GuardConfig(window=16, spike=1000.0))
    for step in range(1, 60):
        assert wide.decide(step, 0.0, 10.0 ** (30 * (step % 3))).action == "accept"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([2.0, 2.1, 1.9, 50.0, NAN]), max_size=80), st.integers(0, 80))
def test_a_saved_guard_decides_as_the_first_would_have(losses, cut):
    config = GuardConfig(window=8, skip=2, hold=2, recovery=3, hold_steps="5 steps")
    guard = Guard(config)
    for step, loss in enumerate(losses, start=1):
        if step == cut:
            other = Guard(config)
            other.load(guard.state())
            guard = other
        expected = Guard(config)
        expected.load(guard.state())
        assert guard.lr_factor(step) == expected.lr_factor(step)
        assert guard.decide(step, loss, 1.0) == expected.decide(step, loss, 1.0)
    assert len(guard.losses) <= 8


def test_the_learning_rate_is_held_down_for_a_while():
    guard = Guard(GuardConfig(skip=0, hold=1, hold_steps="3 steps", hold_factor=0.25))
    assert guard.decide(5, NAN, 1.0).action == "hold"
    assert [guard.lr_factor(step) for step in range(5, 11)] == [0.25, 0.25, 0.25, 0.25, 1.0, 1.0]


def test_state_of_older_releases_is_taken_up():
    guard = Guard(GuardConfig())
    guard.load({"skipped": [3], "in_a_row": 1})
    assert (guard.skipped, guard.bad, guard.losses) == ([3], 0, [])


# ---------------------------------------------------------------- whole runs

LADDER = {"skip": 1, "hold": 1, "recovery": 2, "hold_steps": "2 steps", "hold_factor": 0.5}
FAULTY = {"budget": "9 steps", "checkpoints": {"every": "2 steps", "keep": 3}, "guard": LADDER}


def inject(patch, faults, counts=None):
    """Losses of some steps (1-based) are replaced; `faults[step]`: the value."""
    reduce = loop.Trainer._reduce

    def faulty(self, reports, stop):
        if counts is not None:
            counts.append(self.step + 1)
        sums = reduce(self, reports, stop)
        if self.step + 1 in faults:
            sums["loss_sum"] = faults[self.step + 1]
        return sums

    patch.setattr(loop.Trainer, "_reduce", faulty)


def test_skip_then_hold(tmp_path, shards, monkeypatch, messages):
    with monkeypatch.context() as patch:
        inject(patch, {3: NAN, 4: INF})
        found = CheckpointSet.open(train(tmp_path, train_settings(**FAULTY), shards=shards))
    skip, hold = found.journal()
    assert [skip[key] for key in ("step", "attempt", "decision", "loss", "first", "last")] == [3, 0, "skip", None, 8, 11]
    assert [hold[key] for key in ("step", "decision", "hold_until")] == [4, "hold", 6]
    assert sum(reading[4] for reading in skip["documents"]) == 128
    assert found.manifest.skipped_steps == [3, 4]
    assert [record["applied"] for record in found.ledger()] == [True, True, False, False, *[True] * 5]
    plain = CheckpointSet.open(train(tmp_path, train_settings(**FAULTY), "plain", shards=shards))
    rates = [mine["lr"] / theirs["lr"] for mine, theirs in zip(found.metrics(), plain.metrics(), strict=True)]
    assert rates == pytest.approx([1, 1, 1, 1, 0.5, 0.5, 1, 1, 1])
    assert any("step 3: loss nan: skip (samples 8 to 11)" in message for message in messages)
    assert plain.journal() == []


BROKEN = {5: NAN, 6: NAN, 7: NAN}


@pytest.fixture(scope="module")
def rolled_back(shards, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        ran: list[int] = []
        inject(patch, BROKEN, ran)
        found = CheckpointSet.open(train(tmp_path_factory.mktemp("rolled"), train_settings(**FAULTY), shards=shards))
    return found, ran


def test_roll_back_and_leave_the_data_out(rolled_back, tmp_path, shards):
    found, ran = rolled_back
    assert ran == [1, 2, 3, 4, 5, 6, 7, 8, 9]  # 5 to 7 failed, 4 was saved, 5 to 7 were left out
    assert [(record["step"], record["decision"], record["attempt"]) for record in found.journal()] == [(5, "skip", 0), (6, "hold", 0), (7, "rollback", 0)]
    last = found.journal()[-1]
    assert (last["to"], last["passed"], last["first"], last["last"]) == (4, [5, 7], 16, 27)
    assert [record["step"] for record in found.ledger()] == list(range(1, 10))
    assert [record["applied"] for record in found.ledger()] == [True] * 4 + [False] * 3 + [True] * 2
    assert found.manifest.skipped_steps == [5, 6, 7]
    # The same as never having seen them: updates of 1-4 and 8-9 only, at their own learning rates.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guard, "leaves_out", lambda self, step: step in BROKEN)
        apart = train(tmp_path, train_settings(**FAULTY), shards=shards)
    assert final_bytes(apart) == final_bytes(found.artifact)


def test_a_rollback_survives_being_killed(rolled_back, tmp_path, shards):
    """Killed at once after the decision is on disk, and again before the next checkpoint: the same bytes, the same journal."""
    found, _ = rolled_back

    class Kill(Exception):
        pass

    def killed(self, decision):
        raise Kill

    with pytest.MonkeyPatch.context() as patch:
        inject(patch, BROKEN)
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(loop.Trainer, "_roll_back", killed)
            with pytest.raises(Kill):
                train(tmp_path, train_settings(**FAULTY), shards=shards)
        folder = open_workspace(tmp_path, "train", "checkpoint", train_settings(**FAULTY), {"shards": shards}).path / "checkpoints"
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000004"]
        again = CheckpointSet.open(train(tmp_path, train_settings(**FAULTY), shards=shards))
    assert final_bytes(again.artifact) == final_bytes(found.artifact)
    assert again.journal() == found.journal()
    assert timeless(again.metrics()) == timeless(found.metrics())
    assert again.ledger() == found.ledger()
    assert again.manifest == found.manifest


def test_scores_after_a_rollback_are_of_the_steps_that_count(tmp_path, shards, probe):
    """The rows of a run that went back are those of one that never saw the steps, along the same directions."""
    config = train_settings(**FAULTY | SCORED)
    with pytest.MonkeyPatch.context() as patch:
        inject(patch, BROKEN)
        found = train(tmp_path / "found", config, shards=shards, probe=probe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guard, "leaves_out", lambda self, step: step in BROKEN)
        apart = train(tmp_path / "apart", config, shards=shards, probe=probe)
    mine, theirs = ScoresReader(found.path), ScoresReader(apart.path)
    assert mine.rows().tobytes() == theirs.rows().tobytes()
    assert set(mine.rows()["step"].tolist()) == {4, 8, 9}
    assert mine.probes() == theirs.probes()


def test_two_rollbacks_then_the_end(tmp_path, shards, monkeypatch):
    config = train_settings(**FAULTY | {"budget": "12 steps", "guard": {**LADDER, "rollbacks": 1, "skip_before": "1 steps"}})
    inject(monkeypatch, dict.fromkeys(range(6, 13), NAN))
    with pytest.raises(DataError, match=r"step 11: loss nan; the run went back 1 times already"):
        train(tmp_path, config, shards=shards)
    journal = (open_workspace(tmp_path, "train", "checkpoint", config, {"shards": shards}).path / "journal.jsonl").read_text()
    assert '"to": 4, "passed": [5, 8]' in journal


def test_without_a_checkpoint_there_is_no_way_back(tmp_path, shards, monkeypatch, messages):
    config = train_settings(budget="9 steps", guard=LADDER | {"window": 8, "spike": 8.0})
    with monkeypatch.context() as patch:
        inject(patch, {3: NAN, 4: NAN, 5: NAN})
        with pytest.raises(DataError, match="no checkpoint before them"):
            train(tmp_path, config, shards=shards)
    with monkeypatch.context() as patch:
        inject(patch, dict.fromkeys(range(4, 10), 1e6))
        found = CheckpointSet.open(train(tmp_path / "finite", config, shards=shards))
    assert [record["decision"] for record in found.journal()] == ["skip", "hold", "accept"]
    assert "taken for the new usual" in found.journal()[-1]["reason"]
    assert [record["applied"] for record in found.ledger()] == [True] * 3 + [False] * 2 + [True] * 4


def test_new_shares_are_no_spike(tmp_path, shards, monkeypatch):
    config = train_settings(
        budget="8 steps", sources={"alpha": 1.0}, schedule=[{"start": "512 tokens", "sources": {"beta": 1.0}}], guard=LADDER | {"window": 8}
    )
    inject(monkeypatch, dict.fromkeys(range(5, 9), 1e6))
    assert CheckpointSet.open(train(tmp_path, config, shards=shards)).journal() == []


def test_new_shares_are_no_spike_where_a_rollback_left_their_first_step_out(tmp_path, shards, monkeypatch):
    """Step 5 is the first with other shares, and wrong; after the rollback the losses before it are no measure for step 8."""
    config = train_settings(
        budget="12 steps", sources={"alpha": 1.0}, schedule=[{"start": "512 tokens", "sources": {"beta": 1.0}}], guard=LADDER | {"window": 8}, checkpoints={"every": "2 steps", "keep": 3}
    )
    inject(monkeypatch, dict.fromkeys((5, 6, 7), NAN) | dict.fromkeys(range(8, 13), 1e6))
    found = CheckpointSet.open(train(tmp_path, config, shards=shards))
    assert [(record["step"], record["decision"]) for record in found.journal()] == [(5, "skip"), (6, "hold"), (7, "rollback")]
    assert [record["applied"] for record in found.ledger()] == [True] * 4 + [False] * 3 + [True] * 5


def test_ranks_that_disagree_are_brought_together(monkeypatch):
    """`_agree` on the numbers of three ranks at once, with an all-reduce that sees them all."""
    ranks = [(2.0, 1.0), (2.5, INF), (NAN, 1.0)]
    mine = []

    class Context:
        device = torch.device("cpu")

        def all_reduce_max(self, tensor, over):
            mine.append(tensor)
            return torch.stack(mine).amax(0)

    trainer = loop.Trainer.__new__(loop.Trainer)
    trainer.ctx = Context()
    for values in ranks:
        found = trainer._agree(*values)
    assert math.isnan(found[0])
    assert found[1] == INF
