"""Conversations as tokens with a loss mask: Llama-3 headers, or ChatML for tokenizers that have its tokens instead.

    llama3:  <|begin_of_text|> { <|start_header_id|> role <|end_header_id|> \\n\\n content <|eot_id|> }
    chatml:  { <|im_start|> role \\n content <|im_end|> \\n }

`render` gives the ids that Hugging Face's `apply_chat_template` gives with TEMPLATES, with one difference meant: special
tokens spelled out inside a message stay text, so that a message cannot end its own turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_r1.data.document import Message
from megatron_r1.data.tokenizer import CHAT_TOKENS, Tokenizer
from megatron_r1.utils.errors import DataError

TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + (message['content'] | trim) + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
CHATML_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' + (message['content'] | trim) + '<|im_end|>' + '\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
TEMPLATES = {"llama3": TEMPLATE, "chatml": CHATML_TEMPLATE}


def require_chat(tokenizer: Tokenizer) -> None:
    """Raise DataError unless the tokenizer has the tokens of a chat style."""
    if tokenizer.info.chat_style is None:
        raise DataError(
            expected="a tokenizer with chat tokens: " + " or ".join(", ".join(tokens.values()) for tokens in CHAT_TOKENS.values()),
            found=f"{tokenizer.folder.name} ({tokenizer.vocab_size} ids) has neither set",
            fix="use tokenizer kind train_bpe, a tokenizer that has them, or set tokenizer.add_chat_tokens: true for a tokenizer.json",
        )


def stop_ids(tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer: end of text, and end of turn where the tokenizer has one."""
    return tuple(sorted({i for i in (tokenizer.eos_id, tokenizer.end_of_turn_id) if i is not None}))


def asked(ids: Sequence[int], mask: Sequence[int], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """A rendered conversation cut at its last answer: (what comes before, with the header of the assistant's turn; the answer's tokens).

    ids and mask as `render` makes them. The answer is without the token that ends its turn, and empty where the assistant says nothing.
    """
    said = [place for place, learn in enumerate(mask) if learn]
    end = said[-1] if said else len(ids)
    marks = tokenizer.info.chat_ids
    opening = marks.get("header_start", marks.get("start"))
    before = [place for place in range(end) if ids[place] == opening]
    if not said or not before:
        return list(ids), []
    turn = [place for place in said if place > before[-1]]
    header = render([], tokenizer, add_generation_prompt=True)[0]
    return [*ids[: before[-1]], *header[header.index(opening) :]], list(ids[turn[0] : end + (ids[end] != marks["end"])])


def render(messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
    """Ids and mask of a conversation; mask 1 = what the assistant writes, the token that ends its turn included.

    add_generation_prompt: end with the header of an assistant's turn, for generating. Raises DataError without chat tokens.
    """
    require_chat(tokenizer)
    special, style = tokenizer.info.chat_ids, tokenizer.info.chat_style
    ids: list[int] = []
    mask: list[int] = []

    def put(tokens: Sequence[int], learn: int = 0) -> None:
        ids.extend(tokens)
        mask.extend([learn] * len(tokens))

    def put_text(head: str, content: str, learn: int) -> None:
        # Head and content are tokenised together, as the template does; offsets tell which tokens belong to the content.
        tokens, starts = tokenizer.backend.encode_offsets(head + content)
        for token, start in zip(tokens, starts):
            put([token], learn if start >= len(head) else 0)

    def plain(text: str) -> list[int]:
        if text not in tokenizer.short:
            tokenizer.short[text] = tokenizer.encode(text)
        return tokenizer.short[text]

    if style == "llama3" and tokenizer.bos_id is not None:
        put([tokenizer.bos_id])
    for message in messages:
        role, content = message["role"], message["content"].strip()
        learn = int(role == "assistant")
        if style == "llama3":
            put([special["header_start"]])
            put(plain(role))
            put([special["header_end"]])
            put_text("\n\n", content, learn)
        else:
            put([special["start"]])
            put_text(role + "\n", content, learn)
        put([special["end"]], learn)
        if style == "chatml":
            put(plain("\n"))
    if add_generation_prompt:
        if style == "llama3":
            put([special["header_start"]])
            put(plain("assistant"))
            put([special["header_end"]])
            put_text("\n\n", "", 0)
        else:
            put([special["start"]])
            put_text("assistant\n", "", 0)
    return ids, mask
