"""Prompts in: jsonl, json, csv, parquet, hub names and ``lab:`` tasks, each row checked before a model is loaded."""

from __future__ import annotations

from vigor.data.encode import encode_prompt
from vigor.data.load import PromptData, load_prompts
from vigor.data.rows import BadRow, DataError

__all__ = ["BadRow", "DataError", "PromptData", "encode_prompt", "load_prompts"]
