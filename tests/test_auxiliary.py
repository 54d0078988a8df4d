"""What rewards add to the loss: its weights from TRL's own gradient, and whole steps against the papers in float64."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_trainer import dataset, lab_tokenizer, same_weights, tiny_model, trainer, weights
from torch import Tensor, nn
from transformers import TrainerCallback

from vigor import auxiliary
from vigor.auxiliary import TERMS, check, token_weights
from vigor.resume import portable
from vigor.rewards import get
from vigor.rewards.jepo import gain_in_bound, posterior
from vigor.trainer import VigorTrainer

PROMPTS = ("Q:3+4\nA:", "Q:12-7\nA:")
ANSWERS = ("7", "5")
TEXTS = (
    r"3+4=7 so \boxed{7}", r" so \boxed{8}", "7", r"3+4=8 so \boxed{8}",
    r"2-7=5 so \boxed{5}", r" so \boxed{4}", r"7-2 so \boxed{5}", r"12-7 so \boxed{15}",
)  # fmt: skip
CUT = r" \boxed{"
LENGTH = 32
EXACT = {"scale_rewards": "none", "loss_type": "dr_grpo", "max_completion_length": LENGTH}


def encoded(text: str) -> list[int]:
    return list(lab_tokenizer()(text)["input_ids"])


class Gradients(TrainerCallback):
    """Keeps the gradient of a step."""

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.seen = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def made(folder: Path, reward_funcs: Any, **changes: Any) -> VigorTrainer:
    """A run of one step without clipping."""
    return trainer(
        folder,
        reward_funcs,
        data=dataset(PROMPTS, answer=ANSWERS),
        completions=[[*encoded(text), 1] for text in TEXTS],
        **{"max_grad_norm": 0.0, **changes},
    )


def step(folder: Path, reward_funcs: Any, **changes: Any) -> dict[str, Tensor]:
    """The gradient of one optimizer step."""
    run, gradients = made(folder, reward_funcs, **changes), Gradients()
    run.add_callback(gradients)
    run.train()
    return gradients.seen


def logps(model: nn.Module, context: list[int], text: list[int]) -> Tensor:
    """Each token's log-probability in the model's precision."""
    at = slice(len(context) - 1, -1)
    z = model(input_ids=torch.tensor([context + text])).logits[0, at]
    return z.log_softmax(-1).gather(-1, torch.tensor(text)[:, None]).squeeze(-1)


def paper(spec: str, *, policy: bool = True, reference: bool = True) -> dict[str, Tensor]:
    """The gradient of a paper's loss, a mean over completions, by autograd in float64."""
    model = copy.deepcopy(tiny_model()).double().eval()
    total = torch.zeros((), dtype=torch.float64)
    for prompt, answer, texts in zip(PROMPTS, ANSWERS, (TEXTS[:4], TEXTS[4:]), strict=True):
        log_p: list[Tensor | None] = []
        for text in texts:
            if CUT in text:
                cut, closing = text[: text.index(CUT) + len(CUT)], "}" if spec == "verifree" else ""
            else:
                cut, closing = text + CUT, ""
            left_out = spec == "verifree" and CUT not in text
            log_p.append(None if left_out else logps(model, encoded(prompt + cut), encoded(answer + closing)).sum())
        p = [0.0 if x is None else math.exp(x.item()) for x in log_p]
        gains = [math.log(sum(p) / 4) - math.log((sum(p) - own) / 3) for own in p]
        for i, text in enumerate(texts):
            others = [p[k] for k in range(4) if k != i]
            if spec == "verifree":
                advantage, coefficient = p[i] - sum(others) / 3, p[i]
            elif spec == "jepo(bound=group)":
                advantage, coefficient = gains[i] - sum(gains) / 4, p[i] / sum(p)  # TRL subtracts the group's mean
            else:
                advantage, coefficient = math.log(p[i]) - sum(map(math.log, others)) / 3, 1.0
            if policy:
                total = total - advantage * logps(model, encoded(prompt), [*encoded(text), 1]).sum()
            if reference and log_p[i] is not None:
                total = total - coefficient * log_p[i]
    (total / len(TEXTS)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], scale: float, tolerance: float = 1e-4) -> None:
    size = sum((scale * g).square().sum() for g in wanted.values()).sqrt()
    off = sum((got[name].double() - scale * wanted[name]).square().sum() for name in wanted).sqrt()
    assert size > 0
    assert off < tolerance * size, (off, size)


@pytest.mark.parametrize("spec", ["verifree", "jepo", "jepo(bound=group)"])
@pytest.mark.parametrize(("rows", "accumulated", "rounds"), [(8, 1, 1), (2, 4, 4), (4, 2, 2)])
def test_a_step_is_the_papers(tmp_path: Path, spec: str, rows: int, accumulated: int, rounds: int) -> None:
    changes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated}
    got = step(tmp_path, spec, steps_per_generation=rounds, **changes, **EXACT)
    assert_close(got, paper(spec), 1 / LENGTH)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, of a method that TRL calls
def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    assert_close(step(tmp_path, "verifree", gradient_checkpointing=True, **EXACT), paper("verifree"), 1 / LENGTH)


@pytest.mark.parametrize("spec", ["verifree", "jepo"])
def test_without_the_reference_the_policys_part_is_left(tmp_path: Path, spec: str) -> None:
    got = step(tmp_path, f"{spec}(reference_gradient=False)", **EXACT)
    assert_close(got, paper(spec, reference=False), 1 / LENGTH)


