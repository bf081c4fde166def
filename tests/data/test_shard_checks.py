"""`verify` finds any damage, in any file, and names the file."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from data_toys import toy_shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_toys import toy_set

from megatron_r1.artifacts.base import open_artifact
from megatron_r1.data.indexed import BLOCK, IndexedWriter, crc_path
from megatron_r1.data.shard_checks import verify
from megatron_r1.utils.errors import ArtifactError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return toy_set(tmp_path_factory.mktemp("whole")).path


FILES = [
    "manifest.json", "sources.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_info.json", "quarantine/news.jsonl",
    *(f"sources/{name}{suffix}{more}" for name, suffixes in (("news/train", (".bin", ".idx", ".docs.parquet")), ("talks/train", (".bin", ".idx", ".docs.parquet", ".mask")))
      for suffix in suffixes for more in ("", ".crc")),
]  # fmt: skip


def damaged(path: Path) -> str:
    verdict = verify(path)
    return "\n".join(map(str, verdict.damaged))


def test_nothing_wrong_and_everything_read(whole):
    verdict = verify(whole)
    assert not verdict.damaged
    assert not verdict.unprotected
    # All that is in the folder but the manifest; empty .crc files count too.
    assert verdict.files == sum(path.is_file() for path in whole.rglob("*")) - 1


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_found(whole, name, data):
    path = whole / name
    content = path.read_bytes()
    at, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    try:
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :])
        assert Path(name).name in damaged(whole)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_other_change_is_found(whole, name, data):
    """Overwritten stretches, cut and lengthened files, missing files."""
    path = whole / name
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content) - 1))
    stop = data.draw(st.integers(start, min(len(content), start + 64)))
    changed = content[:start] + data.draw(st.binary(max_size=64)) + content[stop:]
    if changed == content:
        changed = None
    try:
        path.unlink()
        if changed is not None:
            path.write_bytes(changed)
        assert Path(name).name in damaged(whole)
    finally:
        path.write_bytes(content)


def test_every_damaged_file_is_named(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    hurt = ["sources/news/train.bin", "sources/news/test.idx", "sources/talks/train.mask", "tokenizer/tokenizer.json"]
    for name in hurt:
        path = tmp_path / "copy" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    found = verify(tmp_path / "copy").damaged
    assert len(found) == len(hurt)
    for name in hurt:
        assert any(str(tmp_path / "copy" / name) in str(error) for error in found)


def test_the_damaged_block_is_named(tmp_path):
    shard, _ = toy_shard(tmp_path, [BLOCK, BLOCK])
    path = tmp_path / "train.bin"
    content = bytearray(path.read_bytes())
    content[BLOCK + 5] ^= 1
    path.write_bytes(content)
    assert f"bytes {BLOCK} to {2 * BLOCK}" in damaged(shard.prefix)


def test_datasets_without_checksums_are_only_checked_for_contradictions(tmp_path):
    with IndexedWriter(tmp_path / "a", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(9))
    assert not verify(tmp_path / "a").unprotected
    for suffix in (".bin", ".idx"):
        crc_path(tmp_path / f"a{suffix}").unlink()
    verdict = verify(tmp_path / "a.bin")
    assert not verdict.damaged
    assert verdict.unprotected == [str(tmp_path / "a.bin"), str(tmp_path / "a.idx")]
    (tmp_path / "a.bin").write_bytes(b"\0" * 16)
    assert "18 bytes for 9 tokens" in damaged(tmp_path / "a")
    (tmp_path / "a.bin").unlink()
    assert f"{tmp_path / 'a.bin'}\n   found: no such file" in damaged(tmp_path / "a")
    assert "no such file" in damaged(tmp_path / "b")


def test_an_edited_manifest_is_refused_by_every_reader(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    path = tmp_path / "copy" / "manifest.json"
    path.write_text(path.read_text("utf-8").replace("größe", "Größe"), "utf-8")
    with pytest.raises(ArtifactError, match="checksum it holds"):
        open_artifact(tmp_path / "copy")


def test_manifests_of_earlier_releases_have_no_checksum(whole, tmp_path):
    import json

    shutil.copytree(whole, tmp_path / "copy")
    path = tmp_path / "copy" / "manifest.json"
    plain = json.loads(path.read_text("utf-8"))
    del plain["checksum"]
    path.write_text(json.dumps(plain), "utf-8")
    assert open_artifact(tmp_path / "copy").manifest.checksum == ""
    assert verify(tmp_path / "copy").unprotected == [str(path)]
