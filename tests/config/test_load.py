"""YAML recipes: extends, overrides, provenance, and errors that say where and what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from megatron_r1.config.base import Frozen, fingerprint
from megatron_r1.config.load import Layer, load, override, read_yaml, validate
from megatron_r1.config.units import Tokens
from megatron_r1.utils.errors import ConfigError


class Rate(Frozen):
    peak: float = Field(description="highest learning rate")
    schedule: Literal["linear", "cosine"] = Field("linear", description="shape")


class Settings(Frozen):
    budget: Tokens = Field(description="how long")
    lr: Rate | None = Field(None, description="learning rate")
    sources: dict[str, Rate] = Field({}, description="per source")


def find(name: str, folder: Path) -> Path:
    return folder / name


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_extends_merges_and_remembers_origins(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "budget: 1M tokens\nlr:\n  peak: 1e-3\n  schedule: cosine\n")
    top = write(tmp_path / "top.yaml", "extends: base.yaml\nlr:\n  peak: 2e-3\n")
    layer = load(top, find)
    assert layer.data == {"budget": "1M tokens", "lr": {"peak": 0.002, "schedule": "cosine"}}
    assert layer.origin(("lr", "peak")) == "top.yaml:3"
    assert layer.origin(("lr", "schedule")) == "base.yaml:4"
    assert layer.origin(("lr", "schedule", "deeper")) == "base.yaml:4"


def test_null_removes_a_mapping_and_nulls_a_value(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "lr:\n  peak: 1e-3\nname: x\n")
    layer = load(write(tmp_path / "top.yaml", "extends: [base.yaml]\nlr: null\nname: null\n"), find)
    assert layer.data == {"name": None}


def test_circular_extends(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    with pytest.raises(ConfigError, match="circle") as caught:
        load(tmp_path / "a.yaml", find)
    assert "a.yaml -> b.yaml -> a.yaml" in caught.value.found


def test_overrides_win_and_are_read_as_yaml(tmp_path: Path) -> None:
    layer = load(write(tmp_path / "a.yaml", "lr:\n  peak: 1e-3\n"), find)
    layer = override(layer, ["lr.peak=5e-4", "budget=2k tokens", "lr.schedule=cosine"])
    settings = validate(Settings, layer.data, layer)
    assert settings.lr.peak == 5e-4
    assert settings.budget == 2000
    assert "--set lr.peak=5e-4" in layer.origin(("lr", "peak"))


@pytest.mark.parametrize("text", ["lr.peak", "=3"])
def test_malformed_override(text: str) -> None:
    with pytest.raises(ConfigError, match="key=value"):
        override(Layer({}), [text])


def test_unknown_key_names_nearest_key_file_and_line(tmp_path: Path) -> None:
    layer = load(write(tmp_path / "a.yaml", "budget: 1 tokens\nlr:\n  peek: 1e-3\n"), find)
    with pytest.raises(ConfigError) as caught:
        validate(Settings, layer.data, layer, ("steps", "train"))
    assert "steps.train.lr.peek" in caught.value.found
    assert "did you mean 'peak'" in caught.value.fix
    layer.origins = {("steps", "train", *key): value for key, value in layer.origins.items()}
    with pytest.raises(ConfigError, match=r"a.yaml:3"):
        validate(Settings, layer.data, layer, ("steps", "train"))


def test_unknown_key_inside_a_mapping_of_models(tmp_path: Path) -> None:
    layer = load(write(tmp_path / "a.yaml", "budget: 1 tokens\nsources:\n  wiki:\n    peak: 1.0\n    shedule: linear\n"), find)
    with pytest.raises(ConfigError) as caught:
        validate(Settings, layer.data, layer)
    assert "sources.wiki.shedule" in caught.value.found
    assert "did you mean 'schedule'" in caught.value.fix
    assert "a.yaml:5" in caught.value.expected


def test_wrong_value_names_key_line_and_reason(tmp_path: Path) -> None:
    layer = load(write(tmp_path / "a.yaml", "budget: 1000\n"), find)
    with pytest.raises(ConfigError) as caught:
        validate(Settings, layer.data, layer)
    assert "'budget', at a.yaml:1" in caught.value.expected
    assert "write the unit" in caught.value.found


def test_missing_value(tmp_path: Path) -> None:
    layer = load(write(tmp_path / "a.yaml", "lr:\n  schedule: linear\nbudget: 1 tokens\n"), find)
    with pytest.raises(ConfigError, match=r"lr.peak"):
        validate(Settings, layer.data, layer)


@pytest.mark.parametrize(("text", "what"), [("a: [1", "valid YAML"), ("a: 1\na: 2\n", "each key once"), ("- 1\n", "mapping")])
def test_bad_yaml(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        read_yaml(write(tmp_path / "a.yaml", text))


def test_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.yaml", "a: ${R1_TEST_ROOT:-/data}/x\nb: ${R1_TEST_OTHER}\n")
    with pytest.raises(ConfigError, match="R1_TEST_OTHER"):
        read_yaml(path)
    monkeypatch.setenv("R1_TEST_OTHER", "there")
    assert read_yaml(path).data == {"a": "/data/x", "b": "there"}


def test_frozen_and_described() -> None:
    with pytest.raises(TypeError, match="no description"):
        type("Bad", (Frozen,), {"__annotations__": {"x": int}, "__module__": __name__})
    with pytest.raises(Exception, match="frozen"):
        Rate(peak=1.0).peak = 2.0


def test_fingerprint_is_of_content_not_of_order() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint(Rate(peak=1.0)) == fingerprint(Rate(peak=1.0).plain())
