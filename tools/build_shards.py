"""``navil-megatron data build`` for a checkout that is not installed: ``tools/build_shards.py MANIFEST FOLDER ...``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from navil_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["data", "build", *sys.argv[1:]]))
