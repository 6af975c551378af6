r"""BitDance-B-4x on ImageNet, 256px: `python train.py configs/imagenet_b_4x.py --data.path ILSVRC2012_img_train.tar`.

The paper's recipe: 800 epochs for 260M parameters that draw 4 tokens at a time (FID 1.69), on the bits of the tokenizer that was
trained on ImageNet: `python -m bitdance_jax.convert shallowdream204/BitDance-ImageNet/ae_d16c32.pt models/ae_d16c32_imagenet`.
A trial in two minutes, of a small model on the embedded emoji:

    python train.py configs/imagenet_b_4x.py --run.workdir runs/trial_b_4x --run.steps 20 --run.log-every 5 --run.preview-every 10 \
        --data.source emoji --data.path None --data.batch-size 8 --data.workers 0 --model.num-classes 9 --model.image-size 64 \
        --tokenizer emoji --model.tokenizer.ch 32 --model.tokenizer.ch-mult 1 1 2 4 --model.tokenizer.num-res-blocks 1 \
        --model.transformer.num-layers 2 --model.transformer.dim 128 --model.transformer.num-heads 4 --model.head.width 128 \
        --preview.head-steps 10
"""

from bitdance_jax.train.class_conditional_training import ClassConditionalTraining
from bitdance_jax.train.imagenet import imagenet_training


def get_config() -> ClassConditionalTraining:
    return imagenet_training("b_4x", guidance_scale=3.9)
