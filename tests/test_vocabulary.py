"""The output head in slices of the vocabulary: the same norms, and never T x V logits at once."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_distributed import forked
from models import enable_checkpointing, qwen2
from peft import LoraConfig, get_peft_model
from test_gradnorm_batched import FAMILIES, VOCABULARY, batch, both, build, relative
from test_gradnorm_float64 import redirect_float32
from torch import Tensor, nn

from vigor.gradnorm import UnsupportedModule, fused_grad_norms, sequence_grad_norms, vocabulary
from vigor.gradnorm.vocabulary import SlicedHead


@pytest.fixture
def sliced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every row is sliced, 7 columns of its 16 or fewer tokens at a time; the list has the widths of the slices."""
    widths: list[int] = []
    logits = SlicedHead.logits

    def noted(self: SlicedHead, hidden_1Th: Tensor, x_1Tp: Tensor, columns: slice) -> Any:
        widths.append(columns.stop - columns.start if hidden_1Th.shape[1] > 1 else 0)
        return logits(self, hidden_1Th, x_1Tp, columns)

    monkeypatch.setattr(SlicedHead, "logits", noted)
    monkeypatch.setattr(vocabulary, "WHOLE_LOGITS", 1)
    monkeypatch.setattr(vocabulary, "SLICE_LOGITS", 7 * 16)
    monkeypatch.setattr("vigor.gradnorm.head.HEAD_LOGITS", 1)
    yield widths
    assert max(widths, default=0) < VOCABULARY


def with_bias() -> Any:
    model = build("qwen2-untied")
    model.lm_head.bias = nn.Parameter(torch.linspace(-2, 2, VOCABULARY, dtype=torch.float64).sin())
    return model


