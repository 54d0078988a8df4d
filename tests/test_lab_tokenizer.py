"""The lab's tokenizer: nothing is lost, and the Auto classes see what the file says."""

from __future__ import annotations

import itertools

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from vigor.lab.corpus import WORLDS, texts
from vigor.lab.tokenizer import CHARACTERS, UNK, WORDS, build_tokenizer
from vigor.lab.world import NAMES, model_path

ODD = [
    "Q:5x",
    "Q:5x+3=18\nA:",
    "  spaces  twice ",
    "\n\nA: Q:",
    "çé🙂Z%\t",
    "<eos> in a text",
    "\\boxed{7}",
    "\r\n",
    "x" * 600,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer()


@pytest.mark.parametrize("world", list(WORLDS))
def test_every_text_of_the_lab_comes_back_exactly(tokenizer, world):
    for text in itertools.islice(texts(WORLDS[world], seed=3), 2000):
        for part in (text.prompt, text.completion):
            encoding = tokenizer.encode(part)
            assert UNK not in encoding.tokens, part
            assert tokenizer.decode(encoding.ids) == part


def test_every_word_and_character_is_one_token(tokenizer):
    for piece in (*WORDS, *CHARACTERS):
        assert tokenizer.encode(piece).tokens == [piece]


def test_a_prompt_and_its_completion_meet_at_a_token_boundary(tokenizer):
    # Rewards join the ids of both; pre-training did too. Tokens of the joined text must be the same ones.
    for text in itertools.islice(texts(WORLDS["lab"], seed=4), 500):
        joined = tokenizer.encode(text.prompt + text.completion).ids
        assert joined == tokenizer.encode(text.prompt).ids + tokenizer.encode(text.completion).ids


def test_unknown_characters_become_unk_one_by_one(tokenizer):
    assert tokenizer.encode("5%Zé🙂").tokens == ["5", UNK, UNK, UNK, UNK]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ODD)
def test_auto_tokenizer_agrees_with_the_file(name, text):
    auto = AutoTokenizer.from_pretrained(model_path(name))
    plain = Tokenizer.from_file(str(model_path(name) / "tokenizer.json"))
    ids = auto(text)["input_ids"]
    assert ids == plain.encode(text).ids == build_tokenizer().encode(text).ids
    assert auto.decode(ids) == plain.decode(ids, skip_special_tokens=False)


def test_auto_tokenizer_keeps_the_question_mark_of_the_pitfall():
    # transformers builds another tokenizer than the file's for some model types, and "Q:5x" comes back as ":5x".
    auto = AutoTokenizer.from_pretrained(model_path("lab"))
    assert auto.decode(auto("Q:5x")["input_ids"]) == "Q:5x"


def test_special_tokens_are_distinct_and_padding_is_left():
    auto = AutoTokenizer.from_pretrained(model_path("lab"))
    assert len({auto.pad_token_id, auto.eos_token_id, auto.unk_token_id}) == 3
    batch = auto(["Q:1+2\nA:", "Q:1\nA:"], padding=True)
    assert batch["input_ids"][1][0] == auto.pad_token_id
    assert batch["attention_mask"][1][0] == 0
    assert auto("5")["input_ids"] == [auto.convert_tokens_to_ids("5")]
