#!/usr/bin/env bash
# Set up if needed, then lint and run every test, those files first that take longest (see tests/conftest.py). Runs of
# several processes often wait, so that two cores take three files at a time. Arguments go to pytest: -k scorer
set -euo pipefail
cd "$(dirname "$0")"
source records/lib.sh
use_python tests/requirements.txt
"$PYTHON" -m ruff check .
workers=$(($("$PYTHON" -c "import os; print(len(os.sched_getaffinity(0)))") * 3 / 2))
"$PYTHON" -m pytest -n $((workers < 8 ? workers : 8)) --dist loadfile --no-loadscope-reorder "$@"
