"""Fifth task: a part becomes a piece, tokens in the order in which the shards will want them.

A piece's documents are sorted by split and, where the corpus is shuffled, by their place in the shuffled order: what a
shard takes from a piece is one stretch of it. Files of piece n:

    n.bin    tokens end to end, in the shards' own type     n.mask    conversations: 1 byte a token
    n.arrow  rows of docs.parquet, and `order`, the place in the shuffled order
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.corpus.decide import codes_of
from megatron_r1.corpus.plan import Job, Part
from megatron_r1.corpus.scratch import documents, whole
from megatron_r1.data.chat import render, require_chat
from megatron_r1.data.indexed import token_dtype
from megatron_r1.data.shards import SPLITS
from megatron_r1.data.tokenizer import IdsDiffer, Tokenizer
from megatron_r1.utils.errors import ConfigError
from megatron_r1.utils.logging import get_logger
from megatron_r1.utils.seeding import derive_seed

log = get_logger("corpus.tokenise")
BATCH_BYTES = 4 << 20
BATCH_DOCUMENTS = 2048


def use_threads(count: int) -> None:
    """Threads of the tokenizer library, set before its first use in the process (later calls change nothing)."""
    os.environ.setdefault("RAYON_NUM_THREADS", str(count))
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if count > 1 else "false"


def frame(tokenizer: Tokenizer, append_eos: bool, prepend_bos: bool) -> tuple[list[int], list[int]]:
    """Ids put before and after every text document. Raises ConfigError when the tokenizer has no such token."""
    for wanted, token, key, what in ((prepend_bos, tokenizer.bos_id, "prepend_bos", "begins"), (append_eos, tokenizer.eos_id, "append_eos", "ends")):
        if wanted and token is None:
            raise ConfigError(
                expected=f"a token that {what} a text, because {key} is true", found=f"the tokenizer has none among the usual names ({tokenizer.vocab_size} ids)",
                fix=f"name it in tokenizer.{key[-3:]}_token, or set {key}: false",
            )
    return [tokenizer.bos_id] * prepend_bos, [tokenizer.eos_id] * append_eos  # type: ignore[list-item]


def piece(job: Job, part: Part) -> Path:
    """Where the piece of a part is, without its ending."""
    return job.made / "pieces" / part.source / f"{part.number:06d}"


def _batches(part: Part, codes: np.ndarray, sizes: np.ndarray) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    size = 0
    kept = iter(sizes[codes == 0].tolist())
    for document in documents(part.file("spool"), lambda number: codes[number] == 0):
        document["bytes"] = next(kept)
        batch.append(document)
        size += document["bytes"]
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenise(job: Job, part: Part, tokenizer: Tokenizer) -> dict[str, Any]:
    """Make the piece of a part; returns, by split, its documents, tokens and bytes. A part on which the fast library proves
    wrong is made by the plain one, and says so; whatever a process did before, a part is made alike."""
    fast, library = tokenizer.fast, tokenizer.library
    tokenizer.seen = tokenizer.inexact_cuts = 0
    try:
        return _tokenise(job, part, tokenizer)
    except IdsDiffer as error:
        log.error("part %d of %s is tokenised again, by %s\n%s", part.number, part.source, tokenizer.library["library"], error)
        tokenizer.inexact_cuts = 0
        return _tokenise(job, part, tokenizer)
    finally:
        tokenizer.fast, tokenizer.library = fast, library


def _tokenise(job: Job, part: Part, tokenizer: Tokenizer) -> dict[str, Any]:
    item, config, chat = job.plans[part.source], job.config, job.plans[part.source].format == "chat"
    before, after = (np.asarray(ids, np.int32) for ids in frame(tokenizer, config.append_eos, config.prepend_bos))
    if chat:
        require_chat(tokenizer)
    codes = codes_of(job, part)
    rows = np.load(part.file("docs.npy"))
    dtype = token_dtype(tokenizer.vocab_size)
    tokens: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    columns: dict[str, list[Any]] = {name: [] for name in ("id", "group", "file", "offset", "n_bytes")}
    for batch in _batches(part, codes, rows["bytes"]):
        if chat:
            for document in batch:
                ids, mask = render(document["messages"], tokenizer)
                tokens.append(np.asarray(ids, dtype))
                masks.append(np.asarray(mask, np.uint8))
        else:
            tokens += [np.concatenate([before, ids, after]).astype(dtype) for ids in tokenizer.encode_arrays([document["text"] for document in batch])]
        for document in batch:
            for name in ("id", "group", "file", "offset"):
                columns[name].append(document[name])
            columns["n_bytes"].append(document["bytes"])
    splits = rows["split"][codes == 0]
    places = mixed(rows["place"][codes == 0], derive_seed(config.seed or 0, "shuffle", item.name)) if config.shuffle else np.arange(len(splits), dtype=np.uint64)
    order = np.lexsort((places, splits))
    path = piece(job, part)
    for ending, arrays in ((".bin", tokens), (".mask", masks)):
        if arrays or ending == ".bin":
            with whole(path.with_suffix(ending)) as stream:
                for i in order:
                    stream.write(arrays[i].tobytes())
    _write_rows(path.with_suffix(".arrow"), columns, np.array([len(ids) for ids in tokens], np.int64), places, order)
    counts = {}
    for code, split in enumerate(SPLITS):
        mine = np.flatnonzero(splits == code)
        counts[split] = [len(mine), int(sum(len(tokens[i]) for i in mine)), int(sum(columns["n_bytes"][i] for i in mine))]
    return {"splits": counts, "dtype": dtype.name, "masked": chat, "library": tokenizer.library, "inexact_cuts": tokenizer.inexact_cuts}


def mixed(values: np.ndarray, key: int) -> np.ndarray:
    """uint64 -> uint64: one of many bijections, by key."""
    values = values ^ np.uint64(key & (1 << 64) - 1)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _write_rows(path: Path, columns: dict[str, list[Any]], lengths: np.ndarray, places: np.ndarray, order: np.ndarray) -> None:
    import pyarrow as pa

    kinds = {"id": pa.large_string(), "group": pa.large_string(), "file": pa.string(), "offset": pa.int64(), "n_bytes": pa.int64()}
    arrays = {name: pa.array([columns[name][i] for i in order], kind) for name, kind in kinds.items()}
    table = pa.table(arrays | {"n_tokens": pa.array(lengths[order], pa.int64()), "order": pa.array(places[order], pa.uint64())})
    with whole(path) as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)
