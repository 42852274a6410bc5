"""``tokenizer.json`` and its settings that nobody wrote; in one process of its own, which native code may abort."""

import json
import multiprocessing
import random
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from navil_megatron.config.errors import UserError
from navil_megatron.data.tokenizer import load_tokenizer
from navil_megatron.hf.exported.tokenizer_files import extend_tokenizer, vocabulary
from tests.fuzz.inputs import COUNT, damaged_json, fuzz
from tests.unit.shard_examples import small_tokenizer

MORE_MEMORY = 3_000_000_000
FILES = ("tokenizer.json", "tokenizer.json", "tokenizer.json", "tokenizer_config.json")


def _fuzz(folder: Path, count: int, told: Any) -> None:
    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY, used + MORE_MEMORY))
    torch.set_num_threads(1)
    whole = {name: (folder / name).read_bytes() for name in FILES}

    def read(draw: random.Random) -> None:
        name = draw.choice(FILES)
        for other, content in whole.items():
            (folder / other).write_bytes(content)
        (folder / name).write_bytes(damaged_json(json.loads(whole[name]), draw))
        tokenizer = load_tokenizer(folder)
        assert len(tokenizer.count(["a red apple \u00e9\U0001f34e", ""], [0, 1])) == 2
        assert vocabulary(folder)

    try:
        told.put(dict(fuzz("tokenizers", read, count)))
    except BaseException as error:
        told.put(str(error))


def test_tokenizers(tmp_path: Path) -> None:
    small_tokenizer(tmp_path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.fuzz.test_tokenizers"])
    told = context.Queue()
    process = context.Process(target=_fuzz, args=(tmp_path, COUNT, told))
    process.start()
    while process.is_alive() and told.empty():
        process.join(0.1)
    assert not told.empty(), f"exit code {process.exitcode}; the file is in {tmp_path}"
    outcomes = told.get()
    process.join()
    assert not isinstance(outcomes, str), outcomes
    assert min(outcomes["works"], outcomes["refused"]) > 0


@pytest.mark.parametrize("token_id", [2**31 - 1, 2**32 - 1, 2**24 + 1, -1, "7"])
@pytest.mark.parametrize("place", ["vocab", "added_tokens"])
def test_an_id_beyond_any_vocabulary_is_one_line(tmp_path: Path, token_id: object, place: str) -> None:
    """The library would make a table of so many ids, and abort the process."""
    small_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    fields = json.loads(path.read_text())
    if place == "vocab":
        fields["model"]["vocab"]["a"] = token_id
    else:
        fields["added_tokens"][0]["id"] = token_id
    path.write_text(json.dumps(fields))
    match = f"tokenizer.json has {token_id} as a token's id, expected 0 to 16777216: save the tokenizer anew"
    for read in (load_tokenizer, vocabulary, lambda folder: extend_tokenizer(folder, folder / "new")):
        with pytest.raises(UserError, match=match):
            read(tmp_path)
