"""The shipped recipes against the paper's tables, typed in here a second time.

Sections are those of the paper (arXiv 2509.24945 v1) and of its public README. The source names on the left are how the
tables call the data sets, so that a slip in the recipe's own names shows, too.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.pipeline.derive import derive, model_of, pools
from megatron_r1.pipeline.recipe import Recipe, load_recipe, shipped

SIZES = ("140m", "360m", "950m")
ALL = pytest.mark.parametrize("recipe", SIZES, indirect=True)


@pytest.fixture(scope="module")
def loaded() -> dict[str, Recipe]:
    return {size: load_recipe(f"mobilellm_r1_{size}") for size in SIZES}


@pytest.fixture
def recipe(loaded: dict[str, Recipe], request: pytest.FixtureRequest) -> Recipe:
    return loaded[request.param]


def step(recipe: Recipe, name: str) -> Any:
    return recipe.steps[name]


# ------------------------------------------------------------------ Table 1: shapes; exact counts of the released models

# size: layers, heads, KV heads, dim, FFN dim, parameters
TABLE_1 = {
    "140m": (15, 9, 3, 576, 2048, 140_248_512),
    "360m": (15, 16, 4, 1024, 4096, 359_431_168),
    "950m": (22, 24, 6, 1536, 6144, 949_685_760),
}


@pytest.mark.parametrize("size", SIZES)
def test_model(loaded: dict[str, Recipe], size: str) -> None:
    model = step(loaded[size], "pretrain1").model
    shape = (model.num_layers, model.num_heads, model.num_kv_heads, model.hidden_size, model.ffn_size, model.parameters())
    assert shape == TABLE_1[size]
    assert (model.vocab_size, model.head_dim, model.tied_embeddings, model.rms_eps, model.init_std) == (128256, 64, True, 1e-5, 0.02)


@ALL
def test_sizes_differ_in_the_model_only(recipe: Recipe, loaded: dict[str, Recipe]) -> None:
    """One table for all model sizes: no per-size learning rate, batch or budget is published."""
    mine, reference = recipe.plain()["steps"], loaded["950m"].plain()["steps"]
    mine["pretrain1"]["model"] = reference["pretrain1"]["model"]
    for steps in (mine, reference):
        steps["report"].pop("title")
    assert mine == reference


# ------------------------------------------------------------------ Table 2: stages

# stage: budget as printed, per-GPU batch, sequence length, steps or epochs, peak LR
TABLE_2: dict[str, tuple[float | None, int, int, str, float]] = {
    "pretrain1": (2e12, 16, 2048, "500000 steps", 4e-3),
    "pretrain2": (2e12, 16, 2048, "500000 steps", 4e-3),
    "midtrain1": (100e9, 4, 4096, "50000 steps", 3.6e-4),
    "midtrain2": (100e9, 4, 4096, "50000 steps", 3.6e-4),
    "sft_general": (None, 4, 4096, "2 epochs", 5e-6),
    "sft_reasoning": (None, 8, 32768, "4 epochs", 8e-5),
}
GPUS = 16 * 8


@ALL
@pytest.mark.parametrize("name", TABLE_2)
def test_stage_table(recipe: Recipe, name: str) -> None:
    printed, per_gpu, length, duration, peak = TABLE_2[name]
    config = step(recipe, name)
    assert int(config.micro_batch) == per_gpu
    assert int(config.seq_length) == length
    assert int(config.global_batch) == GPUS * per_gpu * length
    assert str(config.budget) == duration
    assert config.lr.peak == peak
    assert config.precision == "bf16"
    if printed is not None:
        # "2T" and "100B" are rounded: 500k steps of 4.19M tokens are 2.097T.
        assert config.steps() * int(config.global_batch) == pytest.approx(printed, rel=0.05)


@ALL
def test_tokens_per_step_and_totals(recipe: Recipe) -> None:
    plans = {plan.step: plan for plan in derive(recipe)}
    for name in ("pretrain1", "pretrain2"):
        assert plans[name].tokens_per_step == 4_194_304
        assert plans[name].tokens == 2_097_152_000_000
    for name in ("midtrain1", "midtrain2"):
        assert plans[name].tokens_per_step == 2_097_152
        assert plans[name].tokens == 104_857_600_000
    assert sum(plans[name].tokens for name in ("pretrain1", "pretrain2")) == pytest.approx(4.2e12, rel=0.002)  # "4.2T"
    assert (plans["sft_general"].sequences_per_step, plans["sft_reasoning"].sequences_per_step) == (512, 1024)


# stage: objective, decay, warm-up, learning rate at the end / peak (section 3.2; SFT warm-up: README)
SCHEDULES = {
    "pretrain1": ("next_token", "linear", "2000 steps", 0.1),
    "pretrain2": ("next_token", "linear", "2000 steps", 0.1),
    "midtrain1": ("distill", "linear", "0 steps", 0.0),
    "midtrain2": ("distill", "linear", "0 steps", 0.0),
    "sft_general": ("sft", "linear", "0.03", 0.0),
    "sft_reasoning": ("sft", "linear", "0.1", 0.0),
}
# Section 3.2: Adam (0.9, 0.95), eps 1e-8, weight decay 0.1 in pre-training; SFT scripts: weight decay 0 and the library's
# betas. Clipping 1.0 is the library's default throughout.
ADAM = {name: (0.9, 0.95, 1e-8, 0.1, 1.0) for name in ("pretrain1", "pretrain2", "midtrain1", "midtrain2")}
ADAM |= {name: (0.9, 0.999, 1e-8, 0.0, 1.0) for name in ("sft_general", "sft_reasoning")}


@ALL
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_and_optimizer(recipe: Recipe, name: str) -> None:
    config = step(recipe, name)
    assert (config.objective, config.lr.schedule, str(config.lr.warmup), config.lr.final_ratio) == SCHEDULES[name]
    adam = config.optimizer
    assert (adam.beta1, adam.beta2, adam.eps, adam.weight_decay, adam.clip) == ADAM[name]
    assert config.reset_optimizer


# stage: RoPE base and declared context. Context 4k of the base models, 32k of the final ones (README); base 1e6, times 8 for
# reasoning SFT (README of the SFT code).
POSITIONS = {
    "pretrain1": (1e6, 2048), "pretrain2": (1e6, 2048), "midtrain1": (1e6, 4096), "midtrain2": (1e6, 4096),
    "sft_general": (1e6, 4096), "sft_reasoning": (8e6, 32768),
}


@ALL
@pytest.mark.parametrize("name", POSITIONS)
def test_rope_and_context(recipe: Recipe, name: str) -> None:
    model = model_of(recipe, name)
    assert (model.rope_theta, model.max_positions) == POSITIONS[name]
    assert model.max_positions >= int(step(recipe, name).seq_length)
    assert model.parameters() == step(recipe, "pretrain1").model.parameters()


@ALL
def test_distillation(recipe: Recipe) -> None:
    """Section 3.2: pure KL to Llama-3.1-8B-Instruct, in both mid-training phases and nowhere else."""
    for name in TABLE_2:
        config = step(recipe, name)
        if name.startswith("midtrain"):
            assert config.distill.teacher.hf_folder.endswith("Llama-3.1-8B-Instruct")
            assert (config.distill.kd_weight, config.distill.temperature) == (1.0, 1.0)
        else:
            assert config.distill.teacher is None
            assert config.inputs.teacher is None


@ALL
def test_order_of_the_phases(recipe: Recipe) -> None:
    chain = {name: step(recipe, name).inputs.checkpoint for name in TABLE_2}
    assert chain == {
        "pretrain1": None, "pretrain2": "pretrain1", "midtrain1": "pretrain2", "midtrain2": "midtrain1", "sft_general": "midtrain2",
        "sft_reasoning": "sft_general",
    }


# ------------------------------------------------------------------ Tables 3 and 4: data mixes

NAMES = {
    "StarCoder": "starcoder", "OpenWebMath": "openwebmath", "FineWeb-Edu": "fineweb_edu", "Wiki": "wiki", "Arxiv": "arxiv",
    "StackExchange": "stackexchange", "Algebraic Stack": "algebraic_stack", "Nemotron science": "nemotron_science",
    "Nemotron code": "nemotron_code", "Nemotron math": "nemotron_math", "Cosmopedia": "cosmopedia",
    "Natural Reasoning": "natural_reasoning", "FineMath": "finemath", "peS2o": "pes2o",
    "Dolmino DCLM": "dolmino_dclm", "Dolmino FLAN": "dolmino_flan", "Dolmino peS2o": "dolmino_pes2o", "Dolmino Wiki": "dolmino_wiki",
    "Dolmino StackExchange": "dolmino_stackexchange", "Dolmino Math": "dolmino_math",
    "Nemotron-Pretraining-Code-v1": "nemotron_pretraining_code", "Nemotron-CC-Math-v1": "nemotron_cc_math", "Benchmark train sets": "benchmark_train",
}

# Table 3: rows, tokens (billions), phase 1 %, phase 2 %; None: not in that phase
TABLE_3: dict[str, tuple[int, float, float | None, float | None]] = {
    "StarCoder": (206_640_114, 263.8, 10.66, 0.52),
    "OpenWebMath": (6_117_786, 12.6, 6.93, 23.33),
    "FineWeb-Edu": (1_279_107_432, 1300, 63.75, 54.83),
    "Wiki": (7_222_303, 3.7, 5.03, 0.14),
    "Arxiv": (1_533_917, 28, 6.36, 1.32),
    "StackExchange": (29_249_120, 19.6, 5.03, 0.86),
    "Algebraic Stack": (3_404_331, 12.6, 2.25, 1.26),
    "Nemotron science": (708_920, 2, None, 0.03),
    "Nemotron code": (10_108_883, 16, None, 0.72),
    "Nemotron math": (22_066_397, 15, None, 3.01),
    "Cosmopedia": (31_064_744, 25, None, 2.70),
    "Natural Reasoning": (1_145_824, 1.8, None, 3.18),
    "FineMath": (48_283_984, 34, None, 8.01),
    "peS2o": (38_800_000, 50, None, 0.08),
}
# Table 4: rows (millions), phase 1 %, phase 2 %
TABLE_4: dict[str, tuple[float, float, float]] = {
    "Dolmino DCLM": (606, 37.03, 6.51),
    "Dolmino FLAN": (57.3, 4.10, 0.72),
    "Dolmino peS2o": (38.8, 11.41, 2.01),
    "Dolmino Wiki": (6.17, 2.66, 0.47),
    "Dolmino StackExchange": (2.48, 2.12, 2.00),
    "Dolmino Math": (21, 11.63, 29.10),
    "Nemotron-Pretraining-Code-v1": (882, 20.69, 29.10),
    "Nemotron-CC-Math-v1": (144, 3.45, 19.40),
    "StarCoder": (206, 6.90, 9.70),
    "Benchmark train sets": (0.01, 0.0, 0.97),
}
# phase: (train step, weights, their printed sum)
MIXES = {
    "pretrain1": ({name: row[2] for name, row in TABLE_3.items() if row[2] is not None}, 100.01),
    "pretrain2": ({name: row[3] for name, row in TABLE_3.items()}, 99.99),
    "midtrain1": ({name: row[1] for name, row in TABLE_4.items() if row[1] > 0}, 99.99),
    "midtrain2": ({name: row[2] for name, row in TABLE_4.items()}, 99.98),
}


@ALL
@pytest.mark.parametrize("name", MIXES)
def test_mixes(recipe: Recipe, name: str) -> None:
    table, total = MIXES[name]
    train = step(recipe, name)
    mixture = step(recipe, train.inputs.mixture)
    assert mixture.method == "explicit"
    assert mixture.weights == {NAMES[source]: share for source, share in table.items()}
    assert sum(mixture.weights.values()) == pytest.approx(total, abs=1e-9)
    assert mixture.inputs.shards == train.inputs.shards
    assert set(mixture.weights) <= set(pools(recipe, train.inputs.shards))
    assert int(mixture.budget) == train.steps() * int(train.global_batch)


@ALL
def test_pools(recipe: Recipe) -> None:
    sources = step(recipe, "corpus_pretrain").sources
    assert set(sources) == {NAMES[name] for name in TABLE_3}
    for name, (rows, billions, _, _) in TABLE_3.items():
        assert int(sources[NAMES[name]].expected_documents) == rows
        assert int(sources[NAMES[name]].expected_tokens) == round(billions * 1e9)
    assert sum(int(source.expected_tokens) for source in sources.values()) == 1_784_100_000_000  # "1.8T"
    sources = step(recipe, "corpus_midtrain").sources
    assert set(sources) == {NAMES[name] for name in TABLE_4}
    for name, (millions, _, _) in TABLE_4.items():
        assert int(sources[NAMES[name]].expected_documents) == round(millions * 1e6)


# Table 3's shares of 2,097.2B tokens over its pools, worked out by hand: data set, (billions, epochs) of each phase.
EPOCHS: dict[str, tuple[tuple[float, float] | None, tuple[float, float]]] = {
    "StarCoder": ((223.6, 0.85), (10.9, 0.04)),
    "OpenWebMath": ((145.3, 11.53), (489.3, 38.83)),
    "FineWeb-Edu": ((1336.9, 1.03), (1149.9, 0.88)),
    "Wiki": ((105.5, 28.51), (2.9, 0.79)),
    "Arxiv": ((133.4, 4.76), (27.7, 0.99)),
    "StackExchange": ((105.5, 5.38), (18.0, 0.92)),
    "Algebraic Stack": ((47.2, 3.74), (26.4, 2.10)),
    "Nemotron science": (None, (0.6, 0.31)),
    "Nemotron code": (None, (15.1, 0.94)),
    "Nemotron math": (None, (63.1, 4.21)),
    "Cosmopedia": (None, (56.6, 2.26)),
    "Natural Reasoning": (None, (66.7, 37.05)),
    "FineMath": (None, (168.0, 4.94)),
    "peS2o": (None, (1.7, 0.03)),
}


HELD_OUT = 0.001  # this project's own measuring sets, taken off every pool


@ALL
def test_epochs_per_source(recipe: Recipe) -> None:
    splits = step(recipe, "corpus_pretrain").splits
    assert splits.probe + splits.test == HELD_OUT
    plans = {plan.step: plan for plan in derive(recipe)}
    for name, phases in EPOCHS.items():
        for phase, expected in zip(("pretrain1", "pretrain2"), phases, strict=True):
            found = plans[phase].sources.get(NAMES[name])
            if expected is None:
                assert found is None
                continue
            printed_sum = MIXES[phase][1] / 100  # the run divides the shares by their sum, the figures above do not
            assert found.tokens * printed_sum / 1e9 == pytest.approx(expected[0], abs=0.051, rel=0)
            assert found.epochs * printed_sum * (1 - HELD_OUT) == pytest.approx(expected[1], abs=0.0051, rel=0)
            assert plans[f"mix_{phase}"].sources[NAMES[name]] == found


# ------------------------------------------------------------------ Table 5: post-training data (rows)

TABLE_5 = {
    "corpus_sft_general": {"tulu_3_sft_olmo_2_mixture_0225": 866_000},
    # The paper's table has 802K and 2.2M for the last two; its text and README 803K and 2.16M.
    "corpus_sft_reasoning": {"openmathreasoning": 3_200_000, "opensciencereasoning_2": 803_000, "opencodereasoning_2": 2_160_000},
}


@ALL
@pytest.mark.parametrize("name", TABLE_5)
def test_fine_tuning_data(recipe: Recipe, name: str) -> None:
    sources = step(recipe, name).sources
    assert {source: int(config.expected_documents) for source, config in sources.items()} == TABLE_5[name]
    train = next(config for config in recipe.steps.values() if config.stage == "train" and config.inputs.shards == name)
    assert train.inputs.mixture is None  # every conversation once per epoch: the three sets are mixed jointly
    assert train.sources is None


@ALL
def test_steps_of_fine_tuning_when_nothing_is_packed(recipe: Recipe) -> None:
    """About 3.4k and 24.1k steps: one conversation per sequence, 0.1 % of them held out here."""
    notes = {plan.step: " ".join(plan.notes) for plan in derive(recipe)}
    for name, conversations, epochs, per_step, printed in (("sft_general", 866_000, 2, 512, 3.4e3), ("sft_reasoning", 6_163_000, 4, 1024, 24.1e3)):
        steps = math.ceil(conversations * (1 - HELD_OUT) * epochs / per_step)
        assert steps == pytest.approx(printed, rel=0.01)
        assert f"at most {steps} " in notes[name]


# ------------------------------------------------------------------ documents and attention (the authors' data loader)


@ALL
def test_documents(recipe: Recipe) -> None:
    for name in ("corpus_pretrain", "corpus_midtrain"):
        config = step(recipe, name)
        assert (config.prepend_bos, config.append_eos) == (True, False)  # the tokenizer's BOS, no EOS
        assert all(source.min_chars == 0 and not source.deduplicate for source in config.sources.values())
    assert step(recipe, "corpus_pretrain").tokenizer.kind == "huggingface"  # LLaMA-3.2's, one for the whole run
    for name in ("corpus_midtrain", "corpus_sft_general", "corpus_sft_reasoning"):
        assert step(recipe, name).inputs.tokenizer == "corpus_pretrain"
    for name in ("pretrain1", "pretrain2", "midtrain1", "midtrain2"):
        assert not step(recipe, name).reset_documents  # attention across documents is allowed
    for name in ("sft_general", "sft_reasoning"):
        assert step(recipe, name).reset_documents
        assert step(recipe, name).sft.mask == "all"


@ALL
def test_what_measures_while_training_has_text_to_measure_on(recipe: Recipe) -> None:
    """Curves and RankMe come from the probe split."""
    for config in recipe.steps.values():
        if config.stage == "train" and (config.validation.tokens or config.rankme.samples):  # type: ignore[attr-defined]
            assert step(recipe, config.inputs.shards).splits.probe > 0  # type: ignore[attr-defined]


def test_the_three_are_shipped() -> None:
    assert {f"mobilellm_r1_{size}" for size in SIZES} <= set(shipped())


# ------------------------------------------------------------------ the published method in place of the table

PROBED = {  # section 5.1.1, Figure 5
    "code": {"StarCoder", "StackExchange", "Nemotron code"},
    "math": {"OpenWebMath", "FineMath", "Algebraic Stack", "Nemotron math"},
    "knowledge": {"FineWeb-Edu", "Wiki", "Arxiv", "Nemotron science"},
}
SHARED = {"Cosmopedia", "Natural Reasoning", "peS2o"}


@pytest.mark.parametrize("size", SIZES)
def test_method_part(tmp_path: Path, size: str) -> None:
    path = tmp_path / "method.yaml"
    path.write_text(f"extends: [mobilellm_r1_{size}, parts/mobilellm_r1_influence.yaml]\nname: method\n", "utf-8")
    recipe = load_recipe(path)
    plans = {plan.step: plan for plan in derive(recipe)}
    for probe, shards in (("probe", "corpus_pretrain"), ("probe_midtrain", "corpus_midtrain")):
        found = step(recipe, probe)
        assert {name: set(capability.sources) for name, capability in found.capabilities.items()} == {
            name: {NAMES[source] for source in members | SHARED} for name, members in PROBED.items()
        }
        assert found.inputs.shards == shards
        # Section 5.1.1: FineWeb-Edu score above 4, the top 10 % twice, about 10k of each set; the members' union is a capability's set.
        rules = found.rules
        assert rules.quality.classifier.endswith("fineweb-edu-classifier")
        assert (rules.quality.above, rules.reasoning.keep, rules.domain.keep, rules.semantic.keep) == (4, 0.1, 0.1, 10_000)
        assert found.windows == {name: 10_000 * len(capability.sources) for name, capability in found.capabilities.items()}
        assert found.judge.model.hf_folder.endswith("Llama-3.1-8B-Instruct")
        # Every sieve may be relaxed, but only to more than what the next one needs.
        assert rules.candidates > rules.quality.fewest > rules.reasoning.fewest > rules.domain.fewest > rules.semantic.keep
    expected = {  # mixture: (influence step, checkpoint it is measured at, checkpoints T)
        "mix_pretrain2": ("influence_pretrain", "pretrain1", 10),
        "mix_midtrain1": ("influence_midtrain1", "pretrain2", 1),
        "mix_midtrain2": ("influence_midtrain2", "midtrain1", 1),
    }
    for mixture, (influence, checkpoint, count) in expected.items():
        config, measured = step(recipe, mixture), step(recipe, influence)
        assert (config.method, config.inputs.influence, config.weights) == ("influence", influence, None)
        assert (measured.inputs.checkpoint, measured.checkpoints, measured.documents) == (checkpoint, count, 10_000)
        assert measured.inputs.shards == config.inputs.shards == step(recipe, measured.inputs.probe).inputs.shards
        assert plans[influence].flops > 0
    # Mid-training weighs Table 4's sources, not the ones that are only read for probing.
    table = {NAMES[name] for name in TABLE_4} - {"benchmark_train"}
    assert set(step(recipe, "mix_midtrain1").sources) == set(step(recipe, "mix_midtrain2").sources) == table
    assert step(recipe, "mix_pretrain1").weights == step(load_recipe(f"mobilellm_r1_{size}"), "mix_pretrain1").weights
    assert step(recipe, "pretrain1").checkpoints.evenly == 10
    assert set(step(recipe, "report").inputs.artifacts) == set(recipe.steps) - {"report"}


@ALL
def test_the_report_shows_every_step(recipe: Recipe) -> None:
    assert set(step(recipe, "report").inputs.artifacts) == set(recipe.steps) - {"report"}
