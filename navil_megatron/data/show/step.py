"""The picture behind ``navil-megatron data show``: some rows of a step, planned and decoded as a run does it."""

from typing import Any

from PIL import Image

from navil_megatron.config.errors import UserError
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.loader import load_run_tokenizer, open_sources, plan_run
from navil_megatron.data.microbatches import MicrobatchBuilder
from navil_megatron.data.show.rows import draw_rows
from navil_megatron.data.types import ALONE


def show_step(config: NaViLConfig, step: int, first_row: int, num_rows: int) -> tuple[Image.Image, dict[str, Any]]:
    """Rows of the global batch of a step as a page, and what is on it.

    Args:
        config: the run.
        step: from 0.
        first_row: of the batch, from 0.
        num_rows: at most; the batch may end before.

    Raises:
        UserError: sources or tokenizer do not fit, or the batch has no such row.
    """
    tokenizer = load_run_tokenizer(config)
    sources = open_sources([source.index for source in config.data.train_sources], tokenizer)
    batch = plan_run(config, sources).step_rows(step)
    rows = batch[first_row : first_row + num_rows]
    if not rows:
        raise UserError(f"row {first_row}: a global batch has {len(batch)} rows; count from 0")
    builder = MicrobatchBuilder(config, sources, tokenizer, place=ALONE)
    sequences = builder.encode(rows)
    microbatch = builder.build(rows)
    fill = microbatch.num_tokens / microbatch.input_ids.size
    title = (
        f"step {step}, rows {first_row} to {first_row + len(rows) - 1} of {len(batch)}, seed {config.training.seed}: "
        f"{fill:.1%} full, {sum(row.cost for row in rows) / len(rows):.3g} FLOPs a row"
    )
    page = draw_rows(
        sequences,
        microbatch,
        tokenizer.hugging_face.decode,
        tokenizer.special_token_ids,
        config.model.vision.patch_size,
        config.model.vision.merge_size,
        title,
        lambda sample: sources[sample.source].key(sample.number),
    )
    report = {
        "step": step,
        "rows": len(rows),
        "samples": len(microbatch.samples),
        "shrunk_samples": microbatch.num_shrunk,
        "failed_samples": len(microbatch.failures),
        "fill": round(fill, 4),
        "costs": [row.cost for row in rows],
    }
    return page, report
