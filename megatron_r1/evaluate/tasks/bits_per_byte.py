"""Bits per byte of held-out text, per source and per domain.

nats / ln 2 / bytes does not depend on the tokenizer, so models with different vocabularies compare. A document is cut into
windows like a training block: window j predicts tokens j*s + 1 to (j + 1)*s from at most s tokens before. The first token of
a document is never predicted (nothing stands before it, in training either); its bytes are not counted. Bytes are those of
the decoded tokens; where a window cuts a character in two, its half counts as U+FFFD (3 bytes), the same for every model with
this tokenizer.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_r1.evaluate.config import BitsPerByteSettings
from megatron_r1.evaluate.results import Measurement, Outcome, bits_per_byte, prompt_hash
from megatron_r1.evaluate.task import Bench
from megatron_r1.utils.errors import ConfigError

SPLIT = "test"


@dataclass(frozen=True)
class _Document:
    source: str
    id: str
    windows: list[list[int]]
    n_bytes: int


class BitsPerByte:
    """See the module."""

    name = "bits_per_byte"

    def __init__(self, settings: BitsPerByteSettings) -> None:
        self.settings = settings

    def run(self, bench: Bench) -> Outcome:
        """One result per source, and one per domain that has several."""
        if bench.shards is None:
            raise ConfigError(
                expected="shards among the inputs of the evaluate step (bits per byte reads held-out documents)", found="none",
                fix="add `inputs: {shards: <corpus step>}`, or switch the task off with `tasks: {bits_per_byte: null}`",
            )
        documents = [document for source in self._sources(bench.shards) for document in self._documents(bench, source)]
        flat = [window for document in documents for window in document.windows]
        nats = iter(bench.subject.token_nats(flat))
        totals = [float(sum(next(nats).sum() for _ in document.windows)) for document in documents]
        groups: dict[str, list[int]] = defaultdict(list)
        by_domain: dict[str, set[str]] = defaultdict(set)
        for index, document in enumerate(documents):
            domain = bench.shards.sources[document.source].domain
            groups[document.source].append(index)
            groups[f"all {domain}"].append(index)
            by_domain[f"all {domain}"].add(document.source)
        results = [
            self._result(bench, name, [documents[i] for i in indices], [totals[i] for i in indices])
            for name, indices in sorted(groups.items(), key=lambda item: (item[0] in by_domain, item[0]))
            if len(by_domain.get(name, ("", ""))) > 1
        ]
        samples = [
            {"source": d.source, "id": d.id, "tokens": sum(len(w) - 1 for w in d.windows), "bytes": d.n_bytes, "nats": total}
            for d, total in zip(documents, totals, strict=True)
        ]
        return Outcome(results, samples)

    def _result(self, bench: Bench, name: str, documents: list[_Document], nats: list[float]) -> Measurement:
        shown = prompt_hash(bench.tokenizer.decode(window) for document in documents for window in document.windows)
        return bits_per_byte(name, "text", nats, [d.n_bytes for d in documents], bench.bootstrap, bench.rng(self.name, name), shown)

    def _sources(self, shards: Any) -> list[str]:
        asked = self.settings.sources
        if asked is None:
            return [name for name, record in sorted(shards.sources.items()) if not record.distractor and record.format == "text" and len(shards.split(name, SPLIT))]
        for name in asked:
            if name not in shards.sources or not len(shards.split(name, SPLIT)):
                raise ConfigError(
                    expected=f"a source with held-out ({SPLIT}) documents", found=repr(name),
                    fix="use one of " + ", ".join(n for n in sorted(shards.sources) if len(shards.split(n, SPLIT))),
                )
        return list(asked)

    def _documents(self, bench: Bench, source: str) -> list[_Document]:
        """Drawn documents with their drawn windows; a document of one token has nothing to predict and is left out."""
        shard = bench.shards.split(source, SPLIT)
        rng = bench.rng(self.name, "draw", source)
        found = []
        for index in rng.permutation(len(shard)):
            tokens = np.asarray(shard.tokens(int(index)))
            count = -(-(len(tokens) - 1) // self.settings.seq_length)
            if count < 1:
                continue
            chosen = np.sort(rng.permutation(count)[: self.settings.windows_per_document]) * self.settings.seq_length
            windows = [tokens[start : start + self.settings.seq_length + 1].tolist() for start in chosen]
            n_bytes = sum(_bytes_after_first(bench.tokenizer, window) for window in windows)
            if n_bytes > 0:
                found.append(_Document(source, str(shard.ids[int(index)]), windows, n_bytes))
            if len(found) == self.settings.documents:
                break
        return found


def _bytes_after_first(tokenizer: Any, window: list[int]) -> int:
    """Bytes of the text of all tokens but the first; the end-of-text token is no text."""
    text = [token for token in window if token != tokenizer.eos_id]
    head = [token for token in window[:1] if token != tokenizer.eos_id]
    return len(tokenizer.decode(text).encode("utf-8")) - len(tokenizer.decode(head).encode("utf-8"))
