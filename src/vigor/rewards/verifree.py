r"""VeriFree: the probability of the reference answer after the completion's own reasoning.

Paper: "Reinforcing General Reasoning without Verifiers", arXiv 2505.21493; code sail-sg/VeriFree@718b363 `verifree.py`.

    z      = the completion cut inside its answer's opener
    p(y)   = exp(Σ_j log π(a*_j | x, z, a*_<j)), a* = rest of the opener, reference and closer; 0 without an opener
    reward = p - mean of the others' p                                                         (leave-one-out)

The paper's loss is mean_i [ -sg(A_i) Σ_t log π(z_t) - sg(p_i) Σ_j log π(a*_j) ] with A = reward. Under
`scale_rewards="none"` and a loss without length normalisation (`loss_type="dr_grpo"`) that is what VigorTrainer
minimises, over max_completion_length: it adds the second term, a gradient on the reference, to the loss (see
`vigor.auxiliary`). `reference_loss` is that term for loops of one's own; `reference_gradient=False` leaves it out, a
departure from the paper.

Departures from the paper and its code (a setting in brackets switches one back):
 1. Without the two settings above, TRL normalises the first term as it does any reward's, and not the second.
 2. Answers stand in \boxed{}, cut after "\boxed{" and closed by "}"; there z ends with "<answer" and a* is
    "> \boxed{reference} </answer>" (`answer="tags"`).
 3. All tokens of the completion are trained on, its own answer included; there those of z.
 4. Sampled tokens are kept in front of the reference, see `vigor.continuation`; there z is encoded again.
 5. A completion whose reference would exceed the token budget is not set to 0.

Command: vigor train --config lab --reward_funcs verifree --scale_rewards none --loss_type dr_grpo
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vigor.rewards.base import Auxiliary, Reward, Text, from_values, unshaped
from vigor.rewards.reference import Answer, Slot, boxed_cut, logps_of, placed, references_of, slot_of, texts_of
from vigor.rollouts import Rollouts
from vigor.shaping import leave_one_out
from vigor.signals import PolicyPass

_OPENER = "<answer"


def _opener_cut(text: str) -> int | None:
    at = text.find(_OPENER)
    return None if at < 0 else at + len(_OPENER)


_SLOTS: dict[Answer, Slot] = {
    "boxed": Slot(boxed_cut, after="}"),
    "tags": Slot(_opener_cut, before="> \\boxed{", after="} </answer>"),
}


def verifree(*, column: str = "answer", answer: Answer = "boxed", reference_gradient: bool = True) -> Reward:
    """The reference's probability, less the mean of the rest of the group.

    Args:
        column: data set column with the reference, or with a solution that boxes it; without one a row has no reward.
        answer: how answers are marked, "boxed" or "tags".
        reference_gradient: add the paper's second term to the loss, with coefficient p.

    Raises:
        ValueError: an unknown `answer`.
    """
    slot = slot_of(_SLOTS, answer, "verifree")

    def texts(rollouts: Rollouts, policy: PolicyPass) -> list[Text | None]:
        return texts_of(placed(rollouts, policy, references_of(rollouts, column, "verifree"), slot, "verifree"))

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        references = references_of(rollouts, column, "verifree")
        found = logps_of(policy, placed(rollouts, policy, references, slot, "verifree"))
        values = [
            None if reference is None or not length else 0.0 if logps is None else float(logps.double().sum().exp())
            for logps, reference, length in zip(found, references, rollouts.lengths_B.tolist(), strict=True)
        ]
        return from_values(values, rollouts)

    return Reward(
        name="verifree",
        needs=frozenset({"text", "reference_logps"}),
        score=score,
        shape=leave_one_out,
        columns=(column,),
        auxiliary=Auxiliary(texts, coefficient=unshaped) if reference_gradient else None,
    )


def reference_loss(logps: Sequence[Tensor]) -> Tensor:
    """VeriFree's gradient on the reference: mean_i [ -sg(p_i) Σ_j log π(a*_j) ], p_i = exp(Σ_j log π(a*_j)).

    Its gradient is that of -mean_i p_i: the policy-gradient identity, with the sampled reasoning held fixed.

    Args:
        logps: (T_ref,) a row, with their graph: `ContinuationScorer.logps(..., requires_grad=True)`.

    Returns:
        A scalar of the rows' dtype.

    Raises:
        ValueError: no row.
    """
    if not logps:
        raise ValueError("reference_loss: no row to average over.")
    sums = torch.stack([row.sum() for row in logps])
    return -(sums.detach().exp() * sums).mean()
