#!/usr/bin/env bash
# Set up if needed, then lint and run every test, the files that take longest first, and more files at a time than there
# are cores (see tests/conftest.py). Arguments go to pytest, as in ./run_tests.sh -k scorer
set -euo pipefail
cd "$(dirname "$0")"
source records/lib.sh
use_python tests/requirements.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"
