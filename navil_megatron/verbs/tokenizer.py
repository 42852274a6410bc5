"""``navil-megatron tokenizer``: a folder that a run's ``data.tokenizer`` can name."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from navil_megatron.config.errors import UserError
from navil_megatron.verbs.arguments import count, value
from navil_megatron.verbs.verb import Outcome, verb

_SMALLEST = 256
"""Every byte is a token, so that any text can be encoded."""


@verb(
    "tokenizer",
    "make a tokenizer with the 12 special tokens: of an LLM's, or trained on texts",
    "navil-megatron tokenizer tokenizer/ --from Qwen3-8B/\n"
    "  navil-megatron tokenizer tokenizer/ --train corpus.txt --vocab 32000",
    value("folder", "FOLDER", "the Hugging Face folder to write"),
    value("--from", "LLM", "a folder with a fast tokenizer, whose tokens keep their ids", dest="source"),
    value("--train", "TEXT", "UTF-8 files, each line a text: train a byte-level BPE on them", nargs="+"),
    value("--vocab", "N", "with --train: most tokens to learn, bytes included (32000)", count, default=32_000),
)
def tokenizer(options: Namespace) -> Outcome:
    """Makes the folder, loads it as a run does, and says where the special tokens are."""
    if (options.source is None) == (options.train is None):
        raise UserError("expected one of --from LLM and --train TEXT")
    if options.train and options.vocab < _SMALLEST:
        raise UserError(f"--vocab is {options.vocab}, expected at least {_SMALLEST}: each byte is a token")
    from navil_megatron.config.model import SPECIAL_TOKENS
    from navil_megatron.data.tokenizer import build_tokenizer, load_tokenizer
    from navil_megatron.files.atomic_folder import new_folder
    from navil_megatron.hf.exported.tokenizer_files import extend_tokenizer

    with new_folder(options.folder) as partial:
        if options.train:
            made = build_tokenizer(_lines(options.train), partial, options.vocab)
        else:
            extend_tokenizer(options.source, partial)
            made = load_tokenizer(partial)
    report = {
        "folder": str(options.folder),
        "vocab_size": made.vocab_size,
        "special_token_ids": dict(zip(SPECIAL_TOKENS, made.special_token_ids, strict=True)),
        "fingerprint": made.fingerprint,
        "has_turns": made.has_turns,
    }
    lines = [
        f"{options.folder}: {made.vocab_size} tokens",
        f"model.special_token_ids = {list(made.special_token_ids)}",
        *([] if made.has_turns else ["no tokens for turns: conversations are refused"]),
    ]
    return Outcome(report, "\n".join(lines))


def _lines(files: Sequence[Path]) -> Iterator[str]:
    for path in files:
        try:
            with path.open(encoding="utf-8-sig") as file:
                yield from (line.rstrip("\n") for line in file)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
            ) from None
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}): give a text file, a text on each line"
            ) from None
