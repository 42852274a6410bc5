"""Looks at this machine: which versions are installed, what is missing or wrong, and the exact line that mends it.

Imports nothing heavy and decides by installed metadata and files, so that it still answers on a broken install, and on
a Python too old for the rest (``python3 -m navil_megatron.cli doctor`` in a checkout).
"""

import ast
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

PROJECT = "navil_megatron"
WHY = {"psutil": "without it a checkpoint save of megatron-core waits for ever"}
"""What goes wrong without a distribution, where that is not plain."""

INSTALL_APEX = (
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation git+https://github.com/NVIDIA/apex "
    "(needs a CUDA build of torch and nvcc)"
)
TRANSFORMER_ENGINE, DALI = "transformer-engine", "nvidia-dali-cuda130"
"""What extras ask for and the doctor looks into, beyond the version."""


@dataclass(frozen=True)
class Requirement:
    """A distribution that setup.py lists."""

    name: str
    parts: str  # extras of its own, such as ``[pytorch]``
    bounds: str  # versions that were tried, such as ``>=2.11,<2.16``; empty: any
    extra: str  # the extra of ours that asks for it; empty: always needed

    @property
    def install(self) -> str:
        """The line that installs it."""
        asked = f'"{self.name}{self.parts}{self.bounds}"'
        if self.name == TRANSFORMER_ENGINE:
            return f"pip install --no-build-isolation {asked} (needs a CUDA torch, nvcc)"
        return f"pip install {asked}"


@dataclass(frozen=True)
class Check:
    """What was found about one thing."""

    name: str
    status: str  # ``ok``; ``absent``: not there and not needed; ``missing`` or ``wrong``: mend it first
    found: str  # its version, or what it is
    advice: str = ""  # what to do, with the line to type; empty when nothing is needed

    @property
    def is_problem(self) -> bool:
        """Whether a run cannot work before this is mended."""
        return self.status in ("missing", "wrong")


def diagnose(python_version: "tuple[int, ...]" = sys.version_info[:3]) -> "list[Check]":
    """Every check, in the order in which to mend what they find."""
    python_bounds, requirements = read_requirements()
    checks = [check_python(python_version, python_bounds)]
    checks += [check_required(wanted) for wanted in requirements.values() if not wanted.extra]
    checks += [check_cuda(), check_gpu(requirements["torch"])]
    checks += [check_transformer_engine(requirements[TRANSFORMER_ENGINE]), check_apex(), check_dali(requirements[DALI])]
    return checks + check_extras(requirements)


def read_requirements() -> "tuple[str, dict[str, Requirement]]":
    """Bounds of Python, and requirements by name: those of a checkout's setup.py, else as pip noted them of it."""
    setup = Path(__file__).parents[1] / "setup.py"
    text = setup.read_text(encoding="utf-8") if setup.is_file() else ""
    if f'name="{PROJECT}"' in text:
        given = {word.arg: word.value for word in ast.walk(ast.parse(text)) if isinstance(word, ast.keyword)}
        python, lines = ast.literal_eval(given["python_requires"]), ast.literal_eval(given["install_requires"])
        for extra, names in ast.literal_eval(given["extras_require"]).items():
            lines += [f'{name}; extra == "{extra}"' for name in names]
    else:
        python, lines = metadata.metadata(PROJECT)["Requires-Python"], metadata.requires(PROJECT) or []
    requirements: dict[str, Requirement] = {}
    for line in lines:
        found = re.match(r"([\w.-]+)(\[.*?\])?([^;]*)(?:;.*extra == .([\w-]+))?", line)
        if found is not None and found[1] != PROJECT:
            wanted = Requirement(found[1], found[2] or "", _in_order(found[3]), found[4] or "")
            requirements.setdefault(wanted.name, wanted)
    return _in_order(python), requirements


def as_json(checks: list[Check]) -> dict[str, object]:
    """The checks as one JSON object; ``ok`` says that nothing needs mending."""
    return {"ok": not any(check.is_problem for check in checks), "checks": [asdict(check) for check in checks]}


def as_table(checks: list[Check]) -> str:
    """The checks as lines for a terminal, advice under each."""
    lines = []
    for check in checks:
        lines.append(f"{check.status:8} {check.name:19} {check.found}")
        if check.advice:
            lines.append(f"{'':8} -> {check.advice}")
    return "\n".join(lines)


def check_python(version: "tuple[int, ...]", bounds: str) -> Check:
    """The interpreter's age. On one that is too old, pip silently resolves an older megatron-core."""
    take = "apt-get install python3.12 python3.12-venv, or pyenv install 3.12"
    return _check_version("python", ".".join(map(str, version)), bounds, take)


def check_required(wanted: Requirement) -> Check:
    """A distribution that everything needs."""
    found = installed_version(wanted.name)
    if found is None:
        because = f"{WHY[wanted.name]}: " if wanted.name in WHY else ""
        return Check(wanted.name, "missing", "not installed", because + wanted.install)
    return _check_version(wanted.name, found, wanted.bounds, wanted.install)


def _check_version(name: str, found: str, bounds: str, remedy: str) -> Check:
    # A found name may stand before the version.
    if satisfies(found.split()[-1], bounds):
        return Check(name, "ok", found)
    return Check(name, "wrong", found, f"expected {bounds}: {remedy}")


