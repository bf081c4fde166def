"""The example in examples/own_corpus runs as its README says."""

from pathlib import Path

import pytest
import yaml
from corpus_toys import make

from megatron_r1.corpus.config import CorpusConfig
from megatron_r1.data.shards import ShardSet

ROOT = Path(__file__).resolve().parents[2]


def test_the_example(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = yaml.safe_load((ROOT / "examples/own_corpus/recipe.yaml").read_text())
    steps = {name: CorpusConfig.model_validate({"seed": recipe["seed"], **step}) for name, step in recipe["steps"].items()}
    corpus = make(tmp_path, steps["corpus"], "corpus")
    tuned = make(tmp_path, steps["sft_corpus"], "sft_corpus", {"tokenizer": corpus})
    shards = ShardSet.open(corpus)
    assert list(shards.sources) == ["notes", "code_stdlib"]
    assert sum(len(shards.split("notes", split)) for split in ("train", "probe", "test")) == 6
    assert len(ShardSet.open(tuned).split("questions")) == 4
    assert ShardSet.open(tuned).tokenizer.vocab_size == 1024


def test_the_readme_names_settings_that_exist():
    from megatron_r1.corpus.config import SourceConfig

    readme = (ROOT / "examples/own_corpus/README.md").read_text()
    for name in ("text_field", "template", "prompt_template", "response_template", "document", "group_field", "min_chars"):
        assert name in readme
        assert name in SourceConfig.model_fields


@pytest.mark.parametrize("name", ["notes", "questions"])
def test_the_sample_data_is_plain_json_lines(name):
    import json

    lines = (ROOT / f"examples/own_corpus/data/{name}.jsonl").read_text().splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines)
