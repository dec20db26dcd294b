#!/usr/bin/env bash
# From a bare machine to a conformance report: bash ci/conformance.sh [options of `dsa-portable conformance`]
#
# Needs Python >= 3.10 and a package index. Runs the core list on the backend that DSA_BACKEND names (default cpu) and writes
# dsa-report/ in the current folder. The exit code is that of `dsa-portable conformance`; 2 also where nothing could be installed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# Editable, so that the run is of the files in this checkout, and its report can name their commit.
make_environment conformance --editable "$root[cpu]"
export DSA_BACKEND=${DSA_BACKEND:-cpu}
exec dsa-portable conformance --list core --out dsa-report "$@"
