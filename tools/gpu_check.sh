#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that is borrowed for minutes: correctness, then memory, then speed.
#
#   tools/gpu_check.sh                    # in at most 8 minutes
#   tools/gpu_check.sh --list             # what would run, and the packages that it needs
#   tools/gpu_check.sh --smoke            # the same on a CPU, with tiny models: does the script work?
#   tools/gpu_check.sh --wheels .wheels   # install missing packages from this folder, without a network
#
# Each result is a line of JSON, on the screen and in $OUT/results.jsonl if OUT is set. A part that fails or takes too
# long leaves a line with its error, and the next one runs; all of its output is in $OUT/errors.log. PYTHON chooses
# another Python than python3; it needs torch.
# Exit code: 0 if all passed, 1 if something failed, 2 if nothing could run.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
exec "${PYTHON:-python3}" tools/gpu_check.py "$@"
