"""Sets up a checkout: a compiler, a virtual environment, the packages each task needs, and the build.

    python3 tools/setup.py build test demo      # any of the groups below; safe and quick to repeat

Standard library only, Python >= 3.10. Everything lands in .venv/ and build/ of the checkout. The two exceptions are
system packages, which are installed by apt as root and otherwise printed as the line to run, and pip's own cache.
Each finished part leaves a stamp holding the hash of what it was made from, so a second run does nothing.

Environment
  PYTHON  the interpreter to build on; default: the first of python3, python3.13 ... python3.10 that fits, one that
          already has PyTorch first (its packages are then used through --system-site-packages)
  TORCH   what pip installs when PyTorch is missing; default torch==2.13.0. pip takes a CPU build of that version by
          itself where its configuration offers one (a find-links folder or an extra index).
  GPU_PYTHON  with `wheel`: also fetch the packages of the tests for that Python, for a machine without network
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BUILD = ROOT / "build" / "make"
VENV_PYTHON = VENV / "bin" / "python"
OLDEST = (3, 10)

# What pip installs for each group. `torch` is not listed: see TORCH above.
PACKAGES: dict[str, list[str]] = {
    "base": ["numpy>=1.24"],
    "build": ["scikit-build-core>=0.10", "ninja>=1.11", "pathspec", "cmake>=3.25,<4.3"],
    "test": ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "nvidia-cuda-nvrtc==13.0.*", "expecttest"],
    "lint": ["mypy==2.4.1", "ruff==0.17.5", "clang-format==23.1.5"],
    "demo": ["pillow>=10", "onnx>=1.16"],
    "plot": ["matplotlib>=3.8"],
}
# What the tests need without network, apart from PyTorch: `make wheel GPU_PYTHON=3.12` adds it to dist/deps.
GPU_TEST_PACKAGES = ["pytest", "pytest-xdist", "execnet", "pluggy", "iniconfig", "packaging", "pygments", "hypothesis",
                     "sortedcontainers", "expecttest"]  # fmt: skip
# Packages whose dependencies are not wanted: only the weights and the pictures inside the wheels are read.
BARE_PACKAGES: dict[str, list[str]] = {"demo": ["rapidocr-onnxruntime==1.4.4", "scikit-image>=0.22"]}
NEEDS: dict[str, list[str]] = {"build": ["base"], "test": ["build", "lint"], "demo": ["build"], "plot": ["base"]}

# Group -> Debian package -> how to tell that it is there.
SYSTEM_PACKAGES: dict[str, dict[str, tuple[str, ...]]] = {
    "build": {"g++": ("command", "c++", "g++", "clang++")},
    "test": {"libgtest-dev": ("file", "/usr/include/gtest/gtest.h", "/usr/local/include/gtest/gtest.h")},
}

# Files that enter the build; a change in any of them builds again.
BUILD_INPUTS = ("include", "src", "python", "bench/tconv.cpp", "cmake", "CMakeLists.txt", "pyproject.toml")
TEST_INPUTS = ("tests", "examples/cpp")


class SetupError(Exception):
    """Something a person has to do; the message says what."""


def say(text: str) -> None:
    print(f"setup: {text}", file=sys.stderr, flush=True)


def run(command: list[str], title: str, log_name: str) -> None:
    """Runs a command, shows its last line while it works, and prints its whole output if it fails."""
    log = ROOT / "build" / "log" / f"{log_name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    live = sys.stderr.isatty()
    done = threading.Event()
    last = [""]

    def show() -> None:
        beat = 0
        while not done.wait(0.2 if live else 1.0):
            seconds = time.monotonic() - started
            if live:
                line = f"setup: {title} [{seconds:4.0f} s] {last[0]}"
                print(f"\r\x1b[2K{line[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
            elif seconds > 30 * (beat + 1):
                beat += 1
                say(f"{title}: {seconds:.0f} s, {last[0][:80]}")

    shower = threading.Thread(target=show, daemon=True)
    shower.start()
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PYTHONUNBUFFERED": "1"}
    # The interpreter's own tools (cmake, ninja) come first.
    environment["PATH"] = f"{VENV / 'bin'}{os.pathsep}{environment.get('PATH', '')}"
    environment.pop("PYTHONPATH", None)
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            sink.write(line)
            if line.strip():
                last[0] = line.strip()
        code = process.wait()
    done.set()
    shower.join()
    if live:
        print("\r\x1b[2K", end="", file=sys.stderr)
    if code != 0:
        print(log.read_text()[-12000:], file=sys.stderr)
        raise SetupError(f"{title} failed with status {code}; the whole output is in {log.relative_to(ROOT)}")
    say(f"{title}: done in {time.monotonic() - started:.0f} s")


def digest(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def tree_digest(names: tuple[str, ...]) -> str:
    """Hash over the names and contents of source files; generated and cached files do not count."""
    state = hashlib.sha256()
    for name in names:
        top = ROOT / name
        files = sorted(top.rglob("*")) if top.is_dir() else [top]
        for path in files:
            generated = path.suffix in {".so", ".pyc"} or path.name == "_build_info.py" or "__pycache__" in path.parts
            if path.is_file() and not generated:
                state.update(f"{path.relative_to(ROOT)}\0".encode())
                state.update(path.read_bytes())
    return state.hexdigest()


class Stamp:
    """A part is up to date while its stamp holds the hash of its inputs."""

    def __init__(self, path: Path, value: str) -> None:
        self.path, self.value = path, value

    def current(self) -> bool:
        return self.path.is_file() and self.path.read_text() == self.value

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(self.value)


def system_packages(groups: list[str], extra: list[str] | None = None) -> None:
    missing = list(extra or [])
    for group in groups:
        for package, (kind, *places) in SYSTEM_PACKAGES.get(group, {}).items():
            found = any(shutil.which(p) for p in places) if kind == "command" else any(Path(p).exists() for p in places)
            if not found:
                missing.append(package)
    if not missing:
        return
    line = f"apt-get install -y --no-install-recommends {' '.join(missing)}"
    if shutil.which("apt-get") is None:
        raise SetupError(f"these packages are missing: {' '.join(missing)}. Install what your system calls them.")
    if os.geteuid() != 0:
        raise SetupError(f"system packages are missing. Run this once, then try again:\n\n    sudo {line}\n")
    os.environ["DEBIAN_FRONTEND"] = "noninteractive"
    try:
        run(line.split(), f"apt: {' '.join(missing)}", "apt")
    except SetupError:  # the package lists of a fresh container are empty or old
        run(["apt-get", "update"], "apt: package lists", "apt-update")
        run(line.split(), f"apt: {' '.join(missing)}", "apt")


def find_python() -> tuple[str, bool]:
    """The interpreter to build on, and whether it already has PyTorch."""
    probe = "import sys, importlib.util as u; print(*sys.version_info[:2], u.find_spec('torch') is not None)"
    names = [os.environ["PYTHON"]] if os.environ.get("PYTHON") else []
    names = names or ["python3", "python", *(f"python3.{minor}" for minor in range(13, 9, -1))]
    usable: list[tuple[str, bool]] = []
    for name in names:
        path = shutil.which(name)
        if path is None or Path(path).is_relative_to(VENV):
            continue
        answer = subprocess.run(
            [path, "-c", probe], check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        words = answer.stdout.split()
        if answer.returncode == 0 and len(words) == 3 and (int(words[0]), int(words[1])) >= OLDEST:
            usable.append((path, words[2] == "True"))
    if not usable:
        raise SetupError(f"no Python >= {OLDEST[0]}.{OLDEST[1]} among {', '.join(names)}; set PYTHON to one")
    return next((entry for entry in usable if entry[1]), usable[0])


def virtual_environment() -> None:
    stamp = Stamp(VENV / "stamp-venv", "1")
    if stamp.current() and VENV_PYTHON.exists():
        return
    python, has_torch = find_python()
    probe = [python, "-c", "import ensurepip, venv"]
    if subprocess.run(probe, check=False, capture_output=True, stdin=subprocess.DEVNULL).returncode != 0:
        system_packages([], ["python3-venv"])
    shared = ["--system-site-packages"] if has_torch else []
    say(f"virtual environment on {python}" + (", with the PyTorch that it has" if has_torch else ""))
    run([python, "-m", "venv", "--clear", *shared, str(VENV)], "virtual environment", "venv")
    stamp.write()


def module_version(name: str) -> str | None:
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    answer = subprocess.run(
        [str(VENV_PYTHON), "-c", code], check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    return answer.stdout.strip() if answer.returncode == 0 else None


def cmake_is_recent() -> bool:
    path = shutil.which("cmake")
    if path is None:
        return False
    text = subprocess.run(
        [path, "--version"], check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL
    ).stdout
    match = re.search(r"(\d+)\.(\d+)", text)
    return match is not None and (int(match[1]), int(match[2])) >= (3, 25)


def install_packages(group: str) -> None:
    wanted = list(PACKAGES.get(group, []))
    if group == "build":
        wanted = [w for w in wanted if not (w.startswith("cmake") and cmake_is_recent())]
        wanted = [w for w in wanted if not (w.startswith("ninja") and shutil.which("ninja"))]
    if group == "base":
        wanted.append(os.environ.get("TORCH", "torch==2.13.0"))
    bare = BARE_PACKAGES.get(group, [])
    stamp = Stamp(VENV / f"stamp-{group}", digest([*wanted, *bare]))
    if stamp.current():
        return
    if group == "base" and (version := module_version("torch")):
        say(f"PyTorch {version} is there already")
        wanted.pop()
    pip = [str(VENV_PYTHON), "-m", "pip", "install", "--progress-bar", "off"]
    if wanted:
        run([*pip, *wanted], f"pip: {group} ({' '.join(wanted)})", f"pip-{group}")
    if bare:
        run([*pip, "--no-deps", *bare], f"pip: {' '.join(bare)} (files only)", f"pip-{group}-bare")
    stamp.write()


def commit() -> str:
    """The checkout's commit, with a + when tracked files differ from it; unknown outside a git checkout."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=False, cwd=ROOT, capture_output=True, text=True)
    state = subprocess.run(
        ["git", "status", "--porcelain", "-uno"], check=False, cwd=ROOT, capture_output=True, text=True
    )
    return head.stdout.strip() + ("+" if state.stdout.strip() else "") if head.returncode == 0 else "unknown"


