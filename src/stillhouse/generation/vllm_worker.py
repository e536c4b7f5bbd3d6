"""Runs a vLLM engine in a separate process that exchanges requests and replies as JSON.

`python -P vllm_worker.py` reads requests from standard input and writes replies to standard output,
one JSON object per line; a reply with `bytes` is followed by that many bytes. It imports nothing
from Stillhouse, so vLLM can be in a separate environment with a different transformers.
`python -P vllm_worker.py probe` prints what is installed in that environment.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, BinaryIO

POOLING: dict[str, Any] = {
    "runner": "pooling",
    "convert": "embed",
    "pooler_config": {"task": "token_embed", "use_activation": False},
}
"""Arguments of vllm.LLM for a language model that returns hidden states."""
SAME_NORM = 0.02
"""Maximum difference between two computations of the final norm, relative to the largest value;
bfloat16 has eight bits."""


def probe() -> dict[str, Any]:
    """Report the packages of this Python and the GPUs that its torch sees; imports only torch."""
    packages = {name: importlib.util.find_spec(name) is not None for name in ("vllm", "ray")}
    try:
        import torch
    except ImportError:
        return {**packages, "gpus": 0}
    return {**packages, "gpus": torch.cuda.device_count()}


def open_llm(options: dict[str, Any], layers: Sequence[int] = ()) -> tuple[Any, int]:
    """Open a vllm.LLM; return it with its maximum number of tokens in prompt and answer.

    layers: layers whose hidden states `hidden_states` returns in addition to the last ones. Raises
    ValueError if the architecture's layers cannot be read.
    """
    from vllm import LLM

    if layers:
        # vLLM's processes then accept functions from each other.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    llm = LLM(**options)
    if layers:
        keep_layers(llm, layers)
    return llm, int(llm.llm_engine.model_config.max_model_len)


def hidden_states(llm: Any, prompts: list[list[int]]) -> list[Any]:
    """The last hidden states of each prompt, after the final norm: [L, D].

    The model must have been opened with `POOLING`. Hidden states of `keep_layers` are concatenated
    before them: [L, D · (layers + 1)].
    """
    from vllm import PoolingParams

    outputs = llm.encode(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        pooling_params=PoolingParams(use_activation=False),  # the activation would normalize
        pooling_task=POOLING["pooler_config"]["task"],
        use_tqdm=False,
    )
    return [output.outputs.data for output in outputs]


def keep_layers(llm: Any, layers: Sequence[int]) -> None:
    """Make a model also return the hidden states after these layers.

    Layer 0 is the embeddings, and layer i is the output of block i. Requires `enforce_eager`,
    because a compiled model runs no hooks. Raises ValueError if the final norm of the last block's
    output differs from the model's output, because the blocks would then mean something else.
    """

    # These functions are sent by value to vLLM's processes.
    def install(worker: Any) -> None:
        _record_blocks(worker.get_model(), layers)

    def deviation(worker: Any) -> float:
        return float(worker.get_model().stillhouse_deviation)

    llm.collective_rpc(install)
    hidden_states(llm, [[0] * 4])
    worst = max(llm.collective_rpc(deviation))
    if not worst < SAME_NORM:
        raise ValueError(
            f"the layers of this architecture cannot be read (relative deviation {worst:.2g}): "
            "use terms on the output alone, or a local teacher"
        )


def _record_blocks(model: Any, layers: Sequence[int]) -> None:
    """Install the hooks, in the process where vLLM runs the model.

    A block returns its output, or two parts whose sum is its output.
    """
    import inspect

    import torch

    named = dict(model.named_modules())
    name, blocks = next(
        (name, each)
        for name, each in named.items()
        if name.endswith("layers") and isinstance(each, torch.nn.ModuleList)
    )
    norm = named[f"{name.removesuffix('layers')}norm"]
    kept: dict[int, Any] = {}

    def keep(number: int) -> Any:
        def hook(_module: Any, _arguments: Any, output: Any) -> None:
            if not isinstance(output, tuple):
                kept[number] = output.clone()
            elif len(output) > 1 and output[1] is not None:
                kept[number] = output[0] + output[1]
            else:
                kept[number] = output[0].clone()

        return hook

    def keep_embeddings(module: Any, arguments: Any, named_arguments: Any) -> None:
        bound = inspect.signature(module.forward).bind(*arguments, **named_arguments)
        kept[0] = bound.arguments["hidden_states"].clone()

    def side_by_side(_module: Any, _arguments: Any, output: Any) -> Any:
        last = kept.pop(len(blocks))
        if model.stillhouse_deviation is None:
            normed = norm(last)
            apart = (normed.float() - output.float()).abs().max()
            model.stillhouse_deviation = apart / output.float().abs().max()
        return torch.cat([*(kept.pop(layer) for layer in layers), output], -1)

    model.stillhouse_deviation = None
    for number in {*layers, len(blocks)} - {0}:
        blocks[number - 1].register_forward_hook(keep(number))
    if 0 in layers:
        blocks[0].register_forward_pre_hook(keep_embeddings, with_kwargs=True)
    model.register_forward_hook(side_by_side)


def generate(llm: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Generate a continuation for each row.

    rows: "prompt" with token ids, and "sampling" with arguments of vllm.SamplingParams.
    """
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": row["prompt"]} for row in rows],
        sampling_params=[SamplingParams(**row["sampling"]) for row in rows],
        use_tqdm=False,
    )
    return [_answer(output.outputs[0]) for output in outputs]


