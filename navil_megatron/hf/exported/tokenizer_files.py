"""Tokenizer files: those of an exported folder, and a pretrained LLM's with NaViL's 12 special tokens added.

Only fast tokenizers (``tokenizer.json``) are used. Python files of a tokenizer folder are neither run nor copied. What
is written loads on every transformers from 4.51 on: the files that version 5 saves name a class and a key that version
4 does not know; those of version 4 load on both.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from navil_megatron.blueprint.chat_template import PLACEHOLDER, chat_template
from navil_megatron.config.errors import UserError
from navil_megatron.config.model import SPECIAL_TOKENS, ModelConfig
from navil_megatron.files.json_file import read_json, write_json
from navil_megatron.files.tokenizer_file import TOKENIZER_FILE, reading_tokenizer

SETTINGS_FILE = "tokenizer_config.json"
NAMES_FILE = "special_tokens_map.json"
TEMPLATE_FILE, PROCESSOR_TEMPLATE_FILE = "chat_template.jinja", "chat_template.json"
"""The second is read by processors alone, the first by tokenizers, too."""
PORTABLE_CLASS = "PreTrainedTokenizerFast"
"""Loads ``tokenizer.json`` as it is, in every version."""
_FILES = (
    *(TOKENIZER_FILE, SETTINGS_FILE, NAMES_FILE, TEMPLATE_FILE, PROCESSOR_TEMPLATE_FILE),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"),
)
_ADDED_ORDER = (
    *("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
    *("<IMG_LINE_BREAK>", "<IMG_FRAME_BREAK>", "<img_uncond>"),
)
"""The order in which missing tokens get the next free ids (reference: InternVL2's tokenizers); the model takes any."""
_FOLDERS_OWN = ("auto_map", "tokenizer_file", "name_or_path", "backend", "is_local", "local_files_only")
"""Keys that name code or files of the old folder."""
_EDITING = ("add_bos_token", "add_eos_token")
"""Keys that make transformers replace what tokenizer.json says about the ends of a text."""
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


def require_tokenizer(folder: Path) -> Path:
    """The folder, if it holds a fast tokenizer.

    Raises:
        UserError: It does not.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        raise UserError(f"{folder} has no {TOKENIZER_FILE}: expected a folder with a fast tokenizer")
    return folder


def read_token_ids(tokenizer: Path, model: ModelConfig) -> Mapping[str, int | None]:
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` of a tokenizer that fits the model.

    Raises:
        UserError: There is no fast tokenizer, or its special tokens have other ids than the model's.
    """
    require_tokenizer(tokenizer)
    from transformers import AutoTokenizer  # a second, which a checkpoint without a tokenizer need not wait for

    with reading_tokenizer(tokenizer):
        loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True, trust_remote_code=False)
        vocabulary = loaded.get_vocab()
    different = [
        f"{token} is {vocabulary.get(token)}, not {expected}"
        for token, expected in zip(SPECIAL_TOKENS, model.special_token_ids, strict=True)
        if vocabulary.get(token) != expected
    ]
    if different:
        raise UserError(
            f"tokenizer {tokenizer} is not the model's: {'; '.join(different)}; give the one it was trained with"
        )
    return {name: getattr(loaded, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    """Copies the files that make a tokenizer, and no code."""
    for name in _FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)


def settle_tokenizer(folder: Path, system_message: str = "") -> bool:
    """Makes the tokenizer files of an exported folder portable and writes the chat template of the processor.

    A template that the tokenizer brought along stays the tokenizer's own, for text; without one it gets the
    processor's. A tokenizer without ``<|im_start|>`` and ``<|im_end|>`` cannot say where a turn ends: the processor
    gets no template then. ``system_message`` opens a conversation that has no system turn of its own.

    Gives whether the processor has a chat template.
    """
    config = _with_known_names(_read_settings(folder / SETTINGS_FILE))
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
        write_json(folder / NAMES_FILE, _with_known_names(_read_settings(folder / NAMES_FILE)))
    return template is not None


def vocabulary(folder: Path) -> dict[str, int]:
    """Name and id of every token of the tokenizer in a folder."""
    with reading_tokenizer(folder):
        return dict(Tokenizer.from_file(str(folder / TOKENIZER_FILE)).get_vocab())


def extend_tokenizer(source: Path, target: Path) -> dict[str, int]:
    """Writes the tokenizer in ``source``, with the special tokens that it lacks, to an empty or new folder.

    The new folder holds ``tokenizer.json``, its settings and the chat template; files of a slow tokenizer would not
    know the new tokens. Tokens that exist keep their ids, and become special if they were not. Missing ones follow the
    tokenizer's last id in ``_ADDED_ORDER``. Without a padding token the end token pads.

    Gives the ids of the 12 special tokens by name, in the order of ``SPECIAL_TOKENS``.

    Raises:
        UserError: The folder has no fast tokenizer, or it cannot be read.
    """
    tokenizer = _load(source / TOKENIZER_FILE)
    config = _read_settings(source / SETTINGS_FILE)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _ADDED_ORDER])
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    ids = {token: vocabulary[token] for token in SPECIAL_TOKENS}
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(target / TOKENIZER_FILE))
    write_json(target / SETTINGS_FILE, _extended(config, tokenizer))
    if (source / TEMPLATE_FILE).is_file():
        shutil.copyfile(source / TEMPLATE_FILE, target / TEMPLATE_FILE)
    return ids


def _load(path: Path) -> Tokenizer:
    if not path.is_file():
        raise UserError(
            f"{path.parent} has no {TOKENIZER_FILE}: save its tokenizer as a fast one, or give another folder with "
            "--tokenizer"
        )
    with reading_tokenizer(path.parent):
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))


def _extended(config: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer's settings for a class that every transformers from 4.51 on has."""
    kept = _with_known_names({key: value for key, value in config.items() if key not in (*_FOLDERS_OWN, *_EDITING)})
    listed = kept.pop("additional_special_tokens", None) or []
    names = list(dict.fromkeys([*map(_name, listed), *_ADDED_ORDER]))
    if kept.get("pad_token") is None and kept.get("eos_token") is not None:
        kept["pad_token"] = _name(kept["eos_token"])
    return kept | {
        "tokenizer_class": PORTABLE_CLASS,
        "additional_special_tokens": names,
        "added_tokens_decoder": {
            str(token_id): {"content": token.content} | {flag: getattr(token, flag) for flag in _FLAGS}
            for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
        },
    }


def _name(token: Any) -> str:
    """A special token is written as its text or as a table."""
    return token["content"] if isinstance(token, dict) else str(token)


def _with_known_names(settings: Mapping[str, Any]) -> dict[str, Any]:
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


def _read_settings(path: Path) -> dict[str, Any]:
    return read_json(path, "save the tokenizer anew") if path.is_file() else {}
