"""A ``tokenizer.json`` of others: looked at before the tokenizers library reads it, which can end the process.

The library makes tables as long as the highest id that a file states, and panics where it takes something for granted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from navil_megatron.config.errors import UserError
from navil_megatron.files.json_file import read_json

TOKENIZER_FILE = "tokenizer.json"
MAX_ID = 2**24
"""No token has an id beyond it: many times the largest vocabulary, and a table of 64 MB."""
_REMEDY = "save the tokenizer anew"


def require_tokenizer_folder(folder: Path) -> None:
    """Refuses a folder without a tokenizer, for which transformers 5.0 makes one of its own up.

    Raises:
        UserError: It is missing, or holds none.
    """
    if not folder.is_dir():
        raise UserError(f"tokenizer folder {folder} is missing: set data.tokenizer to a saved Hugging Face tokenizer")
    if not [*folder.glob("tokenizer*"), *folder.glob("vocab*")]:
        raise UserError(f"tokenizer folder {folder} cannot be loaded (no {TOKENIZER_FILE} in it): {_REMEDY}")


@contextmanager
def reading_tokenizer(folder: Path) -> Iterator[None]:
    """Around what makes a tokenizer of the files in a folder: whatever is wrong with them becomes one line.

    Raises:
        UserError: They are damaged, or the library refuses them or panics.
    """
    path = folder / TOKENIZER_FILE
    if path.is_file():
        _check_ids(path, read_json(path, _REMEDY))
    try:
        yield
    except UserError:
        raise
    except BaseException as error:  # transformers raises many types; a panic is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip().split("\n", 1)[0][:500]
        raise UserError(f"tokenizer folder {folder} cannot be loaded ({reason}): {_REMEDY}") from error


def _check_ids(path: Path, content: dict[str, Any]) -> None:
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = [*vocabulary.values()] if isinstance(vocabulary, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    wrong = next((token_id for token_id in ids if type(token_id) is not int or not 0 <= token_id <= MAX_ID), None)
    if wrong is not None:
        raise UserError(f"{path} has {str(wrong)[:60]} as a token's id, expected 0 to {MAX_ID}: {_REMEDY}")
