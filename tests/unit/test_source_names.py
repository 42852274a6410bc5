"""Sources are called by the stem of their index, and by no more than tells them apart."""

import pytest

from navil_megatron.data.source_names import source_names


@pytest.mark.parametrize(
    ("indexes", "names"),
    [
        (["a/photos.idx", "b/books.idx"], ["photos", "books"]),
        (["a/train.idx", "b/train.idx", "b/held.idx"], ["a/train", "b/train", "held"]),
        (["x/a/train.idx", "y/a/train.idx", "train.idx"], ["x/a/train", "y/a/train", "train"]),
        (["s3://one/train.idx", "s3://two/train.idx"], ["one/train", "two/train"]),
        (["train.idx", "train.idx", "train.idx"], ["train", "train_2", "train_3"]),
        (["train.a", "train.b"], ["train", "train_2"]),
    ],
)
def test_names(indexes: list[str], names: list[str]) -> None:
    assert source_names(indexes) == names
