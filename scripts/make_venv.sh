#!/bin/sh
# Makes the virtual environment $2 with the interpreter $1; does nothing where there is a working one already.
# Debian ships Python without ensurepip: as root the package is installed, otherwise the message says what to do.
set -eu
python=$1
folder=$2

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "dray needs Python 3.11 or newer, and '$python' is not: $("$python" --version 2>&1 || true)" >&2
    echo "Name another one: make PYTHON=/path/to/python3.12 ..." >&2
    exit 1
fi

if "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
    exit 0
fi

if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing $package, which '$python -m venv' needs"
        export DEBIAN_FRONTEND=noninteractive
        apt-get install -qq -y "$package" >/dev/null 2>&1 ||
            { apt-get update -qq && apt-get install -qq -y "$package" >/dev/null; }
    else
        echo "'$python -m venv' does not work here. On Debian or Ubuntu: sudo apt-get install $package" >&2
        exit 1
    fi
fi

rm -rf "$folder"
"$python" -m venv "$folder"
