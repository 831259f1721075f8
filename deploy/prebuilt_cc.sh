#!/bin/sh
# The `cc` of the cuda image. Not a compiler: it hands out the one module that Triton asks a compiler for, cuda_utils,
# which deploy/triton_module.py compiled when the image was built, and refuses every other source.
# Triton calls: cc SOURCE -O3 -shared -fPIC ... -o RESULT ...
set -eu
folder=$(dirname "$0")
cmp -s "$1" "$folder/cuda_utils.c" || {
    echo "this image has no C compiler, only Triton's cuda_utils of its build; asked to compile $1" >&2
    exit 1
}
while [ "$1" != -o ]; do shift; done
exec cp "$folder/cuda_utils.so" "$2"
