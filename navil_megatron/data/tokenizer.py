"""Captions to token ids with a Hugging Face tokenizer; control tokens spelled inside a caption stay plain text.

The reference's 12 special tokens must exist under the ids of the model's config. ``build_tokenizer`` trains a small one
over given captions, for runs that start from nothing.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from navil_megatron.config.errors import UserError
from navil_megatron.config.schema import SPECIAL_TOKENS
from navil_megatron.data.index_build import TokenCounter

END_TOKEN = "<|im_end|>"
START_TOKEN = "<|im_start|>"
PAD_TOKEN = "<pad>"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The reference's prompt (MPT style): no newline between turns, one ``<image>`` placeholder line an image."""


class CaptionTokenizer:
    """Encodes captions as plain text under one tokenizer folder."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, folder: str) -> None:
        """Wraps a loaded tokenizer; ``folder`` names it in messages.

        Raises:
            UserError: a special token, end token or pad token is missing, or would be read out of a caption.
        """
        if not tokenizer.is_fast:
            raise UserError(f"tokenizer {folder} has no tokenizer.json: save it as a fast tokenizer")
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
        if missing:
            raise UserError(f"tokenizer {folder} lacks {', '.join(missing)}: add them as special tokens and save it")
        self.special_token_ids = tuple(vocabulary[token] for token in SPECIAL_TOKENS)
        """Ids of the 12 special tokens, in the order of ``SPECIAL_TOKENS``."""
        self.end_id = _required_id(tokenizer.eos_token_id, "end (eos)", folder)
        """Id that ends a caption."""
        self.pad_id = _required_id(tokenizer.pad_token_id, "padding (pad)", folder)
        """Id of padding tokens."""
        self.vocab_size = max(vocabulary.values()) + 1
        """Smallest number of embedding rows that holds every id."""
        self.hugging_face = tokenizer
        """The tokenizer itself, for decoding and export."""
        definition = tokenizer.backend_tokenizer.to_str()
        self._backend = Tokenizer.from_str(definition)  # a copy: the switch below must not leak into other users
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        self._refuse_control_tokens_in_text(folder)
        self.fingerprint = hashlib.sha256(f"{definition}\0{self.end_id}\0{self.pad_id}".encode()).hexdigest()[:32]
        """32 hexadecimal digits that name everything that decides token ids."""

    @property
    def counter(self) -> TokenCounter:
        """Counts caption tokens, for indexes."""
        return TokenCounter(count=self.count, fingerprint=bytes.fromhex(self.fingerprint))

    def encode(self, caption: str) -> list[int]:
        """Token ids of a caption as plain text, end token not included."""
        return self._backend.encode(caption, add_special_tokens=False).ids

    def count(self, captions: Sequence[str]) -> np.ndarray:
        """[n] int64: tokens of each caption, end token not included."""
        lengths = []
        for start in range(0, len(captions), 4096):  # bounds the memory of the encodings
            batch = self._backend.encode_batch_fast(list(captions[start : start + 4096]), add_special_tokens=False)
            lengths += [len(encoding.ids) for encoding in batch]
        return np.array(lengths, dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """The text behind token ids, special tokens left out."""
        return self.hugging_face.decode(list(ids), skip_special_tokens=True)

    def _refuse_control_tokens_in_text(self, folder: str) -> None:
        control = {*self.special_token_ids, self.end_id, self.pad_id}
        names = self.hugging_face.convert_ids_to_tokens(sorted(control))
        found = [name for name in names if control.intersection(self.encode(f"a {name} b"))]
        if found:
            raise UserError(
                f"tokenizer {folder} reads {', '.join(found)} out of plain text: mark them as special "
                '("special": true in tokenizer.json), or a caption could forge an image'
            )


def load_tokenizer(folder: str | Path, special_token_ids: Sequence[int] | None = None) -> CaptionTokenizer:
    """The tokenizer in a Hugging Face folder, checked against the model's special token ids where they are given.

    Raises:
        UserError: no tokenizer there, a token is missing, or the ids differ.
    """
    if not Path(folder).is_dir():
        raise UserError(f"tokenizer folder {folder} is missing: set data.tokenizer to a saved Hugging Face tokenizer")
    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises many types for a broken folder
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(f"tokenizer folder {folder} cannot be loaded ({reason}): save the tokenizer anew") from error
    tokenizer = CaptionTokenizer(loaded, str(folder))
    if special_token_ids is not None and tuple(special_token_ids) != tokenizer.special_token_ids:
        differing = [
            f"{token} is {found}, not {expected}"
            for token, found, expected in zip(
                SPECIAL_TOKENS, tokenizer.special_token_ids, special_token_ids, strict=False
            )
            if found != expected
        ]
        raise UserError(
            f"tokenizer {folder} does not fit model.special_token_ids ({'; '.join(differing[:3])}): "
            f"set them to {list(tokenizer.special_token_ids)}"
        )
    return tokenizer


def build_tokenizer(captions: Iterable[str], folder: Path, vocab_size: int = 1024) -> CaptionTokenizer:
    """Trains a byte-level BPE tokenizer and saves it as a Hugging Face folder that loads offline.

    Any text can be encoded; frequent words become one token. Special tokens come after the learned ones.

    Args:
        captions: the training text.
        folder: where to save.
        vocab_size: most entries to learn; small captions need fewer. The control tokens come on top.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(captions, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        # transformers 5 calls it extra_special_tokens and takes the name that 4 knows, too.
        additional_special_tokens=[START_TOKEN, *SPECIAL_TOKENS],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(str(folder))
    return load_tokenizer(folder)


def _required_id(token_id: int | None, what: str, folder: str) -> int:
    if token_id is None:
        raise UserError(f"tokenizer {folder} has no {what} token: set one and save it")
    return token_id
