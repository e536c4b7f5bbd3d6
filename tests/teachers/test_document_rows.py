"""Documents in one window do not affect each other, even in models that cannot mask them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    OPTConfig,
    Qwen3_5TextConfig,
)

from stillhouse.data.batches import collate
from stillhouse.pruning import offload
from stillhouse.quantize.moments import input_moments
from stillhouse.students.student import Student
from stillhouse.teachers import document_rows
from stillhouse.teachers.activations import ActivationRequest, run_backbone
from stillhouse.teachers.backbone import hidden_states
from stillhouse.teachers.document_rows import separates_documents
from stillhouse.teachers.load_model import load_model
from stillhouse.teachers.local_teacher import load_teacher
from stillhouse.teachers.model_source import ModelSource
from tests import tiny

V = len(tiny.tokenizer())
TOKENS = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
OLDER = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MASKED: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "gpt2": lambda: GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
SEPARATE: dict[str, Callable[[], Any]] = {
    "opt": lambda: OPTConfig(**OLDER, ffn_dim=64, word_embed_proj_dim=32),
    "falcon": lambda: FalconConfig(**OLDER),
    "bloom": lambda: BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4),
    "gpt_oss": lambda: GptOssConfig(**SIZES, **EXPERTS, head_dim=8),
    "lfm2": lambda: Lfm2Config(**SIZES, block_multiple_of=8, full_attn_idxs=[1]),
    "jamba": lambda: JambaConfig(**SIZES, num_experts=2, attn_layer_period=2, attn_layer_offset=1),
    "qwen3_5": lambda: Qwen3_5TextConfig(**SIZES, **LINEAR, head_dim=8),
}
LENGTHS = (9, 1, 7, 3), (20,)
"""The lengths of the documents in two windows."""
POSITIONS = torch.tensor([[p for n in row for p in range(n)] for row in LENGTHS])
IDS = torch.randint(5, V, (2, 20), generator=torch.Generator().manual_seed(1))


def made(kind: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config((MASKED | SEPARATE)[kind]()).eval()


def alone(model: Any, read: Callable[[Tensor], Tensor]) -> Tensor:
    """What `read` returns for each document [1, l] alone, put in the documents' places."""
    parts = [part for row, n in zip(IDS, LENGTHS, strict=True) for part in row.split(n)]
    return torch.cat([read(part[None])[0] for part in parts]).unflatten(0, IDS.shape)


@pytest.mark.parametrize("kind", [*MASKED, *SEPARATE])
def test_hidden_states_are_those_of_separate_documents(kind: str) -> None:
    model = made(kind)
    assert separates_documents(model) == (kind in MASKED)
    with torch.no_grad():
        found_RLD = hidden_states(model, IDS, POSITIONS)
        wanted_RLD = alone(model, lambda ids: model.base_model(ids).last_hidden_state)
    several_RL = torch.ones_like(IDS, dtype=torch.bool)
    several_RL[0, 9] = kind in MASKED  # a document of one token is not run separately
    torch.testing.assert_close(found_RLD[several_RL], wanted_RLD[several_RL], rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_separate_documents() -> None:
    model = made("qwen3_5").double()
    weights = list(model.base_model.parameters())
    factor_RLD = torch.randn(*IDS.shape, 32, dtype=torch.double)
    factor_RLD[0, 9] = 0
    loss = (hidden_states(model, IDS, POSITIONS) * factor_RLD).sum()
    found = torch.autograd.grad(loss, weights)
    wanted_RLD = alone(model, lambda ids: model.base_model(ids).last_hidden_state)
    wanted = torch.autograd.grad((wanted_RLD * factor_RLD).sum(), weights)
    torch.testing.assert_close(found, wanted)


def test_layers_and_attention_are_those_of_separate_documents() -> None:
    model = made("opt")
    request = ActivationRequest(layers=frozenset({0, 1, 2}), attention=frozenset({2}))
    with torch.no_grad():
        found = run_backbone(model, IDS, POSITIONS, request)
        for layer in (0, 1, 2):

            def layer_alone(ids: Tensor, at: int = layer) -> Tensor:
                return run_backbone(model, ids, None, request).layers[at]

            wanted_RLD = alone(model, layer_alone)
            wanted_RLD[0, 9] = 0
            torch.testing.assert_close(found.layers[layer], wanted_RLD)
        wanted_RLW = alone(
            model,
            lambda ids: run_backbone(model, ids, None, request).attention[2]["key"],
        )
    wanted_RLW[0, 9] = 0
    torch.testing.assert_close(found.attention[2]["key"], wanted_RLW)


def test_moments_count_each_token_once() -> None:
    model = made("opt")
    packed = [
        {"input_ids": ids, "labels": ids, "position_ids": positions}
        for ids, positions in zip(IDS, POSITIONS, strict=True)
    ]
    apart = [
        {"input_ids": part, "labels": part, "position_ids": torch.arange(len(part))}
        for row, lengths in zip(IDS, LENGTHS, strict=True)
        for part in row.split(lengths)
    ]
    found, wanted = input_moments(model, packed), input_moments(model, apart)
    assert found.keys() == wanted.keys()
    for name, moments_I in found.items():
        torch.testing.assert_close(moments_I, wanted[name])


def test_a_sharded_model_runs_all_documents_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = made("lfm2"), list[int]()
    model.base_model.register_forward_hook(lambda *call: rows.append(len(call[2][0])))
    with torch.no_grad():
        wanted_RLD = hidden_states(model, IDS, POSITIONS)
        assert rows == [1, 1, 1, 1]  # documents of 3, 7, 9, and 20 tokens
        monkeypatch.setattr(document_rows, "_is_sharded", lambda model: True)
        torch.testing.assert_close(hidden_states(model, IDS, POSITIONS), wanted_RLD)
    assert rows[4:] == [4]


def test_windows_that_have_only_documents_of_one_token_are_run() -> None:
    positions_RL = torch.zeros_like(IDS)
    assert hidden_states(made("lfm2"), IDS, positions_RL).shape == (2, 20, 32)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom", "gpt_oss"])
def test_a_teacher_with_any_kind_of_decoder_blocks_answers_on_a_cpu(
    kind: str, tmp_path: Path
) -> None:
    model = made(kind)
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    teacher = load_teacher(ModelSource(tmp_path), dtype=torch.float32)
    teacher.place(torch.device("cpu"), 20)
    rows = [
        {"input_ids": ids, "labels": ids, "position_ids": positions}
        for ids, positions in zip(IDS, POSITIONS, strict=True)
    ]
    (signal,) = teacher.answer(collate(rows)).signals
    assert signal.hidden_ND.shape == (38, 32)
    assert torch.isfinite(signal.hidden_ND).all()


def test_a_large_student_with_other_decoder_blocks_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Student(made("llama"), tiny.tokenizer()).save(tmp_path)  # to be replaced
    monkeypatch.setattr(offload, "LARGE_BYTES", 1)
    student = Student(made("gpt2"), tiny.tokenizer())
    student.save(tmp_path)
    loaded = load_model(tmp_path, dtype=torch.float32)
    for name, value in student.model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)
