"""Steps written once and made many times: names, placeholders, references, origins of errors, selection, dry run."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from megatron_r1.pipeline.derive import derive, print_plans, together
from megatron_r1.pipeline.recipe import Recipe, explain, load_recipe
from megatron_r1.pipeline.runner import run_recipe
from megatron_r1.utils.errors import ConfigError

TEXT = """\
name: toy
steps:
  draw:
    repeat: 3
    stage: make
    text: "draw {n}"
    seed: "{n}"
  each_of:
    each: [left, right]
    stage: make
    text: "{item} is {n}; {other} stays"
  pair:
    repeat: 3
    stage: join
    inputs: {shards: "draw-{n}", others: ["each_of-*", "draw-0"]}
  all:
    stage: join
    inputs: {shards: draw-1, others: pair-*}
"""
Load = Callable[..., Recipe]


@pytest.fixture
def load(tmp_path: Path, fake_stages) -> Load:
    def loaded(text: str = TEXT, *overrides: str) -> Recipe:
        path = tmp_path / "toy.yaml"
        path.write_text(text)
        return load_recipe(path, overrides)

    return loaded


def test_members_are_named_and_filled_in(load: Load) -> None:
    recipe = load()
    assert recipe.families == {"draw": ["draw-0", "draw-1", "draw-2"], "each_of": ["each_of-left", "each_of-right"], "pair": ["pair-0", "pair-1", "pair-2"]}
    assert set(recipe.steps) == {name for names in recipe.families.values() for name in names} | {"all"}
    assert [recipe.steps[f"draw-{n}"].text for n in range(3)] == ["draw 0", "draw 1", "draw 2"]  # type: ignore[attr-defined]
    assert [recipe.steps[f"draw-{n}"].seed for n in range(3)] == [0, 1, 2]
    assert recipe.steps["each_of-right"].text == "right is 1; {other} stays"  # type: ignore[attr-defined]
    assert recipe.inputs("pair-2") == {"shards": "draw-2", "others": ["each_of-left", "each_of-right", "draw-0"]}
    assert recipe.inputs("all")["others"] == ["pair-0", "pair-1", "pair-2"]


def test_a_family_over_the_keys_of_a_mapping(load: Load) -> None:
    recipe = load(TEXT.replace("each: [left, right]", "each: steps.all.inputs"))
    assert recipe.families["each_of"] == ["each_of-shards", "each_of-others"]


def test_one_member_can_be_changed_and_all_can_be_overridden(load: Load) -> None:
    recipe = load(TEXT + "  draw-1: {text: other}\n", "steps.each_of.seed=5", "steps.draw.repeat=4", "steps.draw-2.seed=9")
    assert [recipe.steps[f"draw-{n}"].text for n in range(4)] == ["draw 0", "other", "draw 2", "draw 3"]  # type: ignore[attr-defined]
    assert [recipe.steps[name].seed for name in ("each_of-left", "each_of-right", "draw-2")] == [5, 5, 9]


def test_names_that_do_not_depend_on_the_family_keep_their_fingerprints(load: Load) -> None:
    """Written out by hand, the same steps: nothing downstream knows that there was a family."""
    by_hand = load(
        "name: toy\nsteps:\n" + "".join(f"  draw-{n}: {{stage: make, text: draw {n}, seed: {n}}}\n" for n in range(3))
    )
    recipe = load()
    assert all(by_hand.steps[name] == recipe.steps[name] for name in by_hand.steps)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.replace("repeat: 3\n    stage: make", "repeat: 0\n    stage: make"), r"from 1 to 10000 for 'steps.draw.repeat', at toy.yaml:4[\s\S]*repeat: 8"),
        (TEXT.replace("repeat: 3\n    stage: make", "repeat: many\n    stage: make"), r"'many'"),
        (TEXT.replace("each: [left, right]", "each: [left, left]"), r"different names[\s\S]*toy.yaml:9"),
        (TEXT.replace("each: [left, right]", "each: [a b]"), r"different names"),
        (TEXT.replace("each: [left, right]", "each: steps.al.inputs"), r"no 'al'[\s\S]*did you mean 'all'"),
        (TEXT.replace("each: [left, right]", "each: [left]\n    repeat: 2"), r"repeat or each for 'each_of'"),
        (TEXT.replace("others: pair-*", "others: pear-*"), r"a family of this recipe[\s\S]*toy.yaml:18[\s\S]*did you mean 'pair'"),
        (TEXT.replace("shards: draw-1", "shards: draw-7"), r"'draw-7'[\s\S]*did you mean 'draw-"),
        (TEXT.replace('text: "draw {n}"', 'txet: "draw {n}"'), r"toy.yaml:6[\s\S]*steps.draw-0.txet[\s\S]*did you mean 'text'"),
    ],
)
def test_mistakes_point_to_the_line_of_the_family(load: Load, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(text)


def test_explain_a_setting_of_a_family_and_of_a_member(load: Load) -> None:
    recipe = load(TEXT, "steps.draw-2.text=own")
    found = explain(recipe, "steps.draw.text")
    assert (found["key"], found["value"], found["origin"]) == ("steps.draw.text", "'draw 0'", "toy.yaml:6")
    assert found["steps"] == "the same for 3 steps, draw-0 to draw-2; shown for the first"
    assert "--set steps.draw-2.text=own" in explain(recipe, "steps.draw-2.text")["origin"]
    with pytest.raises(ConfigError, match="did you mean 'text'"):
        explain(recipe, "steps.draw.texd")


def test_running_until_and_only_a_family(load: Load, fake_stages, tmp_path: Path) -> None:
    done = run_recipe(load(), tmp_path, "cmd", until="pair")
    assert {item.step for item in done} == {"draw-0", "draw-1", "draw-2", "each_of-left", "each_of-right", "pair-0", "pair-1", "pair-2"}
    assert run_recipe(load(), tmp_path, "cmd", until="pair-*")[-1].skipped
    run_recipe(load(), tmp_path, "cmd", only="all")
    again = run_recipe(load(), tmp_path, "cmd", only="pair")
    assert all(item.skipped for item in again)
    assert fake_stages["make"].calls == ["draw-0", "draw-1", "draw-2", "each_of-left", "each_of-right"]
    with pytest.raises(ConfigError, match="did you mean 'pair'"):
        run_recipe(load(), tmp_path, "cmd", until="pari")


REAL = """
name: real
steps:
  corpus:
    stage: corpus
    tokenizer: {kind: train_bpe, vocab_size: 512}
    sources:
      a: {kind: jsonl, path: a, domain: web, expected_tokens: 1M tokens}
      b: {kind: jsonl, path: b, domain: code, expected_tokens: 3M tokens}
  even: {stage: mixture, inputs: {shards: corpus}, method: uniform}
  loo: {each: steps.corpus.sources, stage: mixture, inputs: {shards: corpus, base: even}, method: without, without: "{item}"}
  run:
    each: steps.corpus.sources
    stage: train
    inputs: {shards: corpus, mixture: "loo-{item}"}
    model: nano
    budget: 10 steps
    seq_length: 64 tokens
    global_batch: 512 tokens
    lr: {peak: 1e-3}
"""


def test_a_dry_run_counts_a_family_once(tmp_path: Path) -> None:
    (tmp_path / "real.yaml").write_text(REAL)
    recipe = load_recipe(tmp_path / "real.yaml")
    plans = derive(recipe)
    single = next(plan for plan in plans if plan.step == "run-a")
    found = {plan.step: plan for plan in together(plans, recipe.families)}
    assert list(found) == ["corpus", "even", "loo-* (2)", "run-* (2)"]
    run = found["run-* (2)"]
    assert (run.steps, run.tokens, run.flops, run.parameters) == (10, 2 * 5120, 2 * (single.flops or 0), single.parameters)
    assert run.sources == {}
    assert "shares differ between these steps" in run.notes
    text = io.StringIO()
    print_plans(plans, Console(file=text, width=160), families=recipe.families)
    assert "run-* (2)" in text.getvalue()
    assert "run-b" not in text.getvalue()
