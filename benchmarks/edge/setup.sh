#!/usr/bin/env bash
# What `make edge` needs beside the virtual environment, fetched once into build/edge: onnxruntime for Node and the browser, a small
# arm64 root with the aarch64 wheels, OpenVINO and tract in an environment of their own. What cannot be had is skipped with its name.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
python=${1:?usage: setup.sh PYTHON}
cache=build/edge
mkdir -p "$cache"
version=$("$python" -c 'import onnxruntime; print(onnxruntime.__version__)')

missing() { echo "edge: skipped: $1"; }

packages=()
command -v qemu-x86_64 >/dev/null || packages+=(qemu-user)
command -v qemu-aarch64-static >/dev/null || packages+=(qemu-user-static)
command -v mmdebstrap >/dev/null || packages+=(mmdebstrap)
if ((${#packages[@]})); then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        { apt-get update && apt-get install -y --no-install-recommends "${packages[@]}"; } >"$cache/apt.log" 2>&1 || missing "${packages[*]} (see $cache/apt.log)"
    else
        missing "${packages[*]}: install with apt-get install ${packages[*]}"
    fi
fi

if command -v npm >/dev/null; then
    if [ ! -d "$cache/node/node_modules/onnxruntime-web" ]; then
        mkdir -p "$cache/node"
        echo '{"name": "edge", "private": true}' >"$cache/node/package.json"
        (cd "$cache/node" && npm install --ignore-scripts --no-audit --no-fund onnxruntime-node onnxruntime-web) >"$cache/npm.log" 2>&1 ||
            missing "onnxruntime-node and -web (see $cache/npm.log)"
    fi
else
    missing "npm: no JavaScript runtimes"
fi

# Extracted and not configured: nothing of the other architecture runs as root. The distribution is the machine's own.
if [ ! -x "$cache/arm64/usr/bin/python3" ] && command -v mmdebstrap >/dev/null; then
    . /etc/os-release
    sources=(/etc/apt/sources.list.d/debian.sources)
    [ -f "${sources[0]}" ] || sources=()
    rm -rf "$cache/arm64"
    mmdebstrap --variant=extract --architectures=arm64 --mode=root \
        --include=python3-minimal,libpython3-stdlib,libstdc++6,libgcc-s1,libc6,zlib1g,libffi8,libexpat1,libssl3 \
        "${VERSION_CODENAME:-stable}" "$cache/arm64" "${sources[@]}" >"$cache/mmdebstrap.log" 2>&1 || missing "arm64 root (see $cache/mmdebstrap.log)"
fi
if [ -x "$cache/arm64/usr/bin/python3" ] && [ ! -d "$cache/arm64/site/onnxruntime" ]; then
    minor=$(readlink "$cache/arm64/usr/bin/python3" | sed 's/python//')
    "$python" -m pip download --quiet --disable-pip-version-check --only-binary=:all: --no-deps --python-version "$minor" \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
        -d "$cache/wheels" "onnxruntime==$version" numpy >"$cache/wheels.log" 2>&1 || missing "aarch64 wheels (see $cache/wheels.log)"
    for wheel in "$cache"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$cache/arm64/site"; done
fi
if [ -d "$cache/arm64" ]; then # onnxruntime reads the processor's kind here; qemu gives the host's
    mkdir -p "$cache/arm64/proc"
    printf '%s\n' 'processor	: 0' 'BogoMIPS	: 100.00' 'Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid' \
        'CPU implementer	: 0x41' 'CPU architecture: 8' 'CPU variant	: 0x0' 'CPU part	: 0xd08' 'CPU revision	: 3' '' >"$cache/arm64/proc/cpuinfo"
fi

# The C API's header is in no wheel and no npm package; Debian has it from trixie on. A header older than the library is fine.
if [ ! -f "$cache/include/onnxruntime_c_api.h" ] && command -v apt-get >/dev/null && [ -f /usr/share/keyrings/debian-archive-keyring.gpg ]; then
    apt=$PWD/$cache/apt
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$cache/include"
    printf '%s\n' 'Types: deb' 'URIs: http://deb.debian.org/debian' 'Suites: trixie' 'Components: main' \
        'Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg' >"$apt/trixie.sources"
    options=(-o "Dir::Etc::SourceList=$apt/trixie.sources" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$apt/lists" -o "Dir::Cache=$apt/cache")
    { apt-get "${options[@]}" update && (cd "$apt" && apt-get "${options[@]}" download libonnxruntime-dev) &&
        dpkg-deb --fsys-tarfile "$apt"/libonnxruntime-dev_*.deb | tar -x -C "$cache/include" --strip-components=4 --wildcards './usr/include/onnxruntime/*.h'
    } >"$cache/header.log" 2>&1 || missing "onnxruntime_c_api.h (see $cache/header.log)"
fi

if [ ! -d "$cache/other" ]; then
    "$python" -m pip install --quiet --disable-pip-version-check --target "$cache/other" openvino tract numpy >"$cache/other.log" 2>&1 ||
        missing "OpenVINO and tract (see $cache/other.log)"
fi
exit 0
