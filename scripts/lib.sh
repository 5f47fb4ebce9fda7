# Shared by scripts/*: sourced, not run.

# Print the Python to use; PYTHON overrides.
find_python() {
    local python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
        echo "nestd needs Python 3.11 or newer; set PYTHON to one" >&2
        return 1
    }
    echo "$python"
}

# Install Debian packages if the command $1 is missing: need_command COMMAND PACKAGE...
need_command() {
    local command=$1
    shift
    PATH=$PATH:/usr/sbin command -v "$command" >/dev/null && return
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "$command is missing: as root, apt-get install $*" >&2
        return 1
    fi
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# Make a virtual environment in $1 unless it is there.
make_venv() {
    local python
    [ -x "$1/bin/pip" ] && return
    python=$(find_python)
    # Debian ships the venv module in a package of its own.
    "$python" -c 'import ensurepip' 2>/dev/null || need_command no-ensurepip python3-venv
    "$python" -m venv "$1"
}
