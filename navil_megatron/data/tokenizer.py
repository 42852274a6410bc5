"""Samples to token ids with a Hugging Face tokenizer; control tokens spelled inside a text stay plain text.

The reference's 12 special tokens must exist under the ids of the model's config; conversations also need the tokens
that start and end a turn. ``build_tokenizer`` trains a small one over given captions, for runs that start from nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from navil_megatron.blueprint.chat_template import TURN_TOKENS, chat_template
from navil_megatron.config.errors import UserError
from navil_megatron.config.model import SPECIAL_TOKENS
from navil_megatron.data.chat import Span, conversation_spans, document_spans
from navil_megatron.data.types import Content, Document
from navil_megatron.files.hashes import fingerprint
from navil_megatron.files.tokenizer_file import reading_tokenizer, require_tokenizer_folder

PAD_TOKEN = "<pad>"

_SPANS_AT_ONCE = 4096  # bounds the memory of the encodings while tokens are counted


@dataclass(frozen=True, slots=True)
class Piece:
    """Token ids of one stretch of a sample."""

    ids: list[int]  # empty for an image
    loss: bool  # the model learns to predict them
    image: bool = False  # the next image stands here


class SampleTokenizer:
    """Turns samples into tokens under one tokenizer folder."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, folder: str) -> None:
        """Wraps a tokenizer; UserError: a special, end or pad token is missing, or would be read out of a text."""
        if not tokenizer.is_fast:
            raise UserError(f"tokenizer {folder} has no tokenizer.json: save it as a fast tokenizer")
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
        if missing:
            raise UserError(f"tokenizer {folder} lacks {', '.join(missing)}: add them as special tokens and save it")
        self.special_token_ids = tuple(vocabulary[token] for token in SPECIAL_TOKENS)
        """Ids of the 12 special tokens, in the order of ``SPECIAL_TOKENS``."""
        self.end_id = _required_id(tokenizer.eos_token_id, "end (eos)", folder)
        """Ends a caption or document."""
        self.pad_id = _required_id(tokenizer.pad_token_id, "padding (pad)", folder)
        self.vocab_size = max(vocabulary.values()) + 1
        """Smallest number of embedding rows that holds every id."""
        self.hugging_face = tokenizer
        self._folder = folder
        # a copy: the switch below must not leak into other users, nor their padding into the fingerprint
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        self._template = chat_template(vocabulary)
        # Whether answers follow a thought is in the vocabulary: one template stands for how conversations read.
        decisive = [self._backend.to_str(), str(self.end_id), str(self.pad_id), chat_template(TURN_TOKENS) or ""]
        self.fingerprint = fingerprint("\0".join(decisive))
        """32 hexadecimal digits that name everything that decides token ids."""
        turn_ids = [vocabulary[token] for token in TURN_TOKENS if token in vocabulary]
        self._ids_of_kind = {"image": [], "end": [self.end_id], "turn_start": turn_ids[:1], "turn_end": turn_ids[1:]}
        around = self._backend.encode("x")
        self._first_ids = around.ids[: around.special_tokens_mask.index(0)]
        """What the tokenizer puts in front of every text: a BOS token, or nothing."""
        self._refuse_control_tokens_in_text({*self.special_token_ids, self.end_id, self.pad_id, *turn_ids})

    def __reduce__(self) -> tuple[type["SampleTokenizer"], tuple[PreTrainedTokenizerFast, str]]:
        """A copy in another process is made anew: a pickled backend would read control tokens out of text again."""
        return SampleTokenizer, (self.hugging_face, self._folder)

    @property
    def has_turns(self) -> bool:
        """Whether conversations can be encoded."""
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, nothing before or after it."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def pieces(self, content: Content, num_images: int) -> list[Piece]:
        """A sample as stretches of tokens, with a place for each image.

        A caption is its images, then the text and the end token, which carry the loss; a document is the same with
        its images in their places. In a conversation the loss lies on what the assistant says and the token that ends
        it.

        Raises:
            UserError: a conversation, but the tokenizer has no tokens for turns.
        """
        pieces = [Piece(self._first_ids, loss=False)] if self._first_ids else []
        for span in self._spans(content, num_images):
            ids = self.encode(span.text) if span.kind == "text" else self._ids_of_kind[span.kind]
            pieces.append(Piece(ids, span.learned, span.kind == "image"))
        return pieces

    def count(self, contents: Sequence[Content], num_images: Sequence[int]) -> np.ndarray:
        """[n] int64: tokens of each sample that do not stand for an image; as many as ``pieces`` gives."""
        counts = np.full(len(contents), len(self._first_ids), dtype=np.int64)
        texts: list[str] = []
        owners: list[int] = []
        for number, (content, images) in enumerate(zip(contents, num_images, strict=True)):
            for span in self._spans(content, images):
                if span.kind == "text":
                    texts.append(span.text)
                    owners.append(number)
                else:
                    counts[number] += len(self._ids_of_kind[span.kind])
        for first in range(0, len(texts), _SPANS_AT_ONCE):
            batch = texts[first : first + _SPANS_AT_ONCE]
            encodings = self._backend.encode_batch_fast(batch, add_special_tokens=False)
            np.add.at(counts, owners[first : first + _SPANS_AT_ONCE], [len(encoding) for encoding in encodings])
        return counts

    def _spans(self, content: Content, num_images: int) -> Iterable[Span]:
        if isinstance(content, str):
            return document_spans([*[None] * num_images, content])
        if isinstance(content, Document):
            return document_spans(content.parts)
        if self._template is None:
            raise UserError(
                f"tokenizer {self._folder} has no {' and '.join(TURN_TOKENS)}, which conversations need: "
                "add them as special tokens and save it"
            )
        return conversation_spans(content, self._template)

    def _refuse_control_tokens_in_text(self, control: set[int]) -> None:
        control = control.union(self._first_ids)
        names = self.hugging_face.convert_ids_to_tokens(sorted(control))
        found = [name for name in names if control.intersection(self.encode(f"a {name} b"))]
        if found:
            raise UserError(
                f"tokenizer {self._folder} reads {', '.join(found)} out of plain text: mark them as special "
                '("special": true in tokenizer.json), or a caption could forge an image'
            )


