#!/usr/bin/env bash
# Builds the C++ engine with AddressSanitizer and UndefinedBehaviorSanitizer into build/sanitize, next to links to the
# Python files, and runs the tests of the ops on that copy; then the thread pool's stress program under ThreadSanitizer.
#
#   tests/sanitize.sh [ARGUMENT OF PYTEST ...]   for example -k "not portable"
#
#   PY=...   the Python to run; default .venv/bin/python
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-.venv/bin/python}
PATH=$(cd "$(dirname "$PY")" && pwd):$PATH
CXX=${CXX:-g++}
export CXX
build=$PWD/build/sanitize

# Of PER_ISA_SOURCES and their callers. The other tests reach the engine through these.
ops="gemm philox_normal pack_batch window_attention plan_attention decode_step plan_ascent block binding_fuzz thread_pool"
tests=
for op in $ops; do
  if [ -f "tests/test_$op.py" ]; then tests="$tests tests/test_$op.py"; fi
done

configure() {
  cmake -S . -B "$build/$1" -G Ninja -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS=-O1 -DGAC_FAST_SANITIZE="$2" \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$build/package/gac_fast" -DGAC_FAST_VERSION="$version" \
    -DPython_EXECUTABLE="$(command -v python)" -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" >"$build/$1.log" ||
    { cat "$build/$1.log"; exit 1; }
}

mkdir -p "$build/package/gac_fast"
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' gac_fast/_version.py)
find "$build/package/gac_fast" -type l -delete
for path in gac_fast/*; do
  case $path in *.so | *__pycache__*) ;; *) ln -s "$PWD/$path" "$build/package/$path" ;; esac
done
ln -s "$PWD/kernels" "$build/package/gac_fast/kernels"

configure thread thread
cmake --build "$build/thread" --target thread_pool_stress
"$build/thread/thread_pool_stress"

configure address address,undefined
cmake --build "$build/address" --target _C

# PYTHONSAFEPATH: or the package of the current folder would come before the copy.
export PYTHONPATH=$build/package PYTHONSAFEPATH=1
preload="$("$CXX" -print-file-name=libasan.so) $("$CXX" -print-file-name=libubsan.so)"
preload="$preload $("$CXX" -print-file-name=libstdc++.so)"
# Python leaks at exit by design.
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1
run="env LD_PRELOAD=$(printf '%s' "$preload" | tr ' ' ':')"
$run python -c "
import gac_fast._C as engine
assert engine.__file__.startswith('$build'), engine.__file__
assert '__asan_init' in open(engine.__file__, 'rb').read().decode('latin1')
"
# Words split on purpose.
# shellcheck disable=SC2086
exec $run python -m pytest -q -p no:cacheprovider $tests "$@"
