"""How well a confidence signal tells right completions from wrong ones of the same prompt.

The plain definitions, one sequence and one gradient at a time: slow, and with nothing to get wrong, which is what a
model card needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .tasks import is_correct, make_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SIGNALS = ("vigor", "norm", "mean log-prob", "-entropy", "self-certainty")


@dataclass(frozen=True)
class Separation:
    """``auc[signal]``: chance that a right completion scores above a wrong one of its prompt, ties counting half.

    ``best[signal]``: accuracy of the highest-scored completion of each prompt. ``auc`` is None where no prompt had
    both right and wrong completions.
    """

    task: str
    n_prompts: int
    n_samples: int
    auc: dict[str, float | None]
    best: dict[str, float]


def separation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    *,
    n_prompts: int = 50,
    n_samples: int = 16,
    seed: int = 0,
    max_new_tokens: int = 72,
) -> Separation:
    """Sample ``n_samples`` completions for each of the first ``n_prompts`` test questions and compare the signals."""
    import torch

    from .decode import complete

    rows = make_rows(task, "test", n_prompts)
    groups = complete(
        model,
        tokenizer,
        [row["prompt"] for row in rows],
        n_samples=n_samples,
        max_new_tokens=max_new_tokens,
        temperature=1.0,
        generator=torch.Generator(device=model.device).manual_seed(seed),
    )
    right = [[is_correct(c.text, row["answer"]) for c in group[1:]] for row, group in zip(rows, groups, strict=True)]
    scored = []
    for row, group in zip(rows, groups, strict=True):
        prompt_ids = tokenizer(row["prompt"])["input_ids"]
        scored.append([_signals(model, prompt_ids, completion.token_ids) for completion in group[1:]])
    auc, best = {}, {}
    for signal in SIGNALS:
        scores = [[signals[signal] for signals in group] for group in scored]
        auc[signal] = within_group_auc(scores, right)
        picked = [r[max(range(n_samples), key=s.__getitem__)] for s, r in zip(scores, right, strict=True)]
        best[signal] = sum(picked) / n_prompts
    return Separation(task, n_prompts, n_samples, auc, best)


def within_group_auc(scores: Sequence[Sequence[float]], right: Sequence[Sequence[bool]]) -> float | None:
    """Share of the (right, wrong) pairs inside a group in which the right one scores higher; ties count half."""
    won = pairs = 0.0
    for group_scores, group_right in zip(scores, right, strict=True):
        rights = [s for s, r in zip(group_scores, group_right, strict=True) if r]
        wrongs = [s for s, r in zip(group_scores, group_right, strict=True) if not r]
        pairs += len(rights) * len(wrongs)
        won += sum((a > b) + 0.5 * (a == b) for a in rights for b in wrongs)
    return won / pairs if pairs else None


def _signals(model: PreTrainedModel, prompt_ids: list[int], completion_ids: Sequence[int]) -> dict[str, float]:
    """The signals of one completion: VIGOR is -sqrt(T) times the norm of the gradient of its mean token NLL."""
    import torch

    input_ids = torch.tensor([[*prompt_ids, *completion_ids]], device=model.device)
    logits_TV = model(input_ids=input_ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
    logps_TV = logits_TV.float().log_softmax(-1)
    mean_logp = logps_TV.gather(1, input_ids[0, len(prompt_ids) :, None]).mean()
    gradients = torch.autograd.grad(-mean_logp, [p for p in model.parameters() if p.requires_grad])
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    logps_TV = logps_TV.detach()
    return {
        "vigor": -math.sqrt(len(completion_ids)) * norm,
        "norm": -norm,
        "mean log-prob": float(mean_logp.detach()),
        "-entropy": float((logps_TV.exp() * logps_TV).sum(-1).mean()),
        # KL from the uniform distribution to the model's, per token (Intuitor, arXiv 2505.19590).
        "self-certainty": float(-logps_TV.mean()) - math.log(logps_TV.shape[-1]),
    }
