"""An export with a fault fails its replay, in transformers or in llama.cpp.

A stub stands in for llama.cpp: it runs the same file in transformers, and can simulate faults.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillhouse.errors import ModelError
from stillhouse.export import gguf_blocks, gguf_export, replay, replay_checks
from stillhouse.export.checkpoint import export_checkpoint
from stillhouse.export.gate import LLAMA_CPP_KL, Gate, ReplayResult, check_replay
from stillhouse.export.gguf_export import export_gguf
from stillhouse.quantize.quantization import FILE, Quantization
from stillhouse.quantize.quantize import quantize
from stillhouse.quantize.quantize_config import QuantizeRecipe
from tests import tiny
from tests.export.conftest import ToyWindows

pytestmark = pytest.mark.run

PROMPT = "the cat sees 42 trees"


@pytest.fixture
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp rounds inputs to 8 bits, too coarsely for a model with such large weights."""
    monkeypatch.setattr(gguf_export, "has_llama_cpp", lambda: False)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an int4 quantize stage; one layer is not quantized. The weights are so large
    that the model is sure of many tokens."""
    folder = tmp_path_factory.mktemp("rounded")
    words = tiny.merging_tokenizer()
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.8}
    tiny.llama(vocab_size=len(words), **shape).save_pretrained(folder / "student")
    words.save_pretrained(folder / "student")
    quantize(
        folder / "student",
        folder / "int4",
        section=QuantizeRecipe(kind="int4", keep=["layers.1"]),
        heldout=ToyWindows(),
        vocabulary=len(words),
        seed=0,
    )
    return folder / "int4"


def ship(rounded: Path, out: Path, **changes: Any) -> ReplayResult:
    gate = Gate(rounded / "model", ToyWindows(), [PROMPT], seed=0, **changes)
    grid = Quantization.load(rounded / FILE)
    return export_gguf(gate, out, kind="q4_0", name="toy", quantization=grid)


class Llama:
    """The parts of `llama_cpp.Llama` that the replay uses. noise: of every logit, in nats."""

    noise = 0.0
    template: str | None = None
    eos: int | None = None
    context = 0

    def __init__(self, file: str, *, n_ctx: int, **_: Any) -> None:
        path = Path(file)
        options = {"gguf_file": path.name, "dtype": torch.float32}
        self.model = AutoModelForCausalLM.from_pretrained(path.parent, **options)
        self.words = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        fields = gguf.GGUFReader(path).fields
        names = ("tokenizer.chat_template", "tokenizer.ggml.eos_token_id")
        self.metadata = {name: str(fields[name].contents()) for name in names}
        if self.template is not None:
            self.metadata["tokenizer.chat_template"] = self.template
        Llama.context = n_ctx
        self.scores = np.zeros((n_ctx, self.model.config.vocab_size), np.float32)
        self.ids: list[int] = []

    @property
    def n_tokens(self) -> int:
        return len(self.ids)

    def reset(self) -> None:
        self.ids = []

    @torch.inference_mode()
    def eval(self, ids: list[int]) -> None:
        self.ids += ids
        assert len(self.ids) <= len(self.scores), "past the context"
        logits_LV = self.model(torch.tensor([self.ids])).logits[0]
        generator = torch.Generator().manual_seed(len(self.ids))
        logits_LV += self.noise * torch.randn(logits_LV.shape, generator=generator)
        self.scores[: len(self.ids)] = logits_LV.numpy()

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        return list(self.words(text.decode())["input_ids"])

    def detokenize(self, ids: list[int], special: bool = False) -> bytes:
        return str(self.words.decode(ids)).encode()

    def token_eos(self) -> int:
        known = int(self.metadata["tokenizer.ggml.eos_token_id"])
        return known if self.eos is None else self.eos

    def token_bos(self) -> int:
        return 11  # llama.cpp's default; ignored if the source has no bos token

    def create_chat_completion(
        self, chat: list[dict[str, str]], *, max_tokens: int, **_: Any
    ) -> dict[str, Any]:
        write = Jinja2ChatFormatter(template=self.metadata["tokenizer.chat_template"])
        self.reset()
        self.eval(self.tokenize(write(messages=chat).prompt.encode()))
        start = len(self.ids)
        while len(self.ids) < start + max_tokens:
            token = int(self.scores[len(self.ids) - 1].argmax())
            if token == self.token_eos():
                break
            self.eval([token])
        text = self.words.decode(self.ids[start:], skip_special_tokens=True)
        return {"choices": [{"message": {"content": text}}]}


class Jinja2ChatFormatter:
    def __init__(self, *, template: str, **words: str) -> None:
        self.template, self.words = jinja2.Template(template), words

    def __call__(self, *, messages: list[dict[str, str]]) -> Any:
        variables = {"messages": messages, "add_generation_prompt": True, **self.words}
        self.prompt = self.template.render(variables)
        return self


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> type[Llama]:
    """The stub of llama.cpp; its class attributes are its faults."""
    package, formats = ModuleType("llama_cpp"), ModuleType("llama_cpp.llama_chat_format")
    stub = type("Stub", (Llama,), {})
    package.Llama = stub  # type: ignore[attr-defined]
    formats.Jinja2ChatFormatter = Jinja2ChatFormatter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp", package)
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_chat_format", formats)
    monkeypatch.setattr(gguf_export, "has_llama_cpp", lambda: True)
    return stub


def test_a_correct_export_passes_in_both_runtimes(
    rounded: Path, tmp_path: Path, llama: type[Llama]
) -> None:
    result = ship(rounded, tmp_path / "out")
    assert result.kl_limit == 0.001
    assert result.llama_cpp is not None
    assert result.llama_cpp.kl < 0.001
    assert result.texts[0].source == result.texts[0].exported != ""


def test_misplaced_weights_fail_even_within_the_formats_limit(
    rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = gguf_blocks.pack
    name = "model.layers.2.mlp.up_proj.weight"

    def scramble(*arguments: Any) -> Any:
        packed = pack(*arguments)
        kind, blocks = packed[name]
        swapped = blocks.copy()
        swapped[[0, 1]] = blocks[[1, 0]]
        return {**packed, name: (kind, swapped)}

    monkeypatch.setattr(gguf_export, "pack", scramble)
    loose = ship(rounded, tmp_path / "loose", kl_limit=1.0)
    assert 0.001 < loose.kl < 1.0, "q4_0's own limit"
    with pytest.raises(ModelError, match="differs from its source"):
        ship(rounded, tmp_path / "out")


@pytest.mark.parametrize("role", ["eos", "pad"])
def test_a_wrong_special_token_fails(
    rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    write = getattr(gguf.GGUFWriter, f"add_{role}_token_id")
    monkeypatch.setattr(
        gguf.GGUFWriter, f"add_{role}_token_id", lambda self, index: write(self, index + 2)
    )
    with pytest.raises(ModelError, match=f"a different {role} token: 2 instead of 0"):
        ship(rounded, tmp_path / "out")


@pytest.mark.usefixtures("without_llama_cpp")
def test_a_wrong_bos_token_fails(
    rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(rounded, tmp_path / "int4")
    words = AutoTokenizer.from_pretrained(source / "model")
    words.bos_token = "<|user|>"
    words.save_pretrained(source / "model")
    assert ship(source, tmp_path / "right").kl < 0.001
    write = gguf.GGUFWriter.add_bos_token_id
    monkeypatch.setattr(gguf.GGUFWriter, "add_bos_token_id", lambda self, _: write(self, 1))
    with pytest.raises(ModelError, match="a different bos token: 1 instead of 2"):
        ship(source, tmp_path / "wrong")


def test_a_different_chat_template_fails(
    rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = gguf.GGUFWriter.add_chat_template
    monkeypatch.setattr(
        gguf.GGUFWriter, "add_chat_template", lambda self, text: write(self, f"{text}\n")
    )
    with pytest.raises(ModelError, match="a different chat template"):
        ship(rounded, tmp_path / "out")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"template": tiny.CHAT_TEMPLATE + "\n\n"}, "in llama.cpp, rendered differently"),
        ({"eos": 2}, "in llama.cpp, a different eos token: 2 instead of 0"),
        ({"noise": 0.5}, "in llama.cpp differs from the same file in transformers"),
    ],
)
def test_a_difference_in_llama_cpp_fails_the_replay(
    rounded: Path, tmp_path: Path, llama: type[Llama], fault: dict[str, Any], message: str
) -> None:
    for name, value in fault.items():
        setattr(llama, name, value)
    with pytest.raises(ModelError, match=message):
        ship(rounded, tmp_path / "out")


def test_the_recipes_limit_applies_to_llama_cpp_too(
    rounded: Path, tmp_path: Path, llama: type[Llama]
) -> None:
    llama.noise = 0.5
    result = ship(rounded, tmp_path / "out", kl_limit=1.0)
    assert result.llama_cpp is not None
    assert LLAMA_CPP_KL < result.llama_cpp.kl < 1.0


def test_llama_cpps_context_has_room_for_the_prompt_and_its_answer(
    rounded: Path, tmp_path: Path, llama: type[Llama]
) -> None:
    source = shutil.copytree(rounded, tmp_path / "int4")
    gate = Gate(source / "model", ToyWindows(), ["a" * 600], seed=0)
    grid = Quantization.load(source / FILE)
    export_gguf(gate, tmp_path / "out", kind="q4_0", name="toy", quantization=grid)
    assert llama.context > 600 + 24


@pytest.mark.usefixtures("without_llama_cpp")
def test_sampling_settings_that_a_file_cannot_hold_do_not_change_the_text(
    rounded: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(rounded, tmp_path / "int4")
    model = AutoModelForCausalLM.from_pretrained(source / "model", dtype=torch.float32)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.save_pretrained(source / "model")
    result = ship(source, tmp_path / "out")
    assert result.texts[0].source == result.texts[0].exported


def test_the_text_that_a_model_is_sure_of_agrees_with_one_token_at_a_time(rounded: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(rounded / "model", dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(rounded / "model")
    lengths = []
    for prompt in ("the cat", "a dog 7", "she", PROMPT, "an apple"):
        text, sure = replay._greedy(model, words, prompt, 8)
        ids, written = replay_checks.prompt_ids(words, prompt), list[int]()
        with torch.no_grad():
            for _ in range(8):
                best = model(torch.tensor([ids + written])).logits[0, -1].topk(2)
                token = int(best.indices[0])
                if best.values[0] - best.values[1] < 1 or token < len(tiny.SPECIAL):
                    break
                written.append(token)
        lengths.append(len(written))
        assert sure == words.decode(written).rstrip("\N{REPLACEMENT CHARACTER}")
        assert text.startswith(sure)
    assert len(set(lengths)) > 1


def found(**changes: Any) -> dict[str, Any]:
    """The replay's answer for a correct export, with these changes to its comparison."""
    pair = {"kl": 1e-6, "top1_agreement": 1.0, "sure": 900, "moved": 0, **changes}
    texts = [{"prompt": "p", "source": "yes, it is", "exported": "yes, it was", "sure": "yes, it"}]
    return {"problems": [], "tokens": 1024, "pairs": {"source ‖ exported": pair}, "texts": texts}


