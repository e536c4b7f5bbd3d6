"""Models whose chat templates are tested, and the special tokens of their tokenizers."""

from __future__ import annotations

from dataclasses import dataclass

IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LLAMA_3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
INST = (
    "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
)  # fmt: skip
PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
DEEPSEEK = (
    "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<｜tool▁sep｜>",
)  # fmt: skip
GRANITE = ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>")
GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|constrain|>")
R1_EOS = "<｜end▁of▁sentence｜>"


@dataclass(frozen=True)
class Model:
    """A model's chat template and special tokens.

    source: a file with the template, or its name in test-chat-template.cpp. eos, bos, special:
    tokens of the model's own tokenizer. ends: eos_token_id of its generation config, besides EOS.
    """

    source: str
    eos: str
    bos: str
    special: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()


OLMO_2 = "OLMo-2-1124-13B-Instruct/tokenizer_config.json"

MODELS = {
    "Llama 2": Model("models/llama-2-chat.json", "</s>", "<s>"),
    "Llama 2 (a fine-tuned one)": Model("bofenghuang/vigogne-2-70b-chat", "</s>", "<s>"),
    "Llama 3": Model("Llama-3", "<|eot_id|>", "<|begin_of_text|>", LLAMA_3),
    "Llama 3.1": Model(
        "meta-llama-Llama-3.1-8B-Instruct.jinja", "<|eot_id|>", "<|begin_of_text|>", LLAMA_3
    ),
    "Llama 3.2": Model(
        "meta-llama-Llama-3.2-3B-Instruct.jinja", "<|eot_id|>", "<|begin_of_text|>", LLAMA_3
    ),
    "Qwen 2.5": Model("Qwen-Qwen2.5-7B-Instruct.jinja", "<|im_end|>", "<|endoftext|>", IM),
    "Qwen 2.5 base": Model("Qwen-Qwen2.5-7B-Instruct.jinja", "<|endoftext|>", "<bos>", IM),
    "Qwen 3": Model(
        "Qwen-Qwen3-0.6B.jinja", "<|im_end|>", "<|endoftext|>", (*IM, "<think>", "</think>")
    ),
    "Gemma": Model("google/gemma-7b-it", "<eos>", "<bos>", ("<start_of_turn>", "<end_of_turn>")),
    "Gemma 2": Model(
        "google-gemma-2-2b-it.jinja", "<eos>", "<bos>", ("<start_of_turn>", "<end_of_turn>")
    ),
    "Gemma 3": Model(
        "models/gemma-3-1b-it.json",
        "<eos>",
        "<bos>",
        ("<start_of_turn>", "<end_of_turn>", "<start_of_image>"),
        ("<end_of_turn>",),
    ),
    "Gemma 4": Model(
        "google-gemma-4-31B-it.jinja",
        "<eos>",
        "<bos>",
        ("<|turn>", "<turn|>", "<|channel>", "<channel|>"),
    ),
    "Phi 3 mini": Model("Phi-3-mini", "<|endoftext|>", "<s>", PHI),
    "Phi 3 medium": Model("Phi-3-medium", "<|endoftext|>", "<s>", PHI),
    "Phi 3.5": Model("microsoft-Phi-3.5-mini-instruct.jinja", "<|endoftext|>", "<s>", PHI),
    "Phi 4": Model("phi-4", "<|im_end|>", "<|endoftext|>", (*IM, "<|im_sep|>")),
    "Mistral v0.2": Model(
        "mistralai/Mistral-7B-Instruct-v0.2 (NOTE: Old pre-v1 without a system prompt)",
        "</s>",
        "<s>",
    ),
    "Mistral v1": Model(
        "mistralai/Mistral-7B-Instruct-v0.2 (mistralai 'v1' template with a system prompt)",
        "</s>",
        "<s>",
    ),
    "Mistral v3": Model(
        "Mistral-Large-Instruct-2407 (mistralai 'v3' template; modified to have system prompt at "
        "start)",
        "</s>",
        "<s>",
        INST,
    ),
    "Mistral tekken": Model("mistralai-Mistral-Nemo-Instruct-2407.jinja", "</s>", "<s>", INST),
    "Mistral Small 3.2": Model(
        "Mistral-Small-3.2-24B-Instruct-2506.jinja",
        "</s>",
        "<s>",
        (*INST, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    ),
    "Ministral 3 Reasoning": Model(
        "mistralai-Ministral-3-14B-Reasoning-2512.jinja",
        "</s>",
        "<s>",
        (*INST, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]"),
    ),
    "DeepSeek R1 (Llama 8B)": Model(
        "deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja",
        R1_EOS,
        "<｜begin▁of▁sentence｜>",
        DEEPSEEK,
    ),
    "DeepSeek R1 (Qwen 32B)": Model(
        "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B.jinja",
        R1_EOS,
        "<｜begin▁of▁sentence｜>",
        DEEPSEEK,
    ),
    "SmolLM 2": Model("SmolLM2-135M-Instruct.Q4_1.gguf", "<|im_end|>", "<|im_start|>", IM),
    "SmolLM 3": Model("HuggingFaceTB-SmolLM3-3B.jinja", "<|im_end|>", "<|begin_of_text|>", IM),
    "gpt-oss": Model("openai-gpt-oss-120b.jinja", "<|return|>", "<|startoftext|>", HARMONY),
    "Granite 3.0": Model(
        "ibm-granite/granite-3.0-8b-instruct", "<|end_of_text|>", "<bos>", GRANITE
    ),
    "Granite 3.3": Model(
        "ibm-granite-granite-3.3-2B-Instruct.jinja", "<|end_of_text|>", "<bos>", GRANITE
    ),
    "Granite 4.0": Model("ibm-granite-granite-4.0.jinja", "<|end_of_text|>", "<bos>", GRANITE),
    "GLM 4": Model("ChatGLM4", "<|endoftext|>", "<bos>", GLM, ("<|user|>", "<|observation|>")),
    "GLM 4-0414": Model(
        "models/glm4-0414.json", "<|endoftext|>", "<bos>", GLM, ("<|user|>", "<|observation|>")
    ),
    "GLM 4.6": Model(
        "GLM-4.6.jinja", "<|endoftext|>", "<bos>", GLM, ("<|user|>", "<|observation|>")
    ),
    "OLMo 2": Model(OLMO_2, "<|endoftext|>", "<|endoftext|>", ("<|im_start|>", "<|im_end|>")),
    "Command R7B": Model(
        "CohereForAI-c4ai-command-r7b-12-2024-tool_use.jinja",
        "<|END_OF_TURN_TOKEN|>",
        "<BOS_TOKEN>",
        (
            "<|START_OF_TURN_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
            "<|START_THINKING|>",
            "<|END_THINKING|>",
            "<|START_RESPONSE|>",
            "<|END_RESPONSE|>",
        ),
    ),
    "Seed-OSS": Model(
        "ByteDance-Seed-OSS.jinja",
        "<seed:eos>",
        "<seed:bos>",
        ("<seed:think>", "</seed:think>"),
    ),
    "Nemotron Nano 2": Model(
        "NVIDIA-Nemotron-Nano-v2.jinja", "<SPECIAL_12>", "<s>", ("<SPECIAL_10>", "<SPECIAL_11>")
    ),
    "Kimi K2": Model(
        "Kimi-K2-Thinking.jinja",
        "<|im_end|>",
        "[BOS]",
        ("<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"),
    ),
    "Llama 3.3": Model(
        "meta-llama-Llama-3.3-70B-Instruct.jinja", "<|eot_id|>", "<|begin_of_text|>", LLAMA_3
    ),
    "QwQ": Model("Qwen-QwQ-32B.jinja", "<|im_end|>", "<|endoftext|>", IM),
    "Qwen 3 Coder": Model("Qwen3-Coder.jinja", "<|im_end|>", "<|endoftext|>", IM),
    "Qwen 3.5": Model("Qwen3.5-4B.jinja", "<|im_end|>", "<|endoftext|>", IM),
    "DeepSeek V3.1": Model(
        "deepseek-ai-DeepSeek-V3.1.jinja", R1_EOS, "<｜begin▁of▁sentence｜>", DEEPSEEK
    ),
    "GLM 4.7 Flash": Model(
        "GLM-4.7-Flash.jinja", "<|endoftext|>", "<bos>", GLM, ("<|user|>", "<|observation|>")
    ),
    "LFM2": Model("LFM2-8B-A1B.jinja", "<|im_end|>", "<|startoftext|>", IM),
    "MiniMax M2": Model("MiniMax-M2.jinja", "[e~[", "]~!b[", ("]~b]",)),
    "Hermes 3": Model(
        "NousResearch-Hermes-3-Llama-3.1-8B-tool_use.jinja", "<|im_end|>", "<|begin_of_text|>", IM
    ),
    "Nemotron 3 Nano": Model("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16.jinja", "<|im_end|>", "<s>", IM),
    "Apertus": Model(
        "Apertus-8B-Instruct.jinja",
        "<|assistant_end|>",
        "<s>",
        ("<|system_end|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>"),
    ),
    "Kimi K2 Instruct": Model(
        "moonshotai-Kimi-K2.jinja",
        "<|im_end|>",
        "[BOS]",
        ("<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"),
    ),
    "Solar Open": Model(
        "upstage-Solar-Open-100B.jinja",
        "<|end|>",
        "<s>",
        ("<|begin|>", "<|content|>", "<|think|>", "<|tool_calls|>", "<|calls|>", "<|flush|>"),
    ),
    "Bielik 11B": Model("Bielik-11B-v3.0-Instruct.jinja", "<|im_end|>", "<s>", IM),
    "Hunyuan 3": Model(
        "tencent-Hy3.jinja",
        "<｜hy_eos:opensource｜>",
        "<｜hy_begin▁of▁sentence:opensource｜>",
        ("<｜hy_User:opensource｜>", "<｜hy_Assistant:opensource｜>"),
    ),
    "YandexGPT 5 Lite": Model("yandex/YandexGPT-5-Lite-8B-instruct", "</s>", "<s>", ("[SEP]",)),
    "Command R+": Model(
        "CohereForAI/c4ai-command-r-plus",
        "<|END_OF_TURN_TOKEN|>",
        "<BOS_TOKEN>",
        ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    ),
    "Vicuna": Model("eachadea/vicuna-13b-1.1", "</s>", "<s>"),
}
