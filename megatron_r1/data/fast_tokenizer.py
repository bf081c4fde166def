"""gigatoken in place of the plain tokenizer library, where its ids are the same.

It is some fifty times faster, young, and reads its own way: so it is believed only after it gave the plain library's ids, at
start, on texts chosen to break it (check_texts), and goes on being compared on one document of two thousand
(data/tokenizer.py). What is known to differ is left to the plain library, text by text:

- characters that Unicode got after version 14 (2021): every library has tables of its own age, and a letter of one is no
  letter of the other (found by comparing all code points);
- symbols that a SentencePiece model's user defined (Mistral's [REFERENCE_DOC_1]): what follows one is not a new beginning;
- bytes that the vocabulary lacks (SmolLM2 has no U+0004): the plain library leaves them out and joins what stood around them.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil

SINCE_14 = (
    "558 58b-58c 5c8-5c9 88f 897 b53-b54 c5c cdc cf3 ece 1acf-1af0 1b4e-1b4f 1b7f 1c89-1c8a 208f 209d-209f 20c1-20c4 2427-2429 2b96 2e60-2e63 "
    "2ffc-2fff 31e4-31ef a7cb-a7cf a7d2 a7d4 a7da-a7f1 ab6c-ab6d fbc3-fbd2 fd90-fd91 fdc8-fdce 105c0-105f3 107bb-107bf 10940-10959 10d40-10d8f "
    "10ec2-10eff 1123f-11241 11380-113e2 116d0-116e3 11b00-11bf9 11db0-11df1 11f00-11f5a 1246f 12475-1247f 12550-12686 1342f 13439-143fa "
    "16100-16139 16d40-16d79 16ea0-16ed3 16ff2-16ff6 187f8-187ff 18cd6-18cff 18d09-191d2 1b123-1b132 1b155 1b168 1cc00-1cefd 1d127-1d128 "
    "1d1eb-1d1ff 1d250-1d2d3 1d6a6 1db00-1db1c 1df1f-1dfff 1e030-1e08f 1e4d0-1e6ff 1f1ae 1f6d8-1f6dc 1f774-1f77f 1f7d9-1f7db 1f7f1-1f7ff "
    "1f8b2-1f8d8 1fa54-1fa57 1fa75-1fa77 1fa87-1fa8f 1faad-1faaf 1fabb-1fabf 1fac6-1facf 1fada-1fadf 1fae8-1faef 1faf7-1fafa 1fbcb-1fbef 1fbfa "
    "2b739-2b73f 2b81e 2cea2-2cead 2ebf0-2ee5d 31350-3fc3f"
)
"""Code points assigned by Unicode 15 to 18, in hexadecimal; what this Python does not know either is added to them."""
PLANES = 0x40000
"""Beyond these four planes nothing is a letter, a digit or a space, and nothing will be soon."""
WORDS = 2000
"""Tokens of a vocabulary that the self-check puts together, evenly over the ids."""
CACHE_BYTES = 128 << 20
LOOK_EVERY = 8 << 20
"""The library remembers every word it has seen, without a limit: after this much text its growth is looked at."""


class Refused(Exception):
    """The fast library can not be used; the message says why."""


@cache
def _unsettled() -> np.ndarray:
    """(PLANES + 1,) bool: characters whose kind depends on the age of a library's tables. The last entry stands for all beyond."""
    table = np.fromiter((unicodedata.category(chr(code)) == "Cn" for code in range(PLANES)), bool, PLANES)
    for entry in SINCE_14.split():
        first, _, last = entry.partition("-")
        table[int(first, 16) : int(last or first, 16) + 1] = True
    return np.append(table, False)


def unsettled(text: str) -> bool:
    """Whether the text has characters on which libraries may disagree."""
    if text.isascii():
        return False
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    return bool(_unsettled()[np.minimum(codes, PLANES)].any())


