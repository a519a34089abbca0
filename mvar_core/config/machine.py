"""Where and how to compute: settings that every long function accepts and that never change what is learned."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from mvar_core.config.section import LARGEST, Section
from mvar_core.errors import ConfigError, shown


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

    @field_validator("device", "dtype", mode="before")
    @classmethod
    def _read_torch(cls, value: Any) -> Any:
        """Also torch.device and torch.dtype, by their names."""
        return str(value).removeprefix("torch.") if type(value).__module__.partition(".")[0] == "torch" else value

    @property
    def memory_bytes(self) -> int | None:
        """`memory` as a number of bytes.

        Raises:
            ConfigError: Not an amount of memory.
        """
        return parse_bytes(self.memory) if isinstance(self.memory, str) else self.memory


def parse_bytes(text: str) -> int:
    """Bytes from `24GB`, `16GiB`, `800MB` or a plain number.

    Raises:
        ConfigError: Not an amount of memory.
    """
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    stripped = text.strip().upper()
    number = stripped.rstrip("KMGTIB")
    try:
        count = int(float(number) * units[stripped[len(number) :].strip() or ""])
    except (KeyError, ValueError, OverflowError):
        count = -1
    if not 0 <= count <= LARGEST:
        raise ConfigError(f"{shown(text)} is not an amount of memory.", "Write for example 24GB or 16GiB.")
    return count
