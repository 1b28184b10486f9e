"""What was judged, as a page of tables (quality.md), as data (quality.json) and as plots (PNG, where matplotlib is there).

A result is a dict: what ("mass", "perplexity" or "needles"), model, text, signature, bytes, and values by budget."""
from __future__ import annotations

import json
import pathlib
import sys

from retrieval import accuracy, against

TITLES = {"mass": "Probability mass covered / relative error of the attention output", "perplexity": "Perplexity",
          "needles": "Needles found, all tokens of the answer right"}


def write(results: list[dict], folder: pathlib.Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for key, group in grouped(pooled(results) + results).items():
        parts.append(f"## {TITLES[key[0]]}: {key[1]}, {key[2]}\n\n{table(group)}")
    page = "# Selection quality\n\n" + "\n".join(parts)
    (folder / "quality.md").write_text(page)
    (folder / "quality.json").write_text(json.dumps(results, indent=1) + "\n")
    plots(pooled(results) + results, folder)
    return page


def pooled(results: list[dict]) -> list[dict]:
    """Needles of all texts of a model together, and how far each budget is from full attention, needle by needle."""
    groups: dict[tuple, list[dict]] = {}
    for r in results:
        if r["what"] == "needles" and "right" in r:
            groups.setdefault((r["model"], r["signature"]), []).append(r)
    pools = []
    for (model, _), group in groups.items():
        names = [r["text"] for r in group]
        if len(names) > 1:
            right = {k: "".join(r["right"][k] for r in group) for k in group[0]["right"] if all(k in r["right"] for r in group)}
            full = [c == "1" for c in right["full"]]
            values = {k: accuracy([c == "1" for c in oks]) for k, oks in right.items()}
            pools.append(group[0] | {"text": f"{len(full)} in {', '.join(names)}", "values": values, "against": {
                k: against(full, [c == "1" for c in oks]) for k, oks in right.items() if k != "full"}})
    return pools


def grouped(results: list[dict]) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        groups.setdefault((result["what"], result["model"], result["text"]), []).append(result)
    return groups


def table(group: list[dict]) -> str:
    budgets = list(dict.fromkeys(k for r in group for k in r["values"]))
    lines = ["| signature | B per token and KV head | " + " | ".join(f"k={k}" if k.isdigit() else k for k in budgets) + " |",
             "|---" * (2 + len(budgets)) + "|"]
    for r in group:
        cells = [cell(r["what"], r["values"].get(k), r["values"].get("full"), r.get("against", {}).get(k)) for k in budgets]
        lines.append(f"| {r['signature']} | {r['bytes'] or '-'} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(what: str, value, full, difference) -> str:
    if value is None:
        return ""
    if what == "mass":
        return f"{value[0]:.3f} / {value[1]:.3f}"
    if what == "needles":
        apart = f" (full {difference[0]:+.3f} +- {difference[1]:.3f})" if difference else ""
        return f"{value[0]:.3f} +- {value[1]:.3f}{apart}"
    return f"{value:.3f}" + (f" ({value / full - 1:+.1%})" if value is not full else "")


def plots(results: list[dict], folder: pathlib.Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("quality: no plots without matplotlib: pip install -r tests/quality/requirements.txt", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    for (what, model, text), group in grouped(results).items():
        figure, axes = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
        for r in group:
            draw(axes, what, r)
        axes.set(xlabel="selected rows k, beside 128 sinks and 128 recent", title=f"{model}, {text}", xscale="log",
                 ylabel={"mass": "relative error of the attention output"}.get(what, TITLES[what]))
        if what == "mass":
            axes.set_yscale("log")
        budgets = sorted({int(k) for r in group for k in r["values"] if k.isdigit()})
        axes.set_xticks(budgets, [str(k) for k in budgets])
        axes.grid(True, which="both", alpha=0.3)
        axes.legend(fontsize=8)
        figure.savefig(folder / f"{what}-{model}-{text.split(' ')[0]}.png", dpi=110, metadata={"Software": None})
        pyplot.close(figure)


def draw(axes, what: str, result: dict) -> None:
    points = {int(k): v for k, v in result["values"].items() if k.isdigit()}
    label = result["signature"] + (f" ({result['bytes']} B)" if result["bytes"] else "")
    if what == "needles" and points:
        axes.errorbar(list(points), [v[0] for v in points.values()], [v[1] for v in points.values()], marker="o", capsize=3,
                      label=label)
    elif points:
        axes.plot(list(points), [v[1] if what == "mass" else v for v in points.values()], "o-", label=label)
    if what != "mass" and "full" in result["values"]:
        full = result["values"]["full"]
        axes.axhline(full[0] if what == "needles" else full, color="gray", linestyle=":")
