"""How a conversation becomes a prompt with ``<image>`` placeholders, as the authors' ``chat`` writes it.

Turns follow each other without a newline. Images that begin a turn stand on a line each; later ones stand where they
are. The templates are Jinja as transformers renders it, in the subset that other engines know too.
"""

from navil_megatron.config.model import ModelConfig

TURN_TOKENS = ("<|im_start|>", "<|im_end|>")
"""What a tokenizer must know for these templates to mean something."""
PLACEHOLDER = "<image>"

AUTHORS_SYSTEM_MESSAGE = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
"""The system turn that the authors' code starts with where none is given."""

_NO_THINKING = r"<think>\n\n</think>\n\n"

_TEMPLATE = r"""
{%- if system_message and messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\n' + system_message + '<|im_end|>' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {{- assistant_start -}}
    {%- endif -%}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- set turn = namespace(leading=true) -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'text' -%}
                {%- set turn.leading = false -%}
                {{- part['text'] -}}
            {%- elif turn.leading -%}
                {{- '<image>\n' -}}
            {%- else -%}
                {{- '<image>' -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' + assistant_start -}}
{%- endif -%}
"""


def chat_template(model: ModelConfig) -> str:
    """The template of a model's processor.

    Qwen3 models answer after an empty thought, as in the authors' 9B. A model of the authors' making, told by its
    window token order, gets their system message where a conversation has none; any other model gets no system turn
    that its owner did not write.
    """
    family = model.language.family
    theirs = family in ("internlm2", "qwen3") and model.vision.token_order == "window"
    system_message = AUTHORS_SYSTEM_MESSAGE if theirs else ""
    assistant_start = _NO_THINKING if family == "qwen3" else ""
    settings = (
        "{#- NaViL: one " + PLACEHOLDER + " for each image part. -#}\n"
        "{%- set system_message = '" + system_message + "' -%}\n"
        "{%- set assistant_start = '" + assistant_start + "' -%}"
    )
    return settings + _TEMPLATE