def check_extras(requirements: "dict[str, Requirement]") -> "list[Check]":
    """What other extras ask for and is installed in a version that was never tried."""
    looked_into = (TRANSFORMER_ENGINE, DALI)
    optional = [wanted for wanted in requirements.values() if wanted.extra and wanted.name not in looked_into]
    checks = [check_required(wanted) for wanted in optional if installed_version(wanted.name) is not None]
    return [check for check in checks if check.is_problem]


def check_cuda() -> Check:
    """The CUDA version that the installed torch was built for, read from its version file."""
    path = metadata.distribution("torch").locate_file("torch/version.py") if installed_version("torch") else None
    if path is None or not Path(str(path)).is_file():
        return Check("cuda", "absent", "no torch to ask")
    version = re.search(r"^cuda\b.*= *['\"](.+)['\"]", Path(str(path)).read_text(encoding="utf-8"), re.MULTILINE)
    if version is None:
        return Check("cuda", "absent", 'torch is a CPU build: runtime.device = "cpu" only')
    return Check("cuda", "ok", f"{version[1]} (torch's build)")


def check_gpu(torch: Requirement) -> Check:
    """The GPUs that the driver lists."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return Check("gpu", "absent", 'no nvidia-smi: runtime.device = "cpu" only')
    listed = subprocess.run([command, "-L"], capture_output=True, text=True, check=False, timeout=60)
    names = re.findall(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", listed.stdout, re.MULTILINE)
    if listed.returncode != 0 or not names:
        said = " ".join((listed.stderr or listed.stdout).split())
        return Check("gpu", "wrong", f"nvidia-smi lists none: {said}", "check the driver: nvidia-smi -L")
    found = f"{len(names)} x {names[0]}" if len(set(names)) == 1 else ", ".join(names)
    if check_cuda().status != "ok":
        again = torch.install.replace("install", "install --force-reinstall")
        return Check("gpu", "wrong", found, f"torch cannot use it: {again}")
    return Check("gpu", "ok", found)


def check_transformer_engine(wanted: Requirement) -> Check:
    """Transformer Engine and its part for torch."""
    found = installed_version(wanted.name)
    if found is None and find_spec("transformer_engine") is None:
        return Check(wanted.name, "absent", 'not installed: runtime.kernels = "torch" only')
    if find_spec("transformer_engine_torch") is None:
        return Check(wanted.name, "wrong", f"{found} without its torch part", wanted.install)
    return check_required(wanted)


def check_apex() -> Check:
    """NVIDIA Apex, told apart from the web toolkit that owns its name on PyPI."""
    spec = find_spec("apex")
    version = installed_version("apex")
    if spec is None and version is None:
        return Check("apex", "absent", 'not installed: runtime.gradient_accumulation_fusion = "apex" is refused')
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    if not any((folder / "normalization").is_dir() for folder in folders):
        found = f"{version}: the web toolkit of that name on PyPI, not NVIDIA Apex"
        return Check("apex", "wrong", found, f"pip uninstall apex; if Apex is wanted: {INSTALL_APEX}")
    if find_spec("amp_C") is None:
        return Check("apex", "wrong", f"{version}: built without its CUDA extensions (no amp_C)", INSTALL_APEX)
    if find_spec("fused_weight_gradient_mlp_cuda") is None:
        return Check("apex", "wrong", f"{version}: built without fused_weight_gradient_mlp_cuda", INSTALL_APEX)
    return Check("apex", "ok", str(version))


def check_dali(wanted: Requirement) -> Check:
    """DALI, told apart from the placeholder ``nvidia-dali``."""
    names = sorted({str(found.name) for found in metadata.distributions() if found.name})
    real = [name for name in names if re.fullmatch(r"nvidia[-_.]dali[-_.]cuda\d+", name, re.IGNORECASE)]
    fake = installed_version("nvidia-dali")
    if fake is not None:
        found = f"nvidia-dali {fake}: a placeholder on PyPI, not DALI"
        # Both unpack into the same folder, so removing the placeholder may take files of the real one along.
        return Check("dali", "wrong", found, f"pip uninstall nvidia-dali; if DALI is wanted: {wanted.install}")
    if not real:
        return Check("dali", "absent", 'not installed: data.image_decoder = "pillow" only', wanted.install)
    return _check_version("dali", f"{real[0]} {installed_version(real[0])}", wanted.bounds, wanted.install)


def installed_version(name: str) -> "str | None":
    """Version of an installed distribution, ``None`` if it is not installed."""
    for distribution in metadata.distributions(name=name):
        return distribution.version
    return None


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version's release number meets comma-separated ``>=`` and ``<`` bounds."""
    release, bounds = _release(version), wanted.split(",")
    lowest = [_release(bound[2:]) for bound in bounds if bound.startswith(">=")]
    beyond = [_release(bound[1:]) for bound in bounds if bound.startswith("<")]
    return all(release >= low for low in lowest) and all(release < high for high in beyond)


def _in_order(bounds: str) -> str:
    """``<2.16,>=2.11``, as pip notes bounds, with the lower one first."""
    return ",".join(sorted((bound.strip() for bound in bounds.split(",")), reverse=True))


def _release(version: str) -> "tuple[int, ...]":
    """``2.11.0a0+git`` -> (2, 11): trailing zeros fall off, so that 2.11 equals 2.11.0."""
    digits = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in digits.group().split(".")] if digits else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