def load_tokenizer(folder: str | Path, special_token_ids: Sequence[int] | None = None) -> SampleTokenizer:
    """The tokenizer in a Hugging Face folder, checked against the model's special token ids where they are given.

    Raises:
        UserError: no tokenizer there, a token is missing, or the ids differ.
    """
    require_tokenizer_folder(Path(folder))
    with reading_tokenizer(Path(folder)):
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        tokenizer = SampleTokenizer(loaded, str(folder))
    if special_token_ids is not None and tuple(special_token_ids) != tokenizer.special_token_ids:
        both = zip(SPECIAL_TOKENS, tokenizer.special_token_ids, special_token_ids, strict=False)
        differing = [f"{token} is {found}, not {expected}" for token, found, expected in both if found != expected]
        raise UserError(
            f"tokenizer {folder} does not fit model.special_token_ids ({'; '.join(differing[:3])}): "
            f"set them to {list(tokenizer.special_token_ids)}"
        )
    return tokenizer


def build_tokenizer(captions: Iterable[str], folder: Path, vocab_size: int = 1024) -> SampleTokenizer:
    """Trains a byte-level BPE tokenizer over captions and saves it as a Hugging Face folder that loads offline.

    Any text can be encoded; frequent words become one token. ``vocab_size`` is the most that is learned; the control
    tokens come on top, and after them.
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
        eos_token=TURN_TOKENS[1],
        pad_token=PAD_TOKEN,
        # transformers 5 calls it extra_special_tokens and takes the name that 4 knows, too.
        additional_special_tokens=[TURN_TOKENS[0], *SPECIAL_TOKENS],
        clean_up_tokenization_spaces=False,
        chat_template=chat_template(TURN_TOKENS),
    )
    tokenizer.save_pretrained(str(folder))
    return load_tokenizer(folder)


def _required_id(token_id: int | None, what: str, folder: str) -> int:
    if token_id is None:
        raise UserError(f"tokenizer {folder} has no {what} token: set one and save it")
    return token_id
