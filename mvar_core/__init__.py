"""Train, fine-tune, sample, measure and understand next-scale visual autoregressive models (VAR, MVAR).

Everything that the command line does is one function here, with the command's names; docs/python.md shows how they go
together. Names are resolved on first use, so that `import mvar_core` loads nothing.
"""

from importlib import import_module
from inspect import isfunction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names, for type checkers and editors
    from mvar_core.config import Machine as Machine
    from mvar_core.config import ModelConfig as ModelConfig
    from mvar_core.config import RunConfig as RunConfig
    from mvar_core.config import SamplingConfig as SamplingConfig
    from mvar_core.config.presets import preset_names as preset_names
    from mvar_core.errors import BackendError as BackendError
    from mvar_core.errors import CheckpointError as CheckpointError
    from mvar_core.errors import ConfigError as ConfigError
    from mvar_core.errors import DataError as DataError
    from mvar_core.errors import MvarError as MvarError
    from mvar_core.pipeline import Pipeline as Pipeline
    from mvar_core.progress import Progress as Progress
    from mvar_core.workflows.edit import edit as edit
    from mvar_core.workflows.sample import SampleResult as SampleResult
    from mvar_core.workflows.sample import sample_to as sample_to
    from mvar_core.workflows.evaluate import Measured as Measured
    from mvar_core.workflows.evaluate import evaluate as evaluate
    from mvar_core.workflows.evaluate import make_reference as make_reference
    from mvar_core.workflows.evaluate import Likelihood as Likelihood
    from mvar_core.workflows.evaluate import evaluate_likelihood as evaluate_likelihood
    from mvar_core.workflows.evaluate import evaluate_reconstruction as evaluate_reconstruction
    from mvar_core.workflows.quickstart import quickstart as quickstart
    from mvar_core.workflows.attention import analyze_attention as analyze_attention
    from mvar_core.workflows.tokenize import tokenize as tokenize
    from mvar_core.workflows.ablate import ablate as ablate
    from mvar_core.workflows.convert import convert as convert
    from mvar_core.workflows.doctor import doctor as doctor
    from mvar_core.workflows.bench import bench as bench
    from mvar_core.workflows.plan import PresetList as PresetList
    from mvar_core.workflows.plan import list_presets as list_presets
    from mvar_core.workflows.plan import plan as plan
    from mvar_core.workflows.runs import TrainOptions as TrainOptions
    from mvar_core.workflows.runs import TrainTokenizerOptions as TrainTokenizerOptions
    from mvar_core.workflows.train import TrainResult as TrainResult
    from mvar_core.workflows.train import finetune_from_var as finetune_from_var
    from mvar_core.workflows.train import train as train
    from mvar_core.workflows.train_tokenizer import TrainTokenizerResult as TrainTokenizerResult
    from mvar_core.workflows.train_tokenizer import train_tokenizer as train_tokenizer

__version__ = "0.1.0"

_MODULES = {
    "mvar_core.errors": ("BackendError", "CheckpointError", "ConfigError", "DataError", "MvarError"),
    "mvar_core.config": ("Machine", "ModelConfig", "RunConfig", "SamplingConfig"),
    "mvar_core.config.presets": ("preset_names",),
    "mvar_core.pipeline": ("Pipeline",),
    "mvar_core.progress": ("Progress",),
    "mvar_core.workflows.ablate": ("ablate",),
    "mvar_core.workflows.attention": ("analyze_attention",),
    "mvar_core.workflows.bench": ("bench",),
    "mvar_core.workflows.convert": ("convert",),
    "mvar_core.workflows.doctor": ("doctor",),
    "mvar_core.workflows.edit": ("edit",),
    "mvar_core.workflows.evaluate": (
        "Likelihood",
        "Measured",
        "evaluate",
        "evaluate_likelihood",
        "evaluate_reconstruction",
        "make_reference",
    ),
    "mvar_core.workflows.plan": ("PresetList", "list_presets", "plan"),
    "mvar_core.workflows.quickstart": ("quickstart",),
    "mvar_core.workflows.sample": ("SampleResult", "sample_to"),
    "mvar_core.workflows.tokenize": ("tokenize",),
    "mvar_core.workflows.runs": ("TrainOptions", "TrainTokenizerOptions"),
    "mvar_core.workflows.train": ("TrainResult", "finetune_from_var", "train"),
    "mvar_core.workflows.train_tokenizer": ("TrainTokenizerResult", "train_tokenizer"),
}
_SOURCE = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *sorted(_SOURCE)]


def __getattr__(name: str) -> Any:
    """A public name, from the module that defines it (PEP 562); functions check their arguments."""
    if name not in _SOURCE:
        raise AttributeError(f"module 'mvar_core' has no attribute {name!r}")
    value = getattr(import_module(_SOURCE[name]), name)
    if isfunction(value):
        value = import_module("mvar_core.config.section").checked(value)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
