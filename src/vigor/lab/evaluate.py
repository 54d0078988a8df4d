"""Scores a model on a task of the lab: greedy, sampled, best-of-k and majority accuracy, with 95 % intervals.

Evaluating changes nothing: the model keeps its mode, the global random states stay as they were.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .tasks import extract_answer, make_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Interval = tuple[float, float]
_Z = 1.959964
# Below this many parameters a second CPU thread gains nothing, and costs a multiple where the other core is busy.
_ONE_THREAD_BELOW = 10_000_000


@dataclass(frozen=True)
class LabScore:
    """What a model does on ``n_prompts`` questions of a task; accuracies and intervals lie in [0, 1]."""

    task: str
    n_prompts: int
    n_samples: int
    greedy: float
    """Accuracy of greedy decoding."""
    sampled: float
    """Mean accuracy of the samples."""
    majority: float
    """Accuracy of the most frequent boxed answer among the samples of a prompt; the first of them wins a tie."""
    entropy: float
    """Mean entropy per sampled token, in nats."""
    boxed: float
    """Share of the samples that box an answer."""
    mean_length: float
    """Mean tokens of a sample, EOS included."""
    repetition: float
    """Mean share of a sample's token 3-grams that came before in it."""
    pass_at_k: dict[int, float]
    """Share of the prompts that k samples solve at least once, for k = 1, 2, 4 … up to ``n_samples``; without bias."""
    majority_at_k: dict[int, float]
    """Accuracy of the most frequent boxed answer of k samples, for the same k."""
    greedy_interval: Interval
    """Wilson."""
    sampled_interval: Interval
    """Wilson with the effective number of samples: those of one prompt are not independent."""

    def as_dict(self) -> dict[str, Any]:
        """The fields, intervals as two-element lists and the k of ``..._at_k`` as text: what JSON can hold."""
        fields: dict[str, Any] = {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }
        for key in ("pass_at_k", "majority_at_k"):
            fields[key] = {str(k): share for k, share in fields[key].items()}
        return fields


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    *,
    split: str = "test",
    n_prompts: int = 300,
    n_samples: int = 4,
    seed: int = 0,
    batch_size: int = 150,
    max_new_tokens: int = 72,
    temperature: float = 1.0,
) -> LabScore:
    """Score ``model`` on the first ``n_prompts`` questions of ``task``.

    ``seed`` draws the samples; the questions are always the same, so that two models meet the same test.
    ``batch_size`` counts prompts. Raises ValueError where there is nothing to score or to sample.
    """
    import torch

    from vigor.rewards.agreement import majority_at_k
    from vigor.rewards.repetition import repeated_share

    from .decode import complete

    if n_prompts < 1 or n_samples < 1 or batch_size < 1:
        raise ValueError(
            f"evaluate needs n_prompts, n_samples and batch_size of at least 1: got {n_prompts}, {n_samples} and "
            f"{batch_size}"
        )
    rows = make_rows(task, split, n_prompts)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    was_training, threads = model.training, torch.get_num_threads()
    model.eval()
    if model.device.type == "cpu" and model.num_parameters() < _ONE_THREAD_BELOW:
        torch.set_num_threads(1)
    try:
        groups = []
        for start in range(0, n_prompts, batch_size):
            prompts = [row["prompt"] for row in rows[start : start + batch_size]]
            groups += complete(
                model,
                tokenizer,
                prompts,
                n_samples=n_samples,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                generator=generator,
            )
    finally:
        model.train(was_training)
        torch.set_num_threads(threads)

    answers = [row["answer"] for row in rows]
    found = [[extract_answer(completion.text) for completion in group] for group in groups]
    greedy_right = [guesses[0] == answer for guesses, answer in zip(found, answers, strict=True)]
    shares = [guesses[1:].count(answer) / n_samples for guesses, answer in zip(found, answers, strict=True)]
    samples = [completion for group in groups for completion in group[1:]]
    n_tokens = sum(len(completion.token_ids) for completion in samples)
    ks = [2**i for i in range(n_samples.bit_length())]
    greedy = sum(greedy_right) / n_prompts
    return LabScore(
        task=task,
        n_prompts=n_prompts,
        n_samples=n_samples,
        greedy=greedy,
        sampled=sum(shares) / n_prompts,
        majority=sum(_vote(g[1:]) == answer for g, answer in zip(found, answers, strict=True)) / n_prompts,
        entropy=sum(completion.entropy for completion in samples) / n_tokens,
        boxed=sum(guess is not None for guesses in found for guess in guesses[1:]) / len(samples),
        mean_length=n_tokens / len(samples),
        repetition=sum(repeated_share(list(completion.token_ids), 3) for completion in samples) / len(samples),
        pass_at_k={k: sum(pass_at_k(n_samples, round(s * n_samples), k) for s in shares) / n_prompts for k in ks},
        majority_at_k={
            k: sum(majority_at_k(g[1:], answer, k) for g, answer in zip(found, answers, strict=True)) / n_prompts
            for k in ks
        },
        greedy_interval=wilson_interval(greedy, n_prompts),
        sampled_interval=clustered_interval(shares, n_samples),
    )


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that k of n samples, drawn without replacement, hold one of the ``right`` ones.

    Without bias for a prompt's pass@k (Chen et al. 2021, arXiv 2107.03374, equation 1). Raises ValueError unless
    1 <= k <= n and 0 <= right <= n.
    """
    if not (1 <= k <= n and 0 <= right <= n):
        raise ValueError(f"pass_at_k: k={k} must lie between 1 and n={n}, and right={right} between 0 and {n}.")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def wilson_interval(share: float, n: float) -> Interval:
    """95 % Wilson score interval of a share seen in ``n`` independent trials (Wilson 1927)."""
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered_interval(shares: Sequence[float], n_samples: int) -> Interval:
    """95 % interval of the mean of per-prompt accuracies, each over ``n_samples`` samples of that prompt.

    Wilson's interval with the effective sample size p (1 - p) / Var(mean), the variance taken between prompts and the
    size held between the number of prompts and the number of samples: it keeps a width where all prompts agree.
    """
    n = len(shares)
    mean = sum(shares) / n
    variance = sum((share - mean) ** 2 for share in shares) / max(n - 1, 1) / n
    effective = mean * (1 - mean) / variance if variance > 0 else n
    return wilson_interval(mean, min(max(effective, n), n * n_samples))


def _vote(guesses: list[str | None]) -> str | None:
    counts = Counter(guess for guess in guesses if guess is not None)
    return counts.most_common(1)[0][0] if counts else None
