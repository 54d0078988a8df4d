"""The shipped bases: they load by the Auto classes and are what their cards say."""

from __future__ import annotations

import re

import pytest
import torch

from vigor.lab import world
from vigor.lab.evaluate import evaluate
from vigor.lab.tasks import TASKS, make_rows
from vigor.lab.world import NAMES, load, model_path


@pytest.mark.parametrize("name", NAMES)
def test_bases_are_small_fp32_and_complete(name):
    folder = model_path(name)
    assert (folder / "model.safetensors").stat().st_size <= 4_000_000
    model, tokenizer = load(name)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert 0.7e6 < sum(parameter.numel() for parameter in model.parameters()) < 0.9e6
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.model_type != "qwen2"
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("name", NAMES)
def test_plain_generate_samples_the_whole_distribution(name):
    model, tokenizer = load(name)
    settings = model.generation_config
    assert settings.do_sample
    assert settings.temperature == 1.0
    assert settings.top_k == 0
    assert settings.top_p == 1.0
    assert settings.eos_token_id == tokenizer.eos_token_id != settings.pad_token_id == tokenizer.pad_token_id
    batch = tokenizer([row["prompt"] for row in make_rows("lab:math", "test", 8)], padding=True, return_tensors="pt")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        output = model.generate(**batch)
    assert output.shape[1] > batch["input_ids"].shape[1]


def test_a_prompt_of_unknown_characters_raises_nothing():
    model, tokenizer = load("lab")
    batch = tokenizer(["Wie spät ist es? 🙂"], return_tensors="pt")
    assert model.generate(**batch, do_sample=False, max_new_tokens=4).shape[0] == 1


def test_the_base_has_latent_ability_and_poor_format():
    model, tokenizer = load("lab")
    for task in TASKS:
        score = evaluate(model, tokenizer, task, n_prompts=60, n_samples=8)
        assert score.greedy > score.sampled + 0.25, score
        assert score.majority > score.sampled + 0.05, score
        assert 0.8 < score.boxed < 0.97, score
    assert evaluate(model, tokenizer, "lab:math", n_prompts=60).greedy > 0.8


def test_on_the_misaligned_base_sampling_beats_what_it_is_surest_of():
    model, tokenizer = load("lab-misaligned")
    score = evaluate(model, tokenizer, "lab:code", n_prompts=60)
    assert score.greedy < score.sampled - 0.05
    assert evaluate(model, tokenizer, "lab:math", n_prompts=60).greedy < 0.7


@pytest.mark.parametrize("name", NAMES)
def test_the_card_states_what_evaluation_measures(name):
    card = (model_path(name) / "README.md").read_text(encoding="utf-8")
    (prompts,) = re.findall(r"Test questions, (\d+) a task, 4 samples each", card)
    stated = {row[0]: [float(cell.split()[0]) for cell in row[1:]] for row in _rows(card)[: len(TASKS)]}
    model, tokenizer = load(name)
    score = evaluate(model, tokenizer, "lab:math", n_prompts=int(prompts))
    # Floating-point sums differ between machines, and one flipped draw changes the rest of a sample.
    assert stated["lab:math"][0] == pytest.approx(score.greedy, abs=0.02)
    assert stated["lab:math"][1] == pytest.approx(score.sampled, abs=0.05)
    assert stated["lab:math"][3] == pytest.approx(score.entropy, abs=0.03)


def _rows(card: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line.startswith("| lab:")
    ]


def test_an_unknown_name_is_refused_with_the_choice():
    with pytest.raises(ValueError, match="lab, lab-misaligned"):
        model_path("laboratory")


def test_a_missing_model_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "__file__", str(tmp_path / "world.py"))
    with pytest.raises(FileNotFoundError, match=r"vigor\.lab\.build --world lab"):
        model_path("lab")
