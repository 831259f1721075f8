#!/bin/sh
# Makes the checkpoints of the GPTQ containers, MODELS_DIR/gptq-8bit and gptq-4bit, with GPTQModel from MODELS_DIR/source
# and the calibration text that the SPQ server uses too: the same weights, the same text.
#
#   deploy/gptq_checkpoints.sh [cuda|cpu]          (default: cuda; not yet run on a GPU)
#
# Installs GPTQModel into an environment of its own in GPTQ_ENV (default ~/.cache/spq-serve/gptq), or takes GPTQ_PYTHON, a
# python that has it. GROUP (default 128) is how many inputs share a scale, CALIBRATION the text, BITS what to make.
set -eu
cd "$(dirname "$0")/.."
device=${1:-cuda}
models=${MODELS_DIR:-$(sed -n 's/^MODELS_DIR=//p' .env 2>/dev/null || true)}
models=${models:-./models}
[ -f "$models/source/config.json" ] || {
    echo "$models/source is no model folder; copy the model there" >&2
    exit 1
}

if [ -z "${GPTQ_PYTHON:-}" ]; then
    environment=${GPTQ_ENV:-$HOME/.cache/spq-serve/gptq}
    GPTQ_PYTHON=$environment/bin/python
    if [ ! -f "$environment/.installed" ]; then
        python3 -m venv "$environment"
        # GPTQModel 7.7.0 asks for torch 2.14.1; with --no-deps it takes the one of this project, and works with it
        "$GPTQ_PYTHON" -m pip install -r requirements.txt wheel==0.48.0
        "$GPTQ_PYTHON" -m pip install accelerate==1.15.0 datasets==5.2.0 dill==0.4.1 pillow==13.0.0 protobuf==7.36.2 \
            pyarrow==26.0.1 requests==2.34.2 threadpoolctl==3.8.0 optimum==2.3.0 defuser==0.0.28 device-smi==0.5.7 \
            logbar==0.4.15 pypcre==0.6.4 tokenicer==0.0.14 torchao==0.18.0
        "$GPTQ_PYTHON" -m pip install --no-deps --no-build-isolation --no-binary gptqmodel gptqmodel==7.7.0
        touch "$environment/.installed"
    fi
fi

for bits in ${BITS:-8 4}; do
    out=$models/gptq-${bits}bit
    if [ -f "$out/config.json" ]; then
        echo "$out is there already"
        continue
    fi
    rm -rf "$out.part"
    GPTQMODEL_CPU_WORKERS=${GPTQMODEL_CPU_WORKERS:-2} "$GPTQ_PYTHON" -m benchmarks.gptq_checkpoint "$models/source" "$out.part" \
        --bits "$bits" --group "${GROUP:-128}" --device "$device" --calibration "${CALIBRATION:-demo/calibration.txt}"
    mv "$out.part" "$out"
done
