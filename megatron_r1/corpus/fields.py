"""One record of an input file (a JSON object, a row) as a document, or the reason it is none."""

from __future__ import annotations

import json
from string import Formatter
from typing import Any

from megatron_r1.corpus.config import SourceConfig
from megatron_r1.data.document import Document, problem

DEPTH = 256
"""Levels of JSON that are read. A limit of our own: the parser's hangs on the Python version and on who calls, and a document must
not be good in one run and bad in the next."""


def parse(line: bytes, offset: int) -> dict[str, Any] | str:
    """The JSON object of a line that begins at byte `offset`, or why it is none."""
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"invalid UTF-8 at byte {offset + error.start}"
    except json.JSONDecodeError as error:
        return f"invalid JSON: {error.msg} at character {error.pos}"
    except (RecursionError, ValueError) as error:  # ValueError: a number of more digits than Python reads
        return f"invalid JSON: nested deeper than {DEPTH} levels" if isinstance(error, RecursionError) else f"invalid JSON: {error}"
    if line.count(b"[") + line.count(b"{") > DEPTH and _deeper(fields):
        return f"invalid JSON: nested deeper than {DEPTH} levels"
    return fields if isinstance(fields, dict) else f"{_called(fields)}, not an object"


def _deeper(value: Any) -> bool:
    """Whether lists and objects of a JSON value stand inside each other more than DEPTH times."""
    level = [value]
    for _ in range(DEPTH):
        inside = (inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer))
        level = [inner for inner in inside if isinstance(inner, (dict, list))]
        if not level:
            return False
    return True


def top_fields(template: str) -> set[str]:
    """Names of the fields a template fills in: `meta` of `{meta[url]}`."""
    return {(field or "").split(".")[0].split("[")[0] for _, field, _, _ in Formatter().parse(template)} - {""}


def wanted_fields(source: SourceConfig) -> set[str]:
    """Fields that documents of a source are made of."""
    templates = [template for template in (source.template, source.prompt_template, source.response_template) if template is not None]
    named = {field for field in (source.id_field, source.group_field) if field is not None}
    if not templates:
        named.add(source.messages_field if source.format == "chat" else source.text_field)
    return named.union(*map(top_fields, templates))


def make(name: str, source: SourceConfig, fields: dict[str, Any], file: str, offset: int) -> Document | str:
    """A document, or why there is none."""
    identity, group = f"{file}:{offset}", ""
    for field in (source.id_field, source.group_field):
        if field is not None and fields.get(field) is None:
            return f"field {field!r} is missing"
    if source.id_field is not None:
        identity = storable(str(fields[source.id_field]))
    if source.group_field is not None:
        group = storable(f"{source.group_field}:{fields[source.group_field]}")
    if source.format == "chat":
        return _conversation(name, source, fields, identity, group, file, offset)
    if source.template is not None:
        text, reason = _filled(source.template, fields)
        if reason:
            return reason
    else:
        if source.text_field not in fields:
            return f"field {source.text_field!r} is missing"
        text = fields[source.text_field]
        if not isinstance(text, str):
            return f"field {source.text_field!r} is {_called(text)}, not text"
    if not text or text.isspace():
        return "empty document"
    return Document(identity, name, text=storable(text), group=group, file=file, offset=offset)


def _conversation(name: str, source: SourceConfig, fields: dict[str, Any], identity: str, group: str, file: str, offset: int) -> Document | str:
    if source.prompt_template is not None and source.response_template is not None:
        messages = []
        for role, template in (("user", source.prompt_template), ("assistant", source.response_template)):
            content, reason = _filled(template, fields)
            if reason:
                return reason
            messages.append({"role": role, "content": content})
    elif source.messages_field not in fields:
        return f"field {source.messages_field!r} is missing"
    else:
        messages = fields[source.messages_field]
    if reason := problem(messages):
        return reason
    kept = tuple({"role": message["role"], "content": storable(message["content"])} for message in messages)
    return Document(identity, name, messages=kept, group=group, file=file, offset=offset)


def _called(value: Any) -> str:
    """What JSON calls a value."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def _filled(template: str, fields: dict[str, Any]) -> tuple[str, str]:
    """(text, reason it can not be made)."""
    for key in sorted(top_fields(template)):
        if fields.get(key) is None:
            return "", f"field {key!r} is missing"
    try:
        return template.format_map(fields), ""
    except (KeyError, IndexError, AttributeError, ValueError, TypeError) as error:
        return "", f"the template does not fit: {type(error).__name__}: {error}"


def storable(text: str) -> str:
    """JSON may spell half of a surrogate pair, which UTF-8 cannot hold; it becomes a question mark."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-8", errors="replace").decode("utf-8")
