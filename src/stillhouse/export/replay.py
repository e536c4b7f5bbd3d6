"""Script that replays an export with transformers, torch, safetensors, and, if installed,
llama.cpp.

`python -P replay.py FOLDER` reads FOLDER/request.json and FOLDER/windows.safetensors, and writes
FOLDER/answer.json. It acts as a user without Stillhouse, so it imports nothing from Stillhouse.

Shapes: L tokens in a window, N supervised rows in a window, V vocabulary.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

if TYPE_CHECKING:
    from stillhouse.export import replay_checks as checks
else:
    # `python -P` does not search this folder, because its modules would hide packages.
    spec = spec_from_file_location("replay_checks", Path(__file__).with_name("replay_checks.py"))
    checks = module_from_spec(spec)
    spec.loader.exec_module(checks)

ROWS = 512
"""Maximum number of supervised rows to compare per window, which bounds the memory for logits."""
SURE = 1.0
"""A model is sure of its top-1 token if its logit exceeds all others by this many nats."""
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
GREEDY |= dict.fromkeys(("temperature", "top_p", "top_k"))
SPEED_PROMPT, SPEED_TOKENS, SPEED_ROUNDS = 8, 12, 3
"""Numbers of prompt tokens, of timed generated tokens, and of rounds; runtimes alternate."""

Window = dict[str, torch.Tensor]
Answers = Callable[[str, Window, torch.Tensor], torch.Tensor]
"""Returns a runtime's logits [N, V] for rows of a named window."""
Step = Callable[[list[int]], int]
"""Reads more tokens, and returns the most likely next token; [] resets."""


