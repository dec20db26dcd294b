#!/usr/bin/env bash
# From a bare machine to a conformance report: bash ci/conformance.sh [options of `dsa-portable conformance`]
#
# Needs Python >= 3.10 and a package index, or a folder of wheels (DSA_WHEELS, see environment.sh). Runs the core list on the backend that
# DSA_BACKEND names (default cpu) and writes dsa-report/ in the current folder. The exit code is that of `dsa-portable conformance`; 2 also
# where nothing could be installed.
#
# DSA_PLUGIN names what the backend needs beyond the CPU backend, separated by spaces: requirements (`torch triton` for DSA_BACKEND=cuda,
# `dsa-portable-acme==1.2`), wheels, or folders with a pyproject.toml, which are installed editable. What has a slash is a path.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

plugin=()
read -ra named <<<"${DSA_PLUGIN:-}"
for item in ${named[@]+"${named[@]}"}; do
  path=${item%%\[*} # without extras
  if [[ $path == *://* || ($path != */* && $path != *.whl) ]]; then
    plugin+=("$item")
  elif [[ -d $path ]]; then
    plugin+=(--editable "$(cd "$path" && pwd)${item#"$path"}")
  elif [[ -f $path ]]; then
    plugin+=("$(cd "$(dirname "$path")" && pwd)/${path##*/}${item#"$path"}")
  else
    echo "DSA_PLUGIN names $path, which does not exist; name a wheel, a folder with a pyproject.toml, or a requirement." >&2
    exit 2
  fi
done

# Editable, so that the run is of the files in this checkout, and its report can name their commit.
make_environment conformance --editable "$root[cpu]" ${plugin[@]+"${plugin[@]}"}
# Where packages came from is no part of what is judged: a report holds every DSA_* variable, and --resume asks for the same ones.
unset DSA_WHEELS DSA_PLUGIN
export DSA_BACKEND=${DSA_BACKEND:-cpu}
exec dsa-portable conformance --list core --out dsa-report "$@"
