# Sourced by the scripts that need a Python environment; PYTHON names the interpreter, python3 by default.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

# make_environment NAME REQUIREMENT...: a venv at .ci-env/NAME with the requirements, first on PATH from here on.
# It is kept, and made anew when what it was made from changes. Returns 2, the code of the harness, where it cannot be made.
make_environment() {
  local folder=$root/.ci-env/$1 made_from
  shift
  if ! "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "$python is no Python >= 3.10 with the venv module; install one, or name one with PYTHON=." >&2
    return 2
  fi
  made_from=$("$python" -c 'import sys; print(sys.executable, sys.version)' && echo "$root $*" && cat "$root/pyproject.toml" "$root/ci/constraints.txt")
  if [[ $(cat "$folder/made-from" 2>/dev/null) != "$made_from" ]]; then
    echo "making the environment $folder" >&2
    rm -rf "$folder"
    if ! "$python" -m venv "$folder" ||
      ! "$folder/bin/python" -m pip install --quiet --constraint "$root/ci/constraints.txt" "$@" >&2; then
      echo "the environment $folder could not be made: the lines above say why." >&2
      return 2
    fi
    printf '%s\n' "$made_from" >"$folder/made-from"
  fi
  export PATH="$folder/bin:$PATH"
}
