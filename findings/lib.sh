# Every finding sources this file. It works in a temporary folder and removes it at the end.
#   need_python MINOR...   set $python to the first interpreter 3.MINOR that exists
#   venv PACKAGE...        make an environment with these packages; $py is its interpreter
set -u
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
cd "$here" || exit 2
export JAX_PLATFORMS=cpu PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
python=python3

need_python() {
  local minor candidate
  for minor in "$@"; do
    for candidate in "$(command -v "python3.$minor")" "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor".*/bin/python; do
      if [ -x "$candidate" ] && "$candidate" -c "import sys; sys.exit(sys.version_info[:2] != (3, $minor))" 2>/dev/null; then
        python=$candidate
        return 0
      fi
    done
  done
  echo "needs Python 3.$1"
  exit 2
}

venv() {
  if ! { "$python" -m venv "$here/venv" && "$here/venv/bin/pip" install -q "$@"; } >"$here/pip.log" 2>&1; then
    tail -n 2 "$here/pip.log"
    exit 2
  fi
  py=$here/venv/bin/python
}