@pytest.mark.parametrize(
    "name", ["qwen2-tied", "qwen2-untied", "llama-biases", "gemma2", "cohere", "granite", "gpt2-tied"]
)
def test_float64(name: str, sliced: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Soft caps (Gemma 2) and logit scales (Cohere, Granite) are the model's own, on slices."""
    redirect_float32(monkeypatch)
    assert relative(*both(build(name))) < 1e-9
    assert len(sliced) > 5 * VOCABULARY // 16


@pytest.mark.parametrize("name", FAMILIES)
def test_float32(name: str, sliced: list[int]) -> None:
    assert relative(*both(build(name, torch.float32))) < 1e-5
    assert sliced


def test_a_bias_in_the_head(sliced: list[int]) -> None:
    model = with_bias()
    assert relative(*both(model)) < 1e-6
    assert relative(*both(model, parameters="lm_head.bias".__eq__)) < 1e-6
    assert sliced


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("name", ["qwen2-tied", "qwen2-untied"])
def test_both_forms(name: str, gram: bool, sliced: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vigor.gradnorm.norms.prefers_gram", lambda T, p, q: gram)
    assert relative(*both(build(name))) < 1e-6
    assert sliced


@pytest.mark.parametrize("temperature", [0.6, 2.0])
def test_temperature(temperature: float, sliced: list[int]) -> None:
    assert relative(*both(build("gemma2"), temperature=temperature)) < 1e-6
    assert sliced


@pytest.mark.parametrize("parameters", ["head", "last_1", lambda name: "norm" in name])
def test_subsets_of_parameters(parameters: Any, sliced: list[int]) -> None:
    assert relative(*both(build("qwen2-tied"), parameters=parameters)) < 1e-6
    assert sliced


def test_checkpointing_and_adapters(sliced: list[int]) -> None:
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(qwen2(torch.float64), config).train()
    enable_checkpointing(model, use_reentrant=False)
    model.enable_input_require_grads()
    assert relative(*both(model)) < 1e-6
    assert sliced


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_and_autocast(dtype: torch.dtype, sliced: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen2-tied", dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        slices, loop = both(model)
        monkeypatch.setattr(vocabulary, "WHOLE_LOGITS", 1 << 28)
        whole, _ = both(model)
    assert relative(slices, loop) < 0.02 and relative(slices, whole) < 0.01
    assert sliced


def test_log_probabilities_and_logits_are_reported_once(sliced: list[int]) -> None:
    model = build("qwen2-tied")
    seen = torch.zeros(6, 22, dtype=torch.float64)

    def on_logits(row_N: Tensor, at_N: Tensor, logits_NV: Tensor, token_N: Tensor) -> None:
        assert logits_NV.shape[1] == VOCABULARY
        seen[row_N, at_N] += logits_NV.log_softmax(-1).gather(-1, token_N[:, None]).squeeze(-1)

    _, logps = sequence_grad_norms(
        model, *batch(), method="batched", self_check=False, return_token_logps=True, on_logits=on_logits
    )
    _, wanted = sequence_grad_norms(model, *batch(), method="loop", return_token_logps=True)
    torch.testing.assert_close(logps, wanted, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(seen, wanted, rtol=1e-6, atol=1e-7)
    assert sliced


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen2-untied"])
def test_the_sketch_is_the_same_estimate(name: str, sliced: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    slices = sequence_grad_norms(model, *batch(), method="sketch", self_check=False)
    monkeypatch.setattr(vocabulary, "WHOLE_LOGITS", 1 << 28)
    whole = sequence_grad_norms(model, *batch(), method="sketch", self_check=False)
    assert isinstance(slices, Tensor) and isinstance(whole, Tensor)
    assert relative(slices[:5], whole[:5]) < 1e-6
    assert sliced


@pytest.mark.parametrize("mode", ["keep", "retain"])
def test_the_fused_update(mode: Any, sliced: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """`retain` slices in both backward passes; `keep` needs the logits' gradient whole."""
    redirect_float32(monkeypatch)
    gradients = []
    for fused in (True, False):
        model = with_bias().eval()
        ids, attention, completion = batch()
        if fused:
            logps = fused_grad_norms(model, ids, attention, completion, mode=mode, self_check=False).token_logps()
        else:
            rows = []
            for b in range(5):
                at = attention[b].nonzero().squeeze(1)
                own = model(input_ids=ids[b, at][None]).logits[0, :-1].log_softmax(-1)
                row = own.gather(-1, ids[b, at][1:, None]).squeeze(-1) * completion[b, at][1:]
                rows.append(row)
            logps = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        weights_B = torch.linspace(-1, 1, 5, dtype=torch.float64)
        (weights_B[:, None] * logps[:5]).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-7, atol=1e-9)
    assert bool(sliced) == (mode == "retain")


class _Normalised(nn.Module):
    """Log-probabilities instead of logits: a slice cannot know the others."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.get_decoder, self.get_output_embeddings = inner.get_decoder, inner.get_output_embeddings

    def forward(self, **inputs: Any) -> Any:
        output = self.inner(**inputs)
        output.logits = output.logits.log_softmax(-1)
        return output


class _Scaled(_Normalised):
    """A trainable scale of the logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.scale = nn.Parameter(torch.tensor([1.5], dtype=torch.float64))

    def forward(self, **inputs: Any) -> Any:
        output = self.inner(**inputs)
        output.logits = output.logits * self.scale
        return output


@pytest.mark.parametrize("wrap", [_Normalised, _Scaled])
def test_what_cannot_be_sliced_is_taken_whole(wrap: Any, sliced: list[int]) -> None:
    assert relative(*both(wrap(build("qwen2-untied")))) < 1e-6
    assert set(sliced) <= {0}


def test_a_head_whose_weight_is_something_else_elsewhere_is_refused(sliced: list[int]) -> None:
    model = build("qwen2-untied")
    weight, forward = model.lm_head.weight, model.model.norm.forward
    model.model.norm.forward = lambda x: forward(x) * (1 + weight.square().mean())
    with pytest.raises(UnsupportedModule, match=r"lm_head\.weight is a linear map or an embedding in one place"):
        sequence_grad_norms(model, *batch(), method="batched", self_check=False)
    assert sliced


def test_memory_of_one_long_sequence(tmp_path: Path) -> None:
    """In a process of its own: a sequence whose logits are 1.1 GB in float32 adds less than half of that, all told."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak memory of a process is read from Linux's /proc")
    script = """
        from pathlib import Path
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM
        from vigor.gradnorm import sequence_grad_norms

        def mb(field):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(float(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024

        torch.set_num_threads(1)
        config = Qwen2Config(vocab_size=120_000, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                             num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=True)
        model = Qwen2ForCausalLM(config)
        ids = torch.randint(3, 120_000, (1, 2_300))
        real = torch.ones_like(ids)
        counted = real.clone()
        counted[:, 0] = 0
        sequence_grad_norms(model, ids[:, :8], real[:, :8], counted[:, :8], method="batched", self_check=False)
        Path("/proc/self/clear_refs").write_text("5")
        before = mb("VmRSS")
        norms = sequence_grad_norms(model, ids, real, counted, method="batched", self_check=False)
        assert norms.isfinite().all()
        print(mb("VmHWM") - before)
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    done = forked(str(tmp_path / "script.py"), processes=1)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = 2_299 * 120_000 * 4 / 2**20
    assert vocabulary.WHOLE_LOGITS < 2_299 * 120_000
    assert float(done.stdout) < whole / 2
