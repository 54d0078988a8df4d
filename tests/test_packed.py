"""Packed rows: each sequence has the norm that it has alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import PAD, SAMPLES, Sample, gpt2, llama, naive_norm, padded, qwen2
from test_gradnorm_batched import build, relative
from test_gradnorm_float64 import redirect_float32
from torch import Tensor
from transformers import DataCollatorWithFlattening, MambaConfig, MambaForCausalLM

from vigor.gradnorm import fused_grad_norms, sequence_grad_norms, unpack

LAYOUT: tuple[tuple[int, ...], ...] = ((0, 2, 4), (3, 1))
"""Which samples stand in which packed row, in order."""
ORDER = [i for row in LAYOUT for i in row]


def packed(samples: tuple[Sample, ...] = SAMPLES) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """input_ids, attention_mask, completion_mask, position_ids and sequence_ids of `LAYOUT`, padded on the right."""
    width = max(sum(len(samples[i].ids) for i in row) for row in LAYOUT) + 2
    ids = torch.full((len(LAYOUT), width), PAD)
    attention, completion, positions = torch.zeros_like(ids), torch.zeros_like(ids), torch.zeros_like(ids)
    sequences = torch.full_like(ids, -1)
    for b, row in enumerate(LAYOUT):
        start = 0
        for n, i in enumerate(row):
            sample = samples[i]
            stop = start + len(sample.ids)
            ids[b, start:stop], positions[b, start:stop] = torch.tensor(sample.ids), torch.arange(stop - start)
            attention[b, start:stop], sequences[b, start:stop] = 1, n
            completion[b, [start + t for t in sample.counted]] = 1
            start = stop
    return ids, attention, completion, positions, sequences


def norms(model: Any, **options: Any) -> Tensor:
    ids, attention, completion, positions, _ = packed()
    found = sequence_grad_norms(model, ids, attention, completion, position_ids=positions, **options)
    assert isinstance(found, Tensor)
    return found


def alone(model: Any) -> Tensor:
    """The loop on each sequence in a batch of its own."""
    found = [sequence_grad_norms(model, *padded([SAMPLES[i]]), method="loop") for i in ORDER]
    return torch.cat(found)  # type: ignore[arg-type]


def mamba() -> Any:
    """Its state runs through a row whatever the positions say."""
    config = MambaConfig(vocab_size=41, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4)
    return MambaForCausalLM(config)


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen2-untied", "llama-biases", "gpt2-tied", "gpt-neox", "mixtral"])
@pytest.mark.parametrize("method", ["batched", "loop"])
def test_float64(name: str, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    redirect_float32(monkeypatch)
    model = build(name)
    assert relative(norms(model, method=method), alone(model)) < 1e-9


@pytest.mark.parametrize("make", [qwen2, llama, gpt2, mamba])
def test_float32(make: Any) -> None:
    model = make()
    assert relative(norms(model, method="batched"), alone(model)) < 1e-5


def test_the_definition() -> None:
    model = qwen2()
    wanted = torch.tensor([naive_norm(model, SAMPLES[i]) for i in ORDER])
    assert relative(norms(model), wanted) < 1e-5


def test_sequence_ids_say_the_same() -> None:
    model = qwen2()
    ids, _, completion, _, sequences = packed()
    found = sequence_grad_norms(model, ids, None, completion, sequence_ids=sequences.to(torch.int32))
    torch.testing.assert_close(found, norms(model), rtol=0, atol=0)


def test_the_collator_of_transformers_and_the_models_own_packed_pass() -> None:
    """What transformers computes of a packed row on these position ids is what the norms are taken of."""
    features = [{"input_ids": s.ids, "labels": [-100] * len(s.prompt) + s.completion} for s in SAMPLES if not s.holes]
    batch = DataCollatorWithFlattening(return_tensors="pt")(features)
    model = qwen2().eval()
    completion = batch["labels"] != -100
    found, logps = sequence_grad_norms(
        model, batch["input_ids"], None, completion, position_ids=batch["position_ids"], return_token_logps=True
    )
    assert found.shape == (len(features),)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    own = logits.log_softmax(-1)[:, :-1].gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(logps[:, 1:], own * completion[:, 1:], rtol=1e-5, atol=1e-6)


def test_log_probabilities_and_logits_keep_to_the_packed_layout() -> None:
    model = qwen2()
    ids, attention, completion, positions, _ = packed()
    seen = torch.zeros_like(ids, dtype=torch.float32)

    def on_logits(row_N: Tensor, at_N: Tensor, logits_NV: Tensor, token_N: Tensor) -> None:
        assert torch.equal(ids[row_N, at_N], token_N)
        seen[row_N, at_N] = logits_NV.log_softmax(-1).gather(-1, token_N[:, None]).squeeze(-1)

    _, logps = sequence_grad_norms(
        model, ids, attention, completion, position_ids=positions, return_token_logps=True, on_logits=on_logits
    )
    torch.testing.assert_close(seen, logps, rtol=1e-6, atol=1e-6)
    assert torch.equal(logps != 0, completion.bool())


def test_the_fused_update_on_unpacked_rows() -> None:
    ids, attention, completion, positions, _ = packed()
    rows = unpack(ids, attention, completion, position_ids=positions)
    weights_N = torch.linspace(-1, 1, 5) + 0.1
    grads = []
    for taken in (True, False):
        model = qwen2()
        if taken:
            fused = fused_grad_norms(model, rows.input_ids_NT, rows.attention_mask_NT, rows.completion_mask_NT)
            logps_NT = fused.token_logps()
        else:
            logits = model(input_ids=rows.input_ids_NT, attention_mask=rows.attention_mask_NT.long()).logits
            shifted = logits[:, :-1].log_softmax(-1).gather(-1, rows.input_ids_NT[:, 1:, None]).squeeze(-1)
            logps_NT = torch.nn.functional.pad(shifted, (1, 0)) * rows.completion_mask_NT
        (weights_N[:, None] * logps_NT).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in grads[1].items():
        torch.testing.assert_close(grads[0][name], gradient, rtol=1e-4, atol=1e-6)


def test_unpacked_and_packed_again() -> None:
    ids, attention, completion, positions, _ = packed()
    rows = unpack(ids, attention, completion, position_ids=positions)
    assert [r[m].tolist() for r, m in zip(rows.input_ids_NT, rows.attention_mask_NT, strict=True)] == [
        SAMPLES[i].ids for i in ORDER
    ]
    assert rows.row_N.tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(rows.pack(rows.input_ids_NT), ids * attention)
    assert torch.equal(rows.pack(rows.completion_mask_NT), completion.bool())


def test_rows_without_tokens_and_sequences_without_counted_ones() -> None:
    ids, attention, completion, positions, _ = packed()
    completion[1] = 0
    found = sequence_grad_norms(qwen2(), ids, attention, completion, position_ids=positions)
    assert isinstance(found, Tensor) and found.isnan().tolist() == [False] * 3 + [True] * 2
    attention[1] = 0
    assert len(sequence_grad_norms(qwen2(), ids, attention, completion, position_ids=positions)) == 3
    empty = sequence_grad_norms(qwen2(), ids, 0 * attention, completion, position_ids=positions)
    assert isinstance(empty, Tensor) and empty.shape == (0,)


def _shifted(x: dict[str, Tensor]) -> None:
    x["position_ids"] += 3


def _back(x: dict[str, Tensor]) -> None:
    x["sequence_ids"] = torch.where(x["sequence_ids"] == 2, 0, x.pop("sequence_ids"))
    del x["position_ids"]


def _both(x: dict[str, Tensor]) -> None:
    pass


def _counted(x: dict[str, Tensor]) -> None:
    x["completion_mask"][0, 0] = 1
    del x["sequence_ids"]


def _block(x: dict[str, Tensor]) -> None:
    x["attention_mask"] = torch.ones(2, 1, 20, 20)
    del x["sequence_ids"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: (_shifted(x), x.pop("sequence_ids")), "row 0 a sequence begins at position 3"),
        (_back, "row 0 the sequence id 0 comes back"),
        (_both, "not both and not neither"),
        (_counted, r"first token of sequence 0 \(row 0, column 0\)"),
        (_block, r"attention_mask \(2, 1, 20, 20\).*block-diagonal"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused(change: Any, message: str) -> None:
    names = ("input_ids", "attention_mask", "completion_mask", "position_ids", "sequence_ids")
    given = dict(zip(names, packed(), strict=True))
    change(given)
    with pytest.raises(ValueError, match=message):
        sequence_grad_norms(qwen2(), **given)
