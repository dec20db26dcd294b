#!/usr/bin/env bash
# The project's own tests: bash ci/test.sh [SUITE [pytest arguments]]
#
#   core    everything that needs no torch (the default)
#   torch   tests/torch: tensors where arrays go, on the CPU
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

suite=${1:-core}
shift || true
case $suite in
  core)
    requirements=(--editable "$root[cpu,test]")
    tests=(--ignore tests/torch)
    ;;
  torch)
    requirements=(torch --editable "$root[cpu,test]")
    tests=(tests/torch)
    ;;
  *)
    echo "$suite is no test suite, but core and torch are; name one of them." >&2
    exit 2
    ;;
esac

make_environment "test-$suite" "${requirements[@]}"
cd "$root"
exec pytest -m "not slow" "${tests[@]}" "$@"
