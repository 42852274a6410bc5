"""A copied tokenizer folder made to load on every transformers from 4.51 on, with the processor's chat template.

The files that transformers 5 saves name a class and a key that version 4 does not know; those of version 4 load on
both. Ids are not touched: ``tokenizer.json`` stays as it is.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from navil_megatron.blueprint.chat_template import PLACEHOLDER, chat_template
from navil_megatron.files.json_file import read_json, write_json

PORTABLE_CLASS = "PreTrainedTokenizerFast"
"""Loads ``tokenizer.json`` as it is, in every version."""
_CONFIG = "tokenizer_config.json"
_RAW_TEMPLATE = "chat_template.jinja"
_PROCESSOR_TEMPLATE = "chat_template.json"
"""Read by processors alone; ``chat_template.jinja`` is read by tokenizers, too."""


def settle_tokenizer(folder: Path, system_message: str = "") -> bool:
    """Makes the tokenizer files of an exported folder portable and writes the chat template of the processor.

    A template that the tokenizer brought along stays the tokenizer's own, for text; without one it gets the
    processor's. A tokenizer without ``<|im_start|>`` and ``<|im_end|>`` cannot say where a turn ends: the processor
    gets no template then.

    Args:
        folder: The folder, which holds a copy of the tokenizer's files.
        system_message: The system turn of a conversation that has none of its own.

    Returns:
        Whether the processor has a chat template.
    """
    config = _portable(_read(folder / _CONFIG))
    own = _own_template(folder, config)
    for name in (_RAW_TEMPLATE, _PROCESSOR_TEMPLATE):
        (folder / name).unlink(missing_ok=True)
    config.pop("chat_template", None)
    template = chat_template(vocabulary(folder), system_message)
    if own is not None:
        config["chat_template"] = own
        if template:
            write_json(folder / _PROCESSOR_TEMPLATE, {"chat_template": template})
    elif template:
        (folder / _RAW_TEMPLATE).write_text(template, encoding="utf-8")
    write_json(folder / _CONFIG, config)
    if (folder / "special_tokens_map.json").is_file():
        write_json(folder / "special_tokens_map.json", _renamed(_read(folder / "special_tokens_map.json")))
    return template is not None


def vocabulary(folder: Path) -> dict[str, int]:
    """Name and id of every token of the tokenizer in a folder."""
    return dict(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab())


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    config = _renamed(config)
    # Code of a tokenizer is not copied, and version 5's generic class has another name in version 4.
    has_code = config.pop("auto_map", None) is not None
    if has_code or config.get("tokenizer_class") in (None, "TokenizersBackend"):
        config["tokenizer_class"] = PORTABLE_CLASS
    return config


def _renamed(config: dict[str, Any]) -> dict[str, Any]:
    """With the list of further special tokens under the name that both lines read."""
    config = dict(config)
    if isinstance(config.get("extra_special_tokens"), list):
        extra = config.pop("extra_special_tokens")
        known = config.get("additional_special_tokens") or []
        config["additional_special_tokens"] = [*known, *(token for token in extra if token not in known)]
    return config


def _own_template(folder: Path, config: dict[str, Any]) -> Any:
    """The tokenizer's template for text; ``None`` if there is none or if it is a processor's, which places images."""
    own = config.get("chat_template")
    if (folder / _RAW_TEMPLATE).is_file():
        own = (folder / _RAW_TEMPLATE).read_text(encoding="utf-8")
    return None if own is None or PLACEHOLDER in json.dumps(own) else own


def _read(path: Path) -> dict[str, Any]:
    """The file's content; nothing where there is no such file."""
    return read_json(path) if path.is_file() else {}
