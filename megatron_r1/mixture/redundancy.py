"""Near duplicates among the scored documents: each cluster's benefit counts once.

A score is marginal: it says what one more document would do, so a thousand copies look a thousand times as good as one.
The rule here divides the benefit of each of the m copies of a cluster by m and leaves its tokens in the denominator of
rho, so a source made of copies of another shares that source's benefit with it instead of doubling it. It is linear, so
means stay unbiased, signs stay, and copies of something harmful win nothing either.

Not used: a penalty on the correlation of sources' score vectors. Two sources have no documents in common to correlate
over; what can be correlated is their profile over a handful of capabilities, and sources that are alike in that (two good
corpora of mathematics) need not repeat each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from megatron_r1.artifacts.influence import InfluenceTable
from megatron_r1.artifacts.mixture import Redundancy
from megatron_r1.data.ngrams import near_duplicates
from megatron_r1.mixture.config import RedundancyConfig
from megatron_r1.utils.errors import ArtifactError
from megatron_r1.utils.logging import get_logger

log = get_logger(__name__)


def scored_tokens(table: InfluenceTable, source: str, shard: Any) -> list[np.ndarray]:
    """The tokens that were scored of each document. Raises ArtifactError when the shards hold other documents."""
    scores = table.scores(source)
    found = []
    for index, start, count in zip(scores.index.tolist(), scores.start.tolist(), scores.n_tokens.tolist()):
        tokens = np.asarray(shard.tokens(index))[start : start + count + 1] if index < len(shard) else np.zeros(0)
        if len(tokens) != count + 1:
            raise ArtifactError(
                expected=f"{count + 1} tokens from {start} in document {index} of {source}, as were scored",
                found=f"{len(tokens)}",
                fix="give the mixture the shards that its influence was measured on",
            )
        found.append(tokens)
    return found


def count_once(
    config: RedundancyConfig, table: InfluenceTable, shards: Mapping[str, Any]
) -> tuple[InfluenceTable, Redundancy]:
    """The table with every cluster's benefit shared by its members, and what was found.

    shards: source -> its training split. Copies are looked for within and between the given sources.
    """
    sources = sorted(shards)
    documents = {source: scored_tokens(table, source, shards[source]) for source in sources}
    cluster = near_duplicates([d for source in sources for d in documents[source]], config.ngram, config.similarity)
    size = np.bincount(cluster)
    edges = np.cumsum([0, *(len(documents[source]) for source in sources)])
    own = {source: cluster[a:b] for source, a, b in zip(sources, edges[:-1], edges[1:])}
    shares = {source: 1.0 / size[numbers] for source, numbers in own.items()}
    others = [source for source in table.sources if source not in own]
    for source in others:
        shares[source] = np.ones(len(table.scores(source).index))
        own[source] = table.scores(source).index
    between: Counter[str] = Counter()
    for a, b in combinations(sources, 2):
        shared = len(set(own[a].tolist()) & set(own[b].tolist()))
        if shared:
            between[f"{a} + {b}"] = shared
    record = Redundancy(
        ngram=config.ngram,
        similarity=config.similarity,
        clusters=int((size > 1).sum()),
        documents=int(size[size > 1].sum()),
        counted={source: float(shares[source].mean()) for source in sources},
        between=dict(between),
        seen={source: len(np.unique(table.scores(source).index)) / len(shards[source]) for source in sources},
    )
    log.info(
        "mixture: %d of %d scored documents are near duplicates, in %d clusters; copies outside of the scored documents "
        "(%.2g %% of all) are not seen",
        record.documents,
        len(cluster),
        record.clusters,
        100 * len(cluster) / max(sum(len(shards[source]) for source in sources), 1),
    )
    return table.counted(shares, own), record
