#!/bin/sh
# Tests exported folders under other versions of transformers: tools/test_transformers.sh 4.51.0 4.57.6 5.0.0
#
# Each version is installed with accelerate into a temporary environment that takes everything else (torch, pytest, ...)
# from PYTHON's, by default VENV's (.venv). Folders are exported under PYTHON's transformers and used under the other
# one, and the other way round.
set -eu
cd "$(dirname "$0")/.."
named=${PYTHON:-${VENV:-.venv}/bin/python}
python=$(command -v "$named") || { echo "error: no Python at $named; run make venv" >&2; exit 2; }
[ $# -gt 0 ] || { echo "error: name versions of transformers, for example: $0 4.51.0 5.0.0" >&2; exit 2; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 PYTHONPATH=. OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
folder_tests="tests/unit/test_hf_citizen.py tests/unit/test_hf_generation.py"
other_tests="tests/unit/test_hf_portable_tokenizer.py tests/parity/test_golden_hf.py tests/parity/test_golden_hf_processing.py"
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')

mkdir "$work/exported"
HF_HOME="$work/home" "$python" -m tests.unit.hf_folders "$work/exported"
for version in "$@"; do
    echo "== transformers $version"
    place="$work/$version"
    "$python" -m venv --without-pip "$place"
    other="$place/bin/python"
    # A .pth file comes after the environment's own packages, so what is installed here wins.
    echo "$packages" >"$("$other" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/project.pth"
    # transformers 4.51 cannot load any model without accelerate, and device_map needs it everywhere.
    "$other" -m pip install --quiet --disable-pip-version-check "transformers==$version" accelerate
    found=$("$other" -c 'import transformers; print(transformers.__version__)')
    [ "$found" = "$version" ] || { echo "error: asked for transformers $version, got $found" >&2; exit 1; }
    export HF_HOME="$place/home"
    # shellcheck disable=SC2086 # lists of files
    NAVIL_EXPORTED_DIR="$work/exported" "$other" -m pytest -q --show-capture=no $folder_tests $other_tests
    mkdir "$place/exported"
    "$other" -m tests.unit.hf_folders "$place/exported"
    # shellcheck disable=SC2086
    NAVIL_EXPORTED_DIR="$place/exported" HF_HOME="$work/home" "$python" -m pytest -q --show-capture=no $folder_tests
done
