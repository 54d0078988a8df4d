"""Scores of completions that exist already: for best-of-N selection, data filtering and confidence."""

from __future__ import annotations

from vigor.scoring.rows import Sample, read_samples
from vigor.scoring.score import check_signals, rollouts_of, score_completions

__all__ = ["Sample", "check_signals", "read_samples", "rollouts_of", "score_completions"]
