"""YAML recipes: `extends`, dotted overrides, and the memory of where every value came from.

Merging: mappings merge key by key, anything else replaces. `key: null` over a mapping removes the key; over a plain value
it sets null. `${NAME}` and `${NAME:-default}` in text values are filled from the environment.
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_r1.config.base import Frozen
from megatron_r1.utils.errors import ConfigError

Key = tuple[str, ...]
LARGEST = 100_000
"""Values in one file: aliases could make billions from a few lines."""
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


@dataclass
class Layer:
    """A mapping of settings with the origin ("file:line" or "command line") of every key."""

    data: dict[str, Any]
    origins: dict[Key, str] = field(default_factory=dict)

    def origin(self, key: Key) -> str:
        """Where `key`, or the nearest mapping around it, was written."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.origins:
                return self.origins[key[:length]]
        return "the recipe"


def load(path: Path, find: Callable[[str, Path], Path], _seen: tuple[Path, ...] = ()) -> Layer:
    """Read a YAML file and everything it extends. `find(name, origin_folder)` resolves the names in `extends`.

    Raises ConfigError for missing files, YAML errors, repeated keys and circular `extends`.
    """
    path = Path(path).resolve()
    if path in _seen:
        chain = " -> ".join(item.name for item in (*_seen, path))
        raise ConfigError(expected="recipes that do not extend each other in a circle", found=chain, fix="remove one `extends`")
    own = read_yaml(path)
    parents = own.data.pop("extends", None) or []
    names = [parents] if isinstance(parents, str) else parents
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(expected=f"the name of a recipe, or a list of names, at {own.origin(('extends',))}", found=f"extends: {parents!r}"[:200], fix="correct `extends`")
    merged = Layer({})
    for name in names:
        merged = merge(merged, load(find(name, path.parent), find, (*_seen, path)))
    return merge(merged, own)


def read_yaml(path: Path) -> Layer:
    """One YAML file with the line of every key."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(expected=f"a readable YAML file {path}", found=str(error), fix="check the path; `megatron-r1 recipes` lists the shipped ones") from error
    layer = Layer({})
    value = parse(text, path.name, layer.origins)
    if value is not None:
        if not isinstance(value, dict):
            raise ConfigError(expected=f"a mapping at the top of {path.name}", found=type(value).__name__, fix="start with `name:` and `steps:`")
        layer.data = value
    return layer


def parse(text: str, name: str, origins: dict[Key, str], key: Key = ()) -> Any:
    """The value of a YAML text, the origin of every key noted; None when it is empty. Raises ConfigError."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return None if node is None else _build(node, key, name, origins)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(expected=f"valid YAML in {where}", found=str(getattr(error, "problem", error)), fix="check indentation, colons and quotes near that line") from error
    except RecursionError as error:
        raise ConfigError(expected=f"YAML of ordinary depth in {name}", found="hundreds of nested brackets, or an alias of itself", fix="write it flat") from error


def _build(node: yaml.Node, key: Key, name: str, origins: dict[Key, str]) -> Any:
    if key:
        origins[key] = f"{name}:{node.start_mark.line + 1}"
    if len(origins) > LARGEST:
        raise ConfigError(expected=f"at most {LARGEST} values in {name}", found="more (aliases of aliases multiply)", fix="write out what is meant")
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            part = str(key_node.value)
            if part in result:
                raise ConfigError(expected=f"each key once in {name}", found=f"{'.'.join((*key, part))} again at {name}:{key_node.start_mark.line + 1}", fix="delete one of the two")
            result[part] = _build(value_node, (*key, part), name, origins)
            origins[(*key, part)] = f"{name}:{key_node.start_mark.line + 1}"
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*key, str(index)), name, origins) for index, item in enumerate(node.value)]
    return _scalar(node, name)


def _scalar(node: yaml.Node, name: str) -> Any:
    """A plain value. `1e-3` is a number here, as everywhere but in YAML 1.1."""
    try:
        value = yaml.SafeLoader("").construct_object(node)
    except yaml.YAMLError:
        raise
    except Exception as error:  # the library trusts what a tag or a pattern says and trips over impossible dates and numbers
        raise ConfigError(expected=f"a value at {name}:{node.start_mark.line + 1}", found=f"{str(node.value)[:80]!r} ({type(error).__name__})", fix="put text in quotes") from error
    if isinstance(value, str):
        if node.style is None and re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+", value):  # type: ignore[attr-defined]
            return float(value)
        return expand(value, f"{name}:{node.start_mark.line + 1}")
    return value


def expand(text: str, where: str) -> str:
    """Fill `${NAME}` and `${NAME:-default}` from the environment. Raises ConfigError for an unset name without a default."""

    def fill(match: re.Match[str]) -> str:
        value = os.environ.get(match[1], match[2])
        if value is None:
            raise ConfigError(expected=f"the environment variable {match[1]} ({where})", found="it is not set", fix=f"export {match[1]}=... before the command, or write ${{{match[1]}:-default}}")
        return value

    return _VARIABLE.sub(fill, text)


