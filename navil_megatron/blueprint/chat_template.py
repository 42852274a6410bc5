"""How a conversation reads as a prompt, written once: training rows are cut from it, exported folders carry it.

As the authors' ``chat`` writes it (MPT style): turns follow each other without a newline, images that begin a turn
stand on a line each, later ones where they are. It is Jinja as transformers renders it, in the
subset that other engines know, too.
"""

from collections.abc import Collection

from navil_megatron.config.model import ModelConfig

TURN_TOKENS = ("<|im_start|>", "<|im_end|>")
"""What starts and ends a turn."""
PLACEHOLDER = "<image>"
"""Where an image stands."""

AUTHORS_SYSTEM_MESSAGE = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
"""The system turn that the authors' code starts with where none is given."""

_THOUGHT_TOKENS = {"<think>", "</think>"}
_EMPTY_THOUGHT = "<think>\n\n</think>\n\n"

_CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% set turn = namespace(leading=true) %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{% set turn.leading = false %}{{ part['text'] }}"
    "{% elif turn.leading %}<image>\n{% else %}<image>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>"
)


def chat_template(vocabulary: Collection[str], system_message: str = "") -> str | None:
    """The template for a tokenizer with these tokens; ``None`` where it lacks one that starts or ends a turn.

    Answers follow an empty thought where the tokenizer knows thoughts (Qwen3), as in the authors' 9B. The message is
    the system turn of a conversation that has none of its own.
    """
    if not set(TURN_TOKENS) <= set(vocabulary):
        return None
    thought = _EMPTY_THOUGHT if set(vocabulary) >= _THOUGHT_TOKENS else ""
    system = f"<|im_start|>system\n{system_message}<|im_end|>"
    return (
        (f"{{% if messages[0]['role'] != 'system' %}}{system}{{% endif %}}" if system_message else "")
        + "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        + (f"{{% if message['role'] == 'assistant' %}}{thought}{{% endif %}}" if thought else "")
        + f"{_CONTENT}{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant\n{thought}{{% endif %}}"
    )


def default_system_message(model: ModelConfig, trained_here: bool) -> str:
    """The authors' system message for weights of theirs, told by family and window token order; nothing otherwise.

    Rows of a run have a system turn where the data has one, so a model that was trained on them gets no other.
    """
    theirs = model.language.family in ("internlm2", "qwen3") and model.vision.token_order == "window"
    return AUTHORS_SYSTEM_MESSAGE if theirs and not trained_here else ""
