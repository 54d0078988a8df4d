"""`vigor train` on real prompts: GSM8K and MATH, with a small random Qwen2 and a tokenizer made on the spot."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from helpers_trainer import table
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from vigor.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_base(folder: Path, texts: list[str]) -> Path:
    """A random Qwen2 of 2 layers with a byte-level BPE of 2,000 pieces learnt from `texts`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False))
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL),
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )
    tokenizer.save_pretrained(folder)
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("gsm8k_train.jsonl", []),
        (
            "math_train.jsonl",
            ["--prompt_column", "problem", "--system_prompt", "Put your final answer within \\boxed{}."],
        ),
    ],
)
def test_real_prompts_train_end_to_end(
    name: str, flags: list[str], data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (data_dir / name).open(encoding="utf-8") as stream:
        problems = [json.loads(line)["problem"] for line in stream]
    model = make_base(tmp_path / "base", problems[:2000])
    run = tmp_path / "run"
    settings = {
        "prompts": data_dir / name, "model_name_or_path": model, "output_dir": run, "max_steps": 3,
        "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 16, "learning_rate": 1e-3,
        "save_strategy": "no", "gradient_checkpointing": False, "seed": 1,
    }  # fmt: skip
    argv = ["train", "--use_cpu", "--skip_bad_rows", *flags]
    assert main([*argv, *(part for key, value in settings.items() for part in (f"--{key}", str(value)))]) == 0

    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    for record in records:
        assert math.isfinite(record["loss"])
        assert record["scores/vigor"] < 0
        assert record["rewards/accuracy/mean"] == 0, "a random model cannot be right; accuracy must still be measured"
    for step in (1, 2, 3):
        completions = table(run, step)
        assert len(completions) == 8
        assert completions["accuracy"].notna().all()
        assert sorted(completions["vigor"][:4]) == pytest.approx([-1, -1 / 3, 1 / 3, 1])
        known = set(problems)
        for prompt in completions["prompt"]:
            assert (prompt if isinstance(prompt, str) else prompt[-1]["content"]) in known
    for file in ("config.yaml", "environment.json", "results.json", "report.html", "curves.png"):
        assert (run / file).stat().st_size > 0, file
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.decode(tokenizer(problems[0])["input_ids"]) == problems[0]
    assert AutoModelForCausalLM.from_pretrained(run / "model").config.model_type == "qwen2"
    assert f"Run folder: {run}" in "".join(capsys.readouterr().out.splitlines())
