"""One sample as tokens: images in their places and in order, loss where the model shall speak."""

import numpy as np
import pytest

from navil_megatron.blueprint.image_plan import ScalePlan, image_token_ids
from navil_megatron.data.encode import encode_sample
from navil_megatron.data.tokenizer import SampleTokenizer, build_tokenizer
from navil_megatron.data.types import EncodedSample, SampleId, Turn

SMALL, WIDE, TALL = ((ScalePlan(h * 16, w * 16, h, w),) for h, w in ((2, 2), (2, 6), (8, 2)))
PYRAMID = (ScalePlan(32, 32, 2, 2), ScalePlan(60, 64, 4, 4))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SampleTokenizer:
    return build_tokenizer(["a red apple", "user assistant system"] * 3, tmp_path_factory.mktemp("tokenizer"))


def encode(
    tokenizer: SampleTokenizer, content: str | tuple[Turn, ...], *scales: tuple[ScalePlan, ...]
) -> EncodedSample:
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