def merge(base: Layer, top: Layer) -> Layer:
    """`top` over `base`; neither is changed."""
    replaced: set[Key] = set()
    data = _merge(base.data, top.data, (), replaced)

    def new(path: Key) -> bool:
        return any(path[:length] in replaced for length in range(1, len(path) + 1))

    origins = {path: origin for path, origin in base.origins.items() if not new(path)}
    return Layer(data, origins | {path: origin for path, origin in top.origins.items() if new(path)})


def _merge(base: dict[str, Any], top: dict[str, Any], key: Key, replaced: set[Key]) -> dict[str, Any]:
    """The merged mapping; `replaced` takes the keys whose values, with all below them, are those of `top`."""
    result = dict(base)
    for name, value in top.items():
        here = (*key, name)
        old = result.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            result[name] = _merge(old, value, here, replaced)
        elif isinstance(old, dict) and value is None:
            del result[name]
        else:
            result[name] = value
            replaced.add(here)
    return result


def override(layer: Layer, assignments: Iterable[str]) -> Layer:
    """Apply `a.b.c=value` assignments from the command line; values are read as YAML. Raises ConfigError."""
    for text in assignments:
        dotted, sign, value = text.partition("=")
        if not sign or not dotted.strip():
            raise ConfigError(expected="an override such as steps.pretrain1.lr.peak=1e-3", found=repr(text), fix="write key=value")
        key = tuple(dotted.strip().split("."))
        origins: dict[Key, str] = {}
        built = parse(value, "command line", origins, key) if value.strip() else ""
        data: Any = built
        for part in reversed(key):
            data = {part: data}
        layer = merge(layer, Layer(data, {path: f"command line (--set {text})" for path in origins} | {key: f"command line (--set {text})"}))
    return layer


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid key a reader probably meant, as a sentence."""
    choices = sorted(valid)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.4)
    listed = ", ".join(choices)
    return f"did you mean {close[0]!r}? valid keys: {listed}" if close else f"valid keys: {listed}"


def validate(model: type[Frozen], data: dict[str, Any], layer: Layer, prefix: Key = ()) -> Any:
    """Build `model` from `data`; ConfigError with file, line and the nearest valid key when it does not fit."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _explain(error, model, data, layer, prefix) from None


def _explain(error: ValidationError, model: type[Frozen], data: Any, layer: Layer, prefix: Key) -> ConfigError:
    details = error.errors(include_url=False)
    # An unknown key explains the others (a field it was meant for is then "missing"), so it is told first.
    detail = next((item for item in details if item["type"] == "extra_forbidden"), details[0])
    location = tuple(str(part) for part in detail["loc"])
    path, owner = _walk(model, location, data)
    dotted = ".".join((*prefix, *path))
    where = layer.origin((*prefix, *path))
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    if detail["type"] == "extra_forbidden":
        valid = owner.model_fields if owner is not None else ()
        return ConfigError(expected=f"known keys only, at {where}", found=f"the unknown key {dotted!r}{more}", fix=nearest(path[-1], valid))
    if detail["type"] == "missing":
        return ConfigError(expected=f"a value for {dotted!r}, at {where}", found=f"none{more}", fix=f"set it in the recipe or with --set {dotted}=...; `--explain {dotted}` tells what it means")
    message = detail["msg"].removeprefix("Value error, ")
    return ConfigError(expected=f"a valid value for {dotted!r}, at {where}", found=f"{detail.get('input')!r}: {message}{more}", fix=f"see `--explain {dotted}`")


def _walk(model: Any, location: Key, data: Any) -> tuple[Key, type[Frozen] | None]:
    """Follow a pydantic error location; drop the parts pydantic adds for unions. Returns (key, model that owns the last key)."""
    path: list[str] = []
    owner: type[Frozen] | None = None
    current: list[Any] = [model]
    value = data
    for part in location:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif part != location[-1] or (path and not _has_field(current, part)):
            continue
        path.append(part)
        models = _models(current)
        owner = next((item for item in models if part in item.model_fields), models[0] if models else owner)
        current = _descend(current, part)
    return tuple(path) or location, owner


def _has_field(annotations: list[Any], part: str) -> bool:
    return any(part in item.model_fields for item in _models(annotations))


def _alternatives(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return [leaf for item in typing.get_args(annotation) for leaf in _alternatives(item)]
    if origin is typing.Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    return [annotation]


def _models(annotations: list[Any]) -> list[type[Frozen]]:
    flat = [leaf for item in annotations for leaf in _alternatives(item)]
    return [item for item in flat if isinstance(item, type) and issubclass(item, Frozen)]


def _descend(annotations: list[Any], part: str) -> list[Any]:
    result: list[Any] = []
    for item in (leaf for annotation in annotations for leaf in _alternatives(annotation)):
        if isinstance(item, type) and issubclass(item, Frozen):
            if part in item.model_fields:
                result.append(item.model_fields[part].annotation)
        elif typing.get_origin(item) in (dict, list, tuple):
            result.extend(typing.get_args(item)[-1:])
    return result


def field_at(model: type[Frozen], key: Key) -> tuple[Any, Any] | None:
    """(annotation, FieldInfo or None) of a dotted key inside `model`; None when there is no such key."""
    current: list[Any] = [model]
    info = None
    for part in key:
        info = next((item.model_fields[part] for item in _models(current) if part in item.model_fields), None)
        current = _descend(current, part)
        if not current:
            return None
    return current[0] if len(current) == 1 else tuple(current), info
