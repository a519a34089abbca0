"""Which classes `mvar sample --class` means: ids, comma lists, names or all of them."""

from __future__ import annotations

from collections.abc import Sequence

from mvar_core.errors import DataError, nearest


def parse_classes(texts: Sequence[str], num_classes: int, class_names: Sequence[str] | None) -> list[int]:
    """Class labels in the order they were asked for, each once.

    A whole name is tried before commas are taken as separators, for names may hold commas ("tench, Tinca tinca").

    Args:
        texts: What followed `--class`, one entry per use.
        num_classes: Number of classes of the model.
        class_names: Their names, where the model records them.

    Raises:
        DataError: A label out of range, or a name that no class has (with the nearest names).
    """
    names = _labels_by_name(class_names or ())
    labels: list[int] = []
    for text in texts:
        if text.strip().casefold() == "all":
            labels += range(num_classes)
        elif _fold(text) in names:
            labels.append(_one_label(text, names))
        else:
            labels += [_label(part, num_classes, names) for part in text.split(",") if part.strip()]
    if not labels:
        raise DataError("--class names no class.", f"Write a label 0 … {num_classes - 1}, a name, or all.")
    return list(dict.fromkeys(labels))


def _fold(name: str) -> str:
    return " ".join(name.casefold().split())


def _labels_by_name(class_names: Sequence[str]) -> dict[str, list[int]]:
    """Labels under each whole name and under each of its synonyms, which commas separate."""
    labels: dict[str, list[int]] = {}
    for label, name in enumerate(class_names):
        for known in dict.fromkeys([_fold(name), *(_fold(part) for part in name.split(","))]):
            labels.setdefault(known, []).append(label)
    return labels


def _one_label(text: str, names: dict[str, list[int]]) -> int:
    labels = names[_fold(text)]
    if len(labels) > 1:
        raise DataError(
            f"--class {text!r} is the name of classes {', '.join(map(str, labels))}.", "Choose one by its number."
        )
    return labels[0]


def _label(text: str, num_classes: int, names: dict[str, list[int]]) -> int:
    if _fold(text) in names:
        return _one_label(text, names)
    try:
        label = int(text)
    except ValueError:
        if not names:
            raise DataError(
                f"--class {text.strip()!r}: this model records no class names.", f"Write a label 0 … {num_classes - 1}."
            ) from None
        raise DataError(f"There is no class {text.strip()!r}.", nearest(_fold(text), names)) from None
    if not 0 <= label < num_classes:
        raise DataError(f"--class {label} is out of range.", f"The model has classes 0 … {num_classes - 1}.")
    return label
