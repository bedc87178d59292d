"""Writes the tables of the documents from bench/results/*.json.

python bench/tables.py --write     `make tables`: rewrite them
python bench/tables.py --check     exit status 1 when a document says something else than the results

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; nothing between these lines is typed by hand.
docs/results.md holds every row and is written whole.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DIRECTION = {"forward": "forward", "backward": "both gradients", "train": "training step"}

Row = dict[str, Any]


def records() -> list[tuple[str, dict[str, Any]]]:
    """Result files, GPUs first, the newest of a kind first."""
    found = [(path.stem, json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json"))]
    found.sort(key=lambda entry: str(entry[1]["date"]), reverse=True)
    return sorted(found, key=lambda entry: entry[1]["machine"]["kind"] != "cuda")


def name_of_machine(record: dict[str, Any]) -> str:
    """With the instructions that a CPU's kernels are compiled for: virtual machines hide the model."""
    kernels = [kernel for row in record["rows"] for kernel in row["kernels"]]
    found = {isa.upper() for kernel in kernels for isa in re.findall(r"_(avx2|avx512|portable)", kernel)}
    return ", ".join([str(record["machine"]["name"]), *sorted(found)])


def where(record: dict[str, Any]) -> str:
    machine, versions = record["machine"], record["versions"]
    count = machine.get("threads")
    threads = f", {count} thread{'s' if count > 1 else ''}" if count else f", driver {machine['driver']}"
    cudnn = f", cuDNN {versions['cudnn']}" if versions["cudnn"] else ""
    return (
        f"{name_of_machine(record)}{threads}, PyTorch {versions['torch']}{cudnn}, commit {record['commit'][:10]},"
        f" {record['date'][:10]}"
    )


