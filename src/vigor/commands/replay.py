"""`vigor replay DUMP`: computes the loss and the gradient norm of a step that the guard stopped, and compares."""

from __future__ import annotations

import argparse
import math
import pickle
import tempfile
from pathlib import Path
from typing import Any

from vigor.reading import ReadError, check, read_json
from vigor.terminal import printable, refuse

_SHAPE = {
    "step": int, "why": str, "grad_norm": str, "processes": int, "settings": {str: (str, int, float, bool, type(None))},
    "steps_per_generation": int, "vllm_weights": bool, "base_model": str,
}  # fmt: skip
TOLERANCE = 1e-3
"""Relative: the update may have been taken from the scoring pass, or by several processes, which rounds differently."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    parser.add_argument("dump", help="a folder that a run wrote under dumps/, such as runs/mine/dumps/step-17")


def replay(args: argparse.Namespace) -> int:
    """Prints both sides; returns 0 if the step is reproduced, 1 if it is not, 2 if there is no such dump."""
    folder = Path(args.dump)
    try:
        about = read_about(folder)
        processes = load_batches(folder, about)
        losses, norm, seen = compute(folder, about, processes)
    except (OSError, ValueError) as error:
        return refuse("replay", f"{folder} is no dump ({error}). Name a folder under dumps/ of a run folder.")
    print(printable(f"step {about['step']}: {about['why']}"))
    print(f"              then          now\ngradient norm {float(about['grad_norm']):<13g} {norm:g}")
    for i, (then, now) in enumerate(zip(seen, losses, strict=True)):
        print(f"loss {i:<8} {then:<13g} {now:g}")
    pairs = [*zip(seen, losses, strict=True), (float(about["grad_norm"]), norm)]
    same = all(close(then, now) for then, now in pairs)
    print("reproduced" if same else "not reproduced: what was wrong is not in the weights and the batch alone")
    return 0 if same else 1


def close(then: float, now: float) -> bool:
    """Both finite and near, or both not finite: which of NaN and infinity comes first is a matter of rounding."""
    if not (math.isfinite(then) and math.isfinite(now)):
        return math.isfinite(then) == math.isfinite(now)
    return math.isclose(then, now, rel_tol=TOLERANCE, abs_tol=1e-6)


def read_about(folder: Path) -> dict[str, Any]:
    """What dump.json says.

    Raises:
        OSError, ValueError: there is none, or it is not what the guard writes.
    """
    from vigor.guard import REPLAYED

    about: dict[str, Any] = read_json(folder / "dump.json", _SHAPE)
    if strange := set(about["settings"]) - set(REPLAYED):
        raise ReadError(f"{folder / 'dump.json'} holds the setting {min(strange)!r}, which no dump has.")
    if not (1 <= about["processes"] <= 100_000 and about["steps_per_generation"] >= 1):
        raise ReadError(f"{folder / 'dump.json'}: processes and steps_per_generation must be positive.")
    try:
        float(about["grad_norm"])
    except ValueError as error:
        raise ReadError(f"{folder / 'dump.json'}: grad_norm is {about['grad_norm']!r}, expected a number.") from error
    return about


def load_batches(folder: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Each process's batches and losses; nothing is unpickled.

    Raises:
        OSError, ValueError: a file is missing, or not what the guard writes.
    """
    import torch

    loaded = []
    for i in range(about["processes"]):
        path = folder / f"batch-{i}.pt"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
            raise ReadError(f"{path} is no file of tensors ({str(error).splitlines()[0]})") from error
        check(content, {"batches": [dict], "losses": list}, str(path))
        loaded.append(content)
    return loaded


def compute(
    folder: Path, about: dict[str, Any], loaded: list[dict[str, Any]]
) -> tuple[list[float], float, list[float]]:
    """(losses now, gradient norm now, losses then) of all processes' micro-batches, one after the other.

    Several processes average their gradients; here each one's loss is divided by their number.
    """
    import torch
    from accelerate.utils import send_to_device

    losses: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(folder, about, scratch)
        model = trainer.accelerator.prepare_model(trainer.model)
        model.train()
        for process in loaded:
            trainer.current_gradient_accumulation_steps = len(process["batches"])
            for batch in process["batches"]:
                inputs = send_to_device(batch, trainer.accelerator.device)
                inputs["num_items_in_batch"] = inputs["num_items_in_batch"] / about["processes"]
                with trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(model, inputs)
                losses.append(float(loss.detach()))
                (loss / about["processes"]).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf))
    return losses, norm, [loss for process in loaded for loss in process["losses"]]


def _trainer(folder: Path, about: dict[str, Any], scratch: str) -> Any:
    """A trainer with the dump's weights and loss, and nothing to sample."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from vigor.commands.settings import fit
    from vigor.config import VigorConfig
    from vigor.trainer import VigorTrainer

    args = VigorConfig(
        scratch,
        num_generations=2,
        per_device_train_batch_size=2,
        save_strategy="no",
        fused="off",
        max_skipped_updates=0,
        **fit(about["settings"], (VigorConfig,)),
    )
    trainer = VigorTrainer(
        _model(folder, about),
        lambda completions, **_: [0.0] * len(completions),
        args,
        train_dataset=Dataset.from_dict({"prompt": ["x", "x"]}),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    trainer.args.steps_per_generation = about["steps_per_generation"]
    trainer.use_vllm = about["vllm_weights"]
    trainer.vllm_importance_sampling_correction = about["vllm_weights"]
    return trainer


def _model(folder: Path, about: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    if not (folder / "model" / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(about["base_model"], dtype="auto")
    return PeftModel.from_pretrained(base, folder / "model", is_trainable=True)