def write_build_info() -> None:
    """Records in the package which commit it was built from; the benchmark driver reads it where there is no git."""
    path = ROOT / "python" / "tconv" / "_build_info.py"
    text = f'"""Written by tools/setup.py."""\n\ncommit = "{commit()}"\n'
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def build(with_tests: bool) -> None:
    """One CMake build gives the library, the tools, the C++ tests and the Python module, installed into .venv."""
    inputs = BUILD_INPUTS + (TEST_INPUTS if with_tests else ())
    stamp = Stamp(BUILD / f"stamp-{'test' if with_tests else 'build'}", tree_digest(inputs))
    if stamp.current() and module_version("tconv"):
        return
    write_build_info()
    onoff = "ON" if with_tests else "OFF"
    run(
        [
            str(VENV_PYTHON), "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--force-reinstall",
            f"--config-settings=build-dir={BUILD}",
            f"--config-settings=cmake.define.TCONV_TESTS={onoff}",
            "--config-settings=cmake.define.TCONV_TOOLS=ON", ".",
        ],
        "build", "build",
    )  # fmt: skip
    stamp.write()


def wheel() -> None:
    write_build_info()
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    run(
        [
            str(VENV_PYTHON), "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", "dist",
            f"--config-settings=build-dir={BUILD}", ".",
        ],
        "wheel", "wheel",
    )  # fmt: skip
    if version := os.environ.get("GPU_PYTHON"):
        pip = [str(VENV_PYTHON), "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", "dist/deps"]
        run([*pip, "--python-version", version, *GPU_TEST_PACKAGES], "wheels of the test packages", "pip-deps")
    for path in sorted((ROOT / "dist").rglob("*.whl")):
        say(str(path.relative_to(ROOT)))


def main(arguments: list[str]) -> int:
    known = [*PACKAGES, "wheel", "sanitize"]
    unknown = [a for a in arguments if a not in known]
    if unknown or not arguments:
        print(f"usage: tools/setup.py {{{','.join(known)}}}...", file=sys.stderr)
        return 2
    groups: list[str] = []

    def add(name: str) -> None:
        for needed in NEEDS.get(name, []):
            add(needed)
        if name in PACKAGES and name not in groups:
            groups.append(name)

    for argument in arguments:
        add({"wheel": "build", "sanitize": "test"}.get(argument, argument))
    try:
        system_packages(groups)
        virtual_environment()
        for group in groups:
            install_packages(group)
        if "wheel" in arguments:
            wheel()
        elif "build" in groups and "sanitize" not in arguments:
            build(with_tests="test" in groups)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
