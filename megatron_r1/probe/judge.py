"""The judge: a causal language model that reads a text and answers questions about it with 1 or 0.

The text comes first, between ### marks as in Ask-LLM (arXiv 2402.09668), then the question, so that what was computed for the text
serves all questions. The score is p("1") / (p("1") + p("0")) of the next token.
Legend: b texts, s tokens, q questions, d width of the model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_r1.data.pretrained import locate
from megatron_r1.model.pretrained import load_language_model
from megatron_r1.probe.config import JudgeConfig
from megatron_r1.utils.errors import ConfigError, DataError

SETTING = "judge.model"
MARK = "###\n"
_PLACE = "\x00TEXT\x00"


class Judge:
    """A language model, loaded. `sha256`: of its weights; `rate()`: tokens it has read per second so far."""

    def __init__(self, config: JudgeConfig, device: torch.device) -> None:
        files = locate(config.model, SETTING)
        self.config, self.device, self.sha256 = config, device, files.sha256()
        self.model, self.tokenizer = load_language_model(files.path, files.gguf, config.model.precision, device)
        self._before, self._after = self._frame()
        self._one, self._zero = self._answer("1"), self._answer("0")
        self._read, self._seconds = 0, 0.0

    def rate(self) -> float:
        """Tokens per second."""
        return self._read / max(self._seconds, 1e-9)

    def overhead(self, question: str) -> int:
        """Tokens read beside the text."""
        return len(self._before) + len(self._tail(question))

    @torch.no_grad()
    def ask(self, texts: Sequence[str], questions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(score [b, q], p("1") + p("0") [b, q]) of every text and question, float64. DataError when the model answers NaN."""
        tails = [torch.tensor(self._tail(question), device=self.device) for question in questions]
        self._require_room(max(len(tail) for tail in tails))
        scores, mass = np.zeros((2, len(texts), len(questions)))
        for rows, tokens, mask in self._batches(texts, self._before, max(len(tail) for tail in tails)):
            began = time.monotonic()
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            known = self.model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1).past_key_values
            for q, tail in enumerate(tails):
                ids = tail.expand(len(rows), -1)
                logits = self.model(
                    input_ids=ids, attention_mask=torch.cat([mask, torch.ones_like(ids)], 1), past_key_values=known, use_cache=True, logits_to_keep=1,
                    position_ids=positions[:, -1:] + 1 + torch.arange(len(tail), device=self.device),
                ).logits[:, -1].double()
                known.crop(-len(tail))
                answers = torch.log_softmax(logits, -1)[:, [self._one, self._zero]]
                scores[rows, q] = torch.sigmoid(answers[:, 0] - answers[:, 1]).cpu().numpy()
                mass[rows, q] = answers.exp().sum(1).cpu().numpy()
            self._read += tokens.numel() + len(rows) * sum(len(tail) for tail in tails)
            self._seconds += time.monotonic() - began
        if not np.isfinite(scores).all():
            raise DataError(expected="a number as the judge's answer", found="NaN", fix="use judge.model.precision: fp32, or another judge")
        return scores, mass

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Mean over the text's tokens of the last hidden states, float32 [b, d]."""
        found: np.ndarray | None = None
        for rows, tokens, mask in self._batches(texts, self._bos(), 0):
            began = time.monotonic()
            hidden = self.model.base_model(
                input_ids=tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False
            ).last_hidden_state.float()
            weights = mask[..., None].float()
            mean = ((hidden * weights).sum(1) / weights.sum(1)).cpu().numpy()
            found = np.zeros((len(texts), mean.shape[1]), np.float32) if found is None else found
            found[rows] = mean
            self._read += tokens.numel()
            self._seconds += time.monotonic() - began
        assert found is not None
        return found

    def _batches(self, texts: Sequence[str], before: list[int], reserve: int) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """(numbers of the texts, tokens int64 [b, s], mask int64 [b, s]) of texts of like length; padding is on the left.

        `reserve`: tokens that will follow each text, which count towards the size of a batch.
        """
        sequences = [before + ids for ids in self._encode(texts)]
        order = np.argsort([len(ids) for ids in sequences], kind="stable")
        first = 0
        while first < len(order):
            last = first + 1
            while last < len(order) and (last + 1 - first) * (len(sequences[order[last]]) + reserve) <= self.config.batch:
                last += 1
            rows = order[first:last]
            length = max(len(sequences[rows[-1]]), 1)
            tokens = torch.zeros(len(rows), length, dtype=torch.int64)
            mask = torch.zeros_like(tokens)
            for row, number in enumerate(rows):
                ids = sequences[number] or [0]
                tokens[row, length - len(ids) :] = torch.tensor(ids)
                mask[row, length - len(ids) :] = 1
            yield rows, tokens.to(self.device), mask.to(self.device)
            first = last

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts, cut. Text is only text: the name of a special token in it is letters."""
        found = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [ids[: self.config.tokens] for ids in found]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _bos(self) -> list[int]:
        begin = self.tokenizer.bos_token_id
        return [begin] if begin is not None and list(self.tokenizer.encode("")) == [begin] else []

    def _frame(self) -> tuple[list[int], str]:
        """Ids before the text, and what follows the question."""
        if self.config.template == "plain":
            return self._bos() + self._ids(MARK), "\nAnswer:\n"
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(
                expected=f"a chat template in the tokenizer of {self.config.model.name}", found="none", fix="set judge.template to plain, or name a model with one",
            )
        whole = self.tokenizer.apply_chat_template([{"role": "user", "content": _PLACE}], add_generation_prompt=True, tokenize=False)
        before, _, after = whole.partition(_PLACE)
        return self._ids(before + MARK), after

    def _tail(self, question: str) -> list[int]:
        return self._ids("\n" + MARK + question + self._after)

    def _answer(self, digit: str) -> int:
        """The token the digit is, right after a question. ConfigError when it is not one token there."""
        tail = self._tail("?")
        whole = self._ids("\n" + MARK + "?" + self._after + digit)
        if len(whole) != len(tail) + 1 or whole[:-1] != tail:
            raise ConfigError(
                expected=f"a tokenizer that writes the answer {digit} as one token of its own", found=f"{whole[len(tail) :]} after {tail[-3:]}",
                fix=f"set judge.template to {'plain' if self.config.template == 'chat' else 'chat'}, or choose another judge",
            )
        return int(whole[-1])

    def _require_room(self, tail: int) -> None:
        room = getattr(self.model.config, "max_position_embeddings", None)
        needed = len(self._before) + self.config.tokens + tail
        if room is not None and needed > room:
            raise ConfigError(expected=f"at most {room} tokens for {self.config.model.name}", found=f"{needed} with the question", fix="lower judge.tokens")
