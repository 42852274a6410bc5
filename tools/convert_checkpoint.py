"""``navil-megatron convert`` for a checkout: python tools/convert_checkpoint.py to-hf CHECKPOINT FOLDER."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from navil_megatron import cli

if __name__ == "__main__":
    sys.exit(cli.main(["convert", *sys.argv[1:]]))
