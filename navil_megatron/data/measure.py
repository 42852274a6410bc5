"""Tokens and cost of samples from their index records alone, and what becomes of those too long for a row.

A sample that does not fit does without its images' largest scales, one after another; one that does not fit with the
smallest scale of each is refused and counted. Nothing is ever cut.
"""

from typing import NamedTuple

import numpy as np

from navil_megatron.blueprint.flops import attending_pairs, sample_flops
from navil_megatron.blueprint.image_plan import ImagePlanner, Pyramids
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.shards.shard_index import SourceIndex

REFUSED = -1  # in place of the number of dropped scales: the sample fits no row


class Measures(NamedTuple):
    """What planning knows of n samples."""

    num_text: np.ndarray
    """[n] int64: tokens for the text experts, line and frame breaks and control tokens included."""
    num_visual: np.ndarray
    """[n] int64: tokens for the visual experts, i.e. <IMG_CONTEXT> and <img>."""
    cost: np.ndarray
    """[n] int64: forward FLOPs."""
    dropped: np.ndarray
    """[n] int64: largest scales that the sample's images do without, or ``REFUSED``."""


class Ruler:
    """Measures samples as a run will encode them."""

    def __init__(self, config: NaViLConfig) -> None:
        self.planner = ImagePlanner.from_config(config.data, config.model.vision)
        self.seq_length = config.data.seq_length
        self.pad_segments_to = config.pad_segments_to
        self._model = config.model

    def measure(self, index: SourceIndex, samples: np.ndarray) -> Measures:
        """Measures of [n] samples of a source."""
        records = index.samples[samples]
        num_images = records["num_images"].astype(np.int64)
        owner = np.repeat(np.arange(len(samples)), num_images)
        number = np.arange(len(owner)) - np.repeat(np.cumsum(num_images) - num_images, num_images)
        images = index.images[records["first_image"].astype(np.int64)[owner] + number]
        heights, widths = (images[side].astype(np.int64) for side in ("height", "width"))
        pyramids = self.planner.plan_pyramids(heights, widths, number)
        text = records["text_tokens"].astype(np.int64)
        dropped = self._fit(text, owner, pyramids)
        lines, patches, pairs = self._sum_images(owner, pyramids, dropped, len(samples))
        num_text, num_visual = text + lines, patches // self.planner.merge_size**2 + num_images
        return Measures(num_text, num_visual, sample_flops(self._model, num_text, num_visual, patches, pairs), dropped)

    def row_tokens(self, num_text: np.ndarray, num_visual: np.ndarray) -> np.ndarray:
        """Tokens that a row needs for so many text and visual tokens, the visual segment padded."""
        return num_text + -(-num_visual // self.pad_segments_to) * self.pad_segments_to

    def _fit(self, text: np.ndarray, owner: np.ndarray, pyramids: Pyramids) -> np.ndarray:
        """[n] int64: the fewest dropped scales with which each sample fits a row, or ``REFUSED``."""
        dropped = np.zeros(len(text), dtype=np.int64)
        most = np.zeros(len(text), dtype=np.int64)  # scales of the image that has most: dropping more changes nothing
        np.maximum.at(most, owner, pyramids.num_scales)
        bad = np.zeros(len(text), dtype=bool)
        bad[owner[pyramids.num_scales == 0]] = True
        long = np.flatnonzero(~bad)
        while len(long):
            place = np.full(len(text), -1)
            place[long] = np.arange(len(long))
            chosen = np.flatnonzero(place[owner] >= 0)
            part = Pyramids(pyramids.resized[chosen], pyramids.grid[chosen], pyramids.num_scales[chosen])
            lines, patches, _ = self._sum_images(place[owner[chosen]], part, dropped[long], len(long))
            num_images = np.bincount(place[owner[chosen]], minlength=len(long))
            visual = patches // self.planner.merge_size**2 + num_images
            long = long[self.row_tokens(text[long] + lines, visual) > self.seq_length]
            bad[long[dropped[long] + 1 >= most[long]]] = True
            long = long[~bad[long]]
            dropped[long] += 1
        dropped[bad] = REFUSED
        return dropped

    def _sum_images(
        self, owner: np.ndarray, pyramids: Pyramids, dropped: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each sample, [count] int64: text tokens of its images, patches, and ``attending_pairs`` of them."""
        keep = self.planner.kept_scales(pyramids, np.maximum(dropped, 0)[owner])
        patches = pyramids.patches(keep)
        lines = (pyramids.grid[:, :, 0] // self.planner.merge_size * keep).sum(axis=1) + keep.sum(axis=1) + 1

        def total(values: np.ndarray) -> np.ndarray:
            summed = np.zeros(count, dtype=np.int64)
            np.add.at(summed, owner, values)
            return summed

        pairs = attending_pairs(pyramids.grid[:, :, 0], pyramids.grid[:, :, 1], self._model.vision) * keep
        return total(lines), total(patches.sum(axis=1)), total(pairs.sum(axis=1))
