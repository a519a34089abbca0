"""Where and how to compute: settings that every long function accepts and that never change what is learned."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import Field, field_validator

from mvar_core.config.section import LARGEST, Section, parse_number
from mvar_core.errors import ConfigError, nearest, shown

DTYPES = ("auto", "float32", "bfloat16", "float16")


class Machine(Section):
    """The device and how it is used."""

    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16")
    attention: str = Field(
        "auto", description="auto, reference, dense, tiled, flex or natten; a named backend never falls back"
    )
    compile: bool = Field(False, description="compile the transformer's blocks first, for long runs")
    memory: Annotated[int, Field(ge=0)] | str | None = Field(
        None, description='bytes that sampling may use, also as text such as "2GB"; None is half of what is free'
    )
    max_pixels: Annotated[int, Field(ge=1, le=LARGEST)] | None = Field(
        None, description="the largest image that is read; None is 178,956,970"
    )
    verify: bool = Field(True, description="compare weights and token shards with the hashes that were saved with them")

    @field_validator("device", "dtype", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """Torch's own objects are welcome too; torch is not loaded for that."""
        return str(value).removeprefix("torch.") if type(value).__module__ == "torch" else value

    @field_validator("device")
    @classmethod
    def _is_device(cls, name: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", name, re.ASCII):
            raise ValueError(f"not a device. {nearest(name[:40], ['auto', 'cpu', 'cuda', 'cuda:0', 'mps'])}")
        return name

    @field_validator("dtype")
    @classmethod
    def _is_dtype(cls, name: str) -> str:
        if name not in DTYPES:
            raise ValueError(f"not a dtype. {nearest(name[:40], DTYPES)}")
        return name

    @property
    def memory_bytes(self) -> int | None:
        """`memory` as a number of bytes; ConfigError where it is no amount of memory."""
        return parse_bytes(self.memory) if isinstance(self.memory, str) else self.memory


def parse_bytes(text: str) -> int:
    """Bytes from `24GB`, `16GiB`, `800MB` or a plain number; ConfigError for other text."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    stripped = text.strip().upper()
    number = stripped.rstrip("KMGTIB")
    count = (parse_number(number) or 0) * units.get(stripped[len(number) :].strip(), math.nan)
    if parse_number(number) is None or not 0 <= count <= LARGEST:
        raise ConfigError(f"{shown(text)} is not an amount of memory.", "Write for example 24GB or 16GiB.")
    return int(count)
