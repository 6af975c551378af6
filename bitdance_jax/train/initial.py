"""Weights of a model folder that a new run starts from."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from tqdm import tqdm

from bitdance_jax.config import ClassConditionalTraining, TokenizerTraining, Training
from bitdance_jax.data.tokens import encoder_fingerprint
from bitdance_jax.errors import UserError
from bitdance_jax.io import model_lookup
from bitdance_jax.train.frozen_tokenizer import load_tokenizer
from bitdance_jax.train.objectives import make_objective
from bitdance_jax.train.run_folder import has_checkpoints
from bitdance_jax.train.task import Params


CLASS_EMBEDDING = "class_embedding/embedding"


def initial_params(config: Training) -> Params | None:
    """The weights of `config.init`, float32; None if none is given, or if the run goes on from a checkpoint of its own.

    A class embedding for another number of classes is left out, and said to be: it starts anew.

    Raises:
      UserError: no such model, another kind, or other shapes, all of them listed.
    """
    if config.init is None or has_checkpoints(config):
        return None
    given = traverse_util.flatten_dict(_own_part(config, config.init), sep="/")
    abstract: Any = jax.eval_shape(make_objective(config).init, jax.random.key(0))
    wanted = {name: x.shape for name, x in traverse_util.flatten_dict(abstract, sep="/").items()}
    if isinstance(config, ClassConditionalTraining) and CLASS_EMBEDDING in given:
        classes = len(given[CLASS_EMBEDDING]) - 1
        if classes != config.model.num_classes:
            _say(
                f"{config.init} has {classes} classes and this run {config.model.num_classes}: the class embedding starts anew"
            )
            del given[CLASS_EMBEDDING], wanted[CLASS_EMBEDDING]
    names = sorted(
        name
        for name in given.keys() | wanted.keys()
        if name not in given or given[name].shape != wanted.get(name)
    )
    if names:
        shapes = {name: given[name].shape if name in given else "missing" for name in names}
        listed = ", ".join(
            f"{name} is {shapes[name]} there and {wanted.get(name, 'missing')} here"
            for name in names
        )
        raise UserError(f"the weights of --init {config.init} do not fit this model: {listed}")
    return traverse_util.unflatten_dict(
        {name: x.astype(np.float32) for name, x in given.items()}, sep="/"
    )


def _own_part(config: Training, folder: str) -> Params:
    """What a folder holds of the thing that the run trains."""
    kind = "tokenizer" if isinstance(config, TokenizerTraining) else "class_conditional"
    found = model_lookup.read_config(folder).kind
    if found not in (kind, "class_conditional"):
        raise UserError(f"--init {folder} holds a {found} model, and this run trains a {kind} one")
    params = model_lookup.load(folder).params
    if isinstance(config, TokenizerTraining):
        return params["tokenizer"] if found == "class_conditional" else params
    _compare_tokenizers(config, folder, params["tokenizer"])
    return params["model"]


def _compare_tokenizers(config: ClassConditionalTraining, folder: str, params: Params) -> None:
    """Says so if the weights in `folder` were trained on the bits of another tokenizer, whose parameters these are."""

    def mark(params: Params) -> str:
        # Rounded, as the models that come out of a run may be.
        rounded = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), params["encoder"])
        return encoder_fingerprint(config.model.tokenizer, {"encoder": rounded})

    if mark(load_tokenizer(config.tokenizer, config.model.tokenizer).params) != mark(params):
        _say(
            f"note: the weights of {folder} were trained on the bits of another tokenizer than {config.tokenizer}"
        )


def _say(message: str) -> None:
    if jax.process_index() == 0:
        tqdm.write(message, file=sys.stderr)
