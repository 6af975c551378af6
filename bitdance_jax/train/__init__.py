"""The training loop, which resumes bit for bit, and what can be trained.

>>> from bitdance_jax.train import train
>>> train(config.make_task(), config, hooks=[])  # config: a TrainingConfig
"""

from bitdance_jax.train.class_conditional_training import ClassConditionalTraining
from bitdance_jax.train.hooks import Every, Hook, RunContext, StepResult
from bitdance_jax.train.initial import initial_params
from bitdance_jax.train.loop import train
from bitdance_jax.train.task import Batch, Metrics, Objective, Params, Task, TrainingConfig
from bitdance_jax.train.text_to_image_training import TextToImageTraining
from bitdance_jax.train.tokenizer_training import TokenizerTraining


__all__ = [
    "Batch",
    "ClassConditionalTraining",
    "Every",
    "Hook",
    "Metrics",
    "Objective",
    "Params",
    "RunContext",
    "StepResult",
    "Task",
    "TextToImageTraining",
    "TokenizerTraining",
    "TrainingConfig",
    "initial_params",
    "train",
]
