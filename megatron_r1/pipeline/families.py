"""Families: one step written once, made many times (`repeat:` or `each:`), before anything is validated.

    proxy: {repeat: 3, stage: train, inputs: {mixture: "draw-{n}"}}       -> proxy-0, proxy-1, proxy-2
    loo: {each: steps.corpus.sources, without: "{item}"}                  -> loo-<source>, one per source of that step
    inputs: {proxies: proxy-*}                                            -> all steps of the family

`{n}` is the number of the step, from 0, and `{item}` its item; a value that is nothing but `{n}` becomes a number. What a
recipe (or --set) says about a single member, such as `proxy-1`, is laid over what the family says. Every member remembers
the lines of the family, so errors point to what was written.
"""

from __future__ import annotations

from typing import Any

from megatron_r1.config.load import Key, Layer, merge, nearest
from megatron_r1.utils.errors import ConfigError

Families = dict[str, list[str]]
EVERY = "-*"
MOST = 10_000
"""Members of one family; beyond that a number was mistyped."""


def expand(layer: Layer) -> tuple[Layer, Families]:
    """The recipe with every family written out, and family -> names of its steps. Raises ConfigError."""
    steps = layer.data.get("steps")
    if not isinstance(steps, dict):
        return layer, {}
    families: Families = {}
    made = Layer({key: value for key, value in layer.data.items() if key != "steps"}, {})
    made.data["steps"] = {}
    made.origins.update({key: where for key, where in layer.origins.items() if key[:1] != ("steps",) or key == ("steps",)})
    for step, settings in steps.items():
        items = _items(layer, step, settings) if isinstance(settings, dict) else None
        if items is None:
            continue
        families[step] = [f"{step}-{item}" for item in items]
    for step, settings in steps.items():
        if step in families:
            for n, (name, item) in enumerate(zip(families[step], _items(layer, step, settings) or [])):
                made = merge(made, _member(layer, step, name, n, item))
    for step, settings in steps.items():
        if step not in families:
            made = merge(made, _picked(layer, step, settings))
    made.data["steps"] = _in_order(steps, families, made.data["steps"])
    for step, settings in made.data["steps"].items():
        if isinstance(settings, dict) and isinstance(settings.get("inputs"), dict):
            settings["inputs"] = {role: _listed(value, families, made, ("steps", step, "inputs", role)) for role, value in settings["inputs"].items()}
    return made, families


def _items(layer: Layer, step: str, settings: dict[str, Any]) -> list[str] | None:
    """What a family is made over; None for a plain step."""
    given = [key for key in ("repeat", "each") if settings.get(key) is not None]
    if not given:
        return None
    key: Key = ("steps", step, given[0])
    where, value = layer.origin(key), settings[given[0]]
    if len(given) == 2:
        raise ConfigError(expected=f"repeat or each for {step!r}, at {where}", found="both", fix="remove one of the two")
    if given[0] == "repeat":
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
            raise ConfigError(expected=f"a whole number from 1 to {MOST} for 'steps.{step}.repeat', at {where}", found=repr(value), fix="write repeat: 8")
        return [str(n) for n in range(value)]
    if isinstance(value, str):
        value = _looked_up(layer, value, where)
    items = list(value) if isinstance(value, list | dict) else []
    if not items or any(not isinstance(item, str) or not item.replace("_", "").replace("-", "").isalnum() for item in items) or len(set(items)) < len(items):
        raise ConfigError(
            expected=f"different names of letters, digits, _ and - for 'steps.{step}.each', at {where}", found=repr(settings[given[0]]),
            fix="write each: [a, b] or the key of a mapping of this recipe, such as steps.corpus.sources",
        )
    return items


def _looked_up(layer: Layer, dotted: str, where: str) -> Any:
    value: Any = layer.data
    for part in dotted.split("."):
        if not isinstance(value, dict) or part not in value:
            known = value if isinstance(value, dict) else ()
            raise ConfigError(expected=f"a key of this recipe for `each`, at {where}", found=f"{dotted!r}: no {part!r}", fix=nearest(part, known))
        value = value[part]
    return value


def _filled(value: Any, n: int, item: str) -> Any:
    """`value` with {n} and {item} filled in."""
    if isinstance(value, dict):
        return {_filled(key, n, item): _filled(part, n, item) for key, part in value.items()}
    if isinstance(value, list):
        return [_filled(part, n, item) for part in value]
    if not isinstance(value, str):
        return value
    return n if value == "{n}" else value.replace("{n}", str(n)).replace("{item}", item)


def _member(layer: Layer, family: str, name: str, n: int, item: str) -> Layer:
    """One step of a family, with the origins of the family's lines."""
    settings = {key: value for key, value in layer.data["steps"][family].items() if key not in ("repeat", "each")}
    place: Key = ("steps", family)
    origins = {
        ("steps", name, *(str(_filled(part, n, item)) for part in key[2:])): where for key, where in layer.origins.items() if key[:2] == place
    }
    return Layer({"steps": {name: _filled(settings, n, item)}}, origins)


def _picked(layer: Layer, step: str, settings: Any) -> Layer:
    """A plain step, or what the recipe says about one member."""
    return Layer({"steps": {step: settings}}, {key: where for key, where in layer.origins.items() if key[:2] == ("steps", step)})


def _in_order(steps: dict[str, Any], families: Families, made: dict[str, Any]) -> dict[str, Any]:
    """Steps where they were written, families in the place of theirs."""
    names = [name for step in steps for name in families.get(step, [step])]
    return {name: dict(made[name]) if isinstance(made[name], dict) else made[name] for name in dict.fromkeys(names)}


def _listed(value: Any, families: Families, layer: Layer, key: Key) -> Any:
    """`family-*` as the list of its steps, also inside a list."""
    if isinstance(value, list):
        found: list[Any] = []
        for part in value:
            one = _listed(part, families, layer, key)
            found += one if isinstance(one, list) else [one]
        return found
    if not isinstance(value, str) or not value.endswith(EVERY):
        return value
    family = value.removesuffix(EVERY)
    if family not in families:
        raise ConfigError(
            expected=f"a family of this recipe (a step with repeat: or each:) for {'.'.join(key)}, at {layer.origin(key)}", found=repr(value),
            fix=nearest(family, families) if families else "give the step repeat: or each:, or name single steps",
        )
    return list(families[family])
