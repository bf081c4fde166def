"""Quality scores: the published FineWeb-Edu classifier, or a small one trained here on the judge's answers.

The published one is a BERT with one output, trained on a large model's marks from 0 to 5 for educational value (arXiv 2406.17557).
Ours is a ridge regression over hashed token n-grams, trained on log-odds of the judge's answer to the same kind of question. It costs
next to nothing per document; how well it foretells the judge is measured on documents it was not trained on and recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_r1.data.ngrams import ngram_hashes
from megatron_r1.data.pretrained import locate_folder
from megatron_r1.model.pretrained import load_classifier
from megatron_r1.utils.errors import ConfigError
from megatron_r1.utils.statistics import spearman

BITS = 14
ORDERS = (1, 2)
PENALTIES = np.logspace(-3, 2, 16)
FOLDS = 5
CLASSIFIER_TOKENS = 512
BATCH = 32


class Published:
    """A sequence classifier with one output, loaded."""

    def __init__(self, folder: str, device: torch.device) -> None:
        files = locate_folder(folder, "rules.quality.classifier")
        self.sha256, self.device = files.sha256(), device
        self.model, self.tokenizer = load_classifier(files.folder, device)
        if self.model.config.num_labels != 1:
            raise ConfigError(
                expected=f"a classifier with one output in {files.folder}", found=f"{self.model.config.num_labels}", fix="name the FineWeb-Edu classifier's folder",
            )

    @torch.no_grad()
    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """Raw scores, float64 [n]; of each text its first 512 tokens count."""
        found = np.zeros(len(texts))
        order = np.argsort([len(text) for text in texts], kind="stable")
        for first in range(0, len(order), BATCH):
            rows = order[first : first + BATCH]
            batch = self.tokenizer([texts[i] for i in rows], return_tensors="pt", padding="longest", truncation=True, max_length=CLASSIFIER_TOKENS)
            found[rows] = self.model(**batch.to(self.device)).logits.squeeze(-1).double().cpu().numpy()
        return found


def features(windows: Iterable[np.ndarray], count: int) -> np.ndarray:
    """float32 [count, 2^14]: hashed 1- and 2-grams of the tokens, log(1 + how often), each row of length 1."""
    found = np.zeros((count, 1 << BITS), np.float32)
    for row, tokens in zip(found, windows):
        for n in ORDERS:
            np.add.at(row, (ngram_hashes(tokens, n) >> np.uint64(64 - BITS)).astype(np.int64), 1.0)
    np.log1p(found, out=found)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class Trained:
    """A ridge regression. `pearson` and `spearman`: with the labels, on documents it was not trained on."""

    weights: np.ndarray  # float64 [2^14]
    offset: float
    ridge: float
    pearson: float | None
    spearman: float | None

    def scores(self, windows: Iterable[np.ndarray], count: int) -> np.ndarray:
        """float64 [count]"""
        return features(windows, count) @ self.weights + self.offset


def train(x: np.ndarray, labels: np.ndarray, fold: np.ndarray) -> Trained:
    """Fit features x [n, f] to labels [n]. fold int [n]: in which of several parts each document is held out."""
    held_out = np.zeros(len(labels))
    for k in np.unique(fold):
        weights, offset, _ = _ridge(x[fold != k], labels[fold != k])
        held_out[fold == k] = x[fold == k] @ weights + offset
    weights, offset, penalty = _ridge(x, labels)
    spread = held_out.std() * labels.std()
    pearson = float(np.mean((held_out - held_out.mean()) * (labels - labels.mean())) / spread) if spread > 0 else None
    return Trained(weights, offset, penalty, pearson, spearman(held_out, labels))


def _ridge(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float, float]:
    """(weights [f], offset, penalty) of x @ weights + offset, the penalty with the least leave-one-out error (closed form)."""
    mean, level = x.mean(0, dtype=np.float64), labels.mean()
    centred = x - mean
    values, vectors = np.linalg.eigh(centred @ centred.T)
    values = np.maximum(values, 0.0)
    along = vectors.T @ (labels - level)
    found = []
    for penalty in PENALTIES:
        # With H = V diag(l / (l + penalty)) V^T + 1/n (the mean is fitted too) the error without document i is residual_i / (1 - H_ii).
        shrunk = values / (values + penalty)
        residual = (labels - level) - vectors @ (shrunk * along)
        leverage = np.minimum((vectors**2) @ shrunk + 1 / len(labels), 1 - 1e-9)
        found.append(float(np.mean((residual / (1 - leverage)) ** 2)))
    penalty = float(PENALTIES[int(np.argmin(found))])
    weights = centred.T @ (vectors @ (along / (values + penalty)))
    return weights, float(level - mean @ weights), penalty
