#!/usr/bin/env bash
# The project's own tests: bash ci/test.sh [SUITE [pytest arguments]]
#
#   core    everything that needs no torch (the default)
#   engines the engines of the CPU backend that core has no packages for: OpenVINO
#   torch   tests/torch: tensors where arrays go and torch.library, on the CPU
#   cuda    tests/cuda: the CUDA backend in Triton's interpreter, and its kernels compiled for chips that are not there
#   ascend  tests/ascend: the Ascend backend over the real torch_npu, with neither CANN nor an NPU; needs gcc and binutils
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

suite=${1:-core}
shift || true
case $suite in
  core)
    requirements=(--editable "$root[cpu,test]")
    tests=(--ignore tests/torch --ignore tests/cuda --ignore tests/ascend)
    # A file at a time on each of two cores; BLAS threads of two processes would wait for each other.
    tests+=(--numprocesses 2 --dist loadfile)
    export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
    ;;
  engines)
    requirements=(--editable "$root[cpu,test,openvino]")
    # By hand, and slower: tests/test_cpu_backend.py -k openvino
    tests=(tests/test_openvino.py)
    ;;
  torch)
    requirements=(torch --editable "$root[cpu,test]")
    tests=(tests/torch)
    ;;
  cuda)
    requirements=(torch triton --editable "$root[cpu,test]")
    tests=(tests/cuda)
    # Triton reads it when a kernel is defined; the tests that compile start processes without it.
    export TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1
    ;;
  ascend)
    requirements=(torch torch-npu --editable "$root[cpu,test]")
    tests=(tests/ascend)
    # Otherwise torch loads torch_npu while it is imported, and fails for want of CANN.
    export TORCH_DEVICE_BACKEND_AUTOLOAD=0
    # Threads of two processes on two cores wait for each other.
    export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
    ;;
  *)
    echo "$suite is no test suite, but core, engines, torch, cuda and ascend are; name one of them." >&2
    exit 2
    ;;
esac

make_environment "test-$suite" "${requirements[@]}"
cd "$root"
exec pytest -m "not slow" "${tests[@]}" "$@"
