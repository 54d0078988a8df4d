"""How well a reward tells right completions from wrong ones of the same prompt. For logs only: it needs answers.

Every function takes (P, G) tensors: P prompts, G completions each. NaN in the scores or in the correctness leaves a row
out. All arithmetic is float32 or wider.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor


def within_group_auc(scores_PG: Float[Tensor, "P G"], right_PG: Float[Tensor, "P G"]) -> float:
    """Share of the (right, wrong) pairs inside a group in which the right one scores higher; ties count half.

    0.5 is what a reward has that knows nothing. All pairs of the batch weigh the same.

    Args:
        scores_PG: higher is better.
        right_PG: 1 right, 0 wrong.

    Returns:
        A number in [0, 1]; NaN where no group has both a right and a wrong completion.
    """
    valid = ~(scores_PG.isnan() | right_PG.isnan())
    pairs_PGG = (valid & (right_PG > 0))[:, :, None] & (valid & (right_PG <= 0))[:, None, :]
    higher_PGG = (scores_PG[:, :, None] > scores_PG[:, None, :]) & pairs_PGG
    equal_PGG = (scores_PG[:, :, None] == scores_PG[:, None, :]) & pairs_PGG
    pairs = int(pairs_PGG.sum())
    return (int(higher_PGG.sum()) + 0.5 * int(equal_PGG.sum())) / pairs if pairs else math.nan


def top_quarter_accuracy(scores_PG: Float[Tensor, "P G"], right_PG: Float[Tensor, "P G"]) -> float:
    """Accuracy of each group's top quarter by score, over all groups.

    The ⌈n/4⌉ highest of a group's n valid rows, as in the official VIGOR code (intuitor_trainer.py l.1607-1640,
    `align/acc_high_sce_top25`). Where equal scores straddle the edge, that code takes any of them; here they share the
    open places, which is the mean over all ways to choose.

    Args:
        scores_PG: higher is better.
        right_PG: 1 right, 0 wrong.

    Returns:
        A number in [0, 1]; NaN where no row is valid.
    """
    valid = ~(scores_PG.isnan() | right_PG.isnan())
    places_P1 = (valid.sum(-1, keepdim=True) + 3) // 4
    above_PGG = (scores_PG[:, None, :] > scores_PG[:, :, None]) & valid[:, None, :]
    level_PGG = (scores_PG[:, None, :] == scores_PG[:, :, None]) & valid[:, None, :]
    above_PG, level_PG = above_PGG.sum(-1), level_PGG.sum(-1).clamp(min=1)
    share_PG = ((places_P1 - above_PG).double() / level_PG).clamp(0.0, 1.0).masked_fill(~valid, 0.0)
    places = int(places_P1.sum())
    return float((share_PG * right_PG.double().nan_to_num(0.0)).sum()) / places if places else math.nan
