"""How tensor-parallel ranks split the two tables of the vocabulary: any number of words, over any number of ranks.

As in Megatron-LM every rank holds the same multiple of 128 rows, so that products on a GPU are aligned. Rows behind the
last word are zero: no id asks for them, no softmax counts them, they get no gradient, and checkpoints do not hold them.
"""

ROWS = 128
"""What the rows of a rank are a multiple of."""


def held_rows(vocab_size: int, num_ranks: int) -> int:
    """Rows of a table on each of so many ranks."""
    return -(-vocab_size // (num_ranks * ROWS)) * ROWS


def words_of_rank(vocab_size: int, rank: int, num_ranks: int) -> range:
    """Words whose rows a rank holds, its first ones; of the last ranks there may be none."""
    rows = held_rows(vocab_size, num_ranks)
    return range(min(rank * rows, vocab_size), min((rank + 1) * rows, vocab_size))