def number(value: float) -> str:
    """Three significant digits."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def name_of(row: Row) -> str:
    parts = [f"batch {row['batch']} of {row['full_batch']}"] if row["batch"] != row["full_batch"] else []
    if row.get("input") != row.get("full_input"):
        parts.append("x".join(map(str, row["input"])) + " of " + "x".join(map(str, row["full_input"])))
    return row["name"] + (f" ({', '.join(parts)})" if parts else "")


def markdown(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *("---:" if index else "---" for index in range(1, len(header)))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])


def seeds() -> str:
    """The four seeds in fp32, forward and the gradients, on every machine with results."""
    parts = []
    for _, record in records():
        on_cpu = record["machine"]["kind"] == "cpu"
        rows = [r for r in record["rows"] if r["seed"] and r["dtype"] == "f32" and r["layout"] == "contiguous"]
        lines = []
        for name in dict.fromkeys(r["name"] for r in rows):
            own = {r["direction"]: r for r in rows if r["name"] == name}
            first = next(iter(own.values()))
            problem = first["problem"].replace(" g1 ", " ").replace(" f32", "").replace("|", "\\|")
            cells = [first["seed"], f"`{problem}`"]
            for direction in ("forward", "backward" if "backward" in own else "train"):
                row = own.get(direction)
                ratio = f"**{row['ratio']:.2f}**" if row else ""
                times = [number(row["torch_ms"]), number(row["tconv_ms"])] if row else ["", ""]
                cells += [ratio] if on_cpu else [*times, ratio]
            lines.append(cells)
        if lines:
            header = ["", "problem", "forward: PyTorch ms", "tconv ms", "ratio"]
            header += ["gradients¹: PyTorch ms", "tconv ms", "ratio"]
            if on_cpu:  # shared machines: the sides run in turns, so ratios hold where times do not
                header = ["", "problem", "forward: ratio", "gradients¹: ratio"]
            parts.append(f"{where(record)}:\n\n{markdown(header, sorted(lines, key=lambda cells: cells[0]))}")
    note = "\n\n¹ input, weight and bias; for the chain S4 a whole training step, forward pass included."
    return "\n\n".join(parts) + note if parts else "No results have been committed yet."


def summary(record: dict[str, Any]) -> str:
    lines = []
    rows = record["rows"]
    for dtype, layout, direction in dict.fromkeys((r["dtype"], r["layout"], r["direction"]) for r in rows):
        group = [r for r in rows if (r["dtype"], r["layout"], r["direction"]) == (dtype, layout, direction)]
        ratios = [r["ratio"] for r in group]
        better = [r["ratio_better_layout"] for r in group]
        shares = [r["share_of_floor"] for r in group]
        lines.append(
            [
                f"{dtype} {layout}", DIRECTION[direction], str(len(group)), f"{mean(ratios):.2f}", f"{min(ratios):.2f}",
                f"{mean(better):.2f}", f"{min(better):.2f}", f"{mean(shares):.0%}",
            ]
        )  # fmt: skip
    header = ["dtype, memory format", "what", "problems", "geometric mean", "lowest", "mean, PyTorch's better format",
              "lowest", "share of floor"]  # fmt: skip
    return markdown(header, lines)


def megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f}"


def everything(record: dict[str, Any]) -> str:
    on_cpu = record["machine"]["kind"] == "cpu"
    lines = []
    for row in record["rows"]:
        kernels = ", ".join(dict.fromkeys(k.split(":")[0] for k in row["kernels"]))
        extra = row["extra_bytes"]
        cells = [
            name_of(row), f"{row['dtype']} {row['layout']}".removesuffix(" contiguous"), DIRECTION[row["direction"]],
            number(row["torch_ms"]), number(row["tconv_ms"]), f"{row['ratio']:.2f}", f"{row['share_of_floor']:.0%}",
            f"{row['relative_l2']:.0e}", megabytes(extra["torch"]), megabytes(extra["tconv"]), kernels,
        ]  # fmt: skip
        if on_cpu:
            del cells[3:5]
        else:
            graph = row.get("graph_ms")
            cells.insert(6, f"{graph['torch'] / graph['tconv']:.2f}" if graph else "")
        lines.append(cells)
    header = ["problem", "dtype", "what", "PyTorch ms", "tconv ms", "ratio", "of floor", "rel. L2 to PyTorch",
              "extra MB PyTorch", "extra MB tconv", "kernels"]  # fmt: skip
    if on_cpu:
        del header[3:5]
    else:
        header.insert(6, "ratio in CUDA graphs")
    return markdown(header, lines)


def regrets(record: dict[str, Any]) -> str:
    lines = []
    for row in record["rows"]:
        for part, found in row.get("regret", {}).items():
            ms = found["ms"]
            lines.append(
                [
                    name_of(row), f"{row['dtype']} {row['layout']}".removesuffix(" contiguous"), part,
                    f"{found['chosen']} {number(ms[found['chosen']])}", f"{found['best']} {number(ms[found['best']])}",
                    f"{found['regret']:.2f}",
                ]
            )  # fmt: skip
    header = ["problem", "dtype", "direction", "chosen, ms", "best, ms", "chosen ÷ best"]
    return f"### Planner regret\n\n{markdown(header, lines)}\n\n" if lines else ""


def accuracy(record: dict[str, Any]) -> str:
    lines = [
        [
            name_of(row), f"{row['dtype']} {row['layout']}".removesuffix(" contiguous"), DIRECTION[row["direction"]],
            f"{errors['torch']:.1e}", f"{errors['tconv']:.1e}",
        ]
        for row in record["rows"] if (errors := row.get("error_to_float64"))
    ]  # fmt: skip
    if not lines:
        return ""
    header = ["problem", "dtype", "what", "PyTorch", "tconv"]
    return (
        "### Where the sides differ\n\nRelative L2 distance of each side's worst tensor to a float64 result, for the"
        f" rows whose two results differ by more than the benchmark allows.\n\n{markdown(header, lines)}\n\n"
    )


def first_calls(record: dict[str, Any]) -> str:
    times: dict[str, list[tuple[float, str]]] = {}
    # Older records do not say which programs were there already.
    for row in record["rows"] if any("cold_call_ms" in row for row in record["rows"]) else []:
        label = f"{name_of(row)} {row['dtype']} {row['layout']}".removesuffix(" contiguous")
        kept = f"{DIRECTION[row['direction']]}, the programs in the disk cache"
        times.setdefault(kept, []).append((row["first_call_ms"], label))
        for what, ms in row.get("cold_call_ms", {}).items():
            times.setdefault(f"{what}, nothing compiled before", []).append((ms, label))
    text = ""
    for what, found in times.items():
        found.sort()
        (median, _), (longest, label) = found[len(found) // 2], found[-1]
        text += f"First calls, {what}: median {median:.0f} ms, longest {longest:.0f} ms ({label}).\n"
    return text


def results_page() -> str:
    parts = [
        "# Results\n\nWritten by `make tables` from `bench/results`; how it is measured is in"
        " [numerics](numerics.md#measuring).\n"
        "A ratio is PyTorch's time ÷ tconv's, *of floor* the floor ÷ tconv's time.\n"
    ]
    for stem, record in records():
        host = record["host_us_per_call"]
        part = f"## {name_of_machine(record)}\n\n{where(record)}. {record['method'].capitalize()}.\n"
        if record["machine"]["kind"] == "cpu":
            load = record["machine"]["load_average"]
            part += (
                f"Load of the machine (runnable processes over a minute) {load[0]} before and {load[1]} after: it is"
                " shared, so the table shows ratios of interleaved runs and no times.\n"
            )
        part += f"Host time per call of a tiny layer: PyTorch {host['torch']} µs, tconv {host['tconv']} µs.\n"
        part += first_calls(record) + "\n"
        part += summary(record) + "\n\n"
        image = ROOT / "docs" / "images" / f"{stem}.png"
        if image.is_file():
            part += f"![time against floor](images/{stem}.png)\n\n"
        part += everything(record) + "\n\n" + accuracy(record) + regrets(record)
        for entry in record["left_out"]:
            part += f"Left out: {entry['row']}: {entry['reason'].splitlines()[0][:200]}\n"
        parts.append(part)
    if len(parts) == 1:
        parts.append("No results have been committed yet.\n")
    return "\n".join(parts).rstrip("\n") + "\n"


TABLES = {"seeds": seeds}


def filled(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        if match[1] not in TABLES:
            raise SystemExit(f"there is no table named {match[1]!r}; known: {', '.join(TABLES)}")
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", replace, text, flags=re.DOTALL)


def documents() -> dict[Path, str]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    wanted = {page: filled(page.read_text()) for page in pages if page.name != "results.md"}
    wanted[ROOT / "docs" / "results.md"] = results_page()
    return wanted


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    stale = {page: text for page, text in documents().items() if not page.is_file() or page.read_text() != text}
    for page, text in stale.items():
        if arguments.write:
            page.write_text(text)
        print(f"{page.relative_to(ROOT)}: {'written' if arguments.write else 'differs from the results'}")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
