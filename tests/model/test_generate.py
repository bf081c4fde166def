"""Generation: a batch equals its rows alone, the cache equals a full recomputation, and both equal transformers' generate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Llama4ForCausalLM
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig

from megatron_r1.model.config import PRESETS
from megatron_r1.model.generate import Decoder, config_of, generate
from megatron_r1.model.hf_map import canonical, hf_config, table, to_hf
from megatron_r1.utils.errors import CheckpointError, DataError

CONFIG = PRESETS["nano"].replace(vocab_size=64, num_heads=4, num_kv_heads=2, hidden_size=64, head_dim=16, ffn_size=96, max_positions=128)


def random_state(config, seed=0, scale=0.3):
    draw = torch.Generator().manual_seed(seed)
    return {
        entry.mcore: torch.randn(entry.shape(config), generator=draw) * scale + (1.0 if entry.mcore.endswith("norm.weight") else 0.0)
        for entry in table(config)
    }


@pytest.fixture(scope="module")
def decoder():
    return Decoder(random_state(CONFIG), CONFIG)


@pytest.fixture(scope="module")
def reference():
    model = Llama4ForCausalLM(Llama4TextConfig(**{k: v for k, v in hf_config(CONFIG).items() if k not in ("model_type", "architectures", "torch_dtype")}))
    model.load_state_dict(to_hf(random_state(CONFIG), CONFIG), strict=False)
    model.tie_weights()
    return model.eval()


def prompts(count, seed=0, longest=40):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=draw).tolist()
    return [torch.randint(CONFIG.vocab_size, (length,), generator=draw).tolist() for length in lengths]


def hf_greedy(model, prompt, new):
    with torch.no_grad():
        out = model.generate(torch.tensor([prompt]), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, attention_mask=torch.ones(1, len(prompt)))
    return out[0, len(prompt) :].tolist()


def test_greedy_equals_transformers(decoder, reference):
    asked = prompts(6)
    assert generate(decoder, asked, 24) == [hf_greedy(reference, prompt, 24) for prompt in asked]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(1, 7), st.booleans())
def test_a_batch_equals_its_rows_alone(seed, count, batch_size, greedy):
    decoder = Decoder(random_state(CONFIG, seed=seed % 7), CONFIG)
    asked = prompts(count, seed=seed)
    together = generate(decoder, asked, 12, stop_ids=[3, 5, 9, 11], greedy=greedy, seed=seed, batch_size=batch_size)
    bigger = generate(decoder, asked, 12, stop_ids=[3, 5, 9, 11], greedy=greedy, seed=seed, batch_size=64)
    assert together == bigger
    if greedy:
        assert together == [generate(decoder, [prompt], 12, stop_ids=[3, 5, 9, 11])[0] for prompt in asked]


def test_cached_logits_equal_one_full_pass(decoder):
    tokens = torch.tensor(prompts(3, seed=4, longest=2)[0] + list(range(20)))[None]
    with torch.no_grad():
        full = decoder.logits(decoder.prefill(tokens, decoder.cache(1, tokens.shape[1])))[0]
        cache = decoder.cache(1, tokens.shape[1])
        decoder.prefill(tokens[:, :5], cache)
        stepped = [decoder.logits(decoder.step(tokens[:, i], torch.tensor([i]), cache))[0] for i in range(5, tokens.shape[1])]
    torch.testing.assert_close(torch.stack(stepped), full[5:], atol=2e-5, rtol=1e-5)


def test_stop_token_ends_a_row_and_is_not_returned(decoder):
    asked = prompts(5, seed=2)
    free = generate(decoder, asked, 20)
    stop = free[2][7]
    stopped = generate(decoder, asked, 20, stop_ids=[stop])
    for row, cut in zip(free, stopped, strict=True):
        assert cut == (row[: row.index(stop)] if stop in row else row)


def test_the_stop_token_is_kept_where_asked_for(decoder):
    asked = prompts(9, seed=2)
    plain = generate(decoder, asked, 12, stop_ids=[3, 5, 9], greedy=False, seed=4)
    kept = generate(decoder, asked, 12, stop_ids=[3, 5, 9], greedy=False, seed=4, keep_stop=True)
    for without, row in zip(plain, kept, strict=True):
        assert row[: len(without)] == without
        assert row[len(without) :] in ([[3], [5], [9]] if len(without) < 12 else [[]])
    assert {len(row) == 12 for row in plain} == {True, False}


def test_draws_follow_the_number_and_not_the_place(decoder):
    asked = prompts(5, seed=2)
    together = generate(decoder, asked, 10, greedy=False, seed=4, numbers=[40, 7, 7, 0, 12])
    turned = generate(decoder, asked[::-1], 10, greedy=False, seed=4, numbers=[12, 0, 7, 7, 40])
    assert together == turned[::-1]
    same = generate(decoder, [asked[0]] * 3, 10, greedy=False, seed=4, numbers=[1, 2, 1])
    assert same[0] == same[2] != same[1]
    assert generate(decoder, asked, 10, greedy=False, seed=4, numbers=range(5)) == generate(decoder, asked, 10, greedy=False, seed=4)


def test_rows_that_finish_early_do_not_disturb_the_others(decoder):
    """Forces the batch to be compacted again and again: half of the vocabulary stops a row."""
    asked = prompts(24, seed=9)
    free = generate(decoder, asked, 16)
    stops = list(range(32))
    expected = [row[: next((i for i, token in enumerate(row) if token < 32), len(row))] for row in free]
    assert generate(decoder, asked, 16, stop_ids=stops) == expected
    assert len({len(row) for row in expected}) > 3


def test_sampling_follows_the_distribution(decoder):
    prompt = prompts(1, seed=5)[0]
    with torch.no_grad():
        hidden = decoder.prefill(torch.tensor([prompt]), decoder.cache(1, len(prompt)))
        wanted = (decoder.logits(hidden[0, -1]) / 2.0).softmax(-1)
    drawn = generate(decoder, [prompt] * 3000, 1, greedy=False, temperature=2.0, seed=1, batch_size=512)
    counts = torch.bincount(torch.tensor([row[0] for row in drawn]), minlength=CONFIG.vocab_size) / 3000
    assert float((counts - wanted).abs().sum()) / 2 < 0.06  # total variation; about 0.04 is expected from 3000 draws
    again = generate(decoder, [prompt] * 3000, 1, greedy=False, temperature=2.0, seed=1, batch_size=64)
    assert again == drawn
    assert generate(decoder, [prompt] * 8, 8, greedy=False, temperature=2.0, seed=2) != [row * 1 for row in generate(decoder, [prompt] * 8, 8, greedy=False, temperature=2.0, seed=3)]


def test_low_temperature_is_greedy(decoder):
    asked = prompts(4, seed=6)
    assert generate(decoder, asked, 8, greedy=False, temperature=1e-5) == generate(decoder, asked, 8)


def test_nothing_to_do(decoder):
    assert generate(decoder, [], 4) == []
    assert generate(decoder, [[1], [2]], 0) == [[], []]


@pytest.mark.parametrize(("prompt", "found"), [([], "empty"), ([1, 64], "token 64"), ([-1], "token 1")])
def test_bad_prompts_are_refused(decoder, prompt, found):
    with pytest.raises(DataError, match=found):
        generate(decoder, [[1], prompt], 2)


def test_a_part_of_a_model_is_refused():
    state = {name: value for name, value in random_state(CONFIG).items() if ".1." not in name}
    with pytest.raises(CheckpointError, match="missing"):
        Decoder(state, CONFIG)


@pytest.fixture(scope="module")
def built():
    from megatron_r1.model.build import build_model
    from megatron_r1.parallel.config import LayoutConfig
    from megatron_r1.parallel.context import initialize

    chunks = build_model(CONFIG, initialize(LayoutConfig(), 0), seed=3)
    state = random_state(CONFIG, seed=11)
    missing = chunks[0].load_state_dict(state, strict=False).missing_keys
    assert all(name.endswith("_extra_state") or name == "output_layer.weight" for name in missing)
    return chunks, state


def test_the_built_model_is_read_as_it_is(built):
    chunks, state = built
    config = config_of(chunks[0])
    assert config == CONFIG
    found = canonical(chunks[0].state_dict())
    assert {name: tuple(value.shape) for name, value in found.items()} == {name: tuple(value.shape) for name, value in state.items()}


def test_generation_from_the_built_model_equals_recomputing_with_its_own_forward(built):
    from megatron_r1.model.forward import logits

    chunks, _ = built
    asked = prompts(5, seed=12)
    found = generate(chunks, asked, 10)
    for prompt, continuation in zip(asked, found, strict=True):
        row = list(prompt)
        for token in continuation:
            with torch.no_grad():
                assert int(logits(chunks[0], torch.tensor([row]))[0, -1].argmax()) == token
            row.append(token)


def test_a_decoder_that_is_another_model_is_refused(built, monkeypatch):
    chunks, _ = built
    monkeypatch.setattr(chunks[0], "rotary_base", 500.0)
    with pytest.raises(CheckpointError, match="reproduce the model's own logits"):
        generate(chunks, [[1, 2, 3]], 2)
