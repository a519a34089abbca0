"""The public names and where they are; `__init__.py` reads this file too."""

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
from mvar_core.workflows.ablate import ablate as ablate
from mvar_core.workflows.attention import analyze_attention as analyze_attention
from mvar_core.workflows.bench import bench as bench
from mvar_core.workflows.convert import convert as convert
from mvar_core.workflows.doctor import doctor as doctor
from mvar_core.workflows.edit import edit as edit
from mvar_core.workflows.evaluate import Likelihood as Likelihood
from mvar_core.workflows.evaluate import Measured as Measured
from mvar_core.workflows.evaluate import evaluate as evaluate
from mvar_core.workflows.evaluate import evaluate_likelihood as evaluate_likelihood
from mvar_core.workflows.evaluate import evaluate_reconstruction as evaluate_reconstruction
from mvar_core.workflows.evaluate import make_reference as make_reference
from mvar_core.workflows.plan import PresetList as PresetList
from mvar_core.workflows.plan import list_presets as list_presets
from mvar_core.workflows.plan import plan as plan
from mvar_core.workflows.quickstart import quickstart as quickstart
from mvar_core.workflows.runs import TrainOptions as TrainOptions
from mvar_core.workflows.runs import TrainTokenizerOptions as TrainTokenizerOptions
from mvar_core.workflows.sample import SampleResult as SampleResult
from mvar_core.workflows.sample import sample_to as sample_to
from mvar_core.workflows.tokenize import tokenize as tokenize
from mvar_core.workflows.train import TrainResult as TrainResult
from mvar_core.workflows.train import finetune_from_var as finetune_from_var
from mvar_core.workflows.train import train as train
from mvar_core.workflows.train_tokenizer import TrainTokenizerResult as TrainTokenizerResult
from mvar_core.workflows.train_tokenizer import train_tokenizer as train_tokenizer

__version__: str
