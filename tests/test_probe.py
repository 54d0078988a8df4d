"""The probe: its statistics against brute force, its forecast's rule, and the command on the lab's two worlds."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_trainer import save_tiny, write_jsonl
from torch import Tensor

from vigor.cli import main
from vigor.groupmetrics import within_group_auc
from vigor.probe import forecast
from vigor.probe import statistics as st
from vigor.probe.forecast import BREAK_EVEN, COLLAPSE, HELP, MIN_PROMPTS, NEUTRAL, NONE
from vigor.probe.run import summarise

NAN = math.nan


def groups(seed: int, prompts: int = 12, size: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with ties, right or wrong, and answers, by chance."""
    rng = random.Random(seed)
    scores = [[float(rng.randrange(5)) for _ in range(size)] for _ in range(prompts)]
    clusters = [[rng.randrange(-1, 3) for _ in range(size)] for _ in range(prompts)]
    right = [[float(k == 0) for k in group] for group in clusters]
    return torch.tensor(scores), torch.tensor(right), torch.tensor(clusters)


@pytest.mark.parametrize("seed", range(3))
def test_auc_and_rival_auc_are_counts_of_pairs(seed: int) -> None:
    scores, right, clusters = groups(seed)
    won = [0.0, 0.0]
    pairs = [0.0, 0.0]
    for s, r, c in zip(scores.tolist(), right.tolist(), clusters.tolist(), strict=True):
        for i, j in itertools.product(range(len(s)), repeat=2):
            if r[i] and not r[j]:
                crowd = 1 if c[j] < 0 else c.count(c[j])
                for k, weight in enumerate((1, crowd)):
                    won[k] += weight * ((s[i] > s[j]) + 0.5 * (s[i] == s[j]))
                    pairs[k] += weight
    assert st.auc(scores, right).value == pytest.approx(won[0] / pairs[0])
    assert st.auc(scores, right).value == pytest.approx(within_group_auc(scores, right))
    assert st.auc(scores, right, st.crowd(clusters)).value == pytest.approx(won[1] / pairs[1])


def test_a_repeated_mistake_outweighs_scattered_ones() -> None:
    scores = torch.tensor([[3.0, 4.0, 4.0, 4.0, 1.0, 1.0, 1.0]])
    clusters = torch.tensor([[0, 1, 1, 1, 2, 3, 4]])
    right = (clusters == 0).float()
    assert st.auc(scores, right).value == pytest.approx(0.5)
    assert st.auc(scores, right, st.crowd(clusters)).value == pytest.approx(3 / 12)


@pytest.mark.parametrize("seed", range(3))
def test_kendall_by_definition(seed: int) -> None:
    x, y, _ = groups(seed)
    y = y + groups(seed + 10)[0]
    z = groups(seed + 20)[0]

    def tau(a: list[float], b: list[float]) -> float:
        signs = [(((p > q) - (p < q)), ((u > v) - (u < v))) for (p, u), (q, v) in
                 itertools.combinations(zip(a, b, strict=True), 2)]  # fmt: skip
        below = math.sqrt(sum(s != 0 for s, _ in signs) * sum(t != 0 for _, t in signs))
        return sum(s * t for s, t in signs) / below if below else NAN

    expected = [tau(a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    torch.testing.assert_close(st.kendall(x, y), torch.tensor(expected, dtype=torch.float64), equal_nan=True)
    partial = st.partial_kendall(x, y, z)
    for p, (a, b, c) in enumerate(zip(x.tolist(), y.tolist(), z.tolist(), strict=True)):
        ab, ac, bc = tau(a, b), tau(a, c), tau(b, c)
        wanted = (ab - ac * bc) / math.sqrt((1 - ac**2) * (1 - bc**2))
        assert float(partial[p]) == pytest.approx(wanted, nan_ok=True)


def test_kendall_of_a_constant_is_undefined_and_does_not_count() -> None:
    x = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
    y = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    assert st.kendall(x, y).isnan().tolist() == [True, False]
    assert st.mean(st.kendall(x, y)).value == -1 and st.mean(st.kendall(x, y)).prompts == 1


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_pass_at_k_is_the_mean_over_all_subsets(k: int) -> None:
    _, right, _ = groups(0)
    per_prompt = [
        sum(any(subset) for subset in itertools.combinations(row, k)) / math.comb(len(row), k) for row in right.tolist()
    ]
    assert st.pass_at_k(right, k).value == pytest.approx(sum(per_prompt) / len(per_prompt))


def test_majority_at_k() -> None:
    clusters = torch.tensor([[0, 0, 1, 1], [-1, -1, 0, 1], [0, 1, 1, 1]])
    right = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]])
    assert st.majority_at_k(clusters, right, 4).value == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert st.majority_at_k(clusters, right, 2).value == pytest.approx((0.5 + 0.25 + 0.25) / 3)
    assert st.majority_at_k(clusters, right, 1).value == pytest.approx(right.mean().item())


def test_best_of_shares_a_place_and_a_majority_goes_to_the_first() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0], [NAN, 1.0, 2.0]])
    right = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert st.best_of(scores, right).value == pytest.approx(0.25)
    clusters = torch.tensor([[0, 1, 1, 2], [0, 0, 1, 1], [-1, -1, -1, 0], [-1, -1, -1, -1]])
    members = st.majority_member(clusters)
    assert members[:3].tolist() == [[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]] and members[3].isnan().all()


