"""Derived values of a recipe: against numbers worked out by hand, and FLOPs against torch's own counter."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_r1.cli import main
from megatron_r1.pipeline.cluster import Cluster
from megatron_r1.pipeline.derive import StepPlan, derive, print_plans, size
from megatron_r1.pipeline.recipe import load_recipe

RECIPE = """
name: by_hand
steps:
  corpus:
    stage: corpus
    tokenizer: {kind: train_bpe, vocab_size: 512}
    splits: {probe: 0.1, test: 0.1}
    sources:
      a: {kind: jsonl, path: a, domain: web, expected_tokens: 1.25M tokens}
      b: {kind: jsonl, path: b, domain: code, expected_tokens: 3.75M tokens}
  chats:
    stage: corpus
    inputs: {tokenizer: corpus}
    splits: {probe: 0.0, test: 0.2}
    sources:
      talk: {kind: jsonl, path: talk, domain: chat, format: chat, expected_documents: 1250 samples}
  probe:
    stage: probe
    inputs: {shards: corpus}
    capabilities: {code: {sources: {b: 1}}, web: {sources: {a: 1}}}
    documents: 10
    tokens_per_document: 32
  mix:
    stage: mixture
    inputs: {shards: corpus}
    method: explicit
    weights: {a: 3, b: 1}
    budget: 51200 tokens
  base:
    stage: train
    inputs: {shards: corpus, mixture: mix}
    model: nano
    budget: 100 steps
    seq_length: 64 tokens
    global_batch: 512 tokens
    lr: {peak: 1e-3}
    checkpoints: {evenly: 4, every: 10 steps, keep: 2}
  influence:
    stage: influence
    inputs: {shards: corpus, probe: probe, checkpoint: base}
    documents: 20
    tokens_per_document: 32
    checkpoints: 2
    fd_check_documents: 5
    validity: {batches: 3, documents: 4}
  mix2:
    stage: mixture
    inputs: {shards: corpus, influence: influence}
    method: influence
  longer:
    stage: train
    inputs: {shards: corpus, mixture: mix2, checkpoint: base, teacher: big}
    objective: distill
    model_changes: {max_positions: 4096, rope_theta: 8e6}
    budget: 10k tokens
    seq_length: 64 tokens
    global_batch: 512 tokens
    lr: {peak: 1e-3}
    distill: {cache_top_k: 16}
  big:
    stage: train
    inputs: {shards: corpus}
    model: {preset: small, vocab_size: 512}
    sources: uniform
    budget: 0.5 epochs
    seq_length: 64 tokens
    global_batch: 512 tokens
    lr: {peak: 1e-3}
  tuned:
    stage: train
    inputs: {shards: chats, checkpoint: longer}
    objective: sft
    budget: 3 epochs
    seq_length: 64 tokens
    global_batch: 512 tokens
    lr: {peak: 1e-4}
  export:
    stage: export
    inputs: {checkpoint: tuned}
    dtype: bfloat16
