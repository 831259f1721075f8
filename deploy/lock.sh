#!/bin/sh
# Writes the locked files of the images from requirements*.txt: every version with the SHA-256 of each file it has on the
# package index. Needs uv (`pip install uv`) and the public index; run it after a pin has changed.
#
#   requirements.lock           everything but torch, for both images
#   requirements-cuda.lock      torch for GPUs with what it pins itself: the CUDA libraries and triton
#   requirements-loadtest.lock  requirements-loadtest.txt, for the image that sends the load
#
# There is no lock of the CPU build of torch: its wheels lie on PyTorch's own index alone; see the Dockerfile.
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

compile() { # INPUT OUTPUT OPTION...: locked for the Python and the platform of the images
    input=$1 output=$2
    shift 2
    # the settings of this machine's pip and uv must not decide what the files say
    env -u PIP_FIND_LINKS -u UV_FIND_LINKS uv --no-config pip compile --quiet --upgrade --python-version 3.11 \
        --python-platform x86_64-manylinux_2_28 --generate-hashes --no-annotate --no-header "$@" "$input" -o "$work/out"
    { echo "# Made by deploy/lock.sh; not edited by hand."; cat "$work/out"; } > "$output"
}

grep -v '^torch==' requirements.txt > "$work/runtime.in"
compile "$work/runtime.in" requirements.lock --no-deps

grep '^torch==' requirements.txt > "$work/torch.in"
set -- --constraint requirements.txt
for name in $(sed -n 's/^\([a-z0-9-]*\)==.*/\1/p' "$work/runtime.in"); do
    set -- "$@" --no-emit-package "$name" # is in requirements.lock
done
compile "$work/torch.in" requirements-cuda.lock "$@"

compile requirements-loadtest.txt requirements-loadtest.lock --no-deps
