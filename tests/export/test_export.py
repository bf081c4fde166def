"""Export: what transformers loads is the trained model, bit for bit, and a wrong export is never completed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Llama4ForCausalLM

from megatron_r1.artifacts.base import open_artifact, open_workspace
from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.data.chat import render
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.export import run as stage
from megatron_r1.export.config import ExportConfig
from megatron_r1.export.from_hf import import_hf, read_hf_folder
from megatron_r1.model.forward import logits
from megatron_r1.model.hf_map import canonical
from megatron_r1.model.load import load_model
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import initialize
from megatron_r1.utils import io
from megatron_r1.utils.errors import ArtifactError, CheckpointError, DataError


def export(checkpoint, folder, **changes):
    config = ExportConfig.model_validate({"inputs": {"checkpoint": checkpoint.name}, "seed": 1, **changes})
    work = open_workspace(folder, "export", "export", config, {"checkpoint": checkpoint})
    return stage.run(config, {"checkpoint": checkpoint}, work)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    return export(checkpoint, tmp_path_factory.mktemp("export"))


def trained(checkpoint):
    return load_model(CheckpointSet.open(checkpoint).final, initialize(LayoutConfig(), 0))[0]


def test_the_proof_is_stored_and_holds(exported):
    parity = exported.json("parity.json")
    assert parity["passed"] is True
    assert parity["architecture"] == "Llama4ForCausalLM"
    assert 0 < parity["largest_logit_difference"] < 1e-4
    assert parity["greedy_equal"] is True
    assert parity["tokenizer_equal"] is True
    assert parity["chat_template_equal"] is True
    assert parity["largest_weight_change_by_rounding"] == 0
    assert len(parity["prompts"]) == 4
    # The proof is about a model that says something: flat logits would agree with anything.
    assert all(row["largest_logit"] > 0.5 for row in parity["prompts"])


def test_transformers_loads_it_without_custom_code_or_network(exported, checkpoint, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = AutoModelForCausalLM.from_pretrained(exported.path / "hf")
    assert type(model) is Llama4ForCausalLM
    tokens = torch.randint(384, (3, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, logits(trained(checkpoint), tokens), atol=1e-4, rtol=0)
    assert not list((exported.path / "hf").glob("*.py"))


def test_tokenizer_and_chat_template_are_ours(exported, checkpoint):
    ours = Tokenizer.load(checkpoint.path / "tokenizer")
    theirs = AutoTokenizer.from_pretrained(exported.path / "hf")
    for text in ("Hello  world\n\t12345", "naïve café ✓ 日本", "", " x"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.bos_id, ours.pad_id)
    conversation = [{"role": "user", "content": "  1 + 1? "}, {"role": "assistant", "content": "2"}]
    assert theirs.apply_chat_template(conversation, return_dict=False) == render(conversation, ours)[0]


def test_generation_stops_at_the_end_of_a_turn(exported, checkpoint):
    ours = Tokenizer.load(checkpoint.path / "tokenizer")
    generation = json.loads((exported.path / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [ours.eos_id, ours.end_of_turn_id]
    assert json.loads((exported.path / "hf" / "config.json").read_text())["eos_token_id"] == generation["eos_token_id"]


def test_importing_back_is_bit_identical(exported, checkpoint, tmp_path):
    before = {name: value for name, value in canonical(trained(checkpoint).state_dict()).items() if name != "output_layer.weight"}
    _, state = read_hf_folder(exported.path / "hf")
    assert state.keys() == before.keys()
    artifact = import_hf(exported.path / "hf", open_workspace(tmp_path, "imported", "checkpoint", {}))
    again = canonical(trained(open_artifact(artifact.path, "checkpoint", verify="full")).state_dict())
    for name, value in before.items():
        assert torch.equal(state[name], value), name
        assert torch.equal(again[name], value), name
    opened = CheckpointSet.open(artifact)
    assert opened.model == CheckpointSet.open(checkpoint).model | {"init_std": 0.02}
    assert Tokenizer.load(opened.tokenizer_folder).sha256 == Tokenizer.load(checkpoint.path / "tokenizer").sha256


def test_exporting_twice_gives_the_same_bytes(exported, checkpoint, tmp_path):
    again = export(checkpoint, tmp_path)
    assert {n: f.sha256 for n, f in again.manifest.files.items()} == {n: f.sha256 for n, f in exported.manifest.files.items()}


def test_an_interrupted_attempt_is_redone(exported, checkpoint, tmp_path):
    config = ExportConfig.model_validate({"inputs": {"checkpoint": checkpoint.name}, "seed": 1})
    work = open_workspace(tmp_path, "export", "export", config, {"checkpoint": checkpoint})
    (work.path / "hf").mkdir()
    (work.path / "hf" / "model.safetensors").write_bytes(b"half")
    (work.path / "hf" / "leftover.json").write_text("{}")
    artifact = stage.run(config, {"checkpoint": checkpoint}, work)
    assert {n: f.sha256 for n, f in artifact.manifest.files.items()} == {n: f.sha256 for n, f in exported.manifest.files.items()}


def test_bfloat16_is_proven_against_the_rounded_weights(checkpoint, tmp_path):
    artifact = export(checkpoint, tmp_path, dtype="bfloat16")
    parity = artifact.json("parity.json")
    assert parity["passed"] is True
    assert parity["largest_weight_change_by_rounding"] > 1e-4
    stored = load_file(artifact.path / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(artifact.path / "hf").dtype == torch.bfloat16


@pytest.mark.parametrize("key", ["model.layers.1.self_attn.k_proj.weight", "model.layers.0.post_attention_layernorm.weight", "model.embed_tokens.weight"])
def test_a_wrong_weight_is_never_completed(checkpoint, tmp_path, monkeypatch, key):
    original = stage.write_hf_folder

    def damaged(folder, *rest):
        original(folder, *rest)
        state = load_file(folder / "model.safetensors")
        state[key] = state[key].flip(0).contiguous()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(stage, "write_hf_folder", damaged)
    with pytest.raises(CheckpointError, match="logits differ by") as caught:
        export(checkpoint, tmp_path)
    assert "parity.json" in caught.value.fix
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".partial")]
    assert io.read_json(next(tmp_path.glob("*.partial")) / "parity.json")["passed"] is False


def test_a_wrong_chat_template_is_never_completed(checkpoint, tmp_path, monkeypatch):
    original = stage.write_hf_folder

    def damaged(folder, *rest):
        original(folder, *rest)
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        config["chat_template"] = config["chat_template"].replace("<|eot_id|>", "")
        path.write_text(json.dumps(config))

    monkeypatch.setattr(stage, "write_hf_folder", damaged)
    with pytest.raises(CheckpointError, match="chat templates differ"):
        export(checkpoint, tmp_path)


def test_an_evaluation_of_another_model_is_refused(checkpoint, tmp_path):
    work = open_workspace(tmp_path, "eval", "evaluation", {})
    io.atomic_write_json(work.path / "evaluation.json", {"checkpoint": {"name": "x", "fingerprint": "f" * 64}, "results": [], "dropped": []})
    evaluation = work.complete({})
    config = ExportConfig.model_validate({"inputs": {"checkpoint": checkpoint.name, "evaluation": "eval"}, "seed": 1})
    with pytest.raises(ArtifactError, match="eval measured ffff"):
        stage.run(config, {"checkpoint": checkpoint, "evaluation": evaluation}, open_workspace(tmp_path, "export", "export", config, {"checkpoint": checkpoint}))


def test_the_card_names_what_it_was_made_from(checkpoint, tmp_path):
    work = open_workspace(tmp_path, "eval", "evaluation", {})
    result = {"task": "chain_sum", "metric": "accuracy", "value": 0.25, "low": 0.1, "high": 0.4, "n": 48, "chance": None}
    io.atomic_write_json(
        work.path / "evaluation.json",
        {"checkpoint": {"name": "sft", "fingerprint": checkpoint.fingerprint}, "results": [result], "dropped": [{"task": "humaneval_pass", "reason": "not allowed"}]},
    )
    evaluation = work.complete({})
    config = ExportConfig.model_validate({"inputs": {"checkpoint": checkpoint.name, "evaluation": "eval"}, "seed": 1})
    inputs = {"checkpoint": checkpoint, "evaluation": evaluation}
    card = (stage.run(config, inputs, open_workspace(tmp_path, "export", "export", config, inputs)).path / "hf" / "README.md").read_text()
    for text in (checkpoint.fingerprint, "700 tokens", "300 tokens in earlier", "| chain_sum | accuracy | 0.25 | 0.1 to 0.4 | 48 | - |", "humaneval_pass (not allowed)", "Not an assistant"):
        assert text in card


# ---------------------------------------------------------------- folders that are not ours


@pytest.fixture
def foreign(exported, tmp_path):
    return shutil.copytree(exported.path / "hf", tmp_path / "foreign")


def test_pickled_weights_are_never_read(foreign):
    (foreign / "model.safetensors").rename(foreign / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin") as caught:
        read_hf_folder(foreign)
    assert "never read" in caught.value.fix


def test_a_cut_weights_file_is_refused(foreign):
    path = foreign / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="readable safetensors"):
        read_hf_folder(foreign)


def test_shards_with_an_index_are_read(foreign):
    state = load_file(foreign / "model.safetensors")
    names = sorted(state)
    for part, chosen in (("model-00001-of-00002.safetensors", names[::2]), ("model-00002-of-00002.safetensors", names[1::2])):
        save_file({name: state[name] for name in chosen}, foreign / part, metadata={"format": "pt"})
    _, expected = read_hf_folder(foreign)
    (foreign / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    (foreign / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _, found = read_hf_folder(foreign)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (foreign / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="without folders"):
        read_hf_folder(foreign)


def test_a_folder_without_tokenizer_is_refused(foreign, tmp_path):
    (foreign / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        import_hf(foreign, open_workspace(tmp_path, "imported", "checkpoint", {}))


