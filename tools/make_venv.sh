#!/bin/sh
# Makes or completes the environment that VENV names (.venv) with this project and a set of requirements/:
# tools/make_venv.sh quickstart|recipe-small|test|peers|docs. Does nothing where the set's lock and setup.py are installed.
#
# tools/make_venv.sh engine, after test, fills VENV/engine with Transformer Engine's Python and the source of its compiled
# part, for tests/engine: a folder of its own, since megatron-core imports a Transformer Engine that it finds.
set -eu
cd "$(dirname "$0")/.."
set_name=${1:-}
case $set_name in
quickstart | recipe-small | test | peers | docs | engine) ;;
*) echo "error: found the set '$set_name', expected quickstart, recipe-small, test, peers, docs or engine" >&2; exit 2 ;;
esac
venv=${VENV:-.venv}
venv=${venv%/}

# Two makes at once must not fill one folder: the second waits, then finds everything installed.
if [ "${NAVIL_VENV_LOCKED:-}" != 1 ] && command -v flock >/dev/null; then
    export NAVIL_VENV_LOCKED=1
    exec flock "$venv.lock" "$0" "$@"
fi

lock_for() { # lock_for PYTHON: the lock of the set for that Python's version; fails where there is none
    lock=$("$1" -c 'import sys; print("requirements/%s-py%d%d.txt" % (sys.argv[1], *sys.version_info[:2]))' "$set_name" \
        2>/dev/null) && [ -e "$lock" ] && echo "$lock"
}

find_python() {
    for candidate in ${PYTHON:-} python3.12 python3.13 python3 "$HOME"/.pyenv/versions/3.1[23]*/bin/python; do
        lock_for "$candidate" >/dev/null || continue
        seen=$candidate
        if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    if [ -n "${seen:-}" ]; then
        version=$("$seen" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        echo "error: $seen cannot make virtual environments; run: apt-get install python$version-venv" >&2
    else
        echo "error: found no Python 3.12 or 3.13 (tried python3.12, python3.13, python3 and pyenv's versions); run:" \
            "apt-get install python3.12 python3.12-venv, or: pyenv install 3.12, or: make PYTHON=/path/to/python" >&2
    fi
    return 1
}

# A folder that an interrupted run left half made, or whose Python is gone, is made again from nothing.
if ! lock_for "$venv/bin/python" >/dev/null || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
        echo "error: $venv is no virtual environment; name another folder: make VENV=/path/to/folder" >&2
        exit 2
    fi
    python=$(find_python)
    echo "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi
lock=$(lock_for "$venv/bin/python")

install_set() { # the set and this project, into the environment
    "$venv/bin/python" -m pip install --require-hashes --no-deps --requirement "$lock"
    "$venv/bin/python" -m pip install --no-index --no-deps --no-build-isolation --editable .
}

fill_engine() { # the set and the source package, beside the environment
    rm -rf "$venv/engine"
    "$venv/bin/python" -m pip install --require-hashes --no-deps --no-compile --target "$venv/engine" --requirement "$lock"
    # Its metadata is made by its build script, which compiles nothing under this switch of theirs.
    NVTE_PROJECT_BUILDING=1 "$venv/bin/python" -m pip download --require-hashes --no-deps --no-build-isolation \
        --no-binary transformer-engine-torch --dest "$venv/engine" --requirement "$source"
    tar -xzf "$venv"/engine/transformer_engine_torch-*.tar.gz -C "$venv/engine"
    mv "$venv"/engine/transformer_engine_torch-*/ "$venv/engine/source"
}

source=requirements/engine-source.txt
case $set_name in
engine) wanted=$(cksum "$lock" "$source") ;;
*) wanted=$(cksum "$lock" setup.py) ;;
esac
if [ "$(cat "$venv/.$set_name" 2>/dev/null)" != "$wanted" ]; then
    rm -f "$venv/.$set_name"
    if [ "$set_name" = engine ]; then fill_engine; else install_set; fi
fi
echo "$wanted" >"$venv/.$set_name"
