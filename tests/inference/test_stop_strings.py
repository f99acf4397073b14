"""Stop strings end a response where transformers' `generate(stop_strings=...)` ends it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from models import SIZES
from shardes.inference.generation import decoder
from shardes.inference.stop_strings import StopStrings

SCRIPTS = {
    "Chinese": "答案完毕",
    "Japanese": "終わり。",
    "Korean": "끝났습니다",
    "Hindi": "समाप्त",
    "Tamil": "முடிந்தது",
    "Thai": "จบแล้ว",
    "Arabic": "انتهى",
    "Hebrew": "סוף",
    "Cyrillic": "конец",
    "Greek": "τέλος",
    "accents": "terminé à",
    "combining": "e\u0301ne\u0300",
    "emoji": "🏁",
    "emoji sequence": "👩🏽‍🔬🇩🇪",
    "outside the BMP": "𝔈𝔫𝔡",
    "ASCII": "</answer>",
    "white space": "\n\n",
    "mixed": "END。\n",
}


def byte_level() -> PreTrainedTokenizerFast:
    """Bytes, some pairs of them, and a token of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    merges = [("ç", "Ń"), ("E", "N"), ("EN", "D"), ("Ġ", "a"), ("à", "¤")]
    for a, b in merges:
        vocabulary[a + b] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As sentencepiece's: pieces with ▁ for spaces, and bytes for all other characters."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdeEND</answr>", "▁a", "答", "案完", "конец", "。"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("▁", "a")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


TOKENIZERS = {"byte-level": byte_level(), "byte fall-back": byte_fallback()}


@pytest.fixture(scope="module")
def model():
    """A model that says its attribute `tokens`, whatever the prompt."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES | dict(vocab_size=300, num_hidden_layers=1)))

    def recite(module, args, kwargs, output):
        output.logits[:] = 0
        for row, position in enumerate(kwargs["position_ids"][:, -1].tolist()):
            output.logits[row, -1, module.tokens[position % len(module.tokens)]] = 1

    model.register_forward_hook(recite, with_kwargs=True)
    return model.eval()


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_response_ends_with_the_token_that_completes_the_string(model, kind, script):
    tokenizer, stop = TOKENIZERS[kind], SCRIPTS[script]
    text = "ab " + stop[:-1] + "c " + stop + " d"
    model.tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    decode = decoder(tokenizer, GenerationConfig(), max_new_tokens=60, stop=["never", stop])
    (response,) = decode(model, [model.tokens[-1:]])
    prompt = torch.tensor([model.tokens[-1:]])
    expected = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=60,
        stop_strings=["never", stop],
        tokenizer=tokenizer,
    )[0, 1:].tolist()
    assert response == expected
    assert len(response) < 60
    assert stop in tokenizer.decode(response)


@settings(max_examples=150)
@given(
    kind=st.sampled_from(sorted(TOKENIZERS)),
    script=st.sampled_from(sorted(SCRIPTS)),
    noise=st.lists(st.integers(0, 255), max_size=6),
    before=st.integers(0, 6),
)
def test_bytes_that_are_no_text_do_not_hide_the_string(kind, script, noise, before):
    tokenizer, stop = TOKENIZERS[kind], SCRIPTS[script]
    ids = tokenizer(stop, add_special_tokens=False)["input_ids"]
    tokens = noise[:before] + ids + noise[before:]
    strings = StopStrings(tokenizer, [stop])
    criterion = [
        bool(strings._criteria(torch.tensor([tokens[:n]]), None)) for n in range(1, len(tokens) + 1)
    ]
    ends = [strings.end([tokens[:n]])[0] for n in range(1, len(tokens) + 1)]
    assert ends.index(True) == criterion.index(True)


def test_a_tokenizer_that_does_not_tell_its_bytes(monkeypatch):
    """Its decoded text ends the response."""
    tokenizer = byte_level()

    def unknown(*args):
        raise ValueError("no token matches")

    monkeypatch.setattr("shardes.inference.stop_strings.StopStringCriteria", unknown)
    strings = StopStrings(tokenizer, [SCRIPTS["Chinese"]])
    tokens = tokenizer("xy" * 20 + SCRIPTS["Chinese"], add_special_tokens=False)["input_ids"]
    assert [strings.end([tokens[:n]])[0] for n in range(1, len(tokens) + 1)].count(True) == 1
