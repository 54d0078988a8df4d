"""Mean token probability: the arithmetic mean, where `logprob` is the geometric one.

Source: the official VIGOR code logs it as p_norm, ZJUSCL/VIGOR@52eee72 `src/open_r1/intuitor_trainer.py` l.1098-1106;
RLPR (arXiv 2506.18254) takes the same mean over a reference answer.

    score(y) = (1/T) Σ_t π(y_t|x, y_<t)
    reward   = rank of the score within the group, mapped to [-1, 1]

One improbable token costs 1/T at most, where it can ruin a mean of logarithms. Departures:
 1. There it is watched, or weighs VIGOR's score (`vigor_focal`); here it is a reward.
 2. At the sampling temperature; there at 1.

Command: vigor train --config lab --reward_funcs mean_prob
"""

from __future__ import annotations

import torch

from vigor.rewards.base import Reward, compose, ranked
from vigor.rewards.tokens import of_tokens


def mean_prob() -> Reward:
    """Rank of the mean probability of the sampled tokens."""
    return compose("mean_prob", {"token_stats", "logps"}, of_tokens("logps", each=torch.exp), shape=ranked())
