"""Evaluation: the numbers are what the definitions say, and measuring changes nothing."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from vigor.lab.decode import complete
from vigor.lab.evaluate import clustered_interval, evaluate, wilson_interval
from vigor.lab.separation import SIGNALS, separation, within_group_auc
from vigor.lab.tasks import extract_answer, make_rows
from vigor.lab.world import load


@pytest.fixture(scope="module")
def base():
    return load("lab")


def _complete(base, prompts, seed=0, n_samples=3, temperature=1.0, max_new_tokens=72):
    model, tokenizer = base
    generator = torch.Generator().manual_seed(seed)
    return complete(
        model,
        tokenizer,
        prompts,
        n_samples=n_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        generator=generator,
    )


def test_greedy_rows_equal_generate(base):
    model, tokenizer = base
    prompts = [row["prompt"] for task in ("lab:math-hard", "lab:code") for row in make_rows(task, "test", 12)]
    for prompt, group in zip(prompts, _complete(base, prompts), strict=True):
        batch = tokenizer([prompt], return_tensors="pt")
        output = model.generate(**batch, do_sample=False, max_new_tokens=72)[0, batch["input_ids"].shape[1] :]
        assert group[0].token_ids == tuple(output.tolist())


def test_entropy_is_that_of_the_distributions_sampled_from(base):
    model, tokenizer = base
    prompts = [row["prompt"] for row in make_rows("lab:math", "test", 6)]
    for prompt, group in zip(prompts, _complete(base, prompts, temperature=0.7), strict=True):
        ids = tokenizer(prompt)["input_ids"]
        for completion in group:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*ids, *completion.token_ids]])).logits[0, len(ids) - 1 : -1]
            expected = torch.distributions.Categorical(logits=logits / 0.7).entropy().sum()
            assert completion.entropy == pytest.approx(float(expected), rel=1e-4, abs=1e-4)


def test_a_completion_stops_once_at_eos_or_at_the_limit(base):
    _, tokenizer = base
    prompts = [row["prompt"] for row in make_rows("lab:math", "test", 40)]
    for group in _complete(base, prompts):
        for completion in group:
            stops = completion.token_ids.count(tokenizer.eos_token_id)
            assert (stops == 1 and completion.token_ids[-1] == tokenizer.eos_token_id) or (
                stops == 0 and len(completion.token_ids) == 72
            )
            assert "<eos>" not in completion.text


def test_samples_follow_the_model_s_distribution(base):
    model, tokenizer = base
    prompt = make_rows("lab:math", "test", 1)[0]["prompt"]
    (group,) = _complete(base, [prompt], n_samples=3000, max_new_tokens=1)
    with torch.no_grad():
        probs = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].softmax(-1)
    seen = torch.bincount(torch.tensor([c.token_ids[0] for c in group[1:]]), minlength=len(probs)) / 3000
    # Five standard errors of a share of 3,000 draws.
    assert torch.all((seen - probs).abs() < 5 * (probs * (1 - probs) / 3000).sqrt() + 1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_leaves_mode_threads_and_random_states_alone(base, training):
    model, tokenizer = base
    model.train(training)
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    threads = torch.get_num_threads()
    evaluate(model, tokenizer, "lab:math", n_prompts=5, n_samples=2)
    assert model.training is training
    assert torch.get_num_threads() == threads
    model.eval()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mode_comes_back_even_after_an_error(base):
    model, tokenizer = base
    model.train()
    with pytest.raises(ValueError, match="unknown lab task"):
        evaluate(model, tokenizer, "lab:none", n_prompts=2)
    with pytest.raises(TypeError, match="str"):
        evaluate(model, tokenizer, "lab:math", n_prompts=2, temperature="1")
    assert model.training
    model.eval()


def test_scores_are_counted_from_the_completions(base):
    model, tokenizer = base
    rows = make_rows("lab:math", "test", 30)
    score = evaluate(model, tokenizer, "lab:math", n_prompts=30, n_samples=3, seed=7)
    groups = _complete(base, [row["prompt"] for row in rows], seed=7)
    right = [[extract_answer(c.text) == row["answer"] for c in group] for row, group in zip(rows, groups, strict=True)]
    assert score.greedy == np.mean([r[0] for r in right])
    assert score.sampled == pytest.approx(np.mean([r[1:] for r in right]))
    assert score.mean_length == pytest.approx(np.mean([len(c.token_ids) for group in groups for c in group[1:]]))
    assert score == evaluate(model, tokenizer, "lab:math", n_prompts=30, n_samples=3, seed=7)
    assert score != evaluate(model, tokenizer, "lab:math", n_prompts=30, n_samples=3, seed=8)
    assert json.loads(json.dumps(score.as_dict())) == score.as_dict()


def test_greedy_does_not_depend_on_the_batch(base):
    model, tokenizer = base
    scores = [evaluate(model, tokenizer, "lab:code", n_prompts=30, n_samples=1, batch_size=b) for b in (7, 30)]
    assert scores[0].greedy == scores[1].greedy


def test_nothing_to_score_is_refused(base):
    with pytest.raises(ValueError, match="at least 1"):
        evaluate(*base, "lab:math", n_samples=0)


def test_wilson_interval_against_published_values():
    # Newcombe 1998, table I: 81 of 263 and 15 of 148 and 0 of 20, method 3.
    for (successes, n), expected in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
    }.items():
        assert wilson_interval(successes / n, n) == pytest.approx(expected, abs=5e-5)


def test_the_clustered_interval_knows_that_samples_of_a_prompt_agree():
    rng = random.Random(0)
    independent = [sum(rng.random() < 0.5 for _ in range(4)) / 4 for _ in range(400)]
    agreeing = [float(rng.random() < 0.5) for _ in range(400)]

    def width(shares):
        low, high = clustered_interval(shares, 4)
        return high - low

    assert width(independent) == pytest.approx(2 * 1.96 * 0.5 / 1600**0.5, rel=0.1)
    assert width(agreeing) == pytest.approx(2 * 1.96 * 0.5 / 400**0.5, rel=0.05)
    assert clustered_interval([0.0] * 50, 4) == pytest.approx(wilson_interval(0.0, 50))


def test_the_clustered_interval_covers_as_often_as_it_says():
    rng = random.Random(1)
    covered = 0
    for _ in range(500):
        # Prompt difficulties from a Beta(0.5, 0.5): mean 0.5, strongly clustered.
        shares = []
        for _ in range(60):
            p = rng.betavariate(0.5, 0.5)
            shares.append(sum(rng.random() < p for _ in range(4)) / 4)
        low, high = clustered_interval(shares, 4)
        covered += low <= 0.5 <= high
    assert 0.92 <= covered / 500 <= 0.98


def test_within_group_auc():
    assert within_group_auc([[3.0, 1.0, 2.0]], [[True, False, False]]) == 1.0
    assert within_group_auc([[1.0, 1.0]], [[True, False]]) == 0.5
    assert within_group_auc([[1.0, 2.0], [9.0, 8.0, 7.0]], [[True, False], [True, False, False]]) == pytest.approx(
        2 / 3
    )
    assert within_group_auc([[1.0, 2.0]], [[True, True]]) is None


def test_signals_separate_right_from_wrong_on_the_aligned_base_only(base):
    measured = separation(*base, "lab:math", n_prompts=8, n_samples=8)
    assert set(measured.auc) == set(measured.best) == set(SIGNALS)
    assert measured.auc["vigor"] > 0.75
    assert all(parameter.grad is None for parameter in base[0].parameters())
    misaligned = separation(*load("lab-misaligned"), "lab:code", n_prompts=8, n_samples=8)
    assert misaligned.auc["mean log-prob"] < 0.6
