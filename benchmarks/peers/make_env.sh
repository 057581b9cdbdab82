#!/usr/bin/env bash
# Makes the environment of a peer that halfbyte is measured against: .envs/TOOL (ignored by git).
#
#   benchmarks/peers/make_env.sh llmcompressor|autoround [FOLDER]
#
# PYTHON=/path/to/python3 chooses the interpreter. Each peer needs an environment of its own because it pins other
# versions of transformers and compressed-tensors than halfbyte uses. To measure with an environment that exists
# already, skip this script and give its interpreter to peers.py: --peer-python TOOL=PATH.
set -euo pipefail

usage="usage: make_env.sh llmcompressor|autoround [FOLDER]"
tool="${1:?$usage}"
case "$tool" in
  llmcompressor) requirement="llmcompressor==0.14.0.1" shown="llmcompressor compressed-tensors" ;;
  # compressed-tensors is what its export "llm_compressor" imports, without requiring it
  autoround) requirement="auto-round==0.16.1 compressed-tensors==0.19.0" shown="auto-round compressed-tensors" ;;
  *) echo "$usage" >&2; exit 2 ;;
esac

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
folder="${2:-$root/.envs/$tool}"
python="${PYTHON:-python3}"
torch="torch"
# Without a GPU, this release installs as its CPU build; an unpinned torch would pull gigabytes of CUDA packages.
if ! command -v nvidia-smi >/dev/null 2>&1; then torch="torch==2.13.0"; fi

[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet "$torch"
# shellcheck disable=SC2086 # several requirements are several words
"$folder/bin/python" -m pip install --quiet "$torch" $requirement
# shellcheck disable=SC2086
"$folder/bin/python" -c '
import sys
from importlib.metadata import version
print(", ".join(f"{p} {version(p)}" for p in sys.argv[1:]))' $shown transformers torch
echo "$folder/bin/python"
