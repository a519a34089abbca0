"""A training step without a run around it, to be measured: inputs, forward, backward, clipping, AdamW."""

from __future__ import annotations

import torch
from torch import nn

from mvar_core.config import RunConfig
from mvar_core.models.quantizer import MultiScaleQuantizer
from mvar_core.models.transformer import Transformer
from mvar_core.runtime import generator
from mvar_core.training.curriculum import build_curriculum
from mvar_core.training.optim import build_optimizer


class TrainingStep:
    """Callable: one step of all scales on random tokens, as training takes it on one device.

    Args:
        config: The model, and how it is trained; its batch size is that of the step.
        transformer: Float32, in training mode.
        device: Where it is.
        dtype: Of autocast; float32 is none.
        attention: Attention backend.
        seed: Of tokens and of what is dropped.
    """

    def __init__(
        self,
        config: RunConfig,
        transformer: Transformer,
        device: torch.device,
        dtype: torch.dtype,
        *,
        attention: str = "auto",
        seed: int = 0,
    ):
        self.train = config.train
        self.transformer = transformer
        transformer.recompute_blocks = config.train.activation_checkpointing
        self.device = device
        self.dtype = dtype
        self.attention = attention
        self.seed = seed
        with torch.random.fork_rng(devices=[]):  # its values change neither time nor memory
            quantizer = MultiScaleQuantizer(config.tokenizer, config.pyramid)
        self.quantizer = quantizer.to(device).eval().requires_grad_(False)
        joint = config.train.model_copy(update={"curriculum": "joint"})
        self.curriculum = build_curriculum(joint, config.pyramid, config.patterns)
        self.optimizer = build_optimizer(transformer, config.train.optimizer, transformer.no_decay_names(), device)
        self.rows = config.train.micro_batch or -(-config.train.batch_size // config.train.accumulate)
        random = generator("training_step", seed)
        shape = (config.train.batch_size, config.pyramid.num_tokens)
        self.tokens_BL = torch.randint(config.tokenizer.codebook_size, shape, generator=random).to(device)
        self.conditions = transformer.conditioner.examples(len(self.tokens_BL)).to(device)

    def __call__(self) -> None:
        """Take a step."""
        self.optimizer.zero_grad(set_to_none=True)
        parts = zip(self.tokens_BL.split(self.rows), self.conditions.split(self.rows), strict=True)
        for tokens_BL, conditions in parts:
            self.backward(self.forward(tokens_BL, conditions) * (len(tokens_BL) / len(self.tokens_BL)))
        self.update()

    def forward(self, tokens_BL: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
        """The loss of a micro-batch."""
        with torch.no_grad():
            inputs_BLZ = self.quantizer.teacher_forcing_inputs(tokens_BL)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            losses = self.curriculum.losses(
                self.transformer,
                conditions,
                tokens_BL,
                inputs_BLZ,
                step=0,
                attention=self.attention,
                generator=generator("training_step", self.seed, "drops"),
            )
        return losses.loss

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of a micro-batch."""
        loss.backward()

    def update(self) -> None:
        """Clip and change the weights."""
        nn.utils.clip_grad_norm_(self.transformer.parameters(), self.train.optimizer.grad_clip or float("inf"))
        self.optimizer.step()
