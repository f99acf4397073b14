"""Prompts that a chat template, a tokenizer or a user's text makes special."""

import warnings

import pytest
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from models import CHAT, byte_tokenizer
from shardes.errors import ConfigError
from shardes.inference.prompts import encode

USER = {"role": "user", "content": "hi"}


def test_a_last_message_of_the_assistant_is_continued():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT.replace("{% endfor %}", "</{{ m['role'] }}>{% endfor %}")
    chats = [[USER], [USER, {"role": "assistant", "content": "It is"}]]
    texts = [tokenizer.decode(ids) for ids in encode(tokenizer, chats)]
    assert texts == ["<user>hi</user><a>", "<user>hi</user><assistant>It is"]


@pytest.mark.parametrize(
    "prompt, template, message",
    [
        (
            [{"role": "system", "content": "Be brief."}, USER],
            "{% if messages[0]['role'] == 'system' %}"
            "{{ raise_exception('System role not supported') }}{% endif %}",
            r"task: prompt 1: the chat template of .* does not take its messages "
            r"\(roles system, user\): System role not supported",
        ),
        ([USER], "{{ messages[5]['content']['a'] }}", "the chat template of .* does not take"),
        ([USER], "{% if %}", "the chat template of .* does not take"),
        ([USER, {"role": "assistant", "content": "no"}], "{{ 'content' }}", "does not take"),
        ([], CHAT, "task: prompt 1 is empty"),
        ([{"role": "user"}], CHAT, "{'role': 'user'} is not a message with role and content"),
        ([{"role": "user", "content": None}], CHAT, "is not a message with role and content"),
        ([{"content": "hi"}], CHAT, "is not a message with role and content"),
        (["hi"], CHAT, "'hi' is not a message with role and content"),
        ("a\ud800b", CHAT, r"task: prompt 1 has '\\ud800', half of a pair of UTF-16"),
        ([USER | {"content": "\udfff"}], CHAT, r"task: prompt 1 has '\\udfff', half of a pair"),
    ],
)
def test_a_prompt_that_cannot_be_encoded_is_named_in_one_line(prompt, template, message):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=message) as caught:
        encode(tokenizer, ["ok", prompt])
    assert "\n" not in str(caught.value)


def test_a_second_begin_of_sequence_token_is_warned_of_once(monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.chat_template = "<bos>" + CHAT
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    with warnings.catch_warnings(record=True) as caught:
        encode(tokenizer, ["hi", [USER], "say <bos>"])
        assert not caught
        rows = encode(tokenizer, ["<bos>hi", "<bos>you"])
        encode(tokenizer, ["<bos>she"])
        monkeypatch.setenv("RANK", "1")
        encode(tokenizer, ["<bos>hi"])
    assert all(row[:2] == [tokenizer.bos_token_id] * 2 for row in rows)
    (warning,) = caught
    assert str(warning.message).startswith("task: prompts begin with <bos>, which the tokenizer")


@pytest.mark.parametrize("prompt", ["hello", [{"role": "user", "content": "hello"}]])
def test_a_tokenizer_without_a_vocabulary_is_named(prompt):
    tokenizer = byte_tokenizer()
    vocabulary = {"<eos>": 0, "<pad>": 1}
    empty = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<eos>"))
    lost = PreTrainedTokenizerFast(
        tokenizer_object=empty,
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=tokenizer.chat_template,
    )
    with pytest.raises(ConfigError, match=r"prompt 0: .* has no tokens for its text"):
        encode(lost, [prompt])
    assert encode(lost, ["<eos>"]) == [[0]]
    encode(tokenizer, [prompt])
