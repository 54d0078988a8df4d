"""Self-aligned reward (SAR): how much less surprising the completion is once the question is visible.

Paper: "Self-Aligned Reward: Towards Effective and Efficient Reasoners", arXiv 2509.05489; code
amazon-science/Self-Aligned-Reward-Towards_Effective_and_Efficient_Reasoners@08892d0
`verl/utils/reward_score/efficiency_reward.py` (compute_ppl_qa_log), `verl/trainer/ppo/ray_trainer.py` l.95-160.

    reward(y) = max( (ppl(y) - ppl(y|x)) / (ppl(y) + 1e-9), -1 ),   ppl = exp(mean NLL of the T tokens)

ppl(y) is that of the same tokens after the same template with an empty question. The paper adds 0.2 of it to the
accuracy: --reward_funcs accuracy sar --reward_weights 1 0.2. One forward pass more than `logprob`.

Departures from the paper:
 1. None in the formula.
Departures from the official code:
 1. Where a prompt is plain text, there is no template to empty: BOS (or EOS) stands in its place, or `frame`.
 2. Log-probabilities at the sampling temperature, as there, but in float32.

Command: vigor train --config lab --reward_funcs sar
"""

from __future__ import annotations

from torch import Tensor

from vigor.rewards.base import Reward, compose
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass


def sar(*, frame: str = "") -> Reward:
    r"""Relative drop of the completion's perplexity when the question is visible, in [-1, 1].

    Args:
        frame: text that stands in place of a plain-text prompt, such as 'Q:\nA:' for prompts of that form.
    """

    def signal(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        given, alone = policy.token_stats("logps"), policy.logps_without_prompt(frame)
        with_question = (-given.mean(given.logps_BL)).exp()
        without = (-alone.mean(alone.logps_BL)).exp()
        return ((without - with_question) / (without + 1e-9)).clamp(min=-1)

    return compose("sar", {"token_stats", "logps"}, signal)
