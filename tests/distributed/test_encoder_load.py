"""The balance of the encoder's work that a run reports is that of the plan: fullest rank over the mean."""

import pytest

from navil_megatron.blueprint.flops import encoding_cost
from navil_megatron.training.encoder_load import EncoderLoad
from tests.oracle import Composition, global_batch, oracle_config
from tests.ranks import run_ranks, start_session

LARGE, SMALL = (4, 6), (2, 2)
ONE_LARGE: Composition = ((9, (LARGE,)),)
TEXT: Composition = ((20, ()),)
THREE: Composition = ((5, (LARGE, LARGE, SMALL)),)


def reported(rank: int, world_size: int, parallel: dict, steps: tuple[tuple[Composition, ...], ...]) -> float:
    config = oracle_config(parallel=parallel)
    with start_session(rank, world_size, config) as session:
        load = EncoderLoad(session.device)
        for compositions in steps:
            rows = global_batch(config, compositions, session)
            share = len(rows) // session.groups.dp.size()
            load.add(rows[session.groups.dp.rank() * share : (session.groups.dp.rank() + 1) * share])
        return load.take()


@pytest.mark.parametrize(
    ("parallel", "steps", "expected"),
    [
        ({}, ((ONE_LARGE, TEXT),), 2.0),
        ({}, ((ONE_LARGE, ONE_LARGE),), 1.0),
        ({}, ((TEXT, TEXT),), 1.0),
        ({}, ((ONE_LARGE, TEXT), (TEXT, TEXT)), 1.5),
        ({"tp": 2}, ((ONE_LARGE, ONE_LARGE),), 2.0),
        ({"cp": 2}, ((ONE_LARGE,),), 2.0),
        ({"pp": 2}, ((ONE_LARGE, TEXT),), 1.0),
    ],
)
def test_fullest_rank_over_the_mean(parallel: dict, steps: tuple, expected: float) -> None:
    assert run_ranks(2, reported, parallel, steps) == [pytest.approx(expected)] * 2


def test_images_of_unlike_cost() -> None:
    """Two large ones on a rank each, and the small one beside either."""
    vision = oracle_config().model.vision
    large, small = (encoding_cost((1, *grid), vision) for grid in (LARGE, SMALL))
    expected = (large + small) / (large + small / 2)
    assert run_ranks(2, reported, {"tp": 2}, ((THREE,),)) == [pytest.approx(expected)] * 2
