#!/usr/bin/env bash
# Builds the wheel with all kernels and unpacks it into .gpu/, for a run on a
# machine that has a GPU but no build tools:
#
#   [PYTHON=path/to/python] tools/build_gpu.sh [-C cmake.define.JAX_FLASH_LINEINFO=ON ...]
#   PYTHONPATH=.gpu python -P -m jax_flash info     # there; -P keeps the sources out
#
# $PYTHON (default python3) only says for which Python; the build requirements of
# pyproject.toml go into an environment of their own, build/env-<tag>, because
# handlers built against a newer jax than the one they run under do not load.
# Objects stay in build/gpu-<tag>, so only what changed is compiled. The
# compilers' report is build/gpu-<tag>.log, input of tools/check_build.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
env=build/env-$tag
log=build/gpu-$tag.log

if [ ! -e "$env/complete" ]; then
  "$python" -m venv "$env"
  command -v nvcc >/dev/null && have_nvcc=1 || have_nvcc=0
  "$env/bin/python" - "$have_nvcc" >"$env/requirements.txt" <<'PYTHON'
import sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))
wanted = project["build-system"]["requires"] + ["cmake", "ninja"]
wanted += project["tool"]["scikit-build"]["build"]["requires"]
print(*(r for r in wanted if not (sys.argv[1] == "1" and "cuda" in r)), sep="\n")
PYTHON
  "$env/bin/python" -m pip install -q -r "$env/requirements.txt"
  touch "$env/complete"
fi

# scikit-build-core takes cmake and ninja from PATH.
export PATH=$PWD/$env/bin:$PATH JAX_FLASH_CUDA=ON JAX_FLASH_STRICT=ON
# A build that was interrupted may leave objects of which ninja knows no headers: it
# would keep them whatever changes.
objects=build/gpu-$tag
if [ -e "$objects/.ninja_deps" ]; then
  ninja -C "$objects" -t deps | sed -n 's/: #deps 0,.*//p' | (cd "$objects" && xargs -r rm -f)
fi

rm -rf build/gpu-wheel
started=$SECONDS
status=0
"$env/bin/python" -m pip wheel -v . --no-build-isolation --no-deps \
  --wheel-dir build/gpu-wheel -C build-dir="$objects" "$@" >"$log" 2>&1 || status=$?
if [ "$status" -ne 0 ]; then
  grep -E -A20 'FAILED:|CMake Error|error:' "$log" | head -100 >&2
  echo "build_gpu.sh: failed; everything is in $log" >&2
  exit "$status"
fi

rm -rf .gpu
"$env/bin/python" -m zipfile -e build/gpu-wheel/*.whl .gpu
ls -l build/gpu-wheel/*.whl .gpu/jax_flash/_kernels*.so
echo "build_gpu.sh: built in $((SECONDS - started)) s"
