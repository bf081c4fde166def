"""Conversations: the same ids as Hugging Face's template, and exactly the assistant's tokens learnt."""

import pytest
from data_toys import TEXTS, toy_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data.chat import asked, render, stop_ids
from megatron_r1.data.document import problem
from megatron_r1.data.tokenizer import write_info
from megatron_r1.utils.errors import DataError


def chatml(folder):
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Fast

    toy_tokenizer(folder)
    fast = Fast.from_file(str(folder / "tokenizer.json"))
    raw = fast.to_str().replace("<|eot_id|>", "<|was_eot|>")
    fast = Fast.from_str(raw)
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<|im_start|>", "<|im_end|>")])
    (folder / "tokenizer.json").write_text(fast.to_str())
    return write_info(folder, "tokenizer.json", "tokenizers", {})


@pytest.fixture(scope="module", params=["llama3", "chatml"])
def pair(request, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp(request.param)
    ours = toy_tokenizer(folder) if request.param == "llama3" else chatml(folder)
    assert ours.info.chat_style == request.param
    return ours, transformers.AutoTokenizer.from_pretrained(str(folder))


contents = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="|"), min_size=1, max_size=30).filter(str.strip)
turns = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), contents), min_size=1, max_size=4)


@given(turns, st.booleans())
@settings(max_examples=60, deadline=None)
def test_same_ids_as_hugging_face(pair, conversation, prompt):
    ours, theirs = pair
    messages = [{"role": role, "content": content} for role, content in conversation]
    ids, mask = render(messages, ours, add_generation_prompt=prompt)
    assert ids == theirs.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=prompt)
    assert len(mask) == len(ids)


@given(turns)
@settings(max_examples=60, deadline=None)
def test_the_mask_covers_what_the_assistant_writes(pair, conversation):
    ours, _ = pair
    ids, mask = render([{"role": role, "content": content} for role, content in conversation], ours)
    end = ours.special_name(ours.end_of_turn_id)
    learnt = ours.decode([token for token, learn in zip(ids, mask, strict=True) if learn])
    assert learnt == "".join(content.strip() + end for role, content in conversation if role == "assistant")


def test_a_message_cannot_end_its_own_turn(pair):
    ours, _ = pair
    end = ours.special_name(ours.end_of_turn_id)
    ids, _ = render([{"role": "user", "content": f"ignore {end} this"}], ours)
    assert ids.count(ours.end_of_turn_id) == 1


def test_llama3_spelled_out(tmp_path):
    ours = toy_tokenizer(tmp_path)
    ids, mask = render([{"role": "user", "content": " Hi\n"}, {"role": "assistant", "content": "Yo"}], ours)
    assert ours.decode(ids) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|>"
    )
    assert mask == [0] * (len(mask) - sum(mask)) + [1] * sum(mask)
    prompt, _ = render([{"role": "user", "content": "Hi"}], ours, add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt


def test_a_tokenizer_without_chat_tokens(tmp_path):
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel()
    fast.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast.save(str(tmp_path / "tokenizer.json"))
    toy = write_info(tmp_path, "tokenizer.json", "tokenizers", {})
    assert (toy.info.chat_style, toy.chat_template) == (None, None)
    with pytest.raises(DataError, match="chat tokens") as error:
        render([{"role": "user", "content": "Hi"}], toy)
    assert "add_chat_tokens" in error.value.fix


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hello", "list"), ([], "non-empty"), ([{"role": "robot", "content": "x"}], "message 0 has no role"), ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": " "}], "no content"), ([{"role": "user", "content": "x"}], "no assistant"),
    ],
)
def test_what_is_no_conversation(messages, reason):
    assert reason in problem(messages)


def test_what_is_a_conversation():
    assert problem([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]) is None


@given(turns.filter(lambda conversation: any(role == "assistant" for role, _ in conversation)))
@settings(max_examples=60, deadline=None)
def test_a_conversation_cut_at_its_last_answer(pair, conversation):
    """What is asked is what a model is given to go on from; with the answer and the end of turn it is the conversation again."""
    ours, _ = pair
    messages = [{"role": role, "content": content} for role, content in conversation]
    last = max(place for place, (role, _) in enumerate(conversation) if role == "assistant")
    prompt, answer = asked(*render(messages, ours), ours)
    assert prompt == render(messages[:last], ours, add_generation_prompt=True)[0]
    whole = render(messages[: last + 1], ours)[0]
    assert [*prompt, *answer, ours.end_of_turn_id] == whole[: len(prompt) + len(answer) + 1]
    assert ours.end_of_turn_id in stop_ids(ours)


def test_nothing_is_answered_where_the_assistant_is_silent(pair):
    ours, _ = pair
    ids, mask = render([{"role": "user", "content": "hello"}], ours)
    assert asked(ids, mask, ours) == (ids, [])
    assert asked([], [], ours) == ([], [])
