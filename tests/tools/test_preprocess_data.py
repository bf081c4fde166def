"""tools/preprocess_data.py from the command line."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_r1.data.bpe import train_bpe
from megatron_r1.data.indexed import BlockReader, read_index

TOOLS = Path(__file__).resolve().parents[2] / "tools"
TEXTS = [f"Document {i} says: hello world, {i * i} times over." for i in range(40)]


def load(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setting(tmp_path):
    tokenizer = train_bpe(TEXTS, 400, tmp_path / "tokenizer")
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text, "title": text[:10]}) + "\n" for text in TEXTS))
    return tokenizer, source, ["--input", str(source), "--tokenizer-model", str(tmp_path / "tokenizer"), "--output-prefix", str(tmp_path / "out" / "d"), "--workers", "1"]


def documents(prefix):
    lengths, dtype = read_index(prefix.with_name(prefix.name + ".idx"))
    reader = BlockReader(prefix.with_name(prefix.name + ".bin"), int(lengths.sum()) * dtype.itemsize)
    tokens = reader.bytes(0, reader.size).view(dtype)
    return np.split(tokens, np.cumsum(lengths)[:-1])


def test_megatron_names_and_contents(tmp_path, setting):
    tokenizer, _, flags = setting
    assert load("preprocess_data").main([*flags, "--append-eod", "--json-keys", "text", "title", "--log-interval", "10"]) == 0
    for key, texts in (("text", TEXTS), ("title", [text[:10] for text in TEXTS])):
        found = documents(tmp_path / "out" / f"d_{key}_document")
        assert [part.tolist() for part in found] == [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]


def test_without_end_of_document_and_with_our_tokenizer_folder(tmp_path, setting):
    tokenizer, _, flags = setting
    assert load("preprocess_data").main([*flags, "--tokenizer-type", "R1Tokenizer"]) == 0
    assert documents(tmp_path / "out" / "d_text_document")[3].tolist() == tokenizer.encode(TEXTS[3])


def outputs(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_any_number_of_processes_writes_the_same(tmp_path, setting, monkeypatch):
    tokenizer, source, flags = setting
    lines = [json.dumps({"text": f"{text} {'long ' * i}"}) for i, text in enumerate(TEXTS)]
    lines[7] = "broken"
    source.write_text("\n".join(lines))
    tool = load("preprocess_data")
    monkeypatch.setattr("megatron_r1.corpus.direct.PARTITION_BYTES", 1000)
    made = []
    for workers in ("1", "2"):
        assert tool.main([*flags, "--max-bad-ratio", "0.1", "--append-eod", "--workers", workers]) == 0
        made.append(outputs(tmp_path / "out"))
    assert made[0] == made[1]
    assert set(made[0]) == {"d_text_document" + ending for ending in (".bin", ".bin.crc", ".idx", ".idx.crc", ".bad.jsonl")}
    expected = [[*tokenizer.encode(json.loads(line)["text"]), tokenizer.eos_id] for line in lines if line != "broken"]
    assert [part.tolist() for part in documents(tmp_path / "out" / "d_text_document")] == expected


def test_a_library_that_turns_out_wrong_leaves_no_trace(tmp_path, setting, monkeypatch, caplog):
    """The second of two partitions meets a difference: it is written again, and the file is what the plain library gives."""
    pytest.importorskip("gigatoken")
    tokenizer, _, flags = setting
    from megatron_r1.data import fast_tokenizer
    from megatron_r1.data import tokenizer as module

    tool = load("preprocess_data")
    monkeypatch.setattr("megatron_r1.corpus.direct.PARTITION_BYTES", 2000)
    monkeypatch.setattr(module, "SAMPLED", 1)
    right = fast_tokenizer.Gigatoken.encode
    monkeypatch.setattr(fast_tokenizer.Gigatoken, "encode", lambda self, text: right(self, text)[::-1].copy() if "33" in text and "Document" in text else right(self, text))
    assert tool.main([*flags, "--tokenizer-library", "gigatoken"]) == 0
    assert [part.tolist() for part in documents(tmp_path / "out" / "d_text_document")] == [tokenizer.encode(text) for text in TEXTS]
    assert "tokenised again" in caplog.text


def test_workers_end_with_the_process_they_work_for(setting, tmp_path):
    flags = setting[2]
    script = (
        "import runpy, sys; import megatron_r1.corpus.direct as direct; direct.PARTITION_BYTES = 500\n"
        "direct._join = lambda paths, writer, quarantine: (print('joined', flush=True), __import__('time').sleep(600))\n"
        f"sys.argv = {['preprocess_data.py', *flags, '--workers', '2']!r}\n"
        f"if __name__ == '__main__': runpy.run_path({str(TOOLS / 'preprocess_data.py')!r}, run_name='__main__')\n"
    )
    (tmp_path / "slow.py").write_text(script)
    process = subprocess.Popen([sys.executable, tmp_path / "slow.py"], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert process.stdout.readline() == "joined\n"
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
    finally:
        process.kill()
        process.wait()
    assert not psutil.wait_procs(workers, timeout=30)[1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--split-sentences"], "BERT"), (["--partitions", "2"], "--partitions 1"), (["--tokenizer-type", "GPT2BPETokenizer"], "HuggingFaceTokenizer"),
        (["--input", "nowhere.jsonl"], "nowhere.jsonl"), (["--tokenizer-type", "TikTokenizer"], "--tiktoken-encoding"), (["--json-keys", "body"], "byte 0: field 'body' is missing"),
        (["--max-bad-ratio", "nan"], "from 0 to 1"), (["--workers", "0"], "1 or more"),
    ],
)
def test_what_is_refused(setting, tmp_path, capsys, more, said):
    assert load("preprocess_data").main([*setting[2], *more]) == 1
    assert said in capsys.readouterr().err
    assert {path.suffix for path in (tmp_path / "out").rglob("*")} <= {".jsonl"}


def test_a_dataset_of_the_same_name_is_replaced_by_a_whole_one_or_not_at_all(setting, tmp_path, monkeypatch):
    tokenizer, source, flags = setting
    tool = load("preprocess_data")
    assert tool.main(flags) == 0
    before = outputs(tmp_path / "out")
    source.write_text("broken\n" * 5)
    assert tool.main(flags) == 1
    assert {name: content for name, content in outputs(tmp_path / "out").items() if not name.endswith(".bad.jsonl")} == before
    source.write_text(json.dumps({"text": "other"}) + "\n")
    with monkeypatch.context() as patch:
        patch.setattr("megatron_r1.corpus.direct._join", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tool.main(flags)
    assert outputs(tmp_path / "out") == before
    # What a killed process of this machine left is removed, what a living one writes is not.
    for pid in (os.getppid(), os.getpid(), 2**22 + 1):
        (tmp_path / "out" / f".d_text_document.{socket.gethostname()}.{pid}.tmp").mkdir()
    # What another tool laid beside the old one would contradict the new one.
    (tmp_path / "out" / "d_text_document.docs.parquet").write_bytes(b"of the old one")
    assert tool.main(flags) == 0
    assert [part.tolist() for part in documents(tmp_path / "out" / "d_text_document")] == [tokenizer.encode("other")]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*before, f".d_text_document.{socket.gethostname()}.{os.getppid()}.tmp"}


def test_bad_lines_are_listed(setting, tmp_path, capsys):
    _, source, flags = setting
    source.write_text(source.read_text() + "broken\n")
    tool = load("preprocess_data")
    assert tool.main(flags) == 1
    assert "1 of 41" in capsys.readouterr().err
    bad = tmp_path / "out" / "d_text_document.bad.jsonl"
    record = json.loads(bad.read_text())
    assert (record["offset"], record["excerpt"]) == (source.stat().st_size - len("broken\n"), "broken")
    assert tool.main([*flags, "--max-bad-ratio", "0.1"]) == 0
    assert len(documents(tmp_path / "out" / "d_text_document")) == 40
