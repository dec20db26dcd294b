# Sourced by the scripts that need a Python environment; PYTHON names the interpreter, python3 by default.
#
# DSA_WHEELS names a folder of wheels, for machines that reach no package index: pip then takes everything from it, and asks no index.
# To make one, on a machine of the same kind: pip wheel --constraint ci/constraints.txt --wheel-dir DIR setuptools wheel '.[cpu]'
# and what the others take: DSA_PLUGIN (conformance.sh), the extra `test` (test.sh).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

# make_environment NAME ARGUMENT...: a venv at .ci-env/NAME with what pip installs for the arguments, first on PATH from here on.
# It is kept, and made anew when what it was made from changes. Returns 2, the code of the harness, where it cannot be made.
make_environment() {
  local folder=$root/.ci-env/$1 made_from from=() said missing
  shift
  if ! "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "$python is no Python >= 3.10 with the venv module; install one, or name one with PYTHON=." >&2
    return 2
  fi
  if [[ -n ${DSA_WHEELS:-} ]]; then
    if [[ ! -d $DSA_WHEELS ]]; then
      echo "DSA_WHEELS names $DSA_WHEELS, which is no folder; name one with the wheels to install from, or unset it." >&2
      return 2
    fi
    from=(--no-index --find-links "$(cd "$DSA_WHEELS" && pwd)")
  fi
  # With sizes and times, because a wheel may be built anew under its old name.
  made_from=$("$python" -c '
import os, sys
print(sys.executable, sys.version)
for path in filter(os.path.isfile, sys.argv[1:]):
    print(path, os.stat(path).st_size, os.stat(path).st_mtime_ns)
' "$@" ${from[@]+"${from[2]}"/*.whl} && echo "$root $*" ${from[@]+"${from[@]}"} && cat "$root/pyproject.toml" "$root/ci/constraints.txt")
  if [[ $(cat "$folder/made-from" 2>/dev/null) != "$made_from" ]]; then
    echo "making the environment $folder" >&2
    rm -rf "$folder"
    if ! said=$({ "$python" -m venv "$folder" && "$folder/bin/python" -m pip install --quiet \
      ${from[@]+"${from[@]}"} --constraint "$root/ci/constraints.txt" "$@"; } 2>&1); then
      missing=$(sed -n 's/^ *ERROR: No matching distribution found for \([^;]*\).*/\1/p' <<<"$said")
      if [[ -n ${DSA_WHEELS:-} && -n $missing ]]; then
        echo "DSA_WHEELS=$DSA_WHEELS has no wheel of ${missing%%$'\n'*} that $python can install; add it to the folder." >&2
      else
        printf '%s\n' "$said" "the environment $folder could not be made: the lines above say why." >&2
      fi
      return 2
    fi
    printf '%s\n' "$made_from" >"$folder/made-from"
  fi
  export PATH="$folder/bin:$PATH"
}
