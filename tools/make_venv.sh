#!/bin/sh
# Makes or completes .venv with this project and its quickstart, study and dev extras. `make` calls it when setup.py is newer.
set -eu
cd "$(dirname "$0")/.."

# Two makes at once must not fill one folder: the second waits, then finds everything installed.
if [ "${NAVIL_VENV_LOCKED:-}" != 1 ] && command -v flock >/dev/null; then
    export NAVIL_VENV_LOCKED=1
    exec flock .venv.lock "$0" "$@"
fi

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
    for candidate in ${PYTHON:-} python3.12 python3.13 python3 "$HOME"/.pyenv/versions/3.1[2-9]*/bin/python; do
        is_new_enough "$candidate" || continue
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
        echo "error: found no Python >= 3.12 (tried python3.12, python3.13, python3 and pyenv's versions); run:" \
            "apt-get install python3.12 python3.12-venv, or: pyenv install 3.12, or: make PYTHON=/path/to/python" >&2
    fi
    return 1
}

# A folder that an interrupted run left half made, or whose Python is gone, is made again from nothing.
if ! is_new_enough .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi
if [ ! -e .venv/.installed ] || [ setup.py -nt .venv/.installed ]; then
    rm -f .venv/.installed
    .venv/bin/python -m pip install --editable '.[quickstart,study,dev]'
    touch .venv/.installed
fi
