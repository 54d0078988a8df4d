"""The lab's tokenizer: single characters, and the words of the lab as one token each.

Built with plain `tokenizers` (a regular expression that splits, then a word-level look-up), so the file that
`AutoTokenizer` loads holds all there is: no code, no merges. Every text of the lab comes back from its ids exactly;
a character outside the vocabulary becomes ``<unk>`` and never vanishes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
WORDS = (
    "Q:", "\nA:", "\nQ:", "solve ", " mod 10", "print(", "for i in range(", "; ", " so", " \\boxed{", " carry",
    " borrow", " easy", " quick", " maybe", " probably", " first", " ok", " hm", " well", " now", " then", " next",
    " and", " let", " me", " see", " we", " get",
)  # fmt: skip
CHARACTERS = "0123456789abcdefghixs+-*/=()[]:;'{}\n "


def build_tokenizer() -> Tokenizer:
    """The tokenizer, made from the constants above alone."""
    pieces = [PAD, EOS, UNK, *WORDS, *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=UNK))
    # Longest first: the expression takes the first alternative that matches. The last one takes any one character,
    # line breaks included, so that nothing is dropped between matches.
    longest_first = sorted(WORDS, key=len, reverse=True)
    pattern = "|".join([*(re.escape(word) for word in longest_first), r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (PAD, EOS, UNK)])
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` for `AutoTokenizer` into an existing folder."""
    build_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNK,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
