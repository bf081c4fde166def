"""A recipe: named steps, each a stage with its settings, joined into a graph by their inputs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_r1.config.base import StageConfig
from megatron_r1.config.load import Key, Layer, field_at, load, nearest, override, validate
from megatron_r1.pipeline.families import EVERY, Families, expand
from megatron_r1.pipeline.stages import ROLE_KINDS, STAGES, Stage
from megatron_r1.utils.errors import ConfigError

TOP = {"name", "description", "seed", "steps"}
Inputs = dict[str, str | list[str]]


@dataclass(frozen=True)
class Recipe:
    """A validated recipe. `steps` are in an order in which every step comes after its inputs; `families`: steps written once
    and made many times -> their names."""

    name: str
    description: str
    seed: int
    steps: dict[str, StageConfig]
    layer: Layer = field(repr=False)
    families: Families = field(default_factory=dict)

    def stage(self, step: str) -> Stage:
        """The stage a step runs."""
        return STAGES[self.steps[step].stage]

    def inputs(self, step: str) -> Inputs:
        """Input role -> step name(s); roles left out are absent."""
        return step_inputs(self.steps[step])

    def parents(self, step: str) -> list[str]:
        """Names of the steps a step reads, in order of their roles."""
        return list(flatten(self.inputs(step)))

    def members(self, name: str) -> list[str]:
        """The steps a name stands for: itself, or all of its family. Raises ConfigError for an unknown one."""
        family = name.removesuffix(EVERY)
        if family in self.families and name not in self.steps:
            return self.families[family]
        if name not in self.steps:
            raise ConfigError(expected="a step of this recipe", found=repr(name), fix=nearest(name, [*self.steps, *self.families]))
        return [name]

    def plain(self) -> dict[str, Any]:
        """The resolved recipe as plain data."""
        steps = {name: config.plain() for name, config in self.steps.items()}
        return {"name": self.name, "description": self.description, "seed": self.seed, "steps": steps}


def step_inputs(config: StageConfig) -> Inputs:
    """Input role -> step name(s) of one step's settings."""
    inputs = getattr(config, "inputs", None)
    return {} if inputs is None else {role: value for role, value in inputs.plain().items() if value not in (None, [])}


def flatten(inputs: Inputs) -> Iterator[str]:
    """All step names in `inputs`."""
    for value in inputs.values():
        yield from [value] if isinstance(value, str) else value


