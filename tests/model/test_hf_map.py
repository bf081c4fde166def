"""The name table, against transformers' own Llama4ForCausalLM and against itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, Llama4ForCausalLM
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig

from megatron_r1.model.config import PRESETS, ModelConfig
from megatron_r1.model.hf_map import canonical, from_hf, hf_config, join_qkv, model_config, split_qkv, table, to_hf
from megatron_r1.utils.errors import CheckpointError

NANO = PRESETS["nano"]


def random_state(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A megatron-core state dict with random norms too, so that a swapped pair of norms shows."""
    draw = torch.Generator().manual_seed(seed)
    return {
        entry.mcore: torch.randn(entry.shape(config), generator=draw) * 0.1 + (1.0 if entry.mcore.endswith("norm.weight") else 0.0)
        for entry in table(config)
    }


def hf_model(config: ModelConfig, state: dict[str, torch.Tensor]) -> Llama4ForCausalLM:
    model = Llama4ForCausalLM(Llama4TextConfig(**{k: v for k, v in hf_config(config).items() if k not in ("model_type", "architectures", "torch_dtype")}))
    missing, unexpected = model.load_state_dict(to_hf(state, config), strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    return model.eval()


shapes = st.builds(
    lambda groups, per_group, layers, ffn, vocab, tied, half: ModelConfig(
        vocab_size=vocab, hidden_size=groups * per_group * half * 2, num_layers=layers, num_heads=groups * per_group, num_kv_heads=groups,
        head_dim=half * 2, ffn_size=ffn, tied_embeddings=tied,
    ),
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.integers(2, 30), st.booleans(), st.integers(1, 4),
)


@settings(max_examples=25, deadline=None)
@given(shapes)
def test_round_trip_is_bit_identical_and_counts_every_parameter(config):
    state = random_state(config)
    there = to_hf(state, config)
    back = from_hf(there, config)
    assert set(back) == set(state)
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name
    assert sum(tensor.numel() for tensor in there.values()) == config.parameters()


def test_names_and_shapes_are_those_of_transformers():
    for tied in (True, False):
        config = NANO.replace(tied_embeddings=tied)
        model = Llama4ForCausalLM(Llama4TextConfig(**{k: v for k, v in hf_config(config).items() if k not in ("model_type", "architectures", "torch_dtype")}))
        wanted = {name: tuple(value.shape) for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")}
        found = {name: tuple(value.shape) for name, value in to_hf(random_state(config), config).items()}
        assert found == wanted


def test_qkv_is_grouped_per_key_value_head():
    config = NANO.replace(num_heads=4, num_kv_heads=2, hidden_size=8, head_dim=2)
    rows = torch.arange(16.0)[:, None]  # two rows per head; groups: q q k v | q q k v
    q, k, v = split_qkv(rows, config)
    assert q[:, 0].tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert k[:, 0].tolist() == [4, 5, 12, 13]
    assert v[:, 0].tolist() == [6, 7, 14, 15]
    assert torch.equal(join_qkv((q, k, v), config), rows)


def reference_logits(state: dict[str, torch.Tensor], config: ModelConfig, tokens: torch.Tensor) -> torch.Tensor:
    """The decoder written from the megatron-core layout with nothing shared with the package: loops, complex RoPE, explicit mask."""
    n, h = tokens.shape[1], config.head_dim
    per_group = config.num_heads // config.num_kv_heads

    def norm(x, gain=None):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_eps)
        return y if gain is None else y * gain

    angles = torch.outer(torch.arange(n).double(), config.rope_theta ** (-torch.arange(0, h, 2).double() / h))
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotate(x):  # [b, n, h]
        return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous()) * turn).flatten(-2)

    state = {name: value.double() for name, value in state.items()}
    x = state["embedding.word_embeddings.weight"][tokens]
    for i in range(config.num_layers):
        p = f"decoder.layers.{i}."
        qkv = norm(x, state[p + "input_layernorm.weight"]) @ state[p + "self_attention.linear_qkv.weight"].T
        heads = qkv.unflatten(-1, (config.num_kv_heads, per_group + 2, h))
        out = []
        for group in range(config.num_kv_heads):
            key, value = rotate(norm(heads[:, :, group, per_group])), heads[:, :, group, per_group + 1]
            for head in range(per_group):
                query = rotate(norm(heads[:, :, group, head]))
                scores = query @ key.transpose(1, 2) / h**0.5
                scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
                out.append(scores.softmax(-1) @ value)
        x = x + torch.cat(out, -1) @ state[p + "self_attention.linear_proj.weight"].T
        gate, up = (norm(x, state[p + "pre_mlp_layernorm.weight"]) @ state[p + "mlp.linear_fc1.weight"].T).chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ state[p + "mlp.linear_fc2.weight"].T
    head = state.get("output_layer.weight", state["embedding.word_embeddings.weight"])
    return norm(x, state["decoder.final_layernorm.weight"]) @ head.T


