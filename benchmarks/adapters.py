"""Does an adapter's gradient norm rank completions as the whole model's does? On the lab's base, under LoRA.

    python benchmarks/adapters.py --out docs/results/adapters.md        about 2 minutes on one core

Groups of eight completions are sampled from the policy at temperature 1. Within each group Kendall's tau-b compares two
norms' scores -√T·‖∇‖, the quantity that VIGOR ranks: the adapter's ("trainable") or its layers' ("all-linear") with the
whole base's ("base"). Fresh adapters begin with B = 0, so that only B has a gradient; trained ones have had some steps
of VIGOR.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from vigor.gradnorm import sequence_grad_norms
from vigor.lab.decode import complete
from vigor.lab.tasks import make_rows
from vigor.lab.world import load, model_path
from vigor.probe.statistics import kendall
from vigor.rollouts import Rollouts

GROUP = 8
CHOICES = ("trainable", "all-linear")


def adapter(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def fresh(rank: int, seed: int) -> Any:
    """The base with a new adapter, B = 0."""
    torch.manual_seed(seed)
    return get_peft_model(load("lab")[0], adapter(rank))


def trained(rank: int, seed: int, steps: int) -> Any:
    """The base with an adapter after some steps of VIGOR."""
    from datasets import Dataset

    from vigor.config import VigorConfig
    from vigor.trainer import VigorTrainer

    model, tokenizer = load("lab")
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        args = VigorConfig(
            folder, use_cpu=True, max_steps=steps, save_strategy="no", disable_tqdm=True, learning_rate=2e-3, seed=seed,
            num_generations=GROUP, per_device_train_batch_size=4 * GROUP, max_completion_length=72,
            gradient_checkpointing=False, report_to="none", logging_steps=steps)  # fmt: skip
        prompts = [{"prompt": row["prompt"]} for row in make_rows("lab:math", "train", 512)]
        trainer = VigorTrainer(
            model, "vigor", args, train_dataset=Dataset.from_list(prompts), processing_class=tokenizer,
            peft_config=adapter(rank))  # fmt: skip
        trainer.train()
        return trainer.model


def groups(model: Any, prompts: int, seed: int) -> Rollouts:
    """Completions of test questions, sampled from the policy."""
    tokenizer = load("lab")[1]
    texts = [row["prompt"] for row in make_rows("lab:math", "test", prompts)]
    sampled = complete(
        model.eval(), tokenizer, texts, n_samples=GROUP, max_new_tokens=72, temperature=1.0,
        generator=torch.Generator().manual_seed(seed))  # fmt: skip
    encoded = [tokenizer(text)["input_ids"] for text in texts]
    rows = [(ids, list(c.token_ids)) for ids, answers in zip(encoded, sampled, strict=True) for c in answers[1:]]
    return Rollouts.from_token_ids(
        [ids for ids, _ in rows], [answer for _, answer in rows], group_size=GROUP,
        pad_token_id=tokenizer.pad_token_id, device=torch.device("cpu"))  # fmt: skip


def scores(model: Any, rollouts: Rollouts, parameters: str) -> Tensor:
    """(P, G) scores -√T·‖∇‖."""
    batch = (rollouts.input_ids_BL, rollouts.attention_mask_BL, rollouts.completion_mask_BL)
    norms = sequence_grad_norms(model, *batch, parameters=parameters)
    return (-norms * rollouts.lengths_B.sqrt()).view(-1, GROUP)


def agreement(model: Any, prompts: int, seed: int) -> dict[str, tuple[float, float, int]]:
    """Mean of tau over groups, its standard error and the number of groups, for each choice against the whole base."""
    rollouts = groups(model, prompts, seed)
    whole = scores(model, rollouts, "base")
    found = {}
    for choice in CHOICES:
        taus = [tau for tau in kendall(scores(model, rollouts, choice), whole).tolist() if tau == tau]
        found[choice] = statistics.mean(taus), statistics.stdev(taus) / len(taus) ** 0.5, len(taus)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--steps", type=int, default=15, help="of training before the second measurement")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| adapter | norm over | Kendall tau-b with the whole base | groups |", "|---|---|---|---|"]
    for rank in args.ranks:
        for name, model in (
            (f"r = {rank}, fresh", fresh(rank, args.seed)),
            (f"r = {rank}, {args.steps} steps", trained(rank, args.seed, args.steps)),
        ):
            for choice, (tau, error, n) in agreement(model, args.prompts, args.seed).items():
                lines.append(f"| {name} | `{choice}` | {tau:.3f} ± {error:.3f} | {n} |")
                print(lines[-1], flush=True)
    command = f"python benchmarks/adapters.py --prompts {args.prompts} --steps {args.steps} --seed {args.seed}"
    head = (
        "<!-- made by benchmarks/adapters.py -->\n"
        f"`{command}`, {date.today()}, one CPU core, float32, torch {torch.__version__}; the lab's base "
        f"(`{Path(model_path('lab')).name}`), `lab:math` test questions, groups of {GROUP} at temperature 1. Means "
        "over groups ± standard error.\n\n"
    )
    if args.out:
        args.out.write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