"""


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StepPlan]:
    path = tmp_path_factory.mktemp("recipe") / "by_hand.yaml"
    path.write_text(RECIPE, "utf-8")
    return {plan.step: plan for plan in derive(load_recipe(path))}


# nano: embedding 512 x 128; 2 layers of q, o 128 x 128, k, v 128 x 64, SwiGLU 3 x 128 x 256, 2 gains; 1 gain
NANO = 512 * 128 + 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256 + 2 * 128) + 128


def forward(tokens: int, layers: int, dim: int, heads: int, kv_heads: int, ffn: int, vocabulary: int) -> int:
    """FLOPs of one forward over one causal sequence, multiplication by multiplication."""
    total = 0
    for position in range(1, tokens + 1):
        for _ in range(layers):
            total += 2 * dim * (heads * 64) + 2 * (2 * dim * (kv_heads * 64)) + 2 * (heads * 64) * dim + 3 * (2 * dim * ffn)
            total += heads * (2 * 64 * position) * 2  # scores, then the weighted sum of values, over `position` keys
        total += 2 * dim * vocabulary
    return total


def nano_forward(tokens: int) -> int:
    return forward(tokens, layers=2, dim=128, heads=2, kv_heads=1, ffn=256, vocabulary=512)


def test_training(plans: dict[str, StepPlan]) -> None:
    plan = plans["base"]
    assert (plan.parameters, plan.non_embedding_parameters) == (NANO, NANO - 512 * 128)
    assert (plan.steps, plan.sequences_per_step, plan.tokens_per_step, plan.tokens) == (100, 8, 512, 51_200)
    assert plan.flops == 100 * 8 * 3 * nano_forward(64)
    # fp32 weights and two moments; 4 even ones (the last among them) and the 2 newest for resuming
    assert plan.sizes == {"checkpoints": 6 * 12 * NANO}


def test_checkpoints_of_bf16_hold_the_bf16_weights_too(tmp_path: Path) -> None:
    path = tmp_path / "by_hand.yaml"
    path.write_text(RECIPE, "utf-8")
    plans = {plan.step: plan for plan in derive(load_recipe(path, ["steps.base.precision=bf16"]))}
    assert plans["base"].sizes == {"checkpoints": 6 * 14 * NANO}


def test_tokens_and_epochs_per_source(plans: dict[str, StepPlan]) -> None:
    for step in ("base", "mix"):
        a, b = plans[step].sources["a"], plans[step].sources["b"]
        assert (a.share, a.tokens, a.pool, a.epochs) == (0.75, 38_400, 1_000_000, 0.0384)
        assert (b.share, b.tokens, b.pool) == (0.25, 12_800, 3_000_000)
        assert b.epochs == pytest.approx(12_800 / 3e6)


def test_influence_shares_are_left_to_the_run(plans: dict[str, StepPlan]) -> None:
    for step in ("mix2", "longer"):
        assert plans[step].sources == {}
        assert any("influence influence will measure" in note for note in plans[step].notes)


def test_distillation_counts_the_teacher(plans: dict[str, StepPlan]) -> None:
    plan = plans["longer"]
    assert (plan.parameters, plan.steps, plan.tokens) == (NANO, 20, 10_240)  # 10,000 tokens take 20 steps of 512
    teacher = forward(64, layers=6, dim=256, heads=4, kv_heads=2, ffn=768, vocabulary=512)
    assert plan.flops == 20 * 8 * (3 * nano_forward(64) + teacher)
    assert plan.sizes["teacher cache (temporary)"] == 10_240 * 16 * 8


def test_epochs_budget(plans: dict[str, StepPlan]) -> None:
    plan = plans["big"]
    # 4M tokens are 62,500 sequences; half of them in steps of 8 are 3,906.25, so 3,907 steps.
    assert plan.steps == 3907
    assert plan.sources["a"].share == 0.5
    assert plan.sources["a"].epochs == pytest.approx(3907 * 512 / 2 / 1e6, rel=1e-6)


def test_fine_tuning_states_what_is_known(plans: dict[str, StepPlan]) -> None:
    plan = plans["tuned"]
    assert (plan.steps, plan.tokens, plan.flops) == (None, None, None)
    # 3 x 1,000 conversations, one per sequence, 8 per step
    assert any("3 epochs" in note and "at most 375 " in note for note in plan.notes)


def test_influence_cost(plans: dict[str, StepPlan]) -> None:
    plan = plans["influence"]
    gradients = 3 * 2 * 10  # 2 capabilities of 10 windows, forward and backward
    scoring = (2 + 2) * (2 * 20)  # forward, half a backward and a product per capability over 20 documents of 2 sources
    check = ((2 + 2) + 4 * 2) * 5  # and finite differences with two steps
    shares = (2 + 4 * 2) * 24  # along each kind of parameter alone
    receipt = 3 * (3 * 4 + 2 * 10) + 2 * 10
    assert plan.flops == 2 * (gradients + scoring + check + shares + receipt) * nano_forward(32)
    assert plan.tokens == 2 * 20 * 32


@pytest.mark.parametrize("engine", ["ghost", "finite_differences"])
def test_influence_cost_with_folds_on_a_part_of_the_documents(tmp_path: Path, engine: str) -> None:
    path = tmp_path / "folds.yaml"
    path.write_text(RECIPE, "utf-8")
    recipe = load_recipe(path, ["steps.influence.probe_folds=4", "steps.influence.fold_documents=5", f"steps.influence.engine={engine}"])
    plan = next(plan for plan in derive(recipe) if plan.step == "influence")
    gradients = 3 * 2 * 10
    # 5 documents of each source along 4 folds, 15 along the whole probe; then the rows that are scored twice
    scoring, check = (2 + 8) * 2 * 5 + (2 + 2) * 2 * 15, ((2 + 2) + 4 * 2) * 5
    shares = (2 + 4 * 2) * 24
    if engine == "finite_differences":
        scoring, check = 2 * 2 * (4 * 2 * 5 + 2 * 15), 4 * (2 * 4) * 5
        shares = 2 * 4 * 2 * 24
    receipt = 3 * (3 * 4 + 2 * 10) + 2 * 10
    assert plan.flops == 2 * (gradients + scoring + check + shares + receipt) * nano_forward(32)


def test_influence_cost_with_datainf(tmp_path: Path) -> None:
    path = tmp_path / "datainf.yaml"
    path.write_text(RECIPE, "utf-8")

    def flops(*changes: str) -> float:
        found = derive(load_recipe(path, [f"steps.influence.{change}" for change in changes]))
        return next(plan.flops for plan in found if plan.step == "influence") / nano_forward(32)

    # Forward and backward of 16 documents of 2 sources for the norms, and once more for each capability.
    assert flops("preconditioner=datainf") - flops() == 2 * 3 * (1 + 2) * 2 * 16
    more = flops("preconditioner=datainf", "probe_folds=4", "curvature.documents=4") - flops("probe_folds=4")
    assert more == 2 * 3 * (1 + 2 * 5) * 2 * 4


def test_influence_of_the_published_size_fits_a_night(tmp_path: Path) -> None:
    """14 sources of 10,000 documents, three specialised 140M models at 10 checkpoints each: within 8 GPU-hours, in windows of 1,024
    tokens, at 400 TFLOP/s (two fifths of what an H100's tensor cores do in bf16). A plan, not a measurement."""
    sources = "".join(f"      s{i}: {{kind: jsonl, path: s{i}, domain: web, expected_tokens: 1B tokens}}\n" for i in range(14))
    scored = "".join(
        f"""
  expert{i}:
    stage: train
    inputs: {{shards: corpus}}
    model: mobilellm_r1_140m
    sources: uniform
    budget: 100 steps
    seq_length: 2048 tokens
    global_batch: 2048 tokens
    lr: {{peak: 1e-3}}
  influence{i}:
    stage: influence
    inputs: {{shards: corpus, probe: probe, checkpoint: expert{i}}}
    documents: 10000
    tokens_per_document: 1024
    checkpoints: 10
""" for i in range(3)
    )  # fmt: skip
    path = tmp_path / "published.yaml"
    path.write_text(
        f"""
name: published
steps:
  corpus:
    stage: corpus
    tokenizer: {{kind: train_bpe, vocab_size: 128256}}
    sources:
{sources}
  probe:
    stage: probe
    inputs: {{shards: corpus}}
    capabilities: {{code: {{sources: {{s0: 1}}}}, math: {{sources: {{s1: 1}}}}, knowledge: {{sources: {{s2: 1}}}}}}
    documents: 10000
    tokens_per_document: 1024
{scored}""", "utf-8",
    )  # fmt: skip
    plans = [plan for plan in derive(load_recipe(path)) if plan.stage == "influence"]
    assert [plan.tokens for plan in plans] == [14 * 10_000 * 1024] * 3
    assert 1 < sum(Cluster(gpus=1, tflops=400.0).hours(plan.flops) for plan in plans) < 8
    assert plans[0].sizes["scores"] == 14 * 10_000 * 10 * 3 * 8


def test_shares_of_every_method(tmp_path: Path) -> None:
    path = tmp_path / "methods.yaml"
    path.write_text(RECIPE + """
  tilted:
    stage: mixture
    inputs: {shards: corpus, influence: influence}
    method: kl
    kl: {tau: 1}
  printed:
    stage: mixture
    inputs: {shards: corpus}
    method: published
    table: mobilellm_r1_pretrain1
""", "utf-8")  # fmt: skip
    found = {plan.step: plan for plan in derive(load_recipe(path))}
    assert found["tilted"].sources == {}
    assert any("influence influence will measure" in note for note in found["tilted"].notes)
    assert sum(source.share for source in found["printed"].sources.values()) == pytest.approx(1)
    assert found["printed"].sources["wiki"].share == pytest.approx(5.03 / 100.01)


def test_bytes_of_shards_and_export(plans: dict[str, StepPlan]) -> None:
    assert plans["corpus"].sizes == {"shards": 5_000_000 * 2}  # held-out text included; a vocabulary of 512 fits 2 bytes
    assert plans["export"].sizes == {"weights": NANO * 2}
    assert any("talk" in note for note in plans["chats"].notes)


def test_every_step_says_what_it_would_do(plans: dict[str, StepPlan]) -> None:
    assert all(plan.does for plan in plans.values())


def test_table(plans: dict[str, StepPlan]) -> None:
    text = io.StringIO()
    print_plans(plans.values(), Console(file=text, width=160))
    printed = text.getvalue()
    for words in (f"{NANO:,}", "51.2k", "38.4k", "75.00 %", "0.04", "base: train next_token"):
        assert words in printed
    # The mixture and the phase that trains on it have the same rows: printed once.
    assert printed.count("38.4k") == 1


def test_size() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1536, 1_048_576, 5 * 2**40)] == ["0 B", "1023 B", "1 KiB", "1.5 KiB", "1 MiB", "5 TiB"]


