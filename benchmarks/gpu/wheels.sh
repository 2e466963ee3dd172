#!/usr/bin/env bash
# Fetches into wheels/ what the code imports beside torch and transformers, for a machine without a package index:
#     bash benchmarks/gpu/wheels.sh [3.12]     (the Python of that machine)
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
names='annotated-types|msgpack|pydantic|pydantic_core|typing-inspection|typing_extensions|xxhash|regex|PyYAML'
grep -E "^($names)==" "$here/../../constraints.txt" |
  xargs "${PYTHON:-python3}" -m pip download -q --no-deps --only-binary :all: --python-version "${1:-3.12}" \
    --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -d "$here/wheels"
ls -l "$here/wheels"
