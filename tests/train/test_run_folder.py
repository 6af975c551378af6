import dataclasses
import json

import pytest
import tiny_models
from flax import traverse_util

from bitdance_jax import UserError
from bitdance_jax.config import ClassConditionalTraining, RunConfig, to_dict
from bitdance_jax.train.run_folder import check_config


NEWER = ("model.transformer.residual_dtype", "run.gradient_dtype")


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_run_begun_before_streams_and_sums_were_float32(tmp_path, compute):
    """Its config.json lacks both fields; only under bfloat16 did it compute otherwise than their defaults say."""
    run = RunConfig(workdir=str(tmp_path), steps=2, compute_dtype=compute)
    config = ClassConditionalTraining(run=run, model=tiny_models.MODEL, tokenizer="")
    recorded = traverse_util.flatten_dict(to_dict(config), sep=".")
    (tmp_path / "config.json").write_text(
        json.dumps(traverse_util.unflatten_dict({name: recorded[name] for name in recorded if name not in NEWER}, sep="."))
    )
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    if compute == "float32":
        check_config(config)
        return
    with pytest.raises(UserError, match=r"residual_dtype was 'compute', now 'float32', run\.gradient_dtype was 'compute'"):
        check_config(config)
    transformer = dataclasses.replace(config.model.transformer, residual_dtype="compute")
    model = dataclasses.replace(config.model, transformer=transformer)
    check_config(dataclasses.replace(config, model=model, run=dataclasses.replace(run, gradient_dtype="compute")))
