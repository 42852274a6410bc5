"""The ``navil-megatron attention`` verb: its options, and what it reports.

Nothing heavy is imported until it runs.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any

from navil_megatron.config.errors import UserError

_NUM_SHOWN = 4
"""Layers that are shown where none are named: first to last, evenly spaced."""


def add_attention_verb(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verb; ``add_verb(name, run, what, example)`` makes its parser."""
    parser = add_verb(
        "attention",
        run_attention,
        "draw how much of an exported model's attention goes from text to an image; runs the code in the folder",
        'navil-megatron attention exported/ cat.jpg --prompt "<image>What is it?" --output attention.svg',
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what convert to-hf wrote; must be trusted")
    parser.add_argument("image", type=Path, metavar="IMAGE", help="the picture")
    parser.add_argument("--prompt", default="<image>", metavar="TEXT", help="<image> stands for the image (<image>)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="longest answer that is read too; 0: none (32)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("attention.svg"), metavar="FILE", help=".svg or .png (attention.svg)"
    )
    parser.add_argument("--layers", type=int, nargs="+", metavar="N", help="layers to show, from 0 (four)")
    parser.add_argument("--scales", choices=("largest", "all"), default="largest", help="scales to show (largest)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model runs (cpu)")


def run_attention(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    """Looks, draws, and gives the numbers."""
    if options.output.suffix not in (".svg", ".png"):
        raise UserError(f"--output {options.output} ends in neither .svg nor .png; name one of these")
    if options.max_new_tokens < 0:
        raise UserError(f"--max-new-tokens is {options.max_new_tokens}, expected 0 or more")
    if options.prompt.count("<image>") > 1:
        raise UserError("--prompt holds <image> more than once; it is about one image")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the picture needs matplotlib: pip install 'navil_megatron[study]'")
    from navil_megatron.evaluation.attention import attention_to_image
    from navil_megatron.evaluation.attention_picture import draw_attention
    from navil_megatron.hf.generate import load_for_generation, open_picture

    image = open_picture(options.image)
    captioner = load_for_generation(options.folder, device=options.device)
    layers = _layers(options.layers, captioner.model.config.llm_config.num_hidden_layers)
    found = attention_to_image(captioner, image, options.prompt, options.max_new_tokens)
    num_scales = len(found.covered)
    scales = range(num_scales) if options.scales == "all" else [num_scales - 1]
    title = shorten(f"{options.folder.name} on {options.image.name}: {found.answer}", 90, placeholder=" ...")
    draw_attention(found, image, layers, scales, title, options.output)
    shares = [found.share(layer) for layer in range(len(found.maps))]
    report = {
        "folder": str(options.folder),
        "image": str(options.image),
        "prompt": options.prompt,
        "answer": found.answer,
        "num_text_tokens": found.num_text_tokens,
        "share": shares,
        "share_by_scale": [[float(scale.sum()) for scale in maps] for maps in found.maps],
        "maps": {layer: [found.maps[layer][scale].tolist() for scale in scales] for layer in layers},
        "picture": str(options.output),
    }
    lines = [f"layer {layer}: {100 * share:.1f}% of the text's attention" for layer, share in enumerate(shares)]
    return (
        report,
        "\n".join([f"answer: {found.answer}", "to the image goes, in", *lines, f"picture: {options.output}"]),
        0,
    )


def _layers(wanted: list[int] | None, num_layers: int) -> list[int]:
    """The layers to show.

    Raises:
        UserError: The model has no such layer.
    """
    if wanted is None:
        shown = min(_NUM_SHOWN, num_layers)
        return [round(place * (num_layers - 1) / max(1, shown - 1)) for place in range(shown)]
    wrong = [layer for layer in wanted if not 0 <= layer < num_layers]
    if wrong:
        raise UserError(f"--layers names {wrong[0]}, but the model has layers 0 to {num_layers - 1}")
    return wanted
