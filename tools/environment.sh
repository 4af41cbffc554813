# environment FOLDER EXTRAS: make a virtual environment with this checkout and those extras, or reuse it.
# PYTHON names the interpreter; by default the first of python3.11, python3.12, python3 that runs and is new enough.

environment() {
  local folder=$1 extras=$2 stamp python
  stamp="$folder/.installed-$(cat pyproject.toml <(echo "$extras") | cksum | cut -d' ' -f1)"
  [ -e "$stamp" ] && return
  if [ ! -x "$folder/bin/python" ]; then
    python=$(find_python) || return 2
    echo "making $folder with $("$python" --version)"
    "$python" -m venv "$folder"
  fi
  echo "installing jaxpost[$extras] in $folder"
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$extras]"
  touch "$stamp"
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "jaxpost needs Python 3.11 or newer; set PYTHON to its path" >&2
  return 2
}