def test_the_term_has_the_rewards_weight(tmp_path: Path) -> None:
    changes = {**EXACT, "reward_weights": [0.25, 0.0]}
    assert_close(step(tmp_path, ["verifree", "accuracy"], **changes), paper("verifree"), 0.25 / LENGTH)


def test_watched_it_changes_nothing(tmp_path: Path) -> None:
    watched = made(tmp_path / "a", ["accuracy", "verifree"], reward_weights=[1.0, 0.0])
    assert watched.adding == {}
    watched.train()
    alone = made(tmp_path / "b", "accuracy")
    alone.train()
    assert same_weights(weights(watched.model), weights(alone.model))


def test_an_annealed_weight_is_the_one_of_the_step(tmp_path: Path) -> None:
    run = made(tmp_path, ["accuracy", "verifree"], reward_weights=[1.0, 0.0], reward_weights_final=[1.0, 1.0])
    assert list(run.adding) == [1]
    run.train()
    logged = [log for log in run.state.log_history if "auxiliary_loss" in log]
    assert [log["auxiliary_loss"] for log in logged] == [0.0], "step 0 of 1: the weight is still 0"


@pytest.mark.parametrize("loss_type", auxiliary.LOSSES)
def test_token_weights_are_those_of_trls_loss(tmp_path: Path, loss_type: str) -> None:
    level = "sequence" if loss_type == "luspo" else "token"
    run = made(
        tmp_path,
        "accuracy",
        loss_type=loss_type,
        importance_sampling_level=level,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=2,
        vespo_lambda_pos=0.0,
        vespo_k_pos=0.0,
    )
    kept: dict[str, Tensor] = {}
    forward, compute = run._get_per_token_logps_and_entropies, run._compute_loss
    compared = []

    def keeping(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        kept["logps"] = found[0]
        return found

    def compare(model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = compute(model, {**inputs, "advantages": torch.ones_like(inputs["advantages"])})
        (gradient_RT,) = torch.autograd.grad(loss, kept["logps"], retain_graph=True)
        wanted_RT = -token_weights(run, inputs)[:, None] * inputs["completion_mask"]
        torch.testing.assert_close(gradient_RT, wanted_RT, rtol=1e-5, atol=1e-8)
        compared.append(loss)
        return loss

    run._get_per_token_logps_and_entropies, run._compute_loss = keeping, compare
    run.train()
    assert len(compared) == 2


def test_the_update_is_not_fused_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path, ["vigor", "verifree"]).train()
    assert "fused update: off (reward 'verifree' adds a term to the loss, which has" in capsys.readouterr().out
    with pytest.raises(ValueError, match="fused='keep': reward 'verifree' adds a term"):
        made(tmp_path, ["vigor", "verifree"], fused="keep")


def test_a_truncated_row_that_is_masked_adds_nothing(tmp_path: Path) -> None:
    run = made(tmp_path, "verifree", truncated="mask", **EXACT)
    cut = [[*encoded(text), *([] if i in (0, 4) else [1])] for i, text in enumerate(TEXTS)]
    run._generate_single_turn = lambda *_, **__: (cut, None)
    run.model.train()
    batch = run._generate_and_score_completions(list(run.train_dataset.select([0] * 4 + [1] * 4)))
    assert [len(terms) for terms in batch[TERMS]] == [0, 1, 0, 1, 0, 1, 1, 1], "rows 0 and 4 masked, 2 without answer"
    assert portable(batch)[TERMS] == batch[TERMS], "a checkpoint and a dump take them along"


def test_evaluation_has_no_term(tmp_path: Path) -> None:
    run = made(tmp_path, "verifree", per_device_eval_batch_size=8)
    run.eval_dataset = run.train_dataset
    run.model.eval()
    batch = run._generate_and_score_completions(list(run.train_dataset.select([0] * 4 + [1] * 4)))
    assert TERMS not in batch


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    run = made(tmp_path, "verifree")
    run.is_fsdp_enabled = True
    with pytest.raises(ValueError, match=r"Leave the term out with verifree\(reference_gradient=False\)"):
        check(run, run.adding)
    run.is_fsdp_enabled, run.loss_type = False, "unheard_of"
    with pytest.raises(ValueError, match="how loss_type='unheard_of' weighs a token is not known"):
        check(run, run.adding)
    dropping = tiny_model()
    dropping.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"dropout of 0\.1"):
        made(tmp_path, "verifree", model=dropping, gradient_checkpointing=True)
    assert get("inverse(of=verifree)").auxiliary is None


def test_the_bounds_pieces() -> None:
    nan = math.nan
    log_p = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.5, nan, 0.25, nan], [0.5, nan, nan, nan]]).log()
    gain, share = gain_in_bound(log_p), posterior(log_p)
    assert gain[0, 0] == pytest.approx(math.log(0.25 / (0.5 / 3)))
    assert gain[1].tolist() == pytest.approx([math.log(0.375 / 0.25), nan, math.log(0.375 / 0.5), nan], nan_ok=True)
    assert gain[2].tolist() == pytest.approx([0.0, nan, nan, nan], nan_ok=True)
    torch.testing.assert_close(share.nansum(-1), torch.ones(3))
    far = torch.tensor([[-1e4, -1e4 - math.log(3.0)]])
    assert posterior(far)[0].tolist() == pytest.approx([0.75, 0.25], rel=1e-3)
    assert gain_in_bound(far)[0, 0] == pytest.approx(math.log(2 / 3) + math.log(3), rel=1e-3)