def test_flops_agree_with_torch_on_a_real_model(plans: dict[str, StepPlan]) -> None:
    """One step of the exported architecture, counted by torch: attention there is the full square, here the causal half."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    config = transformers.Llama4TextConfig(
        vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=64, intermediate_size=256,
        intermediate_size_mlp=256, moe_layers=[], num_local_experts=0, num_experts_per_tok=0, no_rope_layers=[1, 1],
        layer_types=["full_attention"] * 2, use_qk_norm=True, attn_temperature_tuning=False, tie_word_embeddings=True, pad_token_id=0,
    )
    model = transformers.Llama4ForCausalLM._from_config(config, attn_implementation="eager")
    assert sum(parameter.numel() for parameter in model.parameters()) == NANO
    tokens = torch.randint(0, 512, (8, 64))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    upper_triangle = 3 * 8 * 2 * 2 * (2 * 64 * 2) * (64 * 63 // 2)  # x3 training, 8 rows, 2 layers, 2 heads, 2 products
    per_step = plans["base"].flops / plans["base"].steps
    # The counter also sees the tiny product that makes RoPE's angles.
    assert counter.get_total_flops() == pytest.approx(per_step + upper_triangle, rel=1e-4)


def test_a_teacher_on_disk_is_counted(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    (tmp_path / "teacher").mkdir()
    steps = RECIPE.replace("teacher: big}", "teacher: null}").replace(
        "distill: {cache_top_k: 16}", "distill: {teacher: {hf_folder: " + str(tmp_path / "teacher") + "}}"
    )
    recipe.write_text(steps, "utf-8")
    unknown = {plan.step: plan for plan in derive(load_recipe(recipe))}["longer"]
    assert unknown.flops == 20 * 8 * 3 * nano_forward(64)
    assert any("without the teacher" in note for note in unknown.notes)
    (tmp_path / "teacher" / "config.json").write_text(
        '{"vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 768}',
        "utf-8",
    )
    known = {plan.step: plan for plan in derive(load_recipe(recipe))}["longer"]
    assert known.flops - unknown.flops == 20 * 8 * forward(64, layers=6, dim=256, heads=4, kv_heads=2, ffn=768, vocabulary=512)
    assert not any("teacher" in note for note in known.notes)


def test_no_torch() -> None:
    code = (
        "import sys; from megatron_r1.pipeline.recipe import load_recipe; from megatron_r1.pipeline.derive import derive; "
        "derive(load_recipe('mobilellm_r1_140m')); sys.exit(any(name in sys.modules for name in ('torch', 'megatron', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_shares_of_baselines(tmp_path: Path) -> None:
    path = tmp_path / "baselines.yaml"
    path.write_text(RECIPE + """
  natural: {stage: mixture, inputs: {shards: corpus}, method: natural}
  loo: {stage: mixture, inputs: {shards: corpus, base: mix}, method: without, without: a}
  loo_natural: {stage: mixture, inputs: {shards: corpus}, method: without, without: b}
  loo_unknown: {stage: mixture, inputs: {shards: corpus, base: mix2}, method: without, without: b}
  drawn: {stage: mixture, inputs: {shards: corpus}, method: random, random: {index: 0}}
  read: {stage: mixture, inputs: {shards: corpus, checkpoint: base}, method: perplexity}
  dro:
    stage: train
    inputs: {shards: corpus, reference: big}
    objective: group_dro
    model: nano
    sources: uniform
    budget: 10 steps
    seq_length: 64 tokens
    global_batch: 512 tokens
    lr: {peak: 1e-3}
  dro_mix: {stage: mixture, inputs: {shards: corpus, proxies: [dro]}, method: doremi}
