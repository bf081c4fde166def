"""A subject without a neural network: a byte-level model whose probabilities a test can compute by hand."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


class ByteTokenizer:
    """One token per byte; 256 ends a text, 257 ends a turn."""

    vocab_size, bos_id, eos_id, pad_id, end_of_turn_id, chat_template = 258, None, 256, None, 257, None

    def encode(self, text):
        return list(text.encode("utf-8"))

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


@dataclass
class FakeSubject:
    """`nats(context, token)` gives the cost of a token; `answers` maps a prompt's text to what is generated."""

    nats: object = staticmethod(lambda context, token: float(np.log(258)))
    answers: object = staticmethod(lambda prompt: "")
    asked: list = field(default_factory=list)

    def token_nats(self, windows):
        self.asked += [list(window) for window in windows]
        return [np.array([self.nats(window[:i], window[i]) for i in range(1, len(window))]) for window in windows]

    def generate(self, prompts, max_new_tokens, stop_ids):
        tokenizer = ByteTokenizer()
        self.asked += [list(prompt) for prompt in prompts]
        return [tokenizer.encode(self.answers(tokenizer.decode(prompt)))[:max_new_tokens] for prompt in prompts]


@dataclass
class FakeShard:
    documents: list
    ids: list

    def __len__(self):
        return len(self.documents)

    def tokens(self, i):
        return np.array(self.documents[i], dtype=np.uint16)


@dataclass
class FakeRecord:
    domain: str
    distractor: bool = False
    format: str = "text"


class FakeShards:
    def __init__(self, **sources):
        """name=(domain, [texts]) or (domain, [texts], distractor)."""
        self.sources = {name: FakeRecord(value[0], *value[2:]) for name, value in sources.items()}
        self._texts = {name: value[1] for name, value in sources.items()}

    def split(self, source, split="train"):
        assert split == "test", "an evaluation must read held-out documents only"
        documents = [ByteTokenizer().encode(text) + [256] for text in self._texts[source]]
        return FakeShard(documents, [f"{source}/{i}" for i in range(len(documents))])
