"""The numbers of tokens that a report colours: those of the policy that wrote the completion, on whole texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers_trainer import lab_tokenizer, tiny_model, trainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vigor.tokenlog import ROWS, pieces

EOS = 1
COMPLETIONS = [[40 + row, 20 + row % 5, 50 - row, *([] if row in (0, 5) else [EOS])] for row in range(16)]
COMPLETIONS[3] = COMPLETIONS[6] = [44, EOS]


def written(folder: Path) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(path) for path in sorted((folder / "tokens").glob("*.parquet"))])


@pytest.mark.parametrize("fused", ["keep", "retain", "off"])
def test_the_numbers_are_the_policys(tmp_path: Path, fused: str) -> None:
    """Of the first step, whose policy is the model before training; at the temperature of the sampling."""
    made = trainer(tmp_path, fused=fused, completions=COMPLETIONS, temperature=0.7)
    made.train()
    found = written(tmp_path)
    tokenizer, model = lab_tokenizer(), tiny_model().double()
    texts = pd.read_parquet(next((tmp_path / "completions").glob("*.parquet")))
    assert len(found) == len(texts)
    assert set(found["step"]) == {1}
    for row in found.to_dict("records"):
        assert ((texts["prompt"] == row["prompt"]) & (texts["completion"] == row["completion"])).any()
        prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
        ids = next(ids for ids in COMPLETIONS if "".join(row["tokens"]) == tokenizer.decode(ids))
        assert list(row["tokens"]) == [tokenizer.decode([token]) for token in ids]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 0.7
        logps = logits.log_softmax(-1)
        assert row["logps"] == pytest.approx(logps.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist(), abs=2e-5)
        assert row["entropies"] == pytest.approx((-(logps.exp() * logps).sum(-1)).tolist(), abs=2e-5)


def test_only_the_first_completions_are_written(tmp_path: Path) -> None:
    """Four steps of two generation batches, each of more completions than are wanted."""
    many = [[40 + row % 7, 20 + row // 7, EOS] for row in range(2 * ROWS)]
    changes = {"per_device_train_batch_size": ROWS, "steps_per_generation": 2, "num_generations": 8}
    trainer(tmp_path, completions=many, max_steps=4, fused="off", **changes).train()
    counts = written(tmp_path).groupby("step").size()
    assert counts.sum() == 2 * ROWS
    assert counts.max() <= ROWS


def test_several_steps_between_two_logs_keep_the_newest_only(tmp_path: Path) -> None:
    """As TRL's own table of completions does: what a long time between two logs costs in memory is one batch."""
    trainer(tmp_path, completions=COMPLETIONS, max_steps=4, logging_steps=2, fused="off").train()
    found, texts = written(tmp_path), pd.read_parquet(tmp_path / "completions")
    assert sorted(set(found["step"])) == sorted(set(texts["step"])) == [2, 4]
    assert found.groupby("step").size().to_dict() == texts.groupby("step").size().to_dict()


@pytest.mark.parametrize("changes", [{"log_completions": False}, {"truncated": "mask", "completions": [[40, 41]] * 8}])
def test_nothing_is_written_without_completions(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer(tmp_path, **{"completions": COMPLETIONS, **changes}).train()
    assert not (tmp_path / "tokens").exists()


def test_a_character_of_several_tokens_is_whole() -> None:
    """Byte-level tokens: the parts put together are the text, and no part holds a broken character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False)
    text = "x = √2 → 😀 done"
    ids = tokenizer(text).input_ids
    assert len(ids) > len(text)
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == text
    assert "√" in found
    cut = pieces(tokenizer, ids[:5])  # ends within √
    assert "".join(cut) == tokenizer.decode(ids[:5])
