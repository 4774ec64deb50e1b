#!/usr/bin/env bash
# Builds the C++ engine with AddressSanitizer and UndefinedBehaviorSanitizer into build/sanitize, next to links to the
# Python files, and runs the tests of the ops on that copy; and the thread pool's stress program under ThreadSanitizer.
#
#   tests/sanitize.sh [--short] [ARGUMENT OF PYTEST ...]   for example -k "not portable"
#
#   --short   the portable and the widest path of this processor alone, and a choice of cases: minutes, for every commit
#   PY=...    the Python to run; default .venv/bin/python
#   CXX=...   GCC or Clang; default g++
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-.venv/bin/python}
PATH=$(cd "$(dirname "$PY")" && pwd):$PATH
CXX=${CXX:-g++}
export CXX OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
build=$PWD/build/sanitize

isas=avx2,avx512,amx
select=()
if [ "${1:-}" = --short ]; then
  shift
  build=$PWD/build/sanitize-short
  widest=avx2
  if grep -qw avx512bw /proc/cpuinfo 2>/dev/null; then widest=avx512; fi
  if grep -qw amx_bf16 /proc/cpuinfo 2>/dev/null; then widest=amx; fi
  isas=$widest
  # No process of its own, no compiler of torch and no long run: they take most of the time and show nothing here.
  export GAC_FAST_FUZZ_EXAMPLES=${GAC_FAST_FUZZ_EXAMPLES:-10}
  select=(-m "not slow" -k "not compile and not opcheck and not gradcheck")
else
  export GAC_FAST_FUZZ_EXAMPLES=${GAC_FAST_FUZZ_EXAMPLES:-200}
fi

# Of PER_ISA_SOURCES and their callers. The other tests reach the engine through these.
ops="gemm weight_gradient norm_linear philox_normal pack_batch window_attention plan_attention decode_step plan_ascent block adamw seed_plans action_errors return_losses posterior_langevin binding_fuzz thread_pool"
tests=
for op in $ops; do
  if [ -f "tests/test_$op.py" ]; then tests="$tests tests/test_$op.py"; fi
done

mkdir -p "$build/package/gac_fast"

# A compiler may lack the sanitizers' libraries.
for sanitizers in address,undefined thread; do
  if ! echo 'int main() { return 0; }' | "$CXX" -x c++ - -fsanitize=$sanitizers -o "$build/probe" 2>"$build/probe.log" ||
    ! "$build/probe" 2>>"$build/probe.log"; then
    cat "$build/probe.log" >&2
    echo "error: $CXX cannot build or run programs with -fsanitize=$sanitizers here; make sanitize needs it." >&2
    echo "Install the libraries (Debian: libasan, libubsan, libtsan; Fedora the same), or name another compiler by CXX." >&2
    exit 1
  fi
done

# The sanitizers' libraries, and that of the exceptions they watch, come before those of Python. Clang's lie elsewhere.
preload=
libraries="libasan.so libubsan.so libstdc++.so"
if "$CXX" --version | grep -qi clang; then libraries="libclang_rt.asan-$(uname -m).so libstdc++.so"; fi
for library in $libraries; do
  path=$("$CXX" -print-file-name="$library")
  if [ ! -e "$path" ]; then
    echo "error: $CXX has no shared $library, which has to be loaded before Python; name another compiler by CXX." >&2
    exit 1
  fi
  preload=$preload:$path
done

configure() {
  cmake -S . -B "$build/$1" -G Ninja -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-O1 -g1" \
    -DGAC_FAST_SANITIZE="$2" -DGAC_FAST_ISAS="$isas" \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$build/package/gac_fast" -DGAC_FAST_VERSION="$version" \
    -DPython_EXECUTABLE="$(command -v python)" -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" >"$build/$1.log" ||
    { cat "$build/$1.log"; exit 1; }
}

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
# Python leaks at exit by design.
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1
run="env LD_PRELOAD=${preload#:}"
$run python -c "
import gac_fast._C as engine
assert engine.__file__.startswith('$build'), engine.__file__
assert '__asan_init' in open(engine.__file__, 'rb').read().decode('latin1')
"
# A finding ends the process: pytest's own capture of file descriptors would take the report along.
# Words split on purpose.
# shellcheck disable=SC2086
exec $run python -m pytest -q --capture=sys -p no:cacheprovider "${select[@]}" $tests "$@"
