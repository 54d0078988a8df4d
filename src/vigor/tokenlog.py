"""What the policy thought of each token: log-probability and entropy of a few completions a log, for the report.

The numbers are those of the update's own forward pass, so writing them costs no pass of the model. They are at the
sampling temperature, in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from vigor.disk import naming
from vigor.rollouts import Rollouts, real_tokens, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS, TOKENS = 16, 8192
"""Completions of a generation batch, and tokens of them all together, that are written."""
FOLDER = "tokens"
_Key = tuple[tuple[int, ...], tuple[int, ...]]
"""Tokens of the prompt and of the completion."""


class TokenLog(TrainerCallback):
    """Collects the first completions of each generation batch, and writes them beside the texts at each log.

    Args:
        folder: of the run; files go to `tokens/tokens_STEP.parquet` in it, rows `prompt`, `completion`, `tokens` (their
            texts, which put together are the completion with its special tokens), `logps` and `entropies`.
        tokenizer: of the policy.
        on: False collects and writes nothing: processes other than the first, or runs without logged completions.
    """

    def __init__(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase, *, on: bool) -> None:
        self._folder, self._tokenizer, self._on = Path(folder) / FOLDER, tokenizer, on
        self._expected: dict[_Key, tuple[str, str]] = {}
        self._found: list[dict[str, Any]] = []

    def expect(
        self, rollouts: Rollouts, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> None:
        """Chooses the completions of a new generation batch whose numbers are wanted."""
        if not self._on:
            return
        assert rollouts.prompts is not None and rollouts.completions is not None
        self._expected, self._found, budget = {}, [], TOKENS  # TRL, too, logs the newest batch's completions only
        rows = zip(prompt_ids, completion_ids, rollouts.prompts, rollouts.completions, strict=True)
        for start, ids, prompt, completion in islice(rows, ROWS):
            budget -= len(ids)
            if budget < 0:
                break
            self._expected[tuple(start), tuple(ids)] = (text_of(prompt), text_of(completion))

    def saw(self, inputs: dict[str, Any], logps_BT: Tensor, entropies_BT: Tensor | None) -> None:
        """Takes what the update's forward pass computed.

        Args:
            inputs: of the loss: `prompt_ids`, `prompt_mask`, `completion_ids` and `completion_mask`.
            logps_BT: of the sampled tokens.
            entropies_BT: None leaves the completions out.
        """
        if not self._expected or entropies_BT is None:
            return
        prompts = real_tokens(inputs["prompt_ids"], inputs["prompt_mask"])
        completions = real_tokens(inputs["completion_ids"], inputs["completion_mask"])
        for i, key in enumerate(zip(prompts, completions, strict=True)):
            if key in self._expected:
                prompt, completion = self._expected.pop(key)
                at = inputs["completion_mask"][i].bool()
                self._found.append(
                    {
                        "prompt": prompt,
                        "completion": completion,
                        "tokens": pieces(self._tokenizer, key[1]),
                        "logps": logps_BT[i, at].detach().to("cpu", torch.float32).tolist(),
                        "entropies": entropies_BT[i, at].detach().to("cpu", torch.float32).tolist(),
                    }
                )

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Writes what was collected since the last log."""
        if not self._found:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        number = pa.list_(pa.float32())
        texts = [("prompt", pa.string()), ("completion", pa.string()), ("tokens", pa.list_(pa.string()))]
        schema = pa.schema([("step", pa.int64()), *texts, ("logps", number), ("entropies", number)])
        rows = [{"step": state.global_step, **row} for row in self._found]
        path = self._folder / f"tokens_{state.global_step:05d}.parquet"
        with naming(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
        self._found = []


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token; put together they are the text of all.

    A character that several tokens make up belongs to the last of them.
    """
    whole = tokenizer.decode(ids)
    single = tokenizer.batch_decode([[token] for token in ids])
    if "".join(single) == whole:
        return list(single)
    found, start, read = [], 0, 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            found.append("")
            continue
        found.append(text[len(tokenizer.decode(ids[start:read])) :])
        start, read = read, end
    return found
