"""What `mvar ablate` says: the rows over seeds, what differences are worth, tables, Markdown, picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvar_cli.ablation_request import ROW, Row
from mvar_cli.old_console import Console, format_bytes, format_count, format_number
from mvar_core.analysis.ablation import Ablation, Setting, over_seeds
from mvar_core.analysis.seed_noise import judge, sentence
from mvar_core.config import RunConfig
from mvar_core.evaluation.scores import METRICS
from mvar_core.io.files import read_json, write_json, write_text
from mvar_core.reports.ablation_plots import Point, plot_ablations

JSON_FILE, MARKDOWN_FILE = "ablation.json", "ablation.md"
PICTURES = ("ablation.png", "ablation.svg")
FROM_ROW = (
    "loss", "validation_loss", "validation_scale_loss", "validation_scale_accuracy", "training_seconds",
)  # fmt: skip
FROM_SCORES = (
    *METRICS, "classifier_accuracy", "pixel_diversity", "nearest_distance",
)  # fmt: skip
GIVEN = ("parameters", "attention_gmacs", "total_gmacs", "kv_cache_bytes")
LEVELS = (
    "classifier_accuracy_real", "demo_fid_floor", "demo_fid_real", "demo_fid_class_means", "pixel_diversity_real",
    "nearest_distance_real",
)  # fmt: skip
SHOWN_SCORES = {"fid": "FID", "precision": "precision", "recall": "recall", "classifier_accuracy": "accuracy"}
TINY_GMACS = 0.1


@dataclass(frozen=True)
class Report:
    """Everything that was found.

    Attributes:
        config: The run that all rows share.
        ablations: The tables.
        seeds: The seeds.
        facts: Further keys of the JSON object: what the experiment was.
        rows: One mapping per row.
        aggregate: One mapping per setting, by its name.
    """

    config: RunConfig
    ablations: tuple[Ablation, ...]
    seeds: tuple[int, ...]
    facts: Mapping[str, Any]
    rows: list[dict[str, Any]]
    aggregate: dict[str, dict[str, Any]]

    @classmethod
    def of(
        cls,
        config: RunConfig,
        ablations: tuple[Ablation, ...],
        rows: Sequence[Row],
        costs: Mapping[str, Mapping[str, Any]],
        facts: Mapping[str, Any],
    ) -> Report:
        """Read the finished rows."""
        found = [{**read_json(row.directory / ROW), "cost": costs[row.setting.name]} for row in rows]
        aggregate = {}
        for setting in dict.fromkeys(row.setting for row in rows):
            own = [row for row in found if row["setting"] == setting.name]
            aggregate[setting.name] = {
                "setting": setting.name,
                "scale_prefixes": setting.scale_prefixes,
                "windows": list(setting.windows),
                "seeds": [row["seed"] for row in own],
                **{name: own[0][name] for name in GIVEN},
                **over_seeds(own, FROM_ROW),
                **over_seeds([row["scores"] for row in own], FROM_SCORES),
                "cost": costs[setting.name],
            }
        return cls(config, ablations, tuple(dict.fromkeys(row.seed for row in rows)), facts, found, aggregate)

    @property
    def fid_name(self) -> str:
        """FID, or with other features than Inception's, whose."""
        features = self.facts.get("features")
        return "FID" if features in (None, "inception") else f"{features}-FID"

    @property
    def qualities(self) -> dict[str, str]:
        """Names of what decides, by key: lower is better in all."""
        scored = any(self.aggregate[name]["fid"]["values"] for name in self.aggregate)
        return {**({"fid": self.fid_name} if scored else {}), "validation_loss": "validation loss"}

    @property
    def levels(self) -> dict[str, float]:
        """What scores are compared with, the same for all rows; empty where there is nothing."""
        scores = self.rows[0]["scores"]
        return {name: scores[name] for name in LEVELS if scores.get(name) is not None}

    def sentences(self, ablation: Ablation) -> list[str]:
        """What the differences of a table are worth against seed noise, one sentence per quality."""
        return [text for text, _ in self._judged(ablation)]

    def savings(self, ablation: Ablation) -> str:
        """What each setting costs beside the baseline, in one sentence."""
        base = self.aggregate[ablation.baseline.name]
        parts = []
        for setting in ablation.settings:
            if setting == ablation.baseline:
                continue
            found = self.aggregate[setting.name]
            ratios = [
                f"{ratio:.2f} of the {what}"
                for what, ratio in (
                    ("attention", _ratio(found["attention_gmacs"], base["attention_gmacs"])),
                    ("time", _ratio(found["cost"]["seconds_per_image"], base["cost"]["seconds_per_image"])),
                    ("allocated memory", _ratio(found["cost"]["allocated_bytes"], base["cost"]["allocated_bytes"])),
                )
                if ratio is not None
            ]
            parts.append(f"{ablation.label(setting)} takes {', '.join(ratios)}")
        return f"Cost beside {ablation.label(ablation.baseline)}: {'; '.join(parts)}." if parts else ""

    def _judged(self, ablation: Ablation) -> list[tuple[str, dict[str, Any]]]:
        judged = []
        for key, name in self.qualities.items():
            values = {
                ablation.label(setting): self.aggregate[setting.name][key]["values"] for setting in ablation.settings
            }
            verdict = judge(name, values, ablation.label(ablation.baseline))
            if verdict is not None:
                judged.append((sentence(verdict, values), verdict.to_dict()))
        return judged

    def to_dict(self) -> dict[str, Any]:
        """As ablation.json holds it."""
        return {
            **self.facts,
            "seeds": list(self.seeds),
            "rows": self.rows,
            "aggregate": list(self.aggregate.values()),
            "ablations": [
                {
                    "kind": ablation.kind,
                    "title": ablation.title,
                    "baseline": ablation.baseline.name,
                    "entries": [{"label": entry.label, "setting": entry.setting.name} for entry in ablation.entries],
                    "sentences": self.sentences(ablation),
                    "savings": self.savings(ablation),
                    "verdicts": [verdict for _, verdict in self._judged(ablation)],
                }
                for ablation in self.ablations
            ],
        }

    def show(self, console: Console) -> None:
        """Tables and sentences on stdout."""
        for ablation in self.ablations:
            for title, columns, cells in self._tables(ablation):
                console.table(title, columns, cells)
            for text in (*self.sentences(ablation), self.savings(ablation)):
                console.say(text)
            console.say()
        for note in self._notes():
            console.say(note)

    def write(self, out: Path) -> dict[str, str]:
        """ablation.json, ablation.md and the pictures; returns where they are."""
        for name in PICTURES:
            self._draw(out / name)
        write_text(out / MARKDOWN_FILE, self.markdown())
        write_json(out / JSON_FILE, self.to_dict())
        return {"json": str(out / JSON_FILE), "markdown": str(out / MARKDOWN_FILE), "plot": str(out / PICTURES[0])}

    def markdown(self) -> str:
        """Tables, sentences and picture."""
        facts, machine = self.facts, self.facts.get("machine", {})
        count = facts["num_samples"]
        lines = [
            f"`{facts['command']}`",
            "",
            f"{self.config.name}, {facts['steps']:,} steps of {self.config.train.batch_size} on {facts['images']:,}"
            f" images ({facts['data']}), {self._seeds()}; scored on {count:,} samples."
            f" {machine.get('cores', '?')} cores of {machine.get('processor', '?')}, {machine.get('date', '?')}.",
            "",
        ]
        for ablation in self.ablations:
            lines += [f"### {ablation.title}", ""]
            for title, columns, cells in self._tables(ablation):
                title = title.removeprefix(f"{ablation.title}; ")
                lines += [f"{title[0].upper()}{title[1:]}:", "", *_markdown_table(columns, cells), ""]
            lines += [f"- {text}" for text in (*self.sentences(ablation), self.savings(ablation)) if text]
            lines.append("")
        lines += [f"![Quality against cost, with the spread over seeds]({PICTURES[0]})", ""]
        lines += [line for note in self._notes() for line in (note, "")]
        return "\n".join(lines).rstrip() + "\n"

    def _tables(self, ablation: Ablation) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, columns and cells of each table of an ablation: quality, cost, quality of each scale."""
        first = "prefixes" if ablation.kind == "prefixes" else "window"
        found = [(entry.label, self.aggregate[entry.setting.name]) for entry in ablation.entries]
        scores = {
            key: name
            for key, name in {**SHOWN_SCORES, "fid": self.fid_name}.items()
            if any(setting[key]["values"] for _, setting in found)
        }
        quality = [
            [label, *(spread_text(setting[key]) for key in ("validation_loss", *scores))] for label, setting in found
        ]
        unit, factor = self._unit
        batch = found[0][1]["cost"]["batch_size"]
        together = f"{batch} images" if batch > 1 else "1 image"
        costs = [
            [
                label,
                format_count(setting["parameters"]),
                format_number(factor * setting["attention_gmacs"]),
                format_bytes(setting["kv_cache_bytes"]),
                _milliseconds(setting["cost"]["seconds_per_image"]),
                format_bytes(setting["cost"]["peak_memory_bytes"]),
                format_bytes(setting["cost"]["allocated_bytes"]),
                spread_text(setting["training_seconds"]),
            ]
            for label, setting in found
        ]
        headings = [
            first, "parameters", f"attention, {unit}", "KV cache", "ms an image", "resident", "allocated",
            "seconds of training",
        ]  # fmt: skip
        scales = [[label, *map(spread_text, setting["validation_scale_loss"])] for label, setting in found]
        return [
            (f"{ablation.title}; {self._seeds()}", [first, "validation loss", *scores.values()], quality),
            (f"cost; time and memory of sampling {together} together", headings, costs),
            ("validation loss of each scale", [first, *(str(grid) for grid in self.config.pyramid)], scales),
        ]

    @property
    def _unit(self) -> tuple[str, float]:
        """What attention is counted in, and how many of them are 10⁹ multiply-accumulates."""
        most = max(found["attention_gmacs"] for found in self.aggregate.values())
        return ("MMACs", 1000.0) if most < TINY_GMACS else ("GMACs", 1.0)

    def _seeds(self) -> str:
        count = len(self.seeds)
        return f"mean ± standard deviation over {count} seeds" if count > 1 else f"one seed ({self.seeds[0]})"

    def _notes(self) -> list[str]:
        notes = []
        levels = self.levels
        if "demo_fid_real" in levels:
            notes.append(
                f"To compare with: {self.fid_name} of real test images {format_number(levels['demo_fid_real'])}, of"
                f" training images redrawn {format_number(levels['demo_fid_floor'])}, of class means"
                f" {format_number(levels['demo_fid_class_means'])}; accuracy on real test images"
                f" {levels['classifier_accuracy_real']:.3f}."
            )
        cost = next(iter(self.aggregate.values()))["cost"]
        memory = f" (memory {cost['memory_is']})" if cost["memory_is"] else ""
        notes.append(
            f"KV cache of one image; time{memory} as `mvar bench` measures it, medians of rounds over all settings;"
            " allocated: what torch's allocator gave out at most."
        )
        reason = self.rows[0]["scores"].get("reasons", {}).get("fid")
        if reason:
            notes.append(f"FID is not computed: {reason.rstrip('.')}.")
        equal = [entry.label for ablation in self.ablations for entry in ablation.entries if " = " in entry.label]
        if equal:
            notes.append(f"What is written with = is one model, trained once: {'; '.join(equal)}.")
        if len(self.seeds) > 1:
            notes.append(
                "p: Welch's t test against the baseline, corrected for the comparisons of the table (Holm); seed std:"
                " standard deviation over seeds, pooled over the table's settings. Settings share data, order and first"
                " weights of a seed."
            )
        return notes

    def _draw(self, path: Path) -> None:
        unit, factor = self._unit
        panels = {
            ablation.title.split(",")[0]: {
                name: [self._point(ablation, setting, key, factor) for setting in ablation.settings]
                for key, name in self.qualities.items()
            }
            for ablation in self.ablations
        }
        levels = {}
        if "demo_fid_real" in self.levels:
            levels[self.fid_name] = ("real test images", self.levels["demo_fid_real"])
        plot_ablations(
            panels,
            [path],
            title=f"{self.config.name}: {self._seeds()}",
            cost_name=f"attention of one image ({unit})",
            levels=levels,
        )

    def _point(self, ablation: Ablation, setting: Setting, key: str, factor: float) -> Point:
        found = self.aggregate[setting.name]
        spread = found[key]
        label = ablation.label(setting)
        return Point(label, factor * found["attention_gmacs"], tuple(spread["values"]), spread["mean"], spread["std"])


def spread_text(spread: Mapping[str, Any]) -> str:
    """Mean ± standard deviation, to two figures of the latter."""
    mean, std = spread["mean"], spread["std"]
    if mean is None:
        return "–"
    if std is None:
        return format_number(mean)
    if std == 0:
        return f"{format_number(mean)} ± 0"
    decimals = min(6, max(0, 1 - math.floor(math.log10(std))))
    return f"{mean:,.{decimals}f} ± {std:.{decimals}f}"


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else format_number(1000 * seconds)


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
