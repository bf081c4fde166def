"""The judge: a causal language model that reads a text and answers a question about it with 1 or 0.

The text comes first, between ### marks as in Ask-LLM (arXiv 2402.09668), then the question; before both, where the settings give any,
answered examples, whose keys and values are computed once. The score is p("1") / (p("1") + p("0")) of the next token.
Legend: b texts, s tokens, q questions, d width of the model.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Question:
    """What is asked, and under which names the examples answer it with 1 (quality, reasoning, capabilities)."""

    text: str
    names: tuple[str, ...]


class Judge:
    """A language model, loaded. `sha256`: of its weights; `rate()`: tokens it has read per second so far."""

    def __init__(self, config: JudgeConfig, device: torch.device) -> None:
        files = locate(config.model, SETTING)
        self.config, self.device, self.sha256 = config, device, files.sha256()
        self.model, self.tokenizer = load_language_model(files.path, files.gguf, config.model.precision, device)
        self._read, self._seconds = 0, 0.0

    def rate(self) -> float:
        """Tokens per second."""
        return self._read / max(self._seconds, 1e-9)

    def overhead(self, question: Question) -> int:
        """Tokens read after every text."""
        return len(self._prompt(question)[1])

    @torch.no_grad()
    def ask(self, texts: Sequence[str], questions: Sequence[Question]) -> tuple[np.ndarray, np.ndarray]:
        """(score [b, q], p("1") + p("0") [b, q]) of every text and question, float64. DataError when the model answers NaN."""
        scores, mass = np.zeros((2, len(texts), len(questions)))
        for q, question in enumerate(questions):
            before, after, one, zero = self._prompt(question)
            self._require_room(len(before) + len(after))
            start = self.model(input_ids=torch.tensor([before], device=self.device), use_cache=True, logits_to_keep=1).past_key_values
            for rows, tokens, mask in self._batches(texts, [], after):
                began = time.monotonic()
                known = copy.deepcopy(start)
                known.batch_repeat_interleave(len(rows))
                seen = torch.cat([mask.new_ones(len(rows), len(before)), mask], 1)
                positions = (seen.cumsum(1) - 1)[:, len(before) :]
                logits = self.model(
                    input_ids=tokens, attention_mask=seen, position_ids=positions, past_key_values=known, use_cache=True, logits_to_keep=1
                ).logits[:, -1].double()
                answers = torch.log_softmax(logits, -1)[:, [one, zero]]
                scores[rows, q] = torch.sigmoid(answers[:, 0] - answers[:, 1]).cpu().numpy()
                mass[rows, q] = answers.exp().sum(1).cpu().numpy()
                self._read += tokens.numel()
                self._seconds += time.monotonic() - began
        if not np.isfinite(scores).all():
            raise DataError(expected="a number as the judge's answer", found="NaN", fix="use judge.model.precision: fp32, or another judge")
        return scores, mass

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Mean over the text's tokens of the last hidden states, float32 [b, d]."""
        found: np.ndarray | None = None
        for rows, tokens, mask in self._batches(texts, self._bos(), []):
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

    def _batches(self, texts: Sequence[str], before: list[int], after: list[int]) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """(numbers of the texts, tokens int64 [b, s], mask int64 [b, s]) of texts of like length, with `before` and `after` around each;
        padding is on the left."""
        sequences = [before + ids + after for ids in self._encode(texts)]
        order = np.argsort([len(ids) for ids in sequences], kind="stable")
        first = 0
        while first < len(order):
            last = first + 1
            while last < len(order) and (last + 1 - first) * len(sequences[order[last]]) <= self.config.batch:
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

    def _prompt(self, question: Question) -> tuple[list[int], list[int], int, int]:
        """(ids before the text, ids after it, id of the answer 1, id of the answer 0). ConfigError when an answer is not one token."""
        asked = "\n" + MARK + question.text
        shown = [(MARK + example.text + asked, "1" if set(example.yes) & set(question.names) else "0") for example in self.config.examples]
        if self.config.template == "plain":
            before, after = "".join(f"{text}\nAnswer:\n{answer}\n\n" for text, answer in shown) + MARK, asked + "\nAnswer:\n"
        elif not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(
                expected=f"a chat template in the tokenizer of {self.config.model.name}", found="none", fix="set judge.template to plain, or name a model with one",
            )
        else:
            turns = [turn for text, answer in shown for turn in ({"role": "user", "content": text}, {"role": "assistant", "content": answer})]
            turns.append({"role": "user", "content": MARK + _PLACE + asked})
            before, _, after = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False).partition(_PLACE)
        begin = self._bos() if self.config.template == "plain" else []
        return begin + self._ids(before), self._ids(after), self._answer(after, "1"), self._answer(after, "0")

    def _answer(self, after: str, digit: str) -> int:
        """The token the digit is, right after a question."""
        tail, whole = self._ids(after), self._ids(after + digit)
        if len(whole) != len(tail) + 1 or whole[:-1] != tail:
            raise ConfigError(
                expected=f"a tokenizer that writes the answer {digit} as one token of its own", found=f"{whole[len(tail) :]} after {tail[-3:]}",
                fix=f"set judge.template to {'plain' if self.config.template == 'chat' else 'chat'}, or choose another judge",
            )
        return int(whole[-1])

    def _require_room(self, prompt: int) -> None:
        room, needed = getattr(self.model.config, "max_position_embeddings", None), prompt + self.config.tokens
        if room is not None and needed > room:
            raise ConfigError(expected=f"at most {room} tokens for {self.config.model.name}", found=f"{needed} with the question", fix="lower judge.tokens")
