"""What is dropped and why: length, duplicates, evaluation items; and where the rest goes."""

from collections import Counter

import pytest
from corpus_toys import WORDS, config, make, write_jsonl
from corpus_toys import text as toy

from megatron_r1.corpus.config import SplitConfig
from megatron_r1.corpus.decontaminate import Overlap, load
from megatron_r1.corpus.filters import content_key, group_of, repeated_lines, stretches, symbols
from megatron_r1.corpus.splits import Splitter
from megatron_r1.data.document import Document
from megatron_r1.utils.errors import DataError

ITEM = "Write a function that takes three sides of a triangle and returns its area, rounded to two decimal points."


def document(text, group=""):
    return Document("1", "s", text=text, group=group)


def test_stretches_do_not_change_keys_or_matches(monkeypatch):
    words = ITEM.split()
    text = "\n".join(["a b c d"] * 5 + words + ["e f"] * 5)
    assert "".join(stretches(text, 7)) == text
    assert all(part[-1].isspace() or text.endswith(part) for part in stretches(text, 7))
    assert list(stretches("x" * 50, 7)) == ["x" * 50]
    overlap = Overlap(13)
    overlap.add("item/1", ITEM)
    key = content_key(document(text))
    monkeypatch.setattr(stretches, "__defaults__", (7,))
    assert content_key(document(text)) == key
    assert overlap.name(text) == "item/1"
    assert overlap.name(" ".join([*words[:9], "not", *words[9:]][:18])) is None


def test_shares():
    assert repeated_lines("menu\ntext\n\n menu \nmenu") == 8 / 16
    assert repeated_lines("one\n\n\ntwo") == repeated_lines("") == symbols("") == 0
    assert symbols("a_1 \u00e9\n!?") == 2 / 8
    assert symbols("{};" * 10) == 1


def test_every_filter_has_its_reason(tmp_path):
    texts = ["tiny", "x" * 500, "menu\n" * 60, "{}; " * 75, *(toy(i) for i in range(4))]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": entry} for entry in texts])
    source = {"kind": "jsonl", "path": str(path), "domain": "web", "max_chars": 450, "max_repeated_lines": 0.3, "max_symbols": 0.5}
    artifact = make(tmp_path / "runs", config({"a": source}))
    assert artifact.manifest.summary["dropped"] == {"a": {"long": 1, "repeated_lines": 1, "short": 1, "symbols": 1}}


def test_equal_texts_are_one_group_in_every_source():
    assert group_of(document("a  b")) == group_of(document("a b\n")) != group_of(document("a c"))
    assert group_of(document("a b", "mine")) == "mine"


def test_a_copy_is_found_whatever_its_layout():
    overlap = Overlap(13)
    overlap.add("item/1", ITEM)
    copy = "# " + ITEM.upper().replace(" ", "\n#  ").replace(",", " --")
    assert overlap.name(f"some words before {copy} and after") == "item/1"
    words = ITEM.split()
    assert overlap.name(" ".join(words[:12])) is None
    assert overlap.name(" ".join(words[:13])) == "item/1"
    assert overlap.name(" ".join([*words[:8], "not", *words[8:]][:16])) is None
    assert overlap.name(" ".join(reversed(words))) is None


@pytest.mark.parametrize("shift", range(0, 20, 3))
def test_against_the_plain_definition(shift):
    items = [" ".join(WORDS[(i * 3 + j) % 24] for j in range(20)) for i in range(4)]
    texts = [" ".join(WORDS[(i * i + shift + j * (1 + i % 2)) % 24] for j in range(30)) for i in range(30)]
    overlap = Overlap(6)
    for i, item in enumerate(items):
        overlap.add(str(i), item)
    grams = {tuple(item.split()[i : i + 6]) for item in items for i in range(15)}
    for text in texts:
        expected = any(tuple(text.split()[i : i + 6]) in grams for i in range(25))
        assert (overlap.name(text) is not None) == expected


def test_items_from_files(tmp_path, caplog):
    overlap = Overlap(13)
    below, beside = " ".join(WORDS[:13]), " ".join(WORDS[5:18])
    deep, long = "[" * 100_000 + f'"{below}"', f'{{"n": {"9" * 5000}, "q": "{beside}"}}'
    (tmp_path / "items.jsonl").write_text('\ufeff{"q": {"text": ["' + ITEM + '"]}}\n\n{"q": "short"}\n' + f"{deep}\n{long}\n")
    (tmp_path / "more.txt").write_text("one two three four five six seven eight nine ten eleven twelve thirteen")
    assert load(str(tmp_path / "items.jsonl"), overlap) == {"name": "items.jsonl", "items": 4, "shorter_than_ngram": 1}
    assert "1 of 4 evaluation items have fewer than 13 words" in caplog.text
    assert load(str(tmp_path / "more.txt"), overlap) == {"name": "more.txt", "items": 1}
    assert overlap.name(ITEM) == "items.jsonl:1"
    assert [overlap.name(below), overlap.name(beside)] == ["items.jsonl:4", "items.jsonl:5"]
    with pytest.raises(DataError, match="human_eval"):
        load(str(tmp_path / "none.txt"), overlap)


def test_splits_are_a_function_of_the_group():
    settings = SplitConfig(probe=0.1, test=0.2)
    splitter = Splitter(settings, ["country:X"])
    counts = Counter(splitter(f"g{i}") for i in range(4000))
    assert abs(counts["probe"] / 4000 - 0.1) < 0.02
    assert abs(counts["test"] / 4000 - 0.2) < 0.025
    assert splitter("country:X") == "control"
    assert [splitter(f"g{i}") for i in range(50)] == [Splitter(settings)(f"g{i}") for i in range(50)]
    other = Splitter(SplitConfig(probe=0.1, test=0.2, salt="x"))
    assert [splitter(f"g{i}") for i in range(50)] != [other(f"g{i}") for i in range(50)]
    more = Splitter(SplitConfig(probe=0.1, test=0.25))
    assert all(more(f"g{i}") == "probe" for i in range(500) if splitter(f"g{i}") == "probe")
