r"""VIGOR from scratch: the whole algorithm in plain PyTorch, on three of our public pieces.

    python examples/minimal_loop.py            # about a minute on a laptop CPU

One step of training:
 1. sample G completions for each prompt from the model itself;
 2. score each: -√T · ‖∇θ NLL‖, T its tokens, NLL their mean negative log-likelihood (`sequence_grad_norms`);
 3. rank the scores within each prompt's group, to [-1, 1] (`rank`), and centre and scale the ranks (`zscore`);
 4. raise the log-probability of each completion's tokens in proportion to that advantage.
No answer is looked at, except to print how many are right.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from vigor import Rollouts, rank, sequence_grad_norms, zscore
from vigor.lab.tasks import is_correct, make_rows
from vigor.lab.world import load

GROUP = 8
NEW_TOKENS = 72


def sample(model: torch.nn.Module, tokenizer, prompts: list[str]) -> Rollouts:
    """One completion for each prompt, drawn from the model's own distribution."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=1.0, top_k=0)
    start = inputs["input_ids"].shape[1]
    completions = []
    for ids in output[:, start:].tolist():
        end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
        completions.append(ids[:end])  # EOS is part of the completion, what follows is not
    prompt_ids = tokenizer(prompts)["input_ids"]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    return Rollouts.from_token_ids(
        prompt_ids, completions, group_size=GROUP, pad_token_id=tokenizer.pad_token_id, completions=texts
    )


def vigor_rewards(model: torch.nn.Module, rollouts: Rollouts) -> Tensor:
    """(P, G) rewards: the ranks of -√T · ‖∇ mean NLL‖ within each group."""
    norms_B = sequence_grad_norms(model, rollouts.input_ids_BL, rollouts.attention_mask_BL, rollouts.completion_mask_BL)
    scores_B = -norms_B * rollouts.lengths_B.sqrt()
    return rank(scores_B.view(-1, GROUP))


def policy_loss(model: torch.nn.Module, rollouts: Rollouts, advantages_B: Tensor) -> Tensor:
    """-(1/N) Σ_b A_b Σ_t log π(y_t): the on-policy gradient, averaged over the N completion tokens of the batch."""
    logits = model(rollouts.input_ids_BL, attention_mask=rollouts.attention_mask_BL).logits[:, :-1]
    logps = logits.float().log_softmax(-1).gather(-1, rollouts.input_ids_BL[:, 1:, None]).squeeze(-1)
    mask = rollouts.completion_mask_BL[:, 1:]
    return -(advantages_B[:, None] * logps * mask).sum() / mask.sum()


def accuracy(model: torch.nn.Module, tokenizer, task: str, n_prompts: int, n_samples: int = 4) -> float:
    """Share of right answers among samples on test prompts, in percent."""
    rows = make_rows(task, "test", n_prompts)
    rollouts = sample(model, tokenizer, [row["prompt"] for row in rows for _ in range(n_samples)])
    answers = [row["answer"] for row in rows for _ in range(n_samples)]
    right = [is_correct(text, answer) for text, answer in zip(rollouts.completion_texts, answers, strict=True)]
    return 100 * sum(right) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--prompts", type=int, default=8, help="prompts a step")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--eval_prompts", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    model, tokenizer = load("lab")
    tasks = ("lab:math", "lab:math-hard", "lab:code")
    before = {task: accuracy(model, tokenizer, task, args.eval_prompts) for task in tasks}

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(1, args.steps + 1):
        rows = make_rows("lab:math", "train", args.prompts, start=(step - 1) * args.prompts, seed=1000 + args.seed)
        rollouts = sample(model, tokenizer, [row["prompt"] for row in rows for _ in range(GROUP)])
        advantages_PG = zscore(vigor_rewards(model, rollouts))
        loss = policy_loss(model, rollouts, advantages_PG.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 10 == 0:
            answers = [row["answer"] for row in rows for _ in range(GROUP)]
            pairs = zip(rollouts.completion_texts, answers, strict=True)
            right = sum(is_correct(text, answer) for text, answer in pairs) / len(answers)
            length = rollouts.lengths_B.float().mean().item()
            print(f"step {step:>3}/{args.steps}  accuracy {right:.2f}  length {length:.1f}", flush=True)

    print(f"\nsampled accuracy, % ({args.eval_prompts} test prompts × 4 samples)")
    print(f"{'task':<15}{'before':>8}{'after':>8}{'change':>8}")
    for task in tasks:
        after = accuracy(model, tokenizer, task, args.eval_prompts)
        print(f"{task:<15}{before[task]:>8.1f}{after:>8.1f}{after - before[task]:>+8.1f}")


if __name__ == "__main__":
    main()
