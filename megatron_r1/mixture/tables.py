"""Published tables of weights, for `method: published`. Per cent of the tokens, as printed (they may not sum to 100)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedTable:
    """One column of one table, with where it stands."""

    origin: str
    weights: dict[str, float]


TABLES = {
    "mobilellm_r1_pretrain1": PublishedTable(
        "arXiv 2509.24945 v1, Table 3, phase 1",
        {
            "starcoder": 10.66,
            "openwebmath": 6.93,
            "fineweb_edu": 63.75,
            "wiki": 5.03,
            "arxiv": 6.36,
            "stackexchange": 5.03,
            "algebraic_stack": 2.25,
        },
    ),
    "mobilellm_r1_pretrain2": PublishedTable(
        "arXiv 2509.24945 v1, Table 3, phase 2",
        {
            "starcoder": 0.52,
            "openwebmath": 23.33,
            "fineweb_edu": 54.83,
            "wiki": 0.14,
            "arxiv": 1.32,
            "stackexchange": 0.86,
            "algebraic_stack": 1.26,
            "nemotron_science": 0.03,
            "nemotron_code": 0.72,
            "nemotron_math": 3.01,
            "cosmopedia": 2.70,
            "natural_reasoning": 3.18,
            "finemath": 8.01,
            "pes2o": 0.08,
        },
    ),
    "mobilellm_r1_midtrain1": PublishedTable(
        "arXiv 2509.24945 v1, Table 4, phase 1",
        {
            "dolmino_dclm": 37.03,
            "dolmino_flan": 4.10,
            "dolmino_pes2o": 11.41,
            "dolmino_wiki": 2.66,
            "dolmino_stackexchange": 2.12,
            "dolmino_math": 11.63,
            "nemotron_pretraining_code": 20.69,
            "nemotron_cc_math": 3.45,
            "starcoder": 6.90,
        },
    ),
    "mobilellm_r1_midtrain2": PublishedTable(
        "arXiv 2509.24945 v1, Table 4, phase 2",
        {
            "dolmino_dclm": 6.51,
            "dolmino_flan": 0.72,
            "dolmino_pes2o": 2.01,
            "dolmino_wiki": 0.47,
            "dolmino_stackexchange": 2.00,
            "dolmino_math": 29.10,
            "nemotron_pretraining_code": 29.10,
            "nemotron_cc_math": 19.40,
            "starcoder": 9.70,
            "benchmark_train": 0.97,
        },
    ),
}
"""Name -> table. The names of the sources are those of the shipped recipes."""
