"""The repository's own rules: what may include what, lists and files, names, documents that say what is so."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CPP = {".h", ".cpp", ".cu", ".cuh", ".def"}
LONGEST_FILE = 800

# What a name may not contain, as a word of its own: it says how good or how old something is, or nothing at all.
BANNED = {
    "fast", "optimized", "new", "old", "v2", "impl", "util", "utils", "helper", "helpers", "common", "misc", "legacy",
    "tmp", "my", "deconv", "deconvolution",
}  # fmt: skip

# Names that others chose: the class that a KernelBench harness imports.
GIVEN = {"ModelNew"}

# A folder may include what stands after it, and itself.
LAYERS = {
    "include/tconv": ["include"],
    "src/cpu": ["include", "src", "src/cpu"],
    "src/cuda": ["include", "src", "src/cuda"],
    "src": ["include", "src"],
}
# The two places where the core reaches the backends: through their lists, and the device query.
SEAM = {"src/kernels.cpp"}


@functools.cache
def files() -> list[Path]:
    """Tracked files, and those that are about to be."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if listed.returncode == 0 and listed.stdout:
        names = [ROOT / line for line in listed.stdout.splitlines()]
    else:  # an exported tree
        skipped = re.compile(r"(^|/)(build|dist|out|__pycache__|\.(?!ci/)\w+)/|\.so$|_build_info\.py$")
        names = [p for p in ROOT.rglob("*") if not skipped.search(p.relative_to(ROOT).as_posix())]
    return sorted(p for p in names if p.is_file())


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def sources(*suffixes: str, under: str = "") -> list[Path]:
    return [p for p in files() if p.suffix in suffixes and named(p).startswith(under)]


def text_files() -> list[Path]:
    return [p for p in files() if p.suffix not in {".png", ".whl"} and p.name != "LICENSE"]


@functools.cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL))


def kernel_lines(backend: str) -> list[tuple[str, str, str]]:
    """(name, source, target) of each line of a list."""
    text = read(ROOT / "src" / backend / "kernels.def")
    return re.findall(r"^KERNEL\((\w+), ([\w.]+), (\w+)\)", text, re.MULTILINE)


# --- Layers


@pytest.mark.parametrize("path", sources(".h", ".cpp", ".cuh", ".cu", under="include") + sources(
    ".h", ".cpp", ".cuh", ".cu", under="src"), ids=named)  # fmt: skip
def test_includes_point_one_way(path: Path) -> None:
    if named(path) in SEAM:
        pytest.skip("the registry includes the lists of both backends")
    folder = next(f for f in sorted(LAYERS, key=len, reverse=True) if named(path).startswith(f + "/"))
    for include in re.findall(r'^\s*#include "([^"]+)"', read(path), re.MULTILINE):
        places = [path.parent / include, ROOT / "include" / include, ROOT / "src" / include]
        target = next((p for p in places if p.exists()), None)
        assert target is not None, f"{named(path)} includes {include}, which is not in the repository"
        target_folder = named(target.resolve().parent).removesuffix("/tconv")
        assert target_folder in LAYERS[folder], f"{named(path)} ({folder}) includes {include} of {target_folder}"


@pytest.mark.parametrize("path", [p for p in files() if p.suffix in CPP], ids=named)
def test_no_foreign_headers(path: Path) -> None:
    """No PyTorch header anywhere, no CUDA toolkit header, Python only in the bindings."""
    for include in re.findall(r"^\s*#include [<\"]([^>\"]+)[>\"]", read(path), re.MULTILINE):
        assert not re.match(r"(torch|ATen|c10|pybind11|cuda|cuda_runtime|cuda_fp16|cuda_bf16|nvrtc|mma)\b(?!/driver)",
                            include) or include.startswith("cuda/"), f"{named(path)} includes {include}"  # fmt: skip
        assert include != "Python.h" or named(path) == "python/bindings.cpp"