class Gigatoken:
    """The fast library, opened. `encode` gives int32 ids, or None for a text that the plain library has to do."""

    def __init__(self, described: str, size: int, symbols: Sequence[str] = ()) -> None:
        """`described`: a tokenizer.json whose special tokens have been taken out; `size`: the plain library's number of ids;
        `symbols`: what a text may not contain."""
        self.described, self.size = described, size
        self.symbols = re.compile("|".join(map(re.escape, symbols))) if symbols else None
        self._open()

    def _open(self) -> None:
        import gigatoken

        self.library = gigatoken.Tokenizer.from_json(self.described)
        self.read, self.resident = 0, psutil.Process().memory_info().rss

    def encode(self, text: str) -> np.ndarray | None:
        """Ids, int32, of one text."""
        if unsettled(text) or (self.symbols and self.symbols.search(text)):
            return None
        self.read += len(text)
        if self.read >= LOOK_EVERY:
            # Growth of anything else counts too; the price is a reload that was not needed.
            if psutil.Process().memory_info().rss - self.resident > CACHE_BYTES:
                self._open()
            self.read = 0
        ids = self.library.encode(text)
        return None if len(ids) and ids.max() >= self.size else ids.view(np.int32)


def open_fast(file: Path, kind: str, size: int, texts: Sequence[str], plain: Callable[[Sequence[str]], list[np.ndarray]]) -> tuple[Gigatoken, dict[str, Any]]:
    """The fast library for a tokenizer file, checked, and what was checked.

    `kind`: tokenizers or sentencepiece; `texts`: check_texts; `plain`: the library it must agree with on them. Raises Refused when it is not installed, can not read the file, or gives other ids.
    """
    try:
        version = metadata.version("gigatoken")
        import gigatoken  # noqa: F401
    except (ImportError, metadata.PackageNotFoundError) as error:
        raise Refused("gigatoken is not installed") from error
    try:
        described = _describe(file, kind, size)
        fast = Gigatoken(json.dumps(described), size, [token["content"] for token in described["added_tokens"]] if kind == "sentencepiece" else ())
    except BaseException as error:  # a Rust panic is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise Refused(f"gigatoken {version} can not read {file.name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    expected = plain(texts)
    # Twice: the second time from its memory of words.
    for _ in range(2):
        for text, ids in zip(texts, expected, strict=True):
            found = fast.encode(text)
            if found is not None and not np.array_equal(found, ids):
                raise Refused(f"gigatoken {version} gives other ids for {text[:60]!r}: {found[:12].tolist()} instead of {ids[:12].tolist()}")
    return fast, {"library": f"gigatoken {version}", "checked_texts": len(texts), "checked_ids": sum(map(len, expected))}


def _describe(file: Path, kind: str, size: int) -> dict[str, Any]:
    """A tokenizer.json for the fast library: without special tokens, which would be read out of text, and with every byte."""
    if kind == "sentencepiece":
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

        described = json.loads(sentencepiece_to_tokenizer_json(file.read_bytes()))
    else:
        described = json.loads(file.read_text("utf-8"))
    described["added_tokens"] = [token for token in described.get("added_tokens", []) if not token["special"]]
    described["post_processor"] = described["truncation"] = described["padding"] = None
    model = described["model"]
    if model.get("type", "BPE") == "BPE" and not model.get("byte_fallback"):
        missing = [letter for letter in byte_letters() if letter not in model["vocab"]]
        model["vocab"] |= {letter: size + i for i, letter in enumerate(missing)}
    return described


