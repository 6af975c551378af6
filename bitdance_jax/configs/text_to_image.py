r"""Text to image with the language models Qwen3 (paper sections 3.3 and 4.3, table 4).

    bitdance train text_to_image --model 14b --stage finetune --data.paths images
    bitdance train t2i_14b_16x --init models/14b_16x --data.paths images
    bitdance train t2i_14b_64x --stage distill --init models/14b_16x --data.paths images
    bitdance train t2i_0.6b_16x --stage pretrain --init models/qwen3_0.6b --data.paths images

The paper's model is 14B. Its four stages:

    stage      starts from                         images a step    pixels 256:512:1024
    pretrain   Qwen3, a language model alone       2560             2:7:1
    continue   the pre-trained model               2480             0:1:1
    finetune   that, or a released model           2320             0:1:1
    distill    a 16x model, which becomes 64x      1536             0:0:1

`--init` is a model folder, local or `gs://`, or the folder of a run; `--tokenizer` is needed where
it has no image tokenizer, as with Qwen3. A step has `--data.batch-size` rows of 33,280 tokens, so
with fewer devices set a smaller one. `--trial` trains a small model on the embedded images in two
minutes.
"""

from dataclasses import dataclass
from typing import Literal

from bitdance_jax.config import (
    MeshConfig,
    OptimizerConfig,
    Qwen3Config,
    RunConfig,
    TextToImageConfig,
    TokenizerConfig,
)
from bitdance_jax.train.text_to_image_config import PackedDataConfig
from bitdance_jax.train.text_to_image_training import TextToImageTraining


@dataclass(frozen=True)
class Stage:
    """A row of table 4.

    Attributes:
      learning_rate: after the warm-up, constant.
      warmup_steps, steps: of the run.
      rows: of a step, which hold about as many images as the paper's batch.
      resolutions: in pixels, by their shares.
    """

    learning_rate: float
    warmup_steps: int
    steps: int
    rows: int
    resolutions: dict[int, float]


# An image with its caption has about 1,280 tokens at 2:7:1, 2,660 at 0:1:1 and 4,200 at 0:0:1.
# The numbers of rows are multiples of 32, so that they can be split over many devices.
STAGES = {
    "pretrain": Stage(1e-4, 2000, 100_000, 96, {256: 2.0, 512: 7.0, 1024: 1.0}),
    "continue": Stage(1e-4, 1000, 40_000, 192, {512: 1.0, 1024: 1.0}),
    "finetune": Stage(2e-5, 500, 40_000, 192, {512: 1.0, 1024: 1.0}),
    "distill": Stage(2e-5, 500, 20_000, 192, {1024: 1.0}),
}


def get_config(
    model: Literal["14b", "8b", "4b", "1.7b", "0.6b"] = "14b",
    tokens_per_step: Literal[16, 64] = 16,
    stage: Literal["pretrain", "continue", "finetune", "distill"] = "finetune",
) -> TextToImageTraining:
    """The config of a stage.

    Args:
      model: size of the Qwen3.
      tokens_per_step: tokens that are predicted at a time.
      stage: of the training; distill starts from a 16x model, and makes a 64x one of it.
    """
    name = f"{model}_{tokens_per_step}x"
    numbers = STAGES[stage]
    before = {
        "pretrain": f"models/qwen3_{model}",
        "continue": f"runs/t2i_{name}_pretrain/model",
        "finetune": f"models/{name}",
        "distill": f"models/{model}_16x",
    }
    resolutions = numbers.resolutions
    return TextToImageTraining(
        run=RunConfig(
            workdir=f"runs/t2i_{name}_{stage}",
            steps=numbers.steps,
            compute_dtype="bfloat16",
            export_dtype="bfloat16",
            remat="nothing",
            log_every=20,
            save_every=1_000,
            preview_every=1_000,
        ),
        model=TextToImageConfig.from_language_model(
            Qwen3Config.released(model), TokenizerConfig.d16c32(), tokens_per_step
        ),
        init=before[stage],
        # BitDance-Tokenizer/ae_d16c32.safetensors; the other stages take that of `init`.
        tokenizer="models/ae_d16c32" if stage == "pretrain" else None,
        data=PackedDataConfig(
            resolutions=tuple(resolutions),
            resolution_weights=tuple(resolutions.values()),
            batch_size=numbers.rows,
            text_drop=0.1,
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
        optimizer=OptimizerConfig(
            learning_rate=numbers.learning_rate,
            warmup_steps=numbers.warmup_steps,
            schedule="constant",
            b1=0.9,
            b2=0.95,
            eps=1e-15,
            weight_decay=0.0,
            clip_norm=1.0,
            ema_decay=None,
        ),
    )
