"""A copied tokenizer folder made to load on every transformers from 4.51 on, with the processor's chat template.

The files that transformers 5 saves name a class and a key that version 4 does not know; those of version 4 load on
both. Ids are not touched: ``tokenizer.json`` stays as it is.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from navil_megatron.blueprint.chat_template import PLACEHOLDER, chat_template
from navil_megatron.files.json_file import read_json, write_json

TOKENIZER_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
NAMES_FILE = "special_tokens_map.json"
TEMPLATE_FILE, PROCESSOR_TEMPLATE_FILE = "chat_template.jinja", "chat_template.json"
"""The second is read by processors alone, the first by tokenizers, too."""
PORTABLE_CLASS = "PreTrainedTokenizerFast"
"""Loads ``tokenizer.json`` as it is, in every version."""


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
    config = with_known_names(read_settings(folder / SETTINGS_FILE))
    # Code of a tokenizer is not copied, and version 5's generic class has another name in version 4.
    has_code = config.pop("auto_map", None) is not None
    if has_code or config.get("tokenizer_class") in (None, "TokenizersBackend"):
        config["tokenizer_class"] = PORTABLE_CLASS
    own = _own_template(folder, config)
    for name in (TEMPLATE_FILE, PROCESSOR_TEMPLATE_FILE):
        (folder / name).unlink(missing_ok=True)
    config.pop("chat_template", None)
    template = chat_template(vocabulary(folder), system_message)
    if own is not None:
        config["chat_template"] = own
        if template:
            write_json(folder / PROCESSOR_TEMPLATE_FILE, {"chat_template": template})
    elif template:
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    write_json(folder / SETTINGS_FILE, config)
    if (folder / NAMES_FILE).is_file():
        write_json(folder / NAMES_FILE, with_known_names(read_settings(folder / NAMES_FILE)))
    return template is not None


def vocabulary(folder: Path) -> dict[str, int]:
    """Name and id of every token of the tokenizer in a folder."""
    return dict(Tokenizer.from_file(str(folder / TOKENIZER_FILE)).get_vocab())


def with_known_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the list of further special tokens under the name that both versions read."""
    config = dict(settings)
    if isinstance(config.get("extra_special_tokens"), list):
        extra = config.pop("extra_special_tokens")
        known = config.get("additional_special_tokens") or []
        config["additional_special_tokens"] = [*known, *(token for token in extra if token not in known)]
    return config


def _own_template(folder: Path, config: dict[str, Any]) -> Any:
    """The tokenizer's template for text; ``None`` if there is none or if it is a processor's, which places images."""
    own = config.get("chat_template")
    if (folder / TEMPLATE_FILE).is_file():
        own = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    return None if own is None or PLACEHOLDER in json.dumps(own) else own


def read_settings(path: Path) -> dict[str, Any]:
    """The file's content; nothing where there is no such file."""
    return read_json(path, "save the tokenizer anew") if path.is_file() else {}
