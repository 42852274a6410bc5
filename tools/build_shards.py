"""``navil-megatron data build`` for a checkout that is not installed: ``tools/build_shards.py MANIFEST FOLDER``."""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from navil_megatron.config.errors import EXIT_CODE, UserError, describe
from navil_megatron.data.build_shards import build_shards


def main() -> int:
    """Builds the shards and prints the report as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest", type=Path, help='JSON lines of {"image": path, "caption": text}')
    parser.add_argument("output", type=Path, help="folder of the shards")
    parser.add_argument("--prefix", default="shard", help="start of the shards' names")
    parser.add_argument("--samples-per-shard", type=int, default=10_000)
    parser.add_argument("--tokenizer", type=Path, help="Hugging Face folder; stores caption lengths in the indexes")
    options = vars(parser.parse_args())
    try:
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("samples", total=None)
            report = build_shards(
                options.pop("manifest"),
                options.pop("output"),
                on_progress=lambda done, total: bar.update(task, completed=done, total=total),
                **options,
            )
    except UserError as error:
        print(describe(error), file=sys.stderr)
        return EXIT_CODE
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
