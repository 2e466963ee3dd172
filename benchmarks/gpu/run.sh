#!/usr/bin/env bash
# Everything that only a GPU can tell, in less than ten minutes: bash benchmarks/gpu/run.sh [--dry-run] [--only PART ...]
# It writes RESULTS.md and RESULTS.json into this folder, or into $OUT if that is set. It needs torch, transformers and triton.
# What else the code imports and the machine lacks, it takes from wheels/ (benchmarks/gpu/wheels.sh fills that folder).
set -uo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$here/../.."
export PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" "$here/suite.py" "$@"