""", "utf-8")  # fmt: skip
    found = {plan.step: plan for plan in derive(load_recipe(path))}
    assert {name: source.share for name, source in found["loo"].sources.items()} == {"b": 1.0}
    assert {name: source.share for name, source in found["loo_natural"].sources.items()} == {"a": 1.0}
    for step, words in (("loo_unknown", "influence will measure"), ("drawn", "drawn around"), ("read", "perplexities"), ("dro_mix", "group-DRO")):
        assert found[step].sources == {}
        assert any(words in note for note in found[step].notes), step
    reference = forward(64, layers=6, dim=256, heads=4, kv_heads=2, ffn=768, vocabulary=512)
    assert found["dro"].flops == 10 * 8 * (3 * nano_forward(64) + reference)
    assert "against big" in found["dro"].does


def test_a_mixture_of_specialised_models_reads_a_table_for_each() -> None:
    recipe = load_recipe("quickstart_specialists")
    wanted = [f"measured-{name}" for name in ("code", "math", "knowledge")]
    assert recipe.inputs("mix1")["influence"] == wanted
    for name, step in zip(("code", "math", "knowledge"), wanted):
        assert (recipe.steps[step].capabilities, recipe.inputs(step)["checkpoint"]) == ([name], f"specialist-{name}")
    plans = {plan.step: plan for plan in derive(recipe)}
    assert any("influence measured-code, measured-math, measured-knowledge will measure" in note for note in plans["mix1"].notes)
    # One capability of three, at five checkpoints: less than the same scores along all of them.
    alone = load_recipe("quickstart_specialists", ["steps.measured-code.capabilities=null"])
    assert plans["measured-code"].flops < next(plan.flops for plan in derive(alone) if plan.step == "measured-code")


def test_a_dry_run_tells_only_of_the_steps_that_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    def told(*arguments: str) -> list[str]:
        assert main(["run", *arguments, "--dry-run"]) == 0
        steps = load_recipe(arguments[0]).steps
        return [name for line in capsys.readouterr().out.splitlines() if (name := line.partition(": ")[0]) in steps]

    assert told("quickstart") == list(load_recipe("quickstart").steps)
    assert told("quickstart", "--until", "mix_uniform") == ["corpus", "mix_uniform"]
    assert told("quickstart", "--only", "pretrain1") == ["pretrain1"]
    assert main(["run", "baselines", "--dry-run", "--only", "left_out-*"]) == 0
    assert "left_out-* (11)" in capsys.readouterr().out
    assert main(["run", "baselines", "--dry-run", "--only", "left_out-web_wiki"]) == 0
    assert "left_out-* (1)" in capsys.readouterr().out
    assert main(["run", "quickstart", "--dry-run", "--until", "mix9"]) == 2
    assert "'mix9'" in capsys.readouterr().err