@pytest.mark.parametrize("config", [NANO, NANO.replace(num_heads=4, num_kv_heads=2, hidden_size=256, tied_embeddings=False)], ids=["tied", "grouped-untied"])
def test_transformers_computes_the_same_function(config):
    state = random_state(config)
    tokens = torch.randint(config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = hf_model(config, state)(tokens).logits
    torch.testing.assert_close(found.double(), reference_logits(state, config, tokens), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("trap", ["no_rope_layers", "layer_types", "moe_layers"])
def test_the_three_traps_are_traps(trap):
    """Without the explicit key transformers builds another model: the reason each is written."""
    written = hf_config(NANO.replace(num_layers=4)) | {"num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
    values = {k: v for k, v in written.items() if k not in ("model_type", "architectures", "torch_dtype")}
    right = Llama4TextConfig(**values)
    wrong = Llama4TextConfig(**{k: v for k, v in values.items() if k != trap})
    assert getattr(right, trap) == written[trap]
    assert getattr(wrong, trap) != written[trap]


@pytest.mark.parametrize("name", ["tiny", "mobilellm_r1_140m", "mobilellm_r1_950m"])
def test_config_round_trip_through_transformers(name, tmp_path):
    config = PRESETS[name]
    import json

    (tmp_path / "config.json").write_text(json.dumps(hf_config(config, eos_token_id=[1, 2])))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is Llama4TextConfig
    assert (loaded.head_dim, loaded.intermediate_size_mlp, loaded.attn_temperature_tuning) == (64, config.ffn_size, False)
    assert loaded.rope_parameters["rope_theta"] == config.rope_theta
    assert model_config(json.loads((tmp_path / "config.json").read_text())) == config
    loaded.save_pretrained(tmp_path / "again")
    assert model_config(json.loads((tmp_path / "again" / "config.json").read_text())) == config


def test_transformer_engine_names_and_extra_states_are_understood():
    state = random_state(NANO)
    renamed = {"decoder.layers.0.mlp.linear_fc1._extra_state": None}
    for name, value in state.items():
        name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
        renamed[name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")] = value
    assert canonical(renamed).keys() == state.keys()
    for name, value in to_hf(renamed, NANO).items():
        assert torch.equal(value, to_hf(state, NANO)[name])


def test_padded_vocabulary_is_cut():
    state = random_state(NANO)
    key = "embedding.word_embeddings.weight"
    padded = state | {key: torch.cat([state[key], torch.ones(64, NANO.hidden_size)])}
    assert torch.equal(to_hf(padded, NANO)["model.embed_tokens.weight"], state[key])


def bias(state):
    return state | {"decoder.layers.0.self_attention.linear_qkv.bias": torch.zeros(4)}


def lost(state):
    return {name: value for name, value in state.items() if "linear_fc2" not in name}


def reshaped(state):
    return state | {"decoder.final_layernorm.weight": torch.ones(7)}


def other_head(state):
    return state | {"output_layer.weight": torch.ones(NANO.vocab_size, NANO.hidden_size)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [(bias, "linear_qkv.bias"), (lost, "linear_fc2"), (reshaped, "final_layernorm.weight of shape (128,)"), (other_head, "tied_embeddings")],
)
def test_a_state_that_does_not_fit_is_refused(damage, message):
    with pytest.raises(CheckpointError) as caught:
        to_hf(damage(random_state(NANO)), NANO)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama"}, {"moe_layers": [0]}, {"moe_layers": None}, {"no_rope_layers": []}, {"no_rope_layers": [1, 0]}, {"layer_types": None},
        {"use_qk_norm": False}, {"rope_scaling": {"rope_type": "yarn"}}, {"attention_bias": True},
    ],
)
def test_a_foreign_model_is_refused(change):
    with pytest.raises(CheckpointError) as caught:
        model_config(hf_config(NANO) | change)
    assert caught.value.fix
