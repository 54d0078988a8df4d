"""What IFEval's checks need besides code: nltk's punkt_tab, which splits text into sentences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from vigor.evaluation.suites import EvalError

_NEED_SENTENCES = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}


def check(docs: Sequence[Mapping[str, str]]) -> None:
    """Raises EvalError where packages are missing, or where a problem needs punkt_tab and it cannot be had."""
    try:
        import immutabledict  # noqa: F401
        import langdetect  # noqa: F401
        import nltk
    except ImportError as error:
        raise EvalError(f"ifeval: {error}. Install what it needs with pip install 'vigor-rl[eval]'.") from error
    needing = sum(bool(_NEED_SENTENCES.intersection(json.loads(doc["row"])["instruction_id_list"])) for doc in docs)
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        if needing and not nltk.download("punkt_tab", quiet=True):
            raise EvalError(
                f"ifeval: {needing} of {len(docs)} problems count sentences or words with nltk's punkt_tab, which is "
                "neither here nor can be downloaded. Run `python -m nltk.downloader punkt_tab` where there is a "
                "network, and copy ~/nltk_data, or set NLTK_DATA to a folder that holds it."
            ) from error
