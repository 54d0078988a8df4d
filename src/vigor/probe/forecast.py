"""From statistics to a verdict: will help, neutral, will collapse, or no verdict at all, with the reasons.

What decides is the *rival AUC*: the chance that a right completion scores above a wrong one of its prompt, where a
wrong completion counts as often as its answer occurs in the group. A mistake that a third of the samples makes is one
direction that the update can take; scattered slips are none. The plain AUC does not see the difference: on the lab's
misaligned base VIGOR's is above one half, and training collapses (docs/probe.md). Without answers the same number is
taken against the group's most common answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vigor.probe.statistics import Estimate

HELP, NEUTRAL, COLLAPSE, NONE = "will help", "neutral", "will collapse", "no forecast"
BREAK_EVEN = {"answers": 0.48, "majority": 0.68}
"""Rival AUC at which training neither helps nor hurts on the lab's worlds (docs/results/probe.md)."""
MIN_PROMPTS = 16
"""Fewer prompts with both kinds of completions give no forecast."""
CALIBRATED = ("vigor",)
"""Signals for which forecasts were compared with trainings."""


@dataclass(frozen=True)
class Forecast:
    """A verdict with the number it rests on."""

    verdict: str
    """One of `HELP`, `NEUTRAL`, `COLLAPSE`, `NONE`."""
    basis: str
    """"answers" or "majority": what told right from wrong."""
    rival_auc: Estimate
    break_even: float
    reasons: tuple[str, ...]


def forecast(
    signal: str, against_answers: Estimate, against_majority: Estimate, tie_rate: float, flip_rate: float
) -> Forecast:
    """The forecast for training on a signal.

    Args:
        signal: its name.
        against_answers: rival AUC against known answers; of 0 prompts where there are none.
        against_majority: rival AUC against each group's most common answer.
        tie_rate: share of pairs with equal scores.
        flip_rate: share of pairs whose order depends on the precision; NaN where it was not measured.
    """
    basis = "answers" if against_answers.prompts >= MIN_PROMPTS else "majority"
    estimate = against_answers if basis == "answers" else against_majority
    even = BREAK_EVEN[basis]
    what = "a right completion" if basis == "answers" else "one with the most common answer"
    reasons = [
        f"{what} outscores a repeated mistake of its group with chance {estimate.value:.2f} "
        f"[{estimate.low:.2f}, {estimate.high:.2f}], over {estimate.prompts} prompts; training breaks even at "
        f"{even:.2f}"
    ]
    if basis == "majority":
        reasons.append(
            "no answers are known, so the most common answer stands for the right one: a model that is mostly wrong, "
            "and sure of it, looks aligned here"
        )
    if estimate.prompts < MIN_PROMPTS:
        reasons = [f"only {estimate.prompts} prompts have both kinds of completions; {MIN_PROMPTS} are needed"]
        verdict = NONE
    elif signal not in CALIBRATED:
        reasons.append(f"forecasts were compared with trainings for {', '.join(CALIBRATED)} only")
        verdict = NONE
    elif estimate.low > even:
        verdict = HELP
    elif estimate.high < even:
        verdict = COLLAPSE
    else:
        verdict = NEUTRAL
        reasons.append("the interval holds the break-even, so neither direction is clear: more prompts narrow it")
    if tie_rate > 0.5:
        reasons.append(f"{tie_rate:.0%} of the pairs of a group tie: there is little to learn from")
    if not math.isnan(flip_rate) and flip_rate > 0.05:
        reasons.append(f"{flip_rate:.0%} of the pairs change their order with the precision: score in float32")
    return Forecast(verdict, basis, estimate, even, tuple(reasons))
