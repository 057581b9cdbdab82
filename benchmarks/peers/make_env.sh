#!/usr/bin/env bash
# Makes the environment of the peer that halfbyte is measured against: .envs/llmcompressor (ignored by git).
#
#   benchmarks/peers/make_env.sh [FOLDER]
#
# PYTHON=/path/to/python3 chooses the interpreter. The peer needs an environment of its own because it pins other
# versions of transformers and compressed-tensors than halfbyte uses. To measure with an environment that exists
# already, skip this script and give its interpreter to peer_gptq.py: --peer-python.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
folder="${1:-$root/.envs/llmcompressor}"
python="${PYTHON:-python3}"
torch="torch"
# Without a GPU, this release installs as its CPU build; an unpinned torch would pull gigabytes of CUDA packages.
if ! command -v nvidia-smi >/dev/null 2>&1; then torch="torch==2.13.0"; fi

[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet "$torch"
"$folder/bin/python" -m pip install --quiet "llmcompressor==0.14.0.1"
"$folder/bin/python" -c '
from importlib.metadata import version
print(", ".join(f"{p} {version(p)}" for p in ("llmcompressor", "compressed-tensors", "transformers", "torch")))'
echo "$folder/bin/python"
