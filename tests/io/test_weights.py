"""Files of weights from strangers: nothing runs, nothing is silently wrong, and the message names file and tensor."""

import os
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mvar_core.errors import CheckpointError
from mvar_core.io.weights import read_weights, shapes_of, tensors_of

GOOD = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_saves_is_read(legacy, tmp_path):
    torch.save(GOOD, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    save_file(GOOD, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        found = read_weights(tmp_path / name)
        assert found.keys() == GOOD.keys()
        assert all(torch.equal(found[key], GOOD[key]) for key in GOOD)


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but still in files
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


BAD = {
    "nan": torch.tensor([1.0, torch.nan]),
    "infinite": torch.tensor([-torch.inf]),
    "int64": torch.ones(3, dtype=torch.int64),
    "bool": torch.ones(3, dtype=torch.bool),
    "complex64": torch.ones(3, dtype=torch.complex64),
    "float8": torch.ones(3).to(torch.float8_e4m3fn),
    "sparse": torch.eye(3).to_sparse(),
    "quantized": quantized(),
    "meta": torch.ones(3, device="meta"),
    "expanded": torch.ones(1).expand(1_000_000_000),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", BAD)
def test_tensors_that_are_no_weights_are_refused_by_name(kind, legacy, tmp_path):
    path = tmp_path / "w.pth"
    torch.save({**GOOD, "c.weight": BAD[kind]}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError) as refused:
        read_weights(path)
    assert str(path) in str(refused.value)
    unreadable = kind == "expanded" or (kind == "float8" and legacy)  # torch itself cannot read the latter
    assert unreadable or "c.weight" in str(refused.value)


@pytest.mark.parametrize("kind", ["nan", "infinite", "int64", "bool", "complex64", "float8"])
def test_they_are_refused_in_safetensors_too(kind, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"c.weight": BAD[kind]}, path)
    with pytest.raises(CheckpointError, match=r"w\.safetensors: c\.weight"):
        dict(tensors_of(path, shapes_of(path)))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        Calls(os.mkdir, "exploded"),
        Calls(eval, "1"),
        Calls(bytearray, 10**13),
        {"a": Calls(os.system, "touch exploded")},
    ],
)
def test_nothing_in_a_file_runs(content, legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "evil.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"evil.pth is refused"):
        read_weights(Path("evil.pth"))
    assert not Path("exploded").exists()


def test_what_is_no_file_of_weights(tmp_path):
    good = tmp_path / "good.pth"
    torch.save(GOOD, good)
    torch.save(GOOD, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(GOOD, tmp_path / "good.safetensors")
    for name in ("good.pth", "legacy.pth", "good.safetensors"):
        whole = (tmp_path / name).read_bytes()
        for share in (0, 1, 3, 9, 60, 99):
            (tmp_path / f"{share}-{name}").write_bytes(whole[: len(whole) * share // 100])
    (tmp_path / "text.pth").write_text("not a file of tensors")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": 1}))
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    (tmp_path / "folder.pth").mkdir()
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "link.pth").symlink_to(tmp_path / "link.pth")
    lie = (1 << 40).to_bytes(8, "little")
    (tmp_path / "header.safetensors").write_bytes(lie + b"{}" + bytes(100))
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    hostile = [path for path in tmp_path.iterdir() if not path.name.startswith(("good", "legacy"))]
    for path in [*hostile, tmp_path / "absent.pth"]:
        with pytest.raises(CheckpointError) as refused:
            read_weights(path)
        assert str(path) in str(refused.value)


def test_a_flipped_bit_in_a_value_is_found(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(GOOD, path)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(GOOD["a"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"w\.pth.*checksum"):
        read_weights(path)


def test_flipped_bits_end_in_values_or_in_a_message(tmp_path):
    source, messages = torch.Generator().manual_seed(0), []
    for name in ("w.pth", "legacy.pth", "w.safetensors"):
        path = tmp_path / name
        if name.endswith("pth"):
            torch.save(GOOD, path, _use_new_zipfile_serialization="legacy" not in name)
        else:
            save_file(GOOD, path)
        whole = path.read_bytes()
        for place in torch.randint(len(whole) * 8, (60,), generator=source).tolist():
            damaged = bytearray(whole)
            damaged[place // 8] ^= 1 << place % 8
            path.write_bytes(damaged)
            try:
                read_weights(path)
            except CheckpointError as refused:
                messages.append(str(refused))
    assert messages
    assert all(str(tmp_path) in message for message in messages)
