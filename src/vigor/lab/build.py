"""Makes a base model of the lab from a seed: ``python -m vigor.lab.build --world lab``.

Two stages of plain next-token training on completions: clean solutions until the model can compute, then the texts
of the world, so that it samples like a base model. Steps are counted, never seconds, and one thread adds up in one
order: the same seed on the same kind of machine gives the same file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .card import write_card
from .corpus import CLEAN, WORLDS, Noise, Text, texts
from .evaluate import evaluate
from .separation import separation
from .tasks import TASKS
from .tokenizer import EOS, PAD, build_tokenizer, save_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

MAX_COMPLETION = 72
"""Tokens of a completion, EOS included; longer texts are cut off."""
IGNORED = -100
_POOL = 1024


@dataclass(frozen=True)
class Stage:
    """One stage of pre-training: ``steps`` AdamW updates with a warm-up and a cosine down to a tenth of ``lr``."""

    noise: Noise
    steps: int
    lr: float
    first_text: int = 0
    """Index of the first text, so that the stages see different questions."""
    warmup: int = 100
    tokens_per_batch: int = 1024


def stages(world: str, steps: int | None = None) -> tuple[Stage, Stage]:
    """The two stages of a world; ``steps`` shortens both to that many updates."""
    clean, final = Stage(CLEAN, 3900, 2e-3), Stage(WORLDS[world], 1200, 1e-3, first_text=1_000_000)
    if steps is None:
        return clean, final
    return replace(clean, steps=steps, warmup=min(100, steps)), replace(final, steps=steps, warmup=min(100, steps))


def new_model(seed: int) -> LlamaForCausalLM:
    """A randomly initialised model of the lab's shape: 0.80 M parameters, 4 layers, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = build_tokenizer().get_vocab()
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=vocabulary[EOS],
            pad_token_id=vocabulary[PAD],
        )
    )


def batches(stage: Stage, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (input ids, labels), each (B, L) int64, right-padded; prompts and padding carry the label -100.

    Texts of like length share a batch of at most ``stage.tokens_per_batch`` tokens, padding included.
    """
    tokenizer = build_tokenizer()
    vocabulary = tokenizer.get_vocab()
    pad, eos = vocabulary[PAD], vocabulary[EOS]
    shuffler = random.Random(f"batches/{seed}")
    stream = texts(stage.noise, seed, stage.first_text)
    while True:
        pool: list[Text] = list(itertools.islice(stream, _POOL))
        prompts = [encoding.ids for encoding in tokenizer.encode_batch([text.prompt for text in pool])]
        completions = [encoding.ids for encoding in tokenizer.encode_batch([text.completion for text in pool])]
        pairs = [(p, [*c, eos][:MAX_COMPLETION]) for p, c in zip(prompts, completions, strict=True)]
        pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for pair in pairs:
            if (len(groups[-1]) + 1) * (len(pair[0]) + len(pair[1])) > stage.tokens_per_batch:
                groups.append([])
            groups[-1].append(pair)
        shuffler.shuffle(groups)
        for group in groups:
            length = max(len(p) + len(c) for p, c in group)
            ids = [p + c + [pad] * (length - len(p) - len(c)) for p, c in group]
            labels = [[IGNORED] * len(p) + c + [IGNORED] * (length - len(p) - len(c)) for p, c in group]
            yield torch.tensor(ids), torch.tensor(labels)


def train(model: torch.nn.Module, stage: Stage, seed: int, log_every: int = 100) -> None:
    """Run one stage on ``model`` in place, printing the loss now and then."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.lr, betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    started, running = time.monotonic(), 0.0
    for step, (input_ids, labels) in enumerate(itertools.islice(batches(stage, seed), stage.steps), start=1):
        decay = 0.55 + 0.45 * math.cos(math.pi * step / stage.steps)
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * min(1.0, step / stage.warmup) * decay
        # Right padding and causal attention: no completion token can see a pad, so no attention mask is needed.
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running += float(loss.detach())
        if step % log_every == 0 or step == stage.steps:
            shown = running / ((step - 1) % log_every + 1)
            print(f"step {step}/{stage.steps}  loss {shown:.4f}  {time.monotonic() - started:.0f} s", flush=True)
            running = 0.0
    model.eval()


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write model and tokenizer in the layout of `transformers` into ``folder``, made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    # safetensors leaves the file to its owner alone; a package's files are for every user of the machine.
    (folder / "model.safetensors").chmod(0o644)
    save_tokenizer(folder)
    # Written by hand: `GenerationConfig` leaves out what equals its own defaults, and those have changed before.
    settings = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": MAX_COMPLETION,
        "eos_token_id": model.config.eos_token_id,
        "pad_token_id": model.config.pad_token_id,
    }
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def build(world: str, seed: int, out: Path, steps: int | None = None, n_prompts: int = 300) -> None:
    """Make the base of ``world`` in ``out`` and measure it on ``n_prompts`` test questions a task for its card."""
    # PreTrainedTokenizerFast rather than Auto: it needs no model type, and a test proves that the two agree.
    from transformers import PreTrainedTokenizerFast

    started, started_cpu = time.monotonic(), time.process_time()
    model = new_model(seed)
    plan = stages(world, steps)
    for number, stage in enumerate(plan, start=1):
        print(f"{world}: stage {number} of {len(plan)}, {stage.steps} steps", flush=True)
        train(model, stage, seed)
    save(model, out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    scores = [evaluate(model, tokenizer, task, n_prompts=n_prompts) for task in TASKS]
    separations = [separation(model, tokenizer, task, n_prompts=math.ceil(n_prompts / 6)) for task in TASKS]
    card = write_card(out, world, seed, [stage.steps for stage in plan], scores, separations)
    elapsed, cpu = time.monotonic() - started, time.process_time() - started_cpu
    print(f"{card}\nmade {out} in {elapsed:.0f} s, {cpu:.0f} s of them computing", flush=True)


def main(argv: list[str] | None = None) -> None:
    """The command; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m vigor.lab.build", description="Make a base model of the lab.")
    parser.add_argument("--world", choices=tuple(WORLDS), default="lab", help="which texts it learns (default: lab)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the texts (default: 0)")
    parser.add_argument("--out", type=Path, help="folder to write (default: build/WORLD)")
    parser.add_argument("--steps", type=int, help="updates of each stage, to try things out (default: 3900 and 1200)")
    parser.add_argument("--n_prompts", type=int, default=300, help="test questions a task for the card (default: 300)")
    arguments = parser.parse_args(argv)
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: at least 1")
    threads = torch.get_num_threads()
    # One thread: sums are then added in one order, and both worlds can be made side by side on two cores.
    torch.set_num_threads(1)
    try:
        out = arguments.out or Path("build") / arguments.world
        build(arguments.world, arguments.seed, out, arguments.steps, arguments.n_prompts)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
