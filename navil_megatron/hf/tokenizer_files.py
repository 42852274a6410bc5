"""The tokenizer of an exported folder: which files are copied, which ids the model is told.

Python files of a tokenizer folder are neither run nor copied: only fast tokenizers (``tokenizer.json``) are exported.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from transformers import AutoTokenizer

from navil_megatron.config.errors import UserError
from navil_megatron.config.schema import SPECIAL_TOKENS, ModelConfig

TOKENIZER_FILE = "tokenizer.json"
_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def read_token_ids(tokenizer: Path, model: ModelConfig) -> Mapping[str, int | None]:
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` of a tokenizer that fits the model.

    Raises:
        UserError: There is no fast tokenizer, or its special tokens have other ids than the model's.
    """
    if not (tokenizer / TOKENIZER_FILE).is_file():
        raise UserError(f"{tokenizer} has no {TOKENIZER_FILE}: expected a folder with a fast tokenizer")
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
