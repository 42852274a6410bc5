"""Rows of several matrices that lie behind one another, each brought to the rows that FP8 takes, and back."""

from tests.engine.standin.calls import exported


@exported
def fused_multi_row_padding(input, output, input_row_list, padded_input_row_list, /):
    """Zeros fill each matrix up."""
    start = to = 0
    for rows, padded in zip(input_row_list, padded_input_row_list, strict=True):
        if rows:
            output[to : to + rows] = input[start : start + rows]
            output[to + rows : to + padded] = 0
        start, to = start + rows, to + padded


@exported
def fused_multi_row_unpadding(input, output, input_row_list, unpadded_input_row_list, /):
    """The rows that were there before."""
    start = to = 0
    for padded, rows in zip(input_row_list, unpadded_input_row_list, strict=True):
        output[to : to + rows] = input[start : start + rows]
        start, to = start + padded, to + rows
