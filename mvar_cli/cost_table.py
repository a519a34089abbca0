"""What a model costs as tables, for `mvar plan` and for every dry run."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mvar_core.formatting import format_bytes, format_count

if TYPE_CHECKING:
    from mvar_core.analysis.cost import Plan

SCALES = (
    "side", "tokens", "window", "keys per query", "attention GMACs", "total GMACs", "KV cache kept", "micro-batch",
    "its memory",
)  # fmt: skip


def cost_tables(cost: "Plan") -> Iterator[tuple[str, Sequence[str], Sequence[Sequence[Any]]]]:
    """Title, columns and rows of each table: totals, where the operations are, and the scales."""
    yield cost.name, ("what", "how much"), _totals(cost)
    operations = [(name, gmacs, 100 * gmacs / cost.total_gmacs) for name, gmacs in cost.parts_gmacs.items() if gmacs]
    yield "where the operations are, one image, no guidance", ("operation", "GMACs", "%"), operations
    scales = [
        (
            side_name(scale["side"]),
            scale["tokens"],
            str(scale["window"] or "whole"),
            scale["keys_per_query"],
            scale["attention_gmacs"],
            scale["total_gmacs"],
            format_bytes(scale["kv_cache_bytes"]),
            scale["micro_batch"],
            format_bytes(scale["activation_bytes"]),
        )
        for scale in cost.scales
    ]
    yield "scales", SCALES, scales


def cost_remarks(cost: "Plan") -> list[str]:
    """How sampling divides the memory, in sentences."""
    together = f"{cost.images_together} image" + ("s" if cost.images_together > 1 else "")
    budget = f" in {format_bytes(cost.memory)}" if cost.memory is not None else ""
    remarks = [
        f"Sampling: {together} from scale to scale together{budget}, at each scale a micro-batch at a time;"
        f" {cost.decoder_images} decoded at a time."
    ]
    if cost.largest_batch:
        remarks.append(
            "What an image keeps from scale to scale limits the batch of sampling; a scale itself uses the memory that"
            " it is given."
        )
    return remarks


def side_name(side: int | Sequence[int]) -> str:
    """What tables call a scale's size: 16, or 16×24."""
    return str(side) if isinstance(side, int) else "×".join(map(str, side))


def _totals(cost: "Plan") -> list[tuple[str, str]]:
    batch = f"batch {cost.batch_size}" + (", guided" if cost.guided else "")
    rows = [
        ("parameters, transformer", format_count(cost.parameters)),
        ("parameters, tokenizer", format_count(cost.tokenizer_parameters)),
        ("tokens per image", f"{cost.tokens:,}"),
        ("attention, one image, no guidance", f"{cost.attention_gmacs:,.4g} GMACs"),
        ("everything, one image, no guidance", f"{cost.total_gmacs:,.4g} GMACs"),
        ("everything, one image, guided", f"{cost.guided_gmacs:,.4g} GMACs"),
        (f"KV cache, {batch}", format_bytes(cost.kv_cache_bytes)),
        (f"weights for sampling, {8 * cost.dtype_bytes} bit", format_bytes(cost.weight_bytes)),
        (f"peak memory of sampling, {batch}, {cost.device}", format_bytes(cost.sample_peak_bytes)),
        ("each further image of the batch keeps", format_bytes(cost.image_bytes)),
    ]
    if cost.train_peak_bytes is not None:
        rows.append((f"peak memory of training, batch {cost.train_batch_size}", format_bytes(cost.train_peak_bytes)))
    for what, largest in (("sampling", cost.largest_batch), ("training", cost.largest_train_batch)):
        if largest is not None:
            rows.append((f"largest batch of {what} in {format_bytes(cost.device_memory)}", f"{largest:,}"))
    return rows
