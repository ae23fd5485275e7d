# Shared by the run scripts and run_tests.sh; source it from the repository's root. Defines:
#   use_python REQUIREMENTS   sets $PYTHON to an interpreter that has these packages
#   default NAME VALUE        exports NAME=VALUE unless the caller's environment has that setting by any of its names
#   use_recipe FOLDER         the same for every NAME=VALUE line of its recipe.env
#   audit FOLDER MARKER PROGRAM...     if AUDIT says so, a finished run by records/audit.py, started by this program;
#                                      status 3 if that found something, whatever torchrun makes of it
#   summarise FOLDER MARKER [OPTION]   a finished run by records/summary.py, if its result is newer than the file MARKER

stop() { echo "error: $*" >&2; exit 1; }

# PYTHON=... given: that interpreter, as it is. Otherwise the active virtual environment, or .venv, which is made where
# there is none that works. pip runs whenever the requirements, or the names in site-packages, are not those that the
# last finished set-up left, so whatever ends a set-up or changes a package is mended by the next start.
use_python() {
    local env="${VIRTUAL_ENV:-.venv}" said stamp
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null || stop "PYTHON=$PYTHON: no such program"
        said="$("$PYTHON" records/check_env.py lacking requirements.txt "$1" 2>&1)" ||
            stop "PYTHON=$PYTHON: ${said##*$'\n'}"
        return
    fi
    if [ "$env" -ef .venv ] || [ "$env" = "$PWD/.venv" ]; then env=.venv; fi  # activated
    PYTHON="$env/bin/python"
    unset PYTHONDONTWRITEBYTECODE  # set, each process would compile PyTorch's modules anew: the set-up does not
    stamp="$env/.installed-${1//\//-}"
    if is_set_up "$1"; then return; fi
    [ "$env" != .venv ] || mkdir -p .venv 2>/dev/null ||
        stop ".venv: cannot be a folder here; remove what stands there (rm -r .venv) and start again"
    [ -d "$env" ] || stop "VIRTUAL_ENV=$env: no such folder; unset VIRTUAL_ENV to have .venv made"
    {   # locked until pip has ended, even when this script is killed before it
        if command -v flock >/dev/null && ! flock -n 9; then
            echo "waiting for another set-up of $env"
            flock 9
        fi
        is_set_up "$1" || set_up "$1"
    } 9<"$env"
}

set_up_state() { cat requirements.txt "$1" && "$PYTHON" records/check_env.py state; } 2>/dev/null

is_set_up() {
    local now
    [ -e "$stamp" ] && now="$(set_up_state "$1")" && [ "$now" = "$(cat "$stamp")" ]
}

set_up() {
    said="$("$PYTHON" records/check_env.py state 2>&1)" || make_environment
    rm -f "$stamp"
    echo "installing $1"
    # not compiled: Python compiles what it imports, pip would take half of its time for all that is there
    said="$(exec 2>&1; "$PYTHON" records/check_env.py mend requirements.txt "$1" &&
        "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-compile -r "$1")" || {
        said="$(printf '%s\n' "$said" | sed -n '/^ERROR: /{s///p;q;};$p')"  # pip's first error, or the last line
        stop "cannot install $1: $said; see that the network works and the disk has room, then start again"
    }
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then  # prebuilt wheels, no compilation
        "$PYTHON" -m pip install --quiet --disable-pip-version-check --only-binary :all: 'kernels>=0.16' ||
            echo "no prebuilt 'kernels': PyTorch's own attention serves"
    fi
    { set_up_state "$1" >"$stamp"; } 2>/dev/null || true  # where it cannot be written, pip looks again next time
}

# Only a .venv of which nothing works any more is made again; $said is what its interpreter answered.
make_environment() {
    local has_packages='import os, sys, sysconfig; sys.exit(not os.path.isdir(sysconfig.get_path("purelib")))'
    said="$PYTHON: ${said##*: }"
    [ "$env" = .venv ] || stop "$said; make that environment again, or unset VIRTUAL_ENV to have .venv made"
    ! "$PYTHON" -c "$has_packages" 2>/dev/null || stop "$said; remove it (rm -r .venv) and start again"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        stop "python3: not there, or older than Python 3.11; a newer one can make .venv: python3.12 -m venv .venv"
    echo "making the virtual environment .venv"
    said="$(python3 -m venv --clear .venv 2>&1)" ||
        stop "python3 -m venv .venv: ${said//$'\n'/ }; mend that and start again"
}

default() {
    local name also
    # the names of each setting that has several, which stand at the end of its line: "... [also MUON_EQR]"
    : "${SETTINGS_NAMES:=$("$PYTHON" train_gpt.py --help | sed -n 's/^  \([A-Z0-9_]*\) .*\[also \(.*\)\]$/ \1, \2,/p')}"
    also="$(grep -- " $1," <<<"$SETTINGS_NAMES" || true)"
    for name in "$1" ${also//,/ }; do
        if [ -n "${!name+set}" ]; then return; fi
    done
    export "$1=$2"
}

use_recipe() {
    local line number=0 quoted="\"([^\"]*)\"|'([^']*)'" form
    form="^(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*)[[:space:]]*=[[:space:]]*($quoted|([^\"'#]*))[[:space:]]*(#.*)?$"
    [ -e "$1/recipe.env" ] || stop "$1: no recipe.env in it"
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1))
        line="${line#$'\xef\xbb\xbf'}"                  # the byte-order mark of some editors
        line="${line#"${line%%[![:space:]]*}"}"
        line="${line%"${line##*[![:space:]]}"}"         # with the \r of Windows
        case "$line" in '' | '#'*) continue ;; esac
        [[ "$line" =~ $form ]] || stop "$1/recipe.env, line $number: expected NAME=VALUE, found $line"
        line="${BASH_REMATCH[6]}"
        line="${line%"${line##*[![:space:]]}"}"
        default "${BASH_REMATCH[2]}" "${BASH_REMATCH[4]}${BASH_REMATCH[5]}$line"
    done <"$1/recipe.env"
}

summarise() { if [ "$1/result.json" -nt "$2" ]; then "$PYTHON" records/summary.py "$1" "${@:3}" || true; fi; }

audit() {
    case "${AUDIT:-0}" in 1 | [Tt]rue | TRUE) ;; *) return 0 ;; esac
    [ "$1/result.json" -nt "$2" ] || return 0
    "${@:3}" records/audit.py "$1" && return
    [ "$1/audit.json" -nt "$2" ] && return 3
    return 1
}
