"""Scores of a short answer against the answers that would be right, each by its published definition.

Every score is from 0 to 1 and the best over the answers.
"""

import math
import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05

_NUMBER_WORDS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"zero": "0", **{word: str(number) for number, word in enumerate(_NUMBER_WORDS)}}
_ARTICLES = {"a", "an", "the"}
_WITH_APOSTROPHES = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll ma'am mightn't mightn't've "
    "might've mustn't must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've "
    "somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've "
    "something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't "
    "we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll "
    "you're you've"
)
_CONTRACTIONS = {
    spelt: word
    for word in _WITH_APOSTROPHES.split()
    for spelt in (
        word.replace("'", ""),
        *(word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"),
    )
}
"""A contraction that lacks apostrophes -> the contraction."""


def exact_match(answer: str, expected: Sequence[str]) -> float:
    """1 if the answer is one of the expected ones after both are normalised as for VQA."""
    return float(normalised(answer) in {normalised(text) for text in expected})


def normalised(text: str) -> str:
    """A text as the evaluation of VQA compares it (visualqa.org/evaluation.html).

    Lower case; no period but a decimal one; number words as digits; no articles; apostrophes restored in
    contractions; other punctuation but apostrophe and colon becomes a space, a comma between digits nothing.
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower().replace("’", "'"))
    text = re.sub(r"\.(?!\d)", "", text)
    text = re.sub(r"[^\w\s.':]|_", " ", text)
    words = [_DIGITS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def anls(answer: str, expected: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer (Biten et al., 2019), in lower case.

    One minus the distance over the longer length; 0 where that distance is half of it or more.
    """
    return max(_similarity(" ".join(answer.lower().split()), " ".join(text.lower().split())) for text in expected)


def relaxed_accuracy(answer: str, expected: Sequence[str]) -> float:
    """1 if a number is within 5% of an expected one, or another text is the same but for case (ChartQA, 2022)."""
    return float(any(_about_equal(answer.strip(), text.strip()) for text in expected))


def _similarity(answer: str, expected: str) -> float:
    distance = Levenshtein.normalized_distance(answer, expected)
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def _about_equal(answer: str, expected: str) -> bool:
    found, wanted = _number(answer), _number(expected)
    if found is None or not wanted:  # nothing but zero itself is within 5% of zero
        return answer.lower() == expected.lower() or (found == wanted == 0)
    return abs(found - wanted) / abs(wanted) <= RELAXED_TOLERANCE


def _number(text: str) -> float | None:
    """The number that a text is, if it is one; a per cent sign divides by 100."""
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        return None
    return (number / 100 if text.endswith("%") else number) if math.isfinite(number) else None
