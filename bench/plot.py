"""Draws time against floor for every problem: bench/results/*.json to docs/images/*.png (`make plots`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from tables import name_of_machine

ROOT = Path(__file__).resolve().parent.parent
TITLES = {
    ("f32", "forward"): "fp32, forward",
    ("f32", "backward"): "fp32, both gradients; chains: training step",
    ("f16", "forward"): "fp16, forward, PyTorch's and tconv's better memory format",
    ("f16", "backward"): "fp16, both gradients; chains: training step",
    ("bf16", "forward"): "bf16, forward, better memory format on either side",
    ("bf16", "backward"): "bf16, both gradients; chains: training step",
}
TORCH, OURS, FLOOR = "#9a9a9a", "#1f6fb2", "#222222"


def panel_rows(record: dict[str, Any], dtype: str, kind: str) -> list[dict[str, Any]]:
    """One entry per problem: the better memory format of each side."""
    wanted = ("forward",) if kind == "forward" else ("backward", "train")
    found: dict[str, dict[str, Any]] = {}
    for row in record["rows"]:
        if row["dtype"] != dtype or row["direction"] not in wanted:
            continue
        entry = found.setdefault(
            row["name"], {**row, "torch_ms": float("inf"), "tconv_ms": float("inf"), "label": row["name"]}
        )
        entry["torch_ms"] = min(entry["torch_ms"], row["torch_ms"])
        entry["tconv_ms"] = min(entry["tconv_ms"], row["tconv_ms"])
        if row["batch"] != row["full_batch"]:
            entry["label"] = f"{row['name']} (b{row['batch']})"
    return sorted(found.values(), key=lambda entry: entry["torch_ms"] / entry["tconv_ms"])


def draw(record: dict[str, Any], target: Path) -> None:
    panels = [
        (key, rows) for key in TITLES if (rows := panel_rows(record, *key))
    ]  # fmt: skip
    if not panels:
        return
    on_cpu = record["machine"]["kind"] == "cpu"
    for _, rows in panels:
        for row in rows if on_cpu else []:  # a shared machine: ratios hold where times do not
            row |= {name: row[name] / row["torch_ms"] for name in ("floor_ms", "tconv_ms", "torch_ms")}
    heights = [len(rows) for _, rows in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(10, 0.27 * sum(heights) + 1.1 * len(panels) + 0.6), squeeze=False,
        gridspec_kw={"height_ratios": [h + 2 for h in heights]},
    )  # fmt: skip
    for (key, rows), axis in zip(panels, axes[:, 0], strict=True):
        for line, row in enumerate(rows):
            axis.plot([row["floor_ms"], row["torch_ms"]], [line, line], color="#e2e2e2", linewidth=1, zorder=1)
            axis.plot([row["tconv_ms"], row["torch_ms"]], [line, line], color="#b9d3ea", linewidth=4, zorder=2)
            ratio = row["torch_ms"] / row["tconv_ms"]
            right = max(row["torch_ms"], row["tconv_ms"])
            axis.annotate(
                f"{ratio:.1f}×" if ratio < 9.95 else f"{ratio:.0f}×", (right, line), (7, 0), textcoords="offset points",
                va="center", fontsize=7.5, color="#333333" if ratio >= 1 else "#b03a2e",
            )  # fmt: skip
        lines = range(len(rows))
        axis.scatter([r["floor_ms"] for r in rows], lines, marker="|", s=70, color=FLOOR, zorder=3, label="floor")
        axis.scatter([r["torch_ms"] for r in rows], lines, s=26, color=TORCH, zorder=3, label="PyTorch")
        axis.scatter([r["tconv_ms"] for r in rows], lines, s=26, color=OURS, zorder=4, label="tconv")
        axis.set_xscale("log")
        axis.set_yticks(list(lines), [r["label"] for r in rows], fontsize=7.5)
        axis.set_ylim(-0.8, len(rows) - 0.2)
        axis.margins(x=0.08)
        axis.set_title(TITLES[key], fontsize=9.5, loc="left", fontweight="bold")
        axis.grid(axis="x", which="major", color="#eeeeee")
        axis.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.tick_params(axis="x", labelsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=3, fontsize=8.5, frameon=False)
    unit = "share of PyTorch's time" if on_cpu else "milliseconds"
    axes[-1, 0].set_xlabel(f"{unit} (log scale); the number is PyTorch ÷ tconv", fontsize=8.5)
    title = f"{name_of_machine(record)}, PyTorch {record['versions']['torch']}, commit {record['commit'][:10]}"
    figure.suptitle(title, fontsize=10.5, x=0.02, y=0.999, ha="left", va="top")
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.45 / figure.get_figheight()))  # room for the title
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    plt.close(figure)
    print(f"{target.relative_to(ROOT) if target.is_relative_to(ROOT) else target}")


def main(arguments: list[str]) -> int:
    """Draws the given result files, or all of bench/results, into docs/images."""
    paths = [Path(a) for a in arguments] or sorted((ROOT / "bench" / "results").glob("*.json"))
    for path in paths:
        draw(json.loads(path.read_text()), ROOT / "docs" / "images" / f"{path.stem}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