@cache
def byte_letters() -> tuple[str, ...]:
    """The letter that stands for each of the 256 bytes in byte-level vocabularies: itself where it can be seen, else from U+0100 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in seen]
    return tuple(chr(byte) if byte in seen else chr(0x100 + hidden.index(byte)) for byte in range(256))


ODD = [
    "", " ", "  ", "\n", "\t", "\r\n", "\0", "a\0b", "\0\0\0", "\ufeffa", "\u200b\u200d\u2060", "\u00a0\u3000\u2028\u2029\u0085x", "\x1b[0m\x7f\x80\x9f",
    "\ufffd\ufffd a\ufffdb", "\uffff\ufffe", "\U0010ffff", "\ue000\U000f0000",
    "Ã¤ Ã\x83 â\x80\x99 caf\xc3\xa9", "ÀÁ\xfe\xff\xc0\xc1",
    "I'm you're he'll she'd we've it's don't I'M YOU'RE HE'LL SHE'D WE'VE IT'S DON'T", "'s 'S 'tis 'Twas 'ſ 'ſt ’s ’T ''s '' 'lL 'Re'vE",
    "0 00 000 0000 12 123 1234 12345 123456 1234567 3.14159 1,234,567.89 0x1F 1e-10 ½ ² ³ ٣٤٥ १२३ Ⅷ ๓ 𝟘𝟙 ①②",
    "a1b2c3 1a2b3c 2nd 3rd x86_64 snake_case camelCase ALLCAPS Kebab-Case", "résumé re\u0301sume\u0301 a\u0300\u0301\u0302\u0303 \u0301x  \u0301 1\u0301 .\u0301",
    "Ünïcödé Straße ΑΒΓ αβγς Привет, мир! Ёлка ёлка", "日本語のテキスト、東京都に住む。我来到北京清华大学。한국어 한국어 ひらがなカタカナ", "ก็ไม่ได้ที่นี่ नमस्ते दुनिया தமிழ் বাংলা ᠮᠣᠩᠭᠣᠯ",
    "مرحبا بالعالم שלום עולם \u202eabc\u202c \u2067x\u2069 אָבֿ", "👩‍🚀👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇫🇷 ☺️ #️⃣ 😀😀😀 a😀b", "ﬁ ﬂ ½ Å Å Ω Ω ｆｕｌｌ ｗｉｄｔｈ １２３ ㍿ ﷽ ẞ ŉ ǰ İı",
    "x = {'a': [1, 2], \"b\": (3,)}\n\tif x!=y and not(z):\n        return f\"{x:>10}\"  # naïve\r\n\r\n\n\n", "<div class=\"a-b\">&nbsp;</div><!-- --> </s> <s> <unk> <pad> [INST] <|x|>",
    "https://example.org/a?b=c&d=%20#e user@example.com C:\\Users\\x ~/x.tar.gz", "$$\\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}$$ ∀x∈ℝ: ∃y≤x ⇒ ∑ᵢ αᵢ²",
    "!?!?!? ... -- --- ==== //// ***** ##### ,,, ;;; ((())) []{} «» “”‘’ ‚„ …—–", " leading", "trailing ", "  two  spaces  ", "tab\tand\t\ttabs \t x", "a\n b\n  c\n\n d\n \n \ne \n",
    "a\rb\r\rc \r d", "▁ ▁▁a ▁b a▁", "Ġ Ċ ĠĠa č", "word" * 40, "supercalifragilisticexpialidocious " * 3, "ſKſK ßẞ ıİ",
]


@cache
def _common() -> tuple[str, ...]:
    """What every tokenizer is checked on; the same on every machine."""
    draw = random.Random(20)
    texts = list(ODD)
    for unit in ("a", "A", " ", "\n", "\r\n", "\t", "-", "=", "0", "é", "東", "ا", "😀", "\u0301", "ab", " a", ". ", "\n ", "'s", "_"):
        texts += [unit * n for n in (2, 3, 5, 7, 8, 15, 16, 17, 33, 64, 129, 500)]
    # Two characters of every 128 of the first two planes, as a letter, a mark or a sign would stand in text.
    codes = [code for start in range(0x80, 0x20000, 128) for code in draw.sample(range(start, start + 128), 2)]
    letters = [chr(code) for code in codes if unicodedata.category(chr(code)) not in ("Cs", "Cn")]
    texts += ["".join(f"a{x}b {x}c 1{x}2 {x}{x}'{x}s\n{x}\n {x} ({x}" for x in letters[i : i + 8]) for i in range(0, len(letters), 8)]
    kinds = ["abc", "XYZ", "019", " ", " ", "\n", "\t", ".,;", "'s't'LL", "äßé", "жя", "東京", "אب", "😀\u200d👍🏽", "\u0301\u0489", "\0\x1b", "_-/", "\u00a0\u2003", "<|>"]
    for _ in range(300):
        texts.append("".join(draw.choice(draw.choice(kinds)) * draw.choice((1, 1, 1, 2, 5)) for _ in range(draw.randrange(1, 60))))
    texts += ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=n)) for n in (50, 500, 3000)]
    return tuple(texts)


def check_texts(specials: Sequence[str], words: Sequence[str]) -> list[str]:
    """The texts on which two tokenizers must agree before one stands for the other.

    `specials`: its special tokens, spelled as text; `words`: texts of its tokens, of which every merge and split is made.
    """
    spelled = [form for name in specials[:80] for form in (name, f"a {name} b", f"a{name}b{name}", name[:-1], name.upper(), f"{name[:3]} {name[3:]}")]
    some = [word for word in words[:: max(1, len(words) // WORDS)] if "\ufffd" not in word]
    random.Random(21).shuffle(some)
    made = [glue.join(some[i : i + 12]) for i in range(0, len(some), 12) for glue in ("", " ")]
    return [*_common(), *spelled, *made]
