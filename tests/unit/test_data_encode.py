"""One sample as tokens: images in their places and in order, loss where the model shall speak."""

import numpy as np
import pytest

from navil_megatron.blueprint.image_plan import ScalePlan, image_token_ids
from navil_megatron.data.encode import encode_sample
from navil_megatron.data.tokenizer import SampleTokenizer, build_tokenizer
from navil_megatron.data.types import Content, Document, EncodedSample, SampleId, Turn

SMALL, WIDE, TALL = ((ScalePlan(h * 16, w * 16, h, w),) for h, w in ((2, 2), (2, 6), (8, 2)))
PYRAMID = (ScalePlan(32, 32, 2, 2), ScalePlan(60, 64, 4, 4))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SampleTokenizer:
    return build_tokenizer(["a red apple", "user assistant system"] * 3, tmp_path_factory.mktemp("tokenizer"))


def encode(tokenizer: SampleTokenizer, content: Content, *scales: tuple[ScalePlan, ...]) -> EncodedSample:
    return encode_sample(SampleId(1, 5), content, scales, tokenizer, merge_size=2)


def image(tokenizer: SampleTokenizer, scales: tuple[ScalePlan, ...]) -> list[int]:
    ids: list[int] = image_token_ids(scales, 2, tokenizer.special_token_ids).tolist()
    return ids


def test_a_document_is_its_images_then_learned_text(tokenizer: SampleTokenizer) -> None:
    encoded = encode(tokenizer, "a red apple", PYRAMID, SMALL)
    pictures = image(tokenizer, PYRAMID) + image(tokenizer, SMALL)
    text = [*tokenizer.encode("a red apple"), tokenizer.end_id]
    assert encoded.input_ids.tolist() == pictures + text
    assert encoded.loss_weights.tolist() == [0.0] * len(pictures) + [1.0] * len(text)
    assert (encoded.sample, encoded.scales) == (SampleId(1, 5), (PYRAMID, SMALL))
    assert (encoded.input_ids.dtype, encoded.loss_weights.dtype) == (np.int64, np.float32)


def test_a_document_holds_images_in_its_text(tokenizer: SampleTokenizer) -> None:
    document = Document(("a red", None, None, "apple", None))
    encoded = encode(tokenizer, document, SMALL, PYRAMID, WIDE)
    first, second, third = (image(tokenizer, scales) for scales in (SMALL, PYRAMID, WIDE))
    before, between = tokenizer.encode("a red"), tokenizer.encode("apple")
    assert encoded.input_ids.tolist() == [*before, *first, *second, *between, *third, tokenizer.end_id]
    weights = [0.0, *[1.0] * (len(before) - 1), *[0.0] * len(first + second), *[1.0] * len(between)]
    assert encoded.loss_weights.tolist() == [*weights, *[0.0] * len(third), 1.0]
    after = encode_sample(SampleId(1, 5), document, (SMALL, PYRAMID, WIDE), tokenizer, 2, "after_image")
    assert after.input_ids.tolist() == encoded.input_ids.tolist()
    assert after.loss_weights.tolist() == [*[0.0] * len(before), *encoded.loss_weights[len(before) :].tolist()]


@pytest.mark.parametrize("content", ["a red apple", (Turn("user", ("a red", None)), Turn("assistant", ("apple",)))])
def test_what_holds_no_text_before_an_image_is_learned_either_way(
    tokenizer: SampleTokenizer, content: str | tuple[Turn, ...]
) -> None:
    for scales in ((), (SMALL,)) if isinstance(content, str) else ((SMALL,),):
        ways = [encode_sample(SampleId(1, 5), content, scales, tokenizer, 2, way) for way in ("all", "after_image")]
        assert ways[0].loss_weights.tolist() == ways[1].loss_weights.tolist()


def test_nothing_predicts_the_first_token_of_pure_text(tokenizer: SampleTokenizer) -> None:
    encoded = encode(tokenizer, "a red apple")
    assert encoded.input_ids.tolist() == [*tokenizer.encode("a red apple"), tokenizer.end_id]
    assert encoded.loss_weights.tolist() == [0.0] + [1.0] * (len(encoded.input_ids) - 1)


def test_a_conversation_holds_images_in_place_and_learns_answers(tokenizer: SampleTokenizer) -> None:
    turns = (
        Turn("system", ("be brief",)),
        Turn("user", (None, None, "left of", None)),
        Turn("assistant", ("a red apple",)),
        Turn("user", ("and ", None)),
        Turn("assistant", ("apple",)),
    )
    encoded = encode(tokenizer, turns, SMALL, PYRAMID, WIDE, TALL)
    start, end = tokenizer.hugging_face.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    text, header = tokenizer.encode, [start, *tokenizer.encode("assistant\n")]
    expected = [
        ([start, *text("system\nbe brief"), end], 0.0),
        ([start, *text("user\n"), *image(tokenizer, SMALL), *text("\n"), *image(tokenizer, PYRAMID)], 0.0),
        ([*text("\nleft of"), *image(tokenizer, WIDE), end], 0.0),
        (header, 0.0),
        ([*text("a red apple"), end], 1.0),
        ([start, *text("user\nand "), *image(tokenizer, TALL), end], 0.0),
        (header, 0.0),
        ([*text("apple"), end], 1.0),
    ]
    assert encoded.input_ids.tolist() == [token for ids, _ in expected for token in ids]
    assert encoded.loss_weights.tolist() == [weight for ids, weight in expected for _ in ids]


def test_images_without_a_place_are_a_mistake(tokenizer: SampleTokenizer) -> None:
    with pytest.raises(ValueError, match="2 images for 1 places"):
        encode(tokenizer, (Turn("user", (None,)), Turn("assistant", ("x",))), SMALL, WIDE)