def load_weights(llm: Any, folder: str) -> None:
    """Load the weights of a checkpoint; wake up the memory first if it is asleep."""
    if llm.llm_engine.model_config.enable_sleep_mode:
        llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
    if llm.llm_engine.model_config.enable_sleep_mode:
        llm.wake_up(tags=["kv_cache"])
    llm.reset_prefix_cache()  # it was computed with the old weights


def sleep(llm: Any) -> None:
    """Release GPU memory until `load_weights`; does nothing without `enable_sleep_mode`."""
    if llm.llm_engine.model_config.enable_sleep_mode:
        llm.sleep(level=2)  # weights are discarded


def _answer(output: Any) -> dict[str, Any]:
    logprobs = None
    if output.logprobs is not None:
        positions = zip(output.token_ids, output.logprobs, strict=True)
        logprobs = [float(at[token].logprob) for token, at in positions]
    return {
        "text": output.text,
        "ids": list(output.token_ids),
        "stop": output.finish_reason,
        "logprobs": logprobs,
    }


def reason(error: BaseException) -> str:
    """The error on one line."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[-1]}"


def serve() -> None:
    """Answer {"open": options, "layers": [...]}, {"generate": rows}, {"hidden": prompts},
    {"weights": folder}, and {"sleep": true} until {"stop": true} arrives.

    Must lead its own process group: the entire group, including vLLM's other processes, is killed
    as soon as standard input is closed, i.e. when the parent process has died.
    """
    # vLLM and its other processes must not print to or read from the two pipes.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    lines = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(lines, requests), daemon=True).start()
    llm: Any = None
    while "stop" not in (request := requests.get()):
        reply: dict[str, Any] = {}
        content = b""
        try:
            if "open" in request:
                llm, reply["window"] = open_llm(request["open"], request["layers"])
            elif "hidden" in request:
                reply, content = _as_bytes(hidden_states(llm, request["hidden"]))
            elif "weights" in request:
                load_weights(llm, request["weights"])
            elif "sleep" in request:
                sleep(llm)
            else:
                reply["answers"] = generate(llm, request["generate"])
        # vLLM raises errors of many types, including GPU errors.
        except Exception as error:
            reply = {"error": reason(error)}
        replies.write(json.dumps(reply).encode() + b"\n" + content)
        replies.flush()
    del llm
    gc.collect()


def _as_bytes(tensors: list[Any]) -> tuple[dict[str, Any], bytes]:
    """Concatenate all rows as bytes in this machine's byte order."""
    import torch

    rows = torch.cat(tensors).contiguous()
    content = rows.view(torch.uint8).numpy().tobytes()
    dtype = str(rows.dtype).removeprefix("torch.")
    return {"dtype": dtype, "width": rows.shape[1], "bytes": len(content)}, content


def _receive(lines: BinaryIO, requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in lines:
        requests.put(json.loads(line))
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1:] == ["probe"]:
        sys.stdout.write(json.dumps(probe()) + "\n")
    else:
        serve()
