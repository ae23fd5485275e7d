# Shared by the run scripts and run_tests.sh; source it from the repository's root. Defines:
#   use_python REQUIREMENTS   sets $PYTHON to an interpreter that has these packages
#   default NAME VALUE        exports NAME=VALUE unless the caller's environment has NAME
#   use_recipe FILE           the same for every NAME=VALUE line of a recipe.env

# PYTHON=... given: that interpreter, as it is. Otherwise the active virtual environment, or .venv, made if missing;
# packages are installed once for each content of the requirements file.
use_python() {
    if [ -n "${PYTHON:-}" ]; then return; fi
    local env="${VIRTUAL_ENV:-.venv}" stamp
    [ -x "$env/bin/python" ] || { echo "making the virtual environment $env"; python3 -m venv "$env"; }
    PYTHON="$env/bin/python"
    stamp="$env/.installed-$(cat requirements.txt "$1" | cksum | cut -d' ' -f1)"
    if [ ! -e "$stamp" ]; then
        echo "installing $1"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$1"
        if [ "$(gpu_count)" -gt 0 ]; then  # extras: prebuilt wheels only, never a compilation
            "$PYTHON" -m pip install --quiet --disable-pip-version-check --only-binary :all: kernels ||
                echo "no prebuilt 'kernels': PyTorch's own attention serves"
        fi
        touch "$stamp"
    fi
}

gpu_count() { if command -v nvidia-smi >/dev/null; then nvidia-smi -L 2>/dev/null | grep -c '^GPU'; else echo 0; fi; }

default() { if [ -z "${!1+set}" ]; then export "$1=$2"; fi; }

use_recipe() {
    local line
    while IFS= read -r line || [ -n "$line" ]; do
        line="${line%%#*}"
        line="${line%"${line##*[![:space:]]}"}"
        [ -z "$line" ] || default "${line%%=*}" "${line#*=}"
    done <"$1"
}
