"""Own files: every way to be wrong is reported with its place; everything else arrives."""

import gzip
import json
from pathlib import Path

import pytest

from megatron_r1.corpus.config import SourceConfig
from megatron_r1.corpus.files import describe, find_files
from megatron_r1.corpus.readers import Bad, read
from megatron_r1.utils.errors import DataError


def source(kind="jsonl", **more):
    return SourceConfig.model_validate({"kind": kind, "path": "x", "domain": "web", **more})


def collect(settings, *files):
    made = [item for item, _ in read("s", settings, files if files and not isinstance(files[0], Path) else describe(files))]
    return [item for item in made if not isinstance(item, Bad)], [item for item in made if isinstance(item, Bad)]


LINES = [
    b'{"text": "good one"}\n', b'{"text": "broken\n', b'{"text": "bad \xff utf-8"}\n', b'{"text": "   "}\n', b'{"body": "x"}\n', b'{"text": 5}\n', b"[1]\n", b"\n",
    b'{"text": "half a pair \\ud83d"}\n', b'{"text": "good \xe2\x80\xa8 two"}',
]


def test_bad_lines_are_named_with_their_offset(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(LINES))
    offsets = [sum(map(len, LINES[:i])) for i in range(len(LINES))]
    good, bad = collect(source(), path)
    assert [document.text for document in good] == ["good one", "half a pair ?", "good \u2028 two"]
    assert [document.id for document in good] == [f"a.jsonl:{offsets[i]}" for i in (0, 8, 9)]
    reasons = ["invalid JSON", "invalid UTF-8 at byte", "empty document", "'text' is missing", "is a number", "a list, not an object"]
    for entry, line, reason in zip(bad, range(1, 7), reasons, strict=True):
        assert (entry.file, entry.offset) == ("a.jsonl", offsets[line])
        assert reason in entry.reason
    assert f"byte {offsets[2] + LINES[2].index(0xFF)}" in bad[1].reason


def test_compressed_files_and_folders(tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    with gzip.open(tmp_path / "sub" / "b.jsonl.gz", "wb") as stream:
        stream.write(b'{"text": "zipped"}\n')
    (tmp_path / "a.jsonl").write_text('{"text": "plain"}\n')
    (tmp_path / "c.csv").write_text("no\n")
    settings = source(path=str(tmp_path))
    files = find_files("s", settings)
    assert [file.name for file in files] == ["a.jsonl", "sub/b.jsonl.gz"]
    assert "2 files are read; 1 are left out" in caplog.text
    assert ".csv (1)" in caplog.text
    good, bad = collect(settings, *files)
    assert [(document.id, document.text) for document in good] == [("a.jsonl:0", "plain"), ("sub/b.jsonl.gz:0", "zipped")]
    assert not bad


def test_no_files(tmp_path):
    with pytest.raises(DataError, match="'s'") as error:
        find_files("s", source(path=str(tmp_path / "*.jsonl")))
    assert "sources.s.path" in error.value.fix


def test_templates_ids_and_groups(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [{"q": "Why?", "a": "So.", "n": 3, "who": "ann"}, {"q": "Why?", "n": 4, "who": "bob"}, {"q": "x", "a": "y", "who": "eve"}]))
    good, bad = collect(source(template="Q: {q}\nA: {a}", id_field="n", group_field="who"), path)
    assert [(document.id, document.group, document.text) for document in good] == [("3", "who:ann", "Q: Why?\nA: So.")]
    assert ["'a' is missing" in bad[0].reason, "'n' is missing" in bad[1].reason] == [True, True]


def test_conversations(tmp_path):
    path = tmp_path / "a.jsonl"
    talk = [{"role": "user", "content": "Hi", "id": 1}, {"role": "assistant", "content": "Yo"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in [{"messages": talk}, {"messages": talk[:1]}, {"messages": "Hi"}, {}]))
    good, bad = collect(source(format="chat"), path)
    assert good[0].messages == ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"})
    assert [entry.reason for entry in bad] == ["no assistant message, so nothing to learn from", "messages is not a non-empty list", "field 'messages' is missing"]
    path.write_text(json.dumps({"q": "2+2", "a": 4}) + "\n")
    good, bad = collect(source(format="chat", prompt_template="{q}=?", response_template="{a}"), path)
    assert [message["content"] for message in good[0].messages] == ["2+2=?", "4"]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("file", ["one\ntwo\n\n\nthree\n"]), ("line", ["one", "two", "three"]), ("paragraph", ["one\ntwo", "three"]),
    ],
)
def test_plain_text(tmp_path, document, expected):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n\nthree\n")
    good, bad = collect(source("text", document=document), path)
    assert [entry.text for entry in good] == expected
    assert len({entry.id for entry in good}) == len(good)
    assert not bad


def test_bad_plain_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n\nb\xffd\n")
    good, bad = collect(source("text", document="paragraph"), path)
    assert ([entry.text for entry in good], bad[0].offset, bad[0].reason) == (["good"], 6, "invalid UTF-8 at byte 7")
    (tmp_path / "b.txt").write_bytes(b" \n")
    assert collect(source("text"), tmp_path / "b.txt")[1][0].reason == "empty document"


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", None, "", "four"], "key": [1, 2, 3, 4], "other": [0.0] * 4}), path, row_group_size=2)
    good, bad = collect(source("parquet", id_field="key"), path)
    assert [(document.id, document.text) for document in good] == [("1", "one"), ("4", "four")]
    assert [(entry.offset, entry.reason) for entry in bad] == [(1, "field 'text' is null, not text"), (2, "empty document")]
    path.write_bytes(b"PAR1 no")
    good, bad = collect(source("parquet"), path)
    assert not good
    assert [("Parquet" in entry.reason, entry.offset) for entry in bad] == [(True, 0)]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"kind": "jsonl", "domain": "web"}, "path"), ({"kind": "jsonl", "path": "x"}, "domain"), ({"kind": "embedded", "path": "x"}, "path"),
        ({"kind": "jsonl", "path": "x", "domain": "web", "template": "no field"}, "{field}"), ({"kind": "text", "path": "x", "domain": "web", "format": "chat"}, "jsonl"),
        ({"kind": "jsonl", "path": "x", "domain": "web", "format": "chat", "prompt_template": "{a}"}, "response_template"),
        ({"kind": "jsonl", "path": "x", "domain": "web", "max_bytes": 5}, "unit"),
    ],
)
def test_wrong_settings(wrong, said):
    with pytest.raises(ValueError, match=r"expected .* found") as error:
        SourceConfig.model_validate(wrong)
    assert said in str(error.value)
