"""Language consistency: the share of words written in the target script.

Paper: DeepSeek-R1, arXiv 2501.12948, section 2.3.2: a reward for the share of target-language words in the reasoning,
added to accuracy, against the mixing of languages. No code.

    reward(y) = words of y in the target script / words of y

Departures from the paper:
 1. The paper does not say how it tells a word's language. Here a word's script stands for it: Latin against Han,
    Cyrillic, Arabic …; English and French look the same. A word is a run of letters of one script, so that the
    several words of an unspaced Chinese phrase count as one.
 2. A completion without any letter gets 1: it mixes nothing.

Command: vigor train --config lab --reward_funcs accuracy language_consistency
"""

from __future__ import annotations

import regex
from torch import Tensor

from vigor.rewards.base import Reward, from_values
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass

_SCRIPTS = ("Latin", "Han", "Cyrillic", "Arabic", "Greek", "Hebrew", "Devanagari", "Thai", "Hangul", "Hiragana",
            "Katakana")  # fmt: skip
_KNOWN = "".join(rf"\p{{{script}}}" for script in _SCRIPTS)
_WORD = regex.compile(
    "|".join(rf"(?P<{script}>\p{{{script}}}[\p{{{script}}}\p{{M}}]*)" for script in _SCRIPTS)
    + rf"|(?P<other>(?:(?![{_KNOWN}])\p{{L}}\p{{M}}*)+)"
)


def script_share(text: str, script: str) -> float:
    """Words of the script over all words of the text; 1 for a text without words."""
    scripts = [word.lastgroup for word in _WORD.finditer(text)]
    return scripts.count(script) / len(scripts) if scripts else 1.0


def language_consistency(*, script: str = "Latin") -> Reward:
    """The share of the completion's words that are in the script, in [0, 1].

    Args:
        script: one of Latin, Han, Cyrillic, Arabic, Greek, Hebrew, Devanagari, Thai, Hangul, Hiragana, Katakana.

    Raises:
        ValueError: another script.
    """
    if script not in _SCRIPTS:
        raise ValueError(f"language_consistency: script={script!r} must be one of {', '.join(_SCRIPTS)}.")

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        return from_values([script_share(text, script) for text in rollouts.completion_texts], rollouts)

    return Reward(name="language_consistency", needs=frozenset({"text"}), score=score)
