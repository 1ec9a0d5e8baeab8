#!/usr/bin/env bash
# Builds the wheel with all kernels and unpacks it into .gpu/, for a run on a
# machine that has a GPU but no build tools:
#
#   PYTHON=path/to/python tools/build_gpu.sh [extra pip config, e.g. -C cmake.define.JAX_FLASH_LINEINFO=ON]
#   PYTHONPATH=.gpu python -m jax_flash info        # there
#
# $PYTHON (default python3) needs jax, nanobind, scikit-build-core, cmake and
# ninja. Objects stay in build/gpu-<python tag>, so only what changed is compiled;
# the compiler's report is kept in build/gpu.log for tools/check_build.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
tag=$("$python" -c 'import sys; print(f"cp{sys.version_info[0]}{sys.version_info[1]}")')
# scikit-build-core takes cmake and ninja from PATH when they are installed there.
PATH=$(dirname "$(command -v "$python")"):$PATH
export PATH

mkdir -p build
rm -rf build/gpu-wheel
started=$SECONDS
status=0
JAX_FLASH_CUDA=ON JAX_FLASH_STRICT=ON "$python" -m pip wheel -v . \
  --no-build-isolation --no-deps --wheel-dir build/gpu-wheel \
  -C build-dir="build/gpu-$tag" "$@" >build/gpu.log 2>&1 || status=$?
if [ "$status" -ne 0 ]; then
  grep -nE -A20 'FAILED|CMake Error|: error|fatal error|[0-9]+ bytes spill' build/gpu.log |
    grep -v ' 0 bytes spill stores, 0 bytes spill loads' | head -80
  echo "build_gpu.sh: failed; everything is in build/gpu.log" >&2
  exit "$status"
fi

rm -rf .gpu
"$python" -m zipfile -e build/gpu-wheel/*.whl .gpu
ls -l build/gpu-wheel/*.whl .gpu/jax_flash/_kernels*.so
echo "build_gpu.sh: done in $((SECONDS - started)) s"
