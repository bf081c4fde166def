"""The base of every setting: frozen, strict, described, fingerprinted."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

StepName = str
HOW = {"identity": False}
"""`json_schema_extra` of a setting that says how a result is computed and never what it is: a step's fingerprint leaves it out."""


class Frozen(BaseModel):
    """A typed record: unknown keys are errors, values never change, every field says what it means."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        for name, field in cls.model_fields.items():
            if not field.description:
                raise TypeError(f"{cls.__module__}.{cls.__qualname__}.{name} has no description; add Field(description=...)")

    def plain(self) -> dict[str, Any]:
        """JSON-able form; quantities become text with their unit."""
        return self.model_dump(mode="json")

    def identity(self) -> dict[str, Any]:
        """`plain` without the fields marked HOW, of records inside it too: what the result depends on."""
        extras = {name: field.json_schema_extra for name, field in type(self).model_fields.items()}
        inner = {name: getattr(self, name) for name in extras}
        return {
            name: inner[name].identity() if isinstance(inner[name], Frozen) else value for name, value in self.plain().items() if extras[name] != HOW
        }


class StageConfig(Frozen):
    """Settings of one step of a recipe. Subclasses fix `stage` and type `inputs`."""

    stage: str = Field(description="which stage this step runs")
    seed: int | None = Field(None, description="seed of every random draw in this step; by default the recipe's seed")


def fingerprint(obj: Frozen | dict[str, Any]) -> str:
    """SHA-256 (hex) of the canonical JSON of a record: sorted keys, no white space. Equal settings, equal fingerprint."""
    plain = obj.plain() if isinstance(obj, Frozen) else obj
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
