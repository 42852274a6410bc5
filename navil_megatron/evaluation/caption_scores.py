"""CIDEr and BLEU of captions, by the libraries that define them, on the words that both see.

pycocoevalcap computes CIDEr as the COCO server does; its own tokenizer is a Java program, so the Penn Treebank words
come from NLTK here. sacrebleu computes BLEU of the same words.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from nltk.tokenize import NLTKWordTokenizer
from pycocoevalcap.cider.cider import Cider
from sacrebleu.metrics import BLEU

_DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
"""What COCO's caption evaluation does not count as a word; brackets it does."""
_TOKENIZER = NLTKWordTokenizer()


class CaptionScores(NamedTuple):
    """Scores of a set of captions, in points: 100 times the fraction."""

    cider: float
    bleu: float  # of 1 to 4 words at a time, over the whole set
    ciders: list[float]


def score_captions(captions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Scores captions against one or more references each.

    CIDEr weighs words by how few images of the set have them in a reference, so it is 0 for a set of one image.
    """
    found = [words(caption) for caption in captions]
    expected = [[words(text) for text in texts] for texts in references]
    mean, each = Cider().compute_score(dict(enumerate(expected)), {index: [text] for index, text in enumerate(found)})
    most = max(len(texts) for texts in expected)
    columns: list[Any] = [[texts[k] if k < len(texts) else None for texts in expected] for k in range(most)]
    # The words are words already: sacrebleu is to split them at spaces and say nothing of it.
    bleu = BLEU(tokenize="none", force=True).corpus_score(found, columns)
    return CaptionScores(100 * float(mean), float(bleu.score), [100 * float(score) for score in each])


def words(caption: str) -> str:
    """The caption's words in lower case with a space between them, without punctuation."""
    tokens = [token.rstrip(".") if "." not in token[:-1] else token for token in _TOKENIZER.tokenize(caption.lower())]
    return " ".join(token for token in tokens if token and token not in _DROPPED)
