"""The scores against cases computed by hand from their definitions, and against a second library where there is one."""

import math
import shutil

import pytest
from anls import anls_score
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from navil_megatron.evaluation.answer_scores import anls, exact_match, normalised, relaxed_accuracy
from navil_megatron.evaluation.caption_scores import score_captions, words
from tests.tolerances import CAPTION_SCORE

CAPTIONS = [
    "a cat on a mat",
    "a dog runs fast here",
    "two red apples beside a green pear",
    "red and/or blue mugs on it",
]
REFERENCES = [
    ["a cat sits on a mat", "the cat is on the mat"],
    ["a dog runs fast"],
    ["two red apples left of a pear", "apples and a green pear", "two red apples beside a green pear"],
    ["blue and/or red mugs on it"],
]

_SLIPS = ("somebody'd", "ow's", "'ow")
"""Beginnings of keys of lmms-eval's contractions that it gets wrong, and slang."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat", "cat"),
        ("Two cats, one dog.", "2 cats 1 dog"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("100,978", "100978"),
        ("red,blue", "red blue"),
        ("3.5 m.", "3.5 m"),
        ("2:50 p.m.", "2:50 pm"),
        ("girl's", "girl's"),
        ("yes/no (maybe)", "yes no maybe"),
        ("an apple a day", "apple day"),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_for_vqa(text: str, expected: str) -> None:
    assert normalised(text) == expected


def test_normalising_agrees_with_lmms_eval() -> None:
    name = "lmms_eval.tasks._task_utils.vqa_eval_metric"
    theirs = pytest.importorskip(name, reason="lmms-eval is not installed", exc_type=ImportError)
    processor = theirs.EvalAIAnswerProcessor()
    texts = "The Cat|two Dogs|dont|couldnt've|100,978|3.5 m.|yes/no|an apple|none|left-hand side|its 2:50 p.m.|a (b) c"
    # Its keys with a capital are never met in lower case.
    contractions = [text for text in processor.CONTRACTIONS if text.islower() and not text.startswith(_SLIPS)]
    for text in [*texts.split("|"), *contractions]:
        assert normalised(text) == processor(text).replace(" 's", "'s"), text


@given(st.text())
def test_normalising_ends(text: str) -> None:
    assert exact_match(text, ["x", text]) == 1


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("hello", ["hello"], 1),
        ("Hello  World", ["hello world"], 1),
        ("helo", ["hello"], 1 - 1 / 5),
        ("helo", ["goodbye", "hello"], 0.8),
        ("ab", ["ac"], 0),  # half of it wrong: at the threshold, not below
        ("abc", ["abd"], 1 - 1 / 3),
        ("", ["abc"], 0),
    ],
)
def test_anls_is_the_similarity_above_half(answer: str, expected: list[str], score: float) -> None:
    assert anls(answer, expected) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("95", ["100"], 1),
        ("105", ["100"], 1),
        ("94.9", ["100"], 0),
        ("-95", ["-100"], 1),
        ("10%", ["0.1"], 1),
        ("1,050", ["1000"], 0),  # by the published code: no number
        ("0", ["0.0"], 1),
        ("0.01", ["0"], 0),
        ("Blue", ["blue"], 1),
        ("blue", ["red", "BLUE"], 1),
        ("bluish", ["blue"], 0),
        ("ten", ["10"], 0),
        ("", ["5"], 0),
        ("nan", ["5"], 0),
    ],
)
def test_relaxed_accuracy_bears_five_per_cent(answer: str, expected: list[str], score: float) -> None:
    assert relaxed_accuracy(answer, expected) == score


def test_relaxed_accuracy_agrees_with_lmms_eval() -> None:
    name = "lmms_eval.tasks.chartqa.utils"
    theirs = pytest.importorskip(name, reason="lmms-eval is not installed", exc_type=ImportError)
    texts = "1 1.05 1.0501 -1 100% 95% 1e2 99 blue Blue 1,000 1000 . 5.".split()
    for answer in texts:
        for expected in texts:
            assert relaxed_accuracy(answer, [expected]) == theirs.relaxed_correctness(answer, expected), (
                answer,
                expected,
            )


@given(st.text("abcAB ", max_size=8), st.lists(st.text("abcAB ", min_size=1, max_size=8), min_size=1, max_size=3))
def test_anls_agrees_with_its_package(answer: str, expected: list[str]) -> None:
    assert anls(answer, expected) == pytest.approx(anls_score(answer, expected))


def test_cider_of_two_images_by_hand() -> None:
    # Every word is in one of two images: idf log 2. Captions equal their references, so each n-gram order has cosine 1
    # where it has n-grams: "red apple" has 1- and 2-grams, so CIDEr is 10 * 2 / 4.
    scores = score_captions(["red apple", "green pear"], [["red apple"], ["green pear"]])
    assert scores.ciders == pytest.approx([500, 500])
    # "red pear" has 1 of 2 words: cosine 1/2 for one order, 0 for the next; "pear" is in both images now: idf 0.
    scores = score_captions(["red", "blue"], [["red pear"], ["blue pear"]])
    penalty = math.exp(-1 / (2 * 6**2))
    assert scores.ciders[0] == pytest.approx(1000 / 4 * penalty)


def test_bleu_is_that_of_coco() -> None:
    theirs, _ = Bleu(4).compute_score(
        dict(enumerate(REFERENCES)), {index: [text] for index, text in enumerate(CAPTIONS)}, verbose=0
    )
    assert score_captions(CAPTIONS, REFERENCES).bleu == pytest.approx(100 * theirs[3], rel=CAPTION_SCORE)


def test_bleu_by_hand() -> None:
    # 3 of 4 words, 2 of 3 pairs, 1 of 2 triples and 0 of 1 quadruples (sacrebleu smooths that to 1/2).
    expected = 100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    assert score_captions(["a b c x"], [["a b c d"]]).bleu == pytest.approx(expected)


def test_an_empty_caption_scores_nothing() -> None:
    scores = score_captions(["", "a dog runs fast"], REFERENCES[:2])
    assert scores.ciders[0] == 0 < scores.ciders[1]


@pytest.mark.skipif(shutil.which("java") is None, reason="COCO's tokenizer is a Java program, and java is not here")
def test_words_are_those_of_coco() -> None:
    texts = [
        "A man's dog doesn't run. It sits on a black-and-white mat!",
        'Two people, "playing" tennis; it costs $3.50 and 10%',
        "a U.S. flag at 5 p.m. near a car...",
        "it's 3.5 o'clock: 'quoted' text -- end.",
    ]
    theirs = PTBTokenizer().tokenize({number: [{"caption": text}] for number, text in enumerate(texts)})
    assert {number: [words(text)] for number, text in enumerate(texts)} == theirs
