# Shared by the run scripts and run_tests.sh; source it from the repository's root. Defines:
#   use_python REQUIREMENTS   sets $PYTHON to an interpreter that has these packages
#   gpu_count                 how many GPUs PyTorch can use here; after use_python
#   default NAME VALUE        exports NAME=VALUE unless the caller's environment has NAME or one of its aliases
#   use_recipe FOLDER         the same for every NAME=VALUE line of its recipe.env
#   summarise FOLDER MARKER   a finished run in a few lines, if its result is newer than the file MARKER

# PYTHON=... given: that interpreter, as it is. Otherwise the active virtual environment, or .venv, made if missing;
# packages are installed once for each content of the requirements file.
use_python() {
    if [ -n "${PYTHON:-}" ]; then return; fi
    local env="${VIRTUAL_ENV:-.venv}" stamp
    if [ ! -x "$env/bin/pip" ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            { echo "error: Python 3.11 or newer is needed; PYTHON=<path> names one" >&2; exit 1; }
        echo "making the virtual environment $env"
        python3 -m venv "$env"
    fi
    PYTHON="$env/bin/python"
    stamp="$env/.installed-$(cat requirements.txt "$1" | cksum | cut -d' ' -f1)"
    if [ ! -e "$stamp" ]; then
        echo "installing $1"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$1"
        if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then  # prebuilt wheels, no compilation
            "$PYTHON" -m pip install --quiet --disable-pip-version-check --only-binary :all: kernels ||
                echo "no prebuilt 'kernels': PyTorch's own attention serves"
        fi
        touch "$stamp"
    fi
}

gpu_count() { "$PYTHON" -c 'import torch; print(torch.cuda.device_count())'; }

default() {
    local name also
    : "${SETTINGS_HELP:=$("$PYTHON" train_gpt.py --help)}"
    # a setting's other names stand at the end of its line: "... [also MUON_EQR]"
    also="$(sed -n "s/^  $1 .*\[also \(.*\)\]$/\1/p" <<<"$SETTINGS_HELP")"
    for name in "$1" ${also//,/ }; do
        if [ -n "${!name+set}" ]; then return; fi
    done
    export "$1=$2"
}

use_recipe() {
    local line
    [ -e "$1/recipe.env" ] || { echo "error: $1: no recipe.env in it" >&2; exit 1; }
    while IFS= read -r line || [ -n "$line" ]; do
        line="${line%%#*}"
        line="${line%"${line##*[![:space:]]}"}"
        [ -z "$line" ] || default "${line%%=*}" "${line#*=}"
    done <"$1/recipe.env"
}

summarise() { if [ "$1/result.json" -nt "$2" ]; then "$PYTHON" records/summary.py "$1" || true; fi; }