def test_public_headers_compile_alone(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    assert compiler, "no C++ compiler"
    for header in sources(".h", under="include"):
        unit = tmp_path / "unit.cpp"
        unit.write_text(f'#include "{header}"\n')
        answer = subprocess.run(
            [compiler, "-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{ROOT}/include", str(unit)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert answer.returncode == 0, f"{named(header)} does not compile alone:\n{answer.stderr}"


# --- Lists


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_kernels_and_files_match(backend: str) -> None:
    lines = kernel_lines(backend)
    assert lines, f"src/{backend}/kernels.def lists no kernel"
    assert len({name for name, _, _ in lines}) == len(lines), "a kernel is listed twice"
    assert len(re.findall(r"^\s*KERNEL\(", read(ROOT / "src" / backend / "kernels.def"), re.MULTILINE)) == len(lines)
    for name, source, target in lines:
        assert (ROOT / "src" / backend / source).is_file(), f"{name}: src/{backend}/{source} does not exist"
        stem = re.sub(r"_sm\d+a?$", "", Path(source).stem)
        assert name == Path(source).stem or name.startswith(stem), f"{name} is not named after {source}"
        if backend == "cpu":
            assert target in {"portable", "avx2", "avx512", "avx512_bf16", "avx512_amx"}
            assert target == "portable" or name.endswith(f"_{target}"), f"{name} does not end in its target {target}"


def test_each_device_source_is_used() -> None:
    listed = {source for _, source, _ in kernel_lines("cuda")}
    host = "".join(read(p) for p in sources(".cpp", under="src/cuda"))
    for path in sources(".cu", under="src/cuda"):
        assert path.name in listed or f'"{path.name}"' in host, f"{named(path)}: no kernel compiles it"
    device = "".join(read(p) for p in sources(".cu", ".cuh", under="src/cuda"))
    for path in sources(".cuh", under="src/cuda"):
        assert re.search(rf'include \\?"{path.name}\\?"', device + host), f"{named(path)}: nothing includes it"


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_kernel_files_say_what_they_do(backend: str) -> None:
    for source in {source for _, source, _ in kernel_lines(backend)}:
        head = "\n".join(read(ROOT / "src" / backend / source).splitlines()[:40])
        assert re.match(rf"// {re.escape(Path(source).stem)}\b.* — ", head), (
            f"{source}: the first line names the kernel"
        )
        for word in ("Computes", "Method", "Refuses", "Reads as"):
            assert re.search(rf"^// {word}\b", head, re.MULTILINE), f"{source}: the header lacks {word!r}"


def test_named_problems_are_tested() -> None:
    """Every layer that figures are made of is in the list that the C++ tests walk."""
    names = {row["name"] for row in json.loads(read(ROOT / "python/tconv/problems.json"))["problems"]}
    listed = read(ROOT / "tests/problems.txt")
    assert {n for n in names if n not in listed and f"model_{n}" not in listed} <= {"kernelbench_2_19_groups8"}


# --- Names, text, size


def words(name: str) -> set[str]:
    return {w.lower() for w in re.findall(r"[A-Z]?[a-z]+\d*|[A-Z]+(?![a-z])|v\d+", name)}


def test_file_names() -> None:
    for path in files():
        bad = words(path.stem) & BANNED
        assert not bad, f"{named(path)}: {', '.join(bad)} says nothing"
        if path.suffix in CPP:
            assert re.fullmatch(r"[a-z0-9_]+", path.stem), f"{named(path)}: files are snake_case"


def test_names_in_code() -> None:
    for path in sources(".py"):
        for name in re.findall(r"^\s*(?:def|class) (\w+)", read(path), re.MULTILINE):
            if not name.startswith("test_"):  # these are sentences
                assert name in GIVEN or not words(name) & BANNED, f"{named(path)}: {name}"
    for path in sources(*CPP):
        code = without_comments(read(path))
        for name in re.findall(r"\b(?:struct|class|enum class|namespace|using) (\w+)", code):
            assert not words(name) & BANNED, f"{named(path)}: {name}"
        for name in re.findall(r"^[\w:<>&*,\s]*?\b(\w+)\([^;()]*\)(?: const)?(?: noexcept)? \{$", code, re.MULTILINE):
            assert not words(name) & BANNED, f"{named(path)}: {name}"


def test_length_and_whitespace() -> None:
    for path in text_files():
        text = read(path)
        if path.suffix in CPP | {".py"}:
            length = text.count("\n")
            assert length <= LONGEST_FILE, f"{named(path)} has {length} lines, more than {LONGEST_FILE}"
            assert "\t" not in text, f"{named(path)} holds a tab"
        assert not re.search(r"[ \t]+$", text, re.MULTILINE), f"{named(path)}: white space at the end of a line"
        assert not text or text.endswith("\n"), f"{named(path)} does not end in a line break"


def test_licence_lines() -> None:
    for path in sources(".h", ".cpp", ".cu", ".cuh"):
        assert "SPDX-License-Identifier: Apache-2.0" in "\n".join(read(path).splitlines()[:40]), named(path)


def test_nothing_foreign() -> None:
    """No path of one machine, no host of a registry, no unfinished work; written so as not to match here."""
    unwanted = {
        "a path of one machine": r"(?<![\w.])/(?:" + "|".join(["work", "root", "farm"]) + r"|home/\w+)/",
        "a registry's host": "|".join(["pypi" + r"\.org", "python" + "hosted", r"download\.py" + r"torch\.org",
                                       r"deb\.deb" + r"ian\.org", r"registry\.npm" + "js"]),
        "unfinished work": r"\b(?:" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"]) + r")\b",
        "a merge conflict": r"^(?:" + "<" * 7 + "|" + ">" * 7 + r") ",
    }  # fmt: skip
    for path in text_files():
        for what, pattern in unwanted.items():
            match = re.search(pattern, read(path), re.MULTILINE)
            assert match is None, f"{named(path)} holds {what}: {match[0]!r}"


# --- Documents


DOCUMENTS = [p for p in sources(".md") if named(p).count("/") <= 1]


def anchors(path: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", read(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links(path: Path) -> None:
    text = re.sub(r"```.*?```", "", read(path), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        place = (path.parent / name).resolve() if name else path
        assert place.exists(), f"{named(path)} links to {target}"
        assert not anchor or anchor in anchors(place), f"{named(path)} links to {target}; there is no such heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_paths_that_documents_name(path: Path) -> None:
    top = {p.relative_to(ROOT).parts[0] for p in files() if len(p.relative_to(ROOT).parts) > 1}
    for name in re.findall(r"`([\w.]+(?:/[\w.{},*-]+)+)/?`", read(path)):
        if name.split("/")[0] not in top or "*" in name:
            continue
        options = re.search(r"\{([^}]+)\}", name)
        for one in options[1].split(",") if options else [""]:
            place = re.sub(r"\{[^}]+\}", one, name)
            assert (ROOT / place).exists(), f"{named(path)} names {place}, which does not exist"


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_commands_that_documents_name(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", read(ROOT / "Makefile"), re.MULTILINE))
    code = re.findall(r"`([^`\n]+)`", read(path)) + re.findall(r"^(make [^\n#]+)", read(path), re.MULTILINE)
    for line in code:
        if line.startswith("make "):
            for word in line.split()[1:]:
                assert "=" in word or not re.fullmatch(r"[a-z]+", word) or word in targets, (
                    f"{named(path)}: make {word}"
                )
        match = re.match(r"python -m tconv (\w+)", line)
        if match:
            assert re.search(rf"\b{match[1]}\b", read(ROOT / "python/tconv/__main__.py")), f"{named(path)}: {line}"


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if "```python" in read(p)], ids=named)
def test_examples_of_documents_run(path: Path) -> None:
    pytest.importorskip("torch")
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", read(path), re.DOTALL)):
        answer = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False)
        assert answer.returncode == 0, f"{named(path)}, example {number + 1}:\n{answer.stderr}"


def test_tree_in_documents() -> None:
    """The folders that the documents draw exist."""
    for name in ("include/tconv", "src/cpu", "src/cuda", "python/tconv", "tests", "bench", "examples", "docs"):
        assert (ROOT / name).is_dir()
    for document in ("README.md", "docs/architecture.md"):
        for folder in re.findall(r"\b(include/tconv|src/\w+)\b", read(ROOT / document)):
            found = [p for p in files() if named(p).startswith((folder + "/", folder + "."))]
            assert found or folder == "src/planner", f"{document} names {folder}"


def test_tables_come_from_results() -> None:
    answer = subprocess.run(
        [sys.executable, str(ROOT / "bench/tables.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, f"run `make tables`:\n{answer.stdout}{answer.stderr}"


def test_results_say_where_they_come_from() -> None:
    for path in (ROOT / "bench/results").glob("*.json"):
        record = json.loads(read(path))
        assert re.fullmatch(r"[0-9a-f]{40}", record["commit"]), f"{named(path)}: measured at {record['commit']!r}"
        assert record["machine"]["name"] and record["versions"]["torch"] and record["rows"]
        wrong = [row["name"] for row in record["rows"] if not row["ok"]]
        assert not wrong, f"{named(path)}: {', '.join(wrong)} differ from PyTorch"


def test_continuous_integration_runs_the_suite() -> None:
    assert re.search(r"^make test\b", read(ROOT / ".ci/run"), re.MULTILINE)
    assert (ROOT / ".ci/run").stat().st_mode & 0o111, ".ci/run is not executable"
    for command in ("make demo", "make test"):
        assert command in read(ROOT / "README.md")
