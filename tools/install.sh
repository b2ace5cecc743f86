#!/bin/sh
# Usage: tools/install.sh PYTHON VENV EXTRA [PIP_FLAG...]
# Makes the virtual environment VENV with PYTHON if there is no sound one yet, and installs sft_edu[EXTRA] into it.
set -eu
cd "$(dirname "$0")/.."
python=$1 venv=$2 extra=$3
shift 3

stop() {
  printf '\n' >&2
  printf '%s\n' "$@" >&2
  exit 1
}

check_python() {
  command -v "$python" >/dev/null || stop "There is no $python here. sft_edu needs Python 3.11 or newer." \
    "Install one, or name the one you have: make lab PYTHON=/path/to/python3.12"
  # Written so that an old Python can still answer.
  version=$("$python" -c 'import sys; print("%d %d %d" % sys.version_info[:3])') || stop "$python does not run."
  set -- $version
  if [ "$1" -lt 3 ] || { [ "$1" -eq 3 ] && [ "$2" -lt 11 ]; }; then
    stop "$python is Python $1.$2.$3. sft_edu needs Python 3.11 or newer." \
      "Choose another one: make lab PYTHON=python3.12"
  fi
  # Debian ships `venv` without `ensurepip`, and `python -m venv` then leaves half an environment behind.
  "$python" -c 'import venv, ensurepip' 2>/dev/null || stop "$python cannot make virtual environments." \
    "On Debian and Ubuntu: sudo apt-get install python$1.$2-venv"
}

# The mark stands from the first write to the last, so a killed or interrupted run is known by it.
mark=$venv/.unfinished
if [ -e "$mark" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  check_python
  if [ -e "$venv" ] && [ ! -e "$mark" ] && [ ! -e "$venv/lab.stamp" ]; then
    stop "$venv exists, has no pip, and was not made here." "Move it away, or install pip into it, and run this again."
  fi
  echo "Making the virtual environment $venv with $python"
  rm -rf "$venv"
  mkdir "$venv"
  touch "$mark"
  "$python" -m venv "$venv"
fi

touch "$mark"
trap 'exit 130' INT TERM
echo "Installing sft_edu[$extra] into $venv (PyTorch is large: this can take some minutes)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@" -e ".[$extra]" || {
  # pip ended by itself, and undoes what it cannot finish: nothing is broken, so keep the environment.
  rm "$mark"
  stop "The installation failed; pip says why above. Run the same command again to go on."
}

rm "$mark"