def test_ties_flips_and_spread() -> None:
    scores = torch.tensor([[1.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    assert st.tie_rate(scores) == pytest.approx(1 / 6)
    assert st.flips(scores, scores) == 0
    again = torch.tensor([[1.0, 3.0, 2.0], [1.0, 2.0, 3.0]])
    assert st.flips(scores, again) == pytest.approx(1 / 5)  # one of the five pairs that differed
    assert st.spread(10 * scores) == pytest.approx(st.spread(scores)) and st.spread(torch.ones(2, 3)) == 0


def test_intervals_cover_and_shrink_with_the_square_root() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(200):
        values = (torch.rand(50, generator=generator) < 0.3).double()
        estimate = st.ratio(values, torch.ones(50), rounds=400, seed=seed)
        covered += estimate.low <= 0.3 <= estimate.high
    assert 180 <= covered <= 198
    few, many = (st.mean((torch.rand(n, generator=generator) < 0.5).double()) for n in (100, 1600))
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(4, rel=0.15)
    needed = few.prompts_needed()
    assert needed is not None and needed == pytest.approx(100 * (0.196 / 0.1) ** 2, rel=0.15)
    assert st.mean(torch.tensor([NAN])).prompts_needed() is None


def estimate(low: float, high: float, prompts: int = MIN_PROMPTS) -> st.Estimate:
    return st.Estimate((low + high) / 2, low, high, prompts)


def test_the_forecast_needs_the_whole_interval_on_one_side() -> None:
    even, none = BREAK_EVEN["answers"], st.Estimate(NAN, NAN, NAN, 0)
    for low, high, verdict in [(even + 0.01, 1.0, HELP), (0.0, even - 0.01, COLLAPSE), (even - 0.1, 0.9, NEUTRAL)]:
        assert forecast("vigor", estimate(low, high), none, 0.0, NAN).verdict == verdict
    assert forecast("vigor", estimate(0.9, 1.0, MIN_PROMPTS - 1), none, 0.0, NAN).verdict == NONE
    assert forecast("self_certainty", estimate(0.9, 1.0), none, 0.0, NAN).verdict == NONE
    by_majority = forecast("vigor", none, estimate(0.9, 1.0), 0.6, 0.1)
    assert by_majority.verdict == HELP and by_majority.basis == "majority"
    assert any("tie" in r for r in by_majority.reasons) and any("precision" in r for r in by_majority.reasons)


def test_unknown_answers_leave_their_prompts_out() -> None:
    scores, right, clusters = groups(3, prompts=40)
    partly = right.clone()
    partly[20:] = NAN
    report, half = (
        summarise({"vigor": s}, {}, r, c, s, {"labelled_prompts": 1})
        for s, r, c in ((scores, partly, clusters), (scores[:20], right[:20], clusters[:20]))
    )
    assert report["signals"]["vigor"]["auc"] == half["signals"]["vigor"]["auc"]
    assert report["samples"]["pass_at_k"] == half["samples"]["pass_at_k"]
    unknown = summarise({"vigor": scores}, {}, torch.full_like(right, NAN), clusters, scores, {"labelled_prompts": 0})
    assert unknown["signals"]["vigor"]["forecast"].basis == "majority" and unknown["samples"]["pass_at_k"] == {}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "verdict"), [("lab", HELP), ("lab-misaligned", COLLAPSE)])
def test_the_command_tells_the_two_worlds_apart(
    world: str, verdict: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "probe.json"
    command = ["probe", "--prompts", "lab:math", "--world", world, "--signals", "vigor", "--batch_size", "256"]
    assert main([*command, "--noise_prompts", "0", "--device", "cpu", "--out", str(out)]) == 0
    report = json.loads(out.read_text("utf-8"))
    found = report["signals"]["vigor"]["forecast"]
    assert found["verdict"] == verdict and found["basis"] == "answers"
    printed = capsys.readouterr().out
    assert f"vigor: {verdict.upper()}" in printed and "rival AUC" in printed


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


def test_all_signals_come_from_one_pass_and_repeat_with_the_seed(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Q:{i}+4\nA:", "answer": None if i % 2 else str(i + 4)} for i in range(4)]
    source = write_jsonl(tmp_path / "prompts.jsonl", rows)
    command = ["probe", "--prompts", str(source), "--model_name_or_path", str(model), "--num_generations", "4"]
    command += ["--max_completion_length", "12", "--device", "cpu", "--batch_size", "8", "--noise_prompts", "2"]
    reports: list[dict[str, Any]] = []
    for name in ("a.json", "b.json"):
        assert main([*command, "--out", str(tmp_path / name)]) == 0
        reports.append(json.loads((tmp_path / name).read_text("utf-8")))
    assert reports[0] == reports[1]
    facts = reports[0]["facts"]
    assert (facts["prompts"], facts["labelled_prompts"], facts["noise_dtype"]) == (4, 2, "bfloat16")
    assert list(reports[0]["signals"]) == ["vigor", "logprob", "self_certainty", "entropy"]
    assert reports[0]["agreement"]["vigor"]["vigor"] == 1
    assert all(0 <= signal["flip_rate"] <= 0.5 for signal in reports[0]["signals"].values())
    assert all(signal["forecast"]["verdict"] == NONE for signal in reports[0]["signals"].values())


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--num_generations", "1"], "2 completions"), (["--signals", "nonsense"], "unknown reward"),
     (["--signals", "keyword_chain"], "which not every row has"), (["--out", "no/where.json"], "there is no folder"),
     (["--prompts", "missing.jsonl"], "no such file")],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_the_model_loads(
    flags: list[str], said: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    source = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Q:3+4\nA:"}])
    command = ["probe", "--prompts", str(source), "--model_name_or_path", str(model), "--max_completion_length", "8"]
    assert main([*command, *flags]) == 2
    assert said in capsys.readouterr().err