@pytest.mark.parametrize(
    ("limit", "moved", "passes"),
    [
        (0.001, 18, True),
        (0.001, 19, False),
        (0.01, 45, True),
        (0.02, 46, False),
        (0.3, 181, False),
        (1.0, 450, True),
        (1.0, 451, False),
        (3.0, 900, True),
    ],
)
def test_the_limit_decides_how_many_sure_top_1_tokens_may_change(
    limit: float, moved: int, passes: bool
) -> None:
    if passes:
        check_replay(found(moved=moved), limit, 0.02, Path("source"), "more bits")
    else:
        with pytest.raises(ModelError, match=f"top-1 token at {moved} of the 900"):
            check_replay(found(moved=moved), limit, 0.02, Path("source"), "more bits")


def test_few_sure_tokens_are_not_compared() -> None:
    check_replay(found(sure=99, moved=50), 0.001, 0.02, Path("source"), "more bits")


def test_a_different_answer_fails_if_the_weights_are_the_sources() -> None:
    answer = found()
    check_replay(answer, 0.001, 0.02, Path("source"), "more bits")
    answer["texts"][0]["exported"] = "yes, he was"
    check_replay(answer, 0.02, 0.02, Path("source"), "more bits")
    with pytest.raises(ModelError, match="answers 'p' with 'yes, he was', but its source with"):
        check_replay(answer, 0.001, 0.02, Path("source"), "more bits")


def test_sure_tokens_and_those_that_changed_are_counted() -> None:
    p_NV = torch.tensor([[3.0, 0, 0], [0.5, 0, 0], [0, 4, 1], [2, 0, 0]])
    q_NV = torch.tensor([[0.0, 3, 0], [0, 0.5, 0], [0, 2, 1], [1, 0, 0]])
    pair = replay.Pair()
    pair.add(p_NV, q_NV)
    assert (pair.same, pair.sure, pair.moved) == (2, 3, 1)


def test_a_safetensors_export_with_a_different_text_fails(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text begins differently although every number is the source's."""
    write, calls = replay._greedy, iter(range(100))

    def greedy(*arguments: Any) -> tuple[str, str]:
        """The source's text, then the export's, which begins differently."""
        text, sure = write(*arguments)
        return (f"no {text}" if next(calls) % 2 else text), sure

    gate = Gate(trained, ToyWindows(), ["word3 word4"], seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(replay, "_greedy", greedy)
        patch.setattr(replay, "SURE", 0.0)
        with pytest.raises(ModelError, match="its source with"):
            export_checkpoint(gate, tmp_path / "out", dtype="float32")
    export_checkpoint(gate, tmp_path / "out", dtype="float32")