def shipped() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    folder = Path(str(resources.files("megatron_r1.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str, folder: Path) -> Path:
    """A file beside `folder`, a file in the working directory, or a shipped recipe. Raises ConfigError."""
    for candidate in (folder / name, Path(name)):
        if os.path.isfile(candidate):  # False, not an error, for names no file can have
            return candidate
    if name in shipped():
        return shipped()[name]
    inside = Path(str(resources.files("megatron_r1.recipes"))) / name
    if os.path.isfile(inside):
        return inside
    raise ConfigError(expected="a recipe file or the name of a shipped recipe", found=repr(name), fix=nearest(name, shipped()))


def load_recipe(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, merge, override and validate a recipe. Imports no torch. Raises ConfigError."""
    path = find_recipe(str(name_or_path), Path.cwd())
    layer, families = expand(override(load(path, find_recipe), overrides))
    data = layer.data
    for key in data:
        if key not in TOP:
            raise ConfigError(expected=f"known keys only, at {layer.origin((key,))}", found=f"the unknown key {key!r}", fix=nearest(key, TOP))
    steps = data.get("steps")
    if not isinstance(steps, dict) or not steps:
        raise ConfigError(expected=f"a mapping `steps:` in {path.name}", found=repr(steps), fix="name at least one step")
    seed = data.get("seed", 1)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(expected="a whole number for `seed`", found=repr(seed), fix="write seed: 1")
    configs = {step: _step(step, settings, seed, layer) for step, settings in steps.items()}
    recipe = Recipe(str(data.get("name", path.stem)), str(data.get("description", "")), seed, configs, layer)
    return Recipe(recipe.name, recipe.description, seed, {step: configs[step] for step in _ordered(recipe)}, layer, families)


def _step(step: str, settings: Any, seed: int, layer: Layer) -> StageConfig:
    where = layer.origin(("steps", step))
    if not step.replace("_", "").replace("-", "").isalnum():
        raise ConfigError(expected=f"a step name of letters, digits, _ and -, at {where}", found=repr(step), fix="rename the step")
    if not isinstance(settings, dict) or "stage" not in settings:
        raise ConfigError(expected=f"a mapping with `stage:` for the step {step!r}, at {where}", found=repr(settings), fix=f"stage: one of {', '.join(STAGES)}")
    if not isinstance(settings["stage"], str) or settings["stage"] not in STAGES:
        raise ConfigError(expected=f"a known stage, at {where}", found=repr(settings["stage"]), fix=nearest(str(settings["stage"]), STAGES))
    config = validate(STAGES[settings["stage"]].config, settings, layer, ("steps", step))
    return config if config.seed is not None else config.model_copy(update={"seed": seed})


def _ordered(recipe: Recipe) -> list[str]:
    """Steps so that inputs come first, otherwise as written. Raises ConfigError for unknown, mistyped or circular inputs."""
    for step, config in recipe.steps.items():
        for role, value in step_inputs(config).items():
            for parent in [value] if isinstance(value, str) else value:
                where = recipe.layer.origin(("steps", step, "inputs", role))
                if parent not in recipe.steps:
                    raise ConfigError(expected=f"a step of this recipe for {step}.inputs.{role}, at {where}", found=repr(parent), fix=nearest(parent, recipe.steps))
                kind, wanted = recipe.stage(parent).kind, ROLE_KINDS.get(role)
                if wanted is not None and kind != wanted:
                    raise ConfigError(
                        expected=f"a step that makes a {wanted} artifact for {step}.inputs.{role}, at {where}", found=f"{parent!r}, which makes {kind}",
                        fix="name one of: " + (", ".join(name for name in recipe.steps if recipe.stage(name).kind == wanted) or f"(none yet: add a step that makes {wanted})"),
                    )
    order: list[str] = []
    waiting = list(recipe.steps)
    while waiting:
        ready = next((step for step in waiting if all(parent in order for parent in recipe.parents(step))), None)
        if ready is None:
            raise ConfigError(expected="steps whose inputs do not form a circle", found=", ".join(waiting), fix="a re-measured stage is a new step (influence2, mixture2), never an arrow back")
        order.append(ready)
        waiting.remove(ready)
    return order


def explain(recipe: Recipe, dotted: str) -> dict[str, str]:
    """Meaning, type, value and origin of a key such as `steps.pretrain1.lr.peak`. Raises ConfigError for an unknown key."""
    key: Key = tuple(dotted.split("."))
    family = recipe.families.get(key[1], []) if key[0] == "steps" and len(key) >= 3 else []
    if family:
        return explain(recipe, ".".join(("steps", family[0], *key[2:]))) | {"key": dotted, "steps": f"the same for {len(family)} steps, {family[0]} to {family[-1]}; shown for the first"}
    if key[0] == "steps" and len(key) >= 3 and key[1] in recipe.steps:
        config = recipe.steps[key[1]]
        found = field_at(type(config), key[2:])
        value: Any = config.plain()
        for part in key[2:]:
            value = value.get(part) if isinstance(value, dict) else value[int(part)] if isinstance(value, list) and part.isdigit() else None
        if found is not None:
            annotation, info = found
            written = next((key[:n] for n in range(len(key), 2, -1) if key[:n] in recipe.layer.origins), None)
            return {
                "key": dotted,
                "meaning": (info.description if info is not None else "") or "",
                "type": annotation.__name__ if isinstance(annotation, type) else re.sub(r"\b[a-z_0-9]+\.", "", str(annotation)),
                "value": repr(value),
                "origin": recipe.layer.origins[written] if written == key or (written and info is None) else "the default" if written is None else f"the default, inside {recipe.layer.origins[written]}",
            }
        fields: Iterable[str] = _siblings(type(config), key[2:-1])
    elif key[0] == "steps":
        fields = [*recipe.steps, *recipe.families]
    elif len(key) == 1 and key[0] in TOP:
        return {"key": dotted, "meaning": "top level of the recipe", "type": "", "value": repr(getattr(recipe, dotted)), "origin": recipe.layer.origin(key)}
    else:
        fields = TOP
    raise ConfigError(expected="a key of this recipe", found=repr(dotted), fix=nearest(key[-1], fields))


def _siblings(model: type[StageConfig], key: Key) -> Iterable[str]:
    found = field_at(model, key) if key else (model, None)
    annotation = found[0] if found else model
    return getattr(annotation, "model_fields", model.model_fields)
