# Sourced by the scripts beside it: a virtual environment in .venv with moegguf in it.
#
#   prepare_environment [EXTRA]     e.g. `prepare_environment test`; seconds when nothing has changed
#
# llama-cpp-python is compiled once (minutes) and its wheel kept outside the checkout, so that a fresh clone
# does not compile it again. PYTHON chooses the interpreter, CMAKE_ARGS what llama.cpp is built with.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export CMAKE_ARGS="${CMAKE_ARGS:--DGGML_RPC=ON}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

fail() {
    echo "error: $*" >&2
    exit 2
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python3 $0"
}

prepare_environment() {
    local extra="${1:-}" stamp wanted
    stamp="$root/.venv/.moegguf-${extra:-base}"
    wanted=$(cat "$root/pyproject.toml" "$root/tests/constraints.txt" "${BASH_SOURCE[0]}" | cksum)" $CMAKE_ARGS $root"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && [ -x "$root/.venv/bin/python" ]; then
        return
    fi
    if [ ! -x "$root/.venv/bin/python" ]; then
        echo "creating .venv"
        "$(find_python)" -m venv "$root/.venv" || fail "python -m venv failed; on Debian: apt install python3-venv"
    fi
    install_llama_cpp
    echo "installing moegguf${extra:+ with the extra '$extra'}"
    pip install --quiet --constraint "$root/tests/constraints.txt" --editable "$root${extra:+[$extra]}" \
        || fail "installing moegguf failed (see above)"
    echo "$wanted" >"$stamp"
}

# Other programs that load what moegguf writes, for tests/test_clients.py, which skips what is not there.
prepare_clients() {
    local folder="$root/tests/clients"
    if [ "$(uname -sm)" != "Linux x86_64" ] || ! command -v npm >/dev/null; then
        return
    fi
    if [ ! "$folder/node_modules/.package-lock.json" -nt "$folder/package.json" ]; then
        echo "installing other programs that load GGUF files (node-llama-cpp, @huggingface/gguf)"
        timeout 60 npm install --prefix "$folder" --no-package-lock --ignore-scripts --omit=optional --silent \
            || echo "npm failed: they are left out" >&2
    fi
}

pip() {
    "$root/.venv/bin/python" -m pip "$@"
}

install_llama_cpp() {
    local requirement wheels
    requirement=$(sed -n 's/^ *"\(llama-cpp-python==[^"]*\)".*/\1/p' "$root/pyproject.toml")
    wheels="${XDG_CACHE_HOME:-$HOME/.cache}/moegguf/wheels/$(uname -sm | tr ' ' -)-$(cksum <<<"$CMAKE_ARGS" | cut -d' ' -f1)"
    if pip install --quiet --no-index --no-deps --find-links "$wheels" "$requirement" 2>/dev/null; then
        pip install --quiet --constraint "$root/tests/constraints.txt" "$requirement" || fail "installing $requirement failed"
        return
    fi
    command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null \
        || fail "no C++ compiler found; install one (Debian: apt install g++; macOS: xcode-select --install)"
    echo "compiling $requirement (a few minutes, once; kept in $wheels)"
    mkdir -p "$wheels"
    pip wheel --quiet --no-deps --no-cache-dir --wheel-dir "$wheels.part" "$requirement" \
        || fail "compiling $requirement failed (see above)"
    mv "$wheels.part"/*.whl "$wheels"/ && rmdir "$wheels.part"
    pip install --quiet --constraint "$root/tests/constraints.txt" --find-links "$wheels" "$requirement" \
        || fail "installing $requirement failed"
}