def main(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    windows = by_place(load_file(folder / "windows.safetensors"))
    exported = Path(request["exported"])
    options = {"local_files_only": True, "trust_remote_code": request["trust_remote_code"]}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source_model = AutoModelForCausalLM.from_pretrained(
        request["source"], dtype=torch.float32, **options
    ).to(device)
    source_tokenizer = AutoTokenizer.from_pretrained(request["source"], **options)
    if exported.is_file():
        source_tokenizer = checks.as_stored(
            source_tokenizer, Path(request["source"]), request["prompts"]
        )
    prompts, new, same = request["prompts"], request["max_new_tokens"], request["same_tokens"]
    runtimes: dict[str, Answers] = {"source": partial(logits_of, source_model)}
    steps: dict[str, Step] = {"source": stepping(source_model)}
    problems: list[str] = []
    if request["transformers"]:
        model, info, tokenizer = _load(exported, options, float32=request["float32"])
        model = model.to(device)
        problems += checks.weight_problems(model, info, exported)
        problems += checks.tokenizer_problems(source_tokenizer, tokenizer, prompts if same else [])
        runtimes["exported"] = partial(logits_of, model)
        write: Callable[[str, int], tuple[str, str]] = partial(_greedy, model, tokenizer)
    if request["llama_cpp"]:
        lengths = [len(checks.prompt_ids(source_tokenizer, prompt)) + new for prompt in prompts]
        lengths += [int(window["position_ids"].max()) + 1 for window in windows.values()]
        llama = LlamaCpp(exported, max(512, *lengths))
        # If transformers cannot read the file, only llama.cpp is compared.
        runtimes["llama.cpp" if "exported" in runtimes else "exported"] = llama.logits_of
        steps["exported"], write = llama.step, llama.greedy
        problems += llama.problems(source_tokenizer, prompts, plain=request["plain_prompts"])
    elif not exported.is_file():
        # A GGUF file's speed is not measured in transformers, where its numbers are float32.
        steps["exported"] = stepping(model)
    if request["teacher_logits"]:
        stored = safe_open(request["teacher_logits"], framework="pt")
        runtimes["teacher"] = lambda name, window, rows_N: stored.get_tensor(name)
    answer: dict[str, Any] = {"problems": problems}
    if not answer["problems"]:
        answer["tokens"], answer["pairs"] = _compare(runtimes, windows)
        answer["decode_tokens_per_s"] = _speeds(steps, next(iter(windows.values()))["input_ids"])
        answer["texts"] = []
        for prompt in prompts:
            text, sure = _greedy(source_model, source_tokenizer, prompt, new)
            # If the tokenizer is known to differ, texts cannot be compared.
            sure = sure if same or request["llama_cpp"] else ""
            texts = {"prompt": prompt, "source": text, "exported": write(prompt, new)[0]}
            answer["texts"].append({**texts, "sure": sure})
        if request["rounds_to"]:
            # This must come last, because it changes the source.
            _round(source_model, getattr(torch, request["rounds_to"]), model)
            runtimes = {name: runtimes[name] for name in ("source", "exported")}
            found = _compare(runtimes, windows)[1]["source ‖ exported"]
            answer["pairs"]["rounded source ‖ exported"] = found
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def _load(
    exported: Path, options: dict[str, Any], *, float32: bool
) -> tuple[Any, dict[str, Any], Any]:
    """Load the model, loading info, and tokenizer. A folder is loaded in its own dtype or in
    float32, and a GGUF file in float32."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": exported}
    if exported.is_file():
        where = {"pretrained_model_name_or_path": exported.parent, "gguf_file": exported.name}
    dtype = torch.float32 if float32 or exported.is_file() else "auto"
    model, info = AutoModelForCausalLM.from_pretrained(
        **where, dtype=dtype, output_loading_info=True, **options
    )
    return model.eval(), info, AutoTokenizer.from_pretrained(**where, **options)


@torch.no_grad()
def _round(source: Any, dtype: torch.dtype, exported: Any) -> None:
    """Round the source's parameters to `dtype`, and convert them to the export's dtype.

    Buffers stay as they are: those that are not in a checkpoint are float32 in every loaded model.
    """
    for parameter, other in zip(source.parameters(), exported.parameters(), strict=True):
        parameter.data = parameter.data.to(dtype).to(other.dtype)


def by_place(tensors: dict[str, torch.Tensor]) -> dict[str, Window]:
    """Group tensors named PLACE.PART into windows, in order."""
    windows: dict[str, Window] = {}
    for name, tensor in tensors.items():
        place, key = name.split(".")
        windows.setdefault(place, {})[key] = tensor
    return {place: windows[place] for place in sorted(windows, key=int)}


@dataclass
class Pair:
    """Sums over positions of a comparison of two models.

    kl: KL(first ‖ second) in nats.
    same: positions with the same top-1 token.
    sure: positions where the first model is sure.
    moved: positions where the first model is sure, but the second has a different top-1 token.
    """

    kl: float = 0.0
    same: int = 0
    sure: int = 0
    moved: int = 0

    def add(self, p_NV: torch.Tensor, q_NV: torch.Tensor) -> None:
        # Logits beyond the shared vocabulary are padding.
        shared = min(p_NV.shape[1], q_NV.shape[1])
        p_NV, q_NV = p_NV[:, :shared].cpu(), q_NV[:, :shared].cpu()
        same_N = p_NV.argmax(-1) == q_NV.argmax(-1)
        best_N2 = p_NV.topk(2).values
        sure_N = best_N2[:, 0] - best_N2[:, 1] >= SURE
        self.same += int(same_N.sum())
        self.sure += int(sure_N.sum())
        self.moved += int((sure_N & ~same_N).sum())
        for p, q in zip(p_NV.split(64), q_NV.split(64), strict=True):
            log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
            self.kl += float((log_p.exp() * (log_p - log_q)).sum())

    def means(self, tokens: int) -> dict[str, float]:
        mean = {"kl": self.kl / tokens, "top1_agreement": self.same / tokens}
        return {**mean, "sure": self.sure, "moved": self.moved}


@torch.inference_mode()
def _compare(
    runtimes: dict[str, Answers], windows: dict[str, Window]
) -> tuple[int, dict[str, dict[str, float]]]:
    """Return the number of supervised tokens, and each pair's means, by "first ‖ second".

    Pairs are the source with its exports, the export with the same file in llama.cpp, and the
    teacher, if there is one, with source and export.
    """
    others = [name for name in runtimes if name not in ("source", "teacher")]
    pairs = {("source", name): Pair() for name in others}
    if "llama.cpp" in runtimes:
        pairs["exported", "llama.cpp"] = Pair()
    if "teacher" in runtimes:
        pairs |= {("teacher", name): Pair() for name in ("source", "exported")}
    tokens = 0
    for name, window in windows.items():
        rows_N = rows_of(window["labels"])
        logits = {runtime: ask(name, window, rows_N) for runtime, ask in runtimes.items()}
        for (first, second), pair in pairs.items():
            pair.add(logits[first], logits[second])
        tokens += len(rows_N)
    return tokens, {" ‖ ".join(names): pair.means(tokens) for names, pair in pairs.items()}


def rows_of(labels_L: torch.Tensor) -> torch.Tensor:
    """The rows to compare; the logits at t-1 predict the label at t."""
    return (labels_L[1:] != -100).nonzero().flatten()[:ROWS]


@torch.inference_mode()
def logits_of(model: Any, _name: str, window: Window, rows_N: torch.Tensor) -> torch.Tensor:
    """The logits [N, V] of these rows. No mask is needed, because restarting positions separate the
    documents."""
    end = int(rows_N[-1]) + 1
    logits_1NV: torch.Tensor = model(
        input_ids=window["input_ids"][None, :end].to(model.device),
        position_ids=window["position_ids"][None, :end].to(model.device),
        logits_to_keep=rows_N.to(model.device),
        use_cache=False,
    ).logits
    return logits_1NV[0].float()


def _speeds(steps: dict[str, Step], ids_L: torch.Tensor) -> dict[str, float]:
    """Each runtime's decoding speed in tokens/s, from the median step of all rounds."""
    prompt = ids_L[:SPEED_PROMPT].tolist()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(SPEED_ROUNDS):
        for name, step in steps.items():
            step([])
            token = step(prompt)
            for _ in range(SPEED_TOKENS):
                began = time.perf_counter()
                token = step([token])
                seconds[name].append(time.perf_counter() - began)
    return {name: 1 / statistics.median(taken) for name, taken in seconds.items()}


def stepping(model: Any) -> Step:
    """The step function of a transformers model with its cache."""
    cache: dict[str, Any] = {}  # By argument name, which is different for Mamba and RWKV.

    @torch.inference_mode()
    def step(ids: list[int]) -> int:
        if not ids:
            cache.clear()
            return 0
        ids_1L = torch.tensor([ids], device=model.device)
        output = model(input_ids=ids_1L, use_cache=True, **cache)
        for name in ("past_key_values", "cache_params", "state"):
            if getattr(output, name, None) is not None:
                cache[name] = output[name]
        return int(output.logits[0, -1].argmax())  # Waits for a GPU.

    return step


@torch.inference_mode()
def _greedy(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> tuple[str, str]:
    """The greedy text, and its part before the first token that the model is not sure of.

    Ignores the model's own sampling settings, which not every format stores.
    """
    ids_1L = torch.tensor([checks.prompt_ids(tokenizer, prompt)], device=model.device)
    output = model.generate(
        input_ids=ids_1L,
        attention_mask=torch.ones_like(ids_1L),
        **GREEDY,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    ids = output.sequences[0, ids_1L.shape[1] :].tolist()
    sure = 0
    for index, logits_1V in zip(ids, output.logits, strict=True):
        others_V = logits_1V[0].clone()
        others_V[index] = -torch.inf
        # The runtime decides where a text ends, because it can know more stop tokens.
        if logits_1V[0, index] - others_V.max() < SURE or index in tokenizer.added_tokens_decoder:
            break
        sure += 1
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    full_text, part = tokenizer.decode(ids, **options), tokenizer.decode(ids[:sure], **options)
    return str(full_text), str(part).rstrip("\N{REPLACEMENT CHARACTER}")  # Incomplete characters.


class LlamaCpp:
    """A GGUF file in llama.cpp, with the same interface as other runtimes."""

    def __init__(self, file: Path, context: int = 512) -> None:
        import llama_cpp

        self.llama: Any = llama_cpp.Llama(
            str(file),
            n_ctx=context,
            n_threads=torch.get_num_threads(),
            logits_all=True,
            verbose=False,
        )

    def logits_of(self, _name: str, window: Window, rows_N: torch.Tensor) -> torch.Tensor:
        """Run each document of the window separately, since its positions start from 0."""
        end = int(rows_N[-1]) + 1
        ids, positions = window["input_ids"][:end].tolist(), window["position_ids"][:end]
        starts = [*(positions == 0).nonzero().flatten().tolist(), end]
        parts = []
        for start, stop in itertools.pairwise(starts):
            self.llama.reset()
            self.llama.eval(ids[start:stop])
            parts.append(torch.from_numpy(self.llama.scores[: stop - start].copy()))
        return torch.cat(parts)[rows_N]

    def step(self, ids: list[int]) -> int:
        if not ids:
            self.llama.reset()
            return 0
        self.llama.eval(ids)
        return int(self.llama.scores[self.llama.n_tokens - 1].argmax())

    def tokens(self, text: str) -> list[int]:
        """llama.cpp's tokens for a text, including special tokens."""
        return list(self.llama.tokenize(text.encode(), special=True))

    def chat_tokens(self, prompt: str) -> list[int]:
        """A prompt's tokens, through the file's chat template if it has one."""
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        known = self.llama.metadata
        if "tokenizer.chat_template" not in known:
            return self.tokens(prompt)
        words = {}
        for role in ("eos", "bos"):
            index = known.get(f"tokenizer.ggml.{role}_token_id")
            token = b"" if index is None else self.llama.detokenize([int(index)], special=True)
            words[f"{role}_token"] = token.decode()
        write = Jinja2ChatFormatter(template=known["tokenizer.chat_template"], **words)
        written = write(messages=[{"role": "user", "content": prompt}]).prompt
        return list(self.llama.tokenize(written.encode(), add_bos=False, special=True))

    def problems(self, source: Any, prompts: list[str], *, plain: bool) -> list[str]:
        """Describe special tokens and prompts that llama.cpp treats differently from the source's
        tokenizer. plain: also compare prompts without the chat template."""
        found = checks.other_roles(
            source, {"eos": self.llama.token_eos(), "bos": self.llama.token_bos()}
        )
        tokens = self.tokens if plain else lambda text: source(text)["input_ids"]
        found += checks.tokenized_otherwise(source, tokens, self.chat_tokens, prompts)
        return [f"in llama.cpp, {problem}" for problem in found]

    def greedy(self, prompt: str, max_new_tokens: int) -> tuple[str, str]:
        """Like `_greedy`, without the sure part; through the file's chat template if it has one."""
        options = {"temperature": 0.0, "repeat_penalty": 1.0, "max_tokens": max_new_tokens}
        if "tokenizer.chat_template" in self.llama.metadata:
            chat = [{"role": "user", "content": prompt}]
            choice = self.llama.create_chat_completion(chat, **options)["choices"][0]
            return str(choice["message"]["content"]), ""
        return str(self.llama.create_completion(prompt, **options)["choices"][0]["text"]), ""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
