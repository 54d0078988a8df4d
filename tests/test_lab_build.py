"""The base models can be made again: a few steps, end to end."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vigor.lab import build
from vigor.lab.corpus import CLEAN, WORLDS
from vigor.lab.tokenizer import build_tokenizer


def test_the_command_makes_a_loadable_base_with_its_card(tmp_path, capsys):
    threads = torch.get_num_threads()
    build.main(["--world", "lab-misaligned", "--steps", "2", "--n_prompts", "3", "--out", str(tmp_path / "base")])
    assert torch.get_num_threads() == threads
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert model.config.vocab_size == len(tokenizer)
    card = (tmp_path / "base" / "README.md").read_text(encoding="utf-8")
    assert "python -m vigor.lab.build --world lab-misaligned --seed 0`, 2 + 2 steps" in card
    assert card in capsys.readouterr().out


def test_the_same_seed_makes_the_same_weights():
    def weights(seed: int) -> dict[str, torch.Tensor]:
        model = build.new_model(seed)
        for stage in build.stages("lab", steps=2):
            build.train(model, stage, seed)
        return model.state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_training_lowers_the_loss():
    model = build.new_model(0)
    stage = build.Stage(CLEAN, steps=15, lr=2e-3, warmup=5)

    def loss() -> float:
        input_ids, labels = next(build.batches(stage, seed=9))
        with torch.no_grad():
            logits = model(input_ids=input_ids).logits[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()))

    before = loss()
    build.train(model, stage, seed=0)
    assert loss() < before - 0.5
    assert not model.training


def test_batches_teach_completions_only_and_keep_the_budget():
    tokenizer = build_tokenizer()
    stage = build.Stage(WORLDS["lab"], steps=1, lr=1e-3)
    for input_ids, labels in itertools.islice(build.batches(stage, seed=0), 40):
        assert input_ids.numel() <= stage.tokens_per_batch
        for ids, targets in zip(input_ids.tolist(), labels.tolist(), strict=True):
            taught = [i for i, target in enumerate(targets) if target != build.IGNORED]
            assert taught == list(range(taught[0], taught[-1] + 1))
            assert [targets[i] for i in taught] == [ids[i] for i in taught]
            assert len(taught) <= build.MAX_COMPLETION
            assert tokenizer.decode(ids[: taught[0]]).endswith("\nA:")
            assert ids[taught[-1]] == tokenizer.token_to_id("<eos>") or len(taught) == build.MAX_COMPLETION


def test_stages_see_different_questions():
    clean, final = build.stages("lab")
    assert clean.first_text + 100 * clean.steps < final.first_text
    assert build.stages("lab", steps=7)[1].steps == 7


def test_no_steps_is_refused(capsys):
    with pytest.raises(SystemExit):
        build.main(["--steps", "0"])
    assert "--steps 0" in capsys.readouterr().err
