"""What users set is checked once, where it comes in: finite and bounded numbers, types, names."""

import numpy as np
import pytest

import mvar_core as mvar

HUGE = [2**64, 10**30, 10**5000]
ENDLESS = [float("inf"), float("-inf"), float("nan")]


@pytest.mark.parametrize(
    "value", [*HUGE, *ENDLESS, -1, "many", None], ids=lambda value: str(value)[:8] if value != HUGE[-1] else "digits"
)
@pytest.mark.parametrize("key", ["cfg", "top_k", "top_p", "min_p"])
def test_settings_out_of_bounds(key, value):
    with pytest.raises(mvar.ConfigError, match=f"SamplingConfig: {key}: ") as error:
        mvar.SamplingConfig(**{key: value})
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("name", "arguments", "found"),
    [
        ("sample_to", {"out": None, "checkpoint": "x"}, "out: .*None"),
        ("sample_to", {"out": "o"}, "checkpoint: Missing"),
        ("sample_to", {"out": "o", "checkpoint": 3}, "checkpoint: .*3"),
        ("sample_to", {"out": "o", "checkpoint": "x", "clases": "all"}, "'clases'. Did you mean classes"),
        ("sample_to", {"out": "o", "checkpoint": "x", "num": 1.5}, "num: .*1.5"),
        ("sample_to", {"out": "o", "checkpoint": "x", "progress": 3}, "progress: .*3"),
        ("sample_to", {"out": "o", "checkpoint": "x", "settings": 3}, "settings: .*3"),
        ("train", {"out": "o", "tokens": "x", "steps": "many"}, "steps: .*'many'"),
        ("train", {"out": "o", "tokens": "x", "epochs": float("inf")}, "epochs: .*inf"),
        ("train_tokenizer", {"out": "o", "data": None}, "data: .*None"),
        ("plan", {"preset": "digits", "settings": "a=b"}, "settings: .*'a=b'"),
        ("plan", {"preset": "digits", "machine": "cpu"}, "machine: .*'cpu'"),
        ("quickstart", {"out": "o", "minutes": float("nan")}, "minutes: .*nan"),
        *((name, {"out": "o", "seed": seed}, "seed") for name in ("sample_to", "quickstart") for seed in (-1, 2**64)),
    ],
)
def test_arguments_of_public_functions_that_do_not_fit(name, arguments, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(mvar.ConfigError, match=f"^{name}: (unknown key )?{found}"):
        getattr(mvar, name)(**arguments)
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_numpy_are_numbers():
    cost = mvar.plan("digits", batch_size=np.int64(2))
    assert cost == mvar.plan("digits", batch_size=2)


@pytest.mark.parametrize("amount", ["-5GB", "inf", "nanGB", "1e400", "1e30GB"])
def test_amounts_of_memory_that_no_machine_has(amount):
    with pytest.raises(mvar.ConfigError, match="24GB"):
        mvar.plan("digits", device_memory=amount)


@pytest.mark.parametrize("setting", ["seed=-1", f"train.steps={10**30}", "train.optimizer.lr=.inf", "train.ema=.nan",
                                     "train.steps=" + "9" * 5000, "train.steps=0x" + "f" * 5000,
                                     f"patch_sizes=[1, {2**64}]"])  # fmt: skip
def test_settings_by_name_that_are_out_of_bounds(setting):
    with pytest.raises(mvar.ConfigError, match=setting.partition("=")[0]) as error:
        mvar.plan("digits", settings=[setting])
    assert len(str(error.value)) < 400
