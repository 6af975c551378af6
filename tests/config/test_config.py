import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from bitdance_jax import config as config_package
from bitdance_jax.config import (
    AugmentConfig,
    ClassConditionalConfig,
    Config,
    ConfigError,
    FlowHeadConfig,
    HostsConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    SamplerConfig,
    TextToImageConfig,
    TokenizerConfig,
    TransformerConfig,
    from_dict,
    to_dict,
)
from bitdance_jax.config.plain import OneOf, Range
from bitdance_jax.data.config import DataConfig
from bitdance_jax.data.tokens import Versions
from bitdance_jax.errors import UserError
from bitdance_jax.train.class_conditional_training import ClassConditionalTraining
from bitdance_jax.train.tokenizer_training import TokenizerTraining


TOY = ClassConditionalConfig(
    tokenizer=TokenizerConfig(bits=8, ch=32, ch_mult=(1, 2), num_res_blocks=1, num_codebooks=2),
    transformer=TransformerConfig(num_layers=2, dim=64, num_heads=4),
    head=FlowHeadConfig(width=64, num_blocks=4, num_groups=2),
    num_classes=9,
    image_size=64,
    tokens_per_step=16,
)


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (TokenizerConfig(), {"bits": 0}, "bits must be positive, got 0"),
        (TokenizerConfig(), {"ch": 48}, "ch must be a multiple of 32 (GroupNorm groups), got 48"),
        (TokenizerConfig(), {"ch_mult": ()}, "ch_mult must have 1 to 16 levels, got 0"),
        (TokenizerConfig(), {"ch_mult": (1, 0)}, "ch_mult[1] must be positive, got 0"),
        (TokenizerConfig(), {"num_res_blocks": 0}, "num_res_blocks must be positive, got 0"),
        (TokenizerConfig(), {"num_codebooks": 5}, "num_codebooks must divide bits, got 5 and 32"),
        (TOY.transformer, {"num_layers": 0}, "num_layers must be positive, got 0"),
        (
            TOY.transformer,
            {"num_heads": 5},
            "dim must be a multiple of 4 * num_heads, got 64 and 5 heads",
        ),
        (TOY.head, {"num_groups": 3}, "num_groups must divide num_blocks, got 3 and 4"),
        (TOY.head, {"head_dim": 48}, "head_dim must divide width, got 48 and 64"),
        (TOY.head, {"time_shift": 0.0}, "time_shift must be positive, got 0.0"),
        (TOY, {"num_classes": 0}, "num_classes must be positive, got 0"),
        (TOY, {"tokens_per_step": 8}, "tokens_per_step must be a square number, got 8"),
        (
            TOY,
            {"image_size": 60},
            "image_size must be a multiple of 8 (downsampling 2 x patch side 4), got 60",
        ),
        (TOY, {"image_size": 0}, "image_size must be positive, got 0"),
        (
            TOY,
            {"image_size": 2**20},
            "image_size and class_tokens make a sequence of 274877907008 tokens, "
            "and at most 32768 work",
        ),
        (
            TOY,
            {"class_tokens": 2**20},
            "image_size and class_tokens make a sequence of 1049600 tokens, and at most 32768 work",
        ),
        (
            TOY,
            {"transformer": TransformerConfig(1, 2**18, 4)},
            "a sequence of 1088 tokens is too long for dim 262144",
        ),
        (TOY, {"tokens_per_step": -4}, "tokens_per_step must be positive, got -4"),
        (
            TOY.transformer,
            {"num_layers": 2**20},
            "num_layers must be between 1 and 1024, got 1048576",
        ),
        (TOY.head, {"head_dim": 0}, "head_dim must be positive, got 0"),
        (TOY.tokenizer, {"num_res_blocks": 33}, "num_res_blocks must be between 1 and 32, got 33"),
        (TOY, {"bit_flip_rate": 1.5}, "bit_flip_rate must be between 0 and 1, got 1.5"),
        (TOY, {"label_drop_rate": -0.1}, "label_drop_rate must be between 0 and 1, got -0.1"),
        (TOY, {"head_repeats": 0}, "head_repeats must be positive, got 0"),
        (SamplerConfig(), {"head_steps": 0}, "head_steps must be positive, got 0"),
        (
            SamplerConfig(),
            {"guidance_scale": -1.0},
            "guidance_scale must not be negative, got -1.0",
        ),
        (
            SamplerConfig(),
            {"guidance_scale": float("nan")},
            "guidance_scale must be a finite number, got nan",
        ),
        (AugmentConfig(), {"min_crop": 0.0}, "min_crop must be in (0, 1], got 0.0"),
        (AugmentConfig(), {"decay_start": 3.0}, "decay_start and decay_end must be set together"),
        (
            AugmentConfig(),
            {"decay_start": 3.0, "decay_end": 2.0},
            "decay_start must not be after decay_end",
        ),
        (DataConfig(), {"batch_size": 0}, "batch_size must be positive, got 0"),
        (
            DataConfig(),
            {"source": "folder"},
            "data.source folder needs data.path, a folder with one sub-folder per class",
        ),
        (OptimizerConfig(), {"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        (OptimizerConfig(), {"ema_decay": 1.0}, "ema_decay must be in [0, 1), got 1.0"),
        (RunConfig(workdir="runs", steps=1), {"steps": 0}, "steps must be positive, got 0"),
        (RunConfig(workdir="runs", steps=1), {"keep": 0}, "keep must be positive, got 0"),
        (
            TokenizerTraining(
                run=RunConfig(workdir="runs", steps=1), model=TokenizerConfig(), image_size=64
            ),
            {"image_size": 72},
            "image_size must be a multiple of the downsampling 16, got 72",
        ),
    ],
)
def test_bad_values(config, fields, message):
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(config, **fields)
    assert str(error.value) == message
    assert isinstance(error.value, UserError)


@pytest.mark.parametrize(
    "config",
    [
        TOY,
        TokenizerConfig.d32c128(),
        ClassConditionalConfig.imagenet("h_1x"),
        TokenizerTraining(
            run=RunConfig(workdir="runs/a", steps=10),
            model=TokenizerConfig(),
            image_size=64,
            data=DataConfig(
                source="folder",
                path="images",
                augment=AugmentConfig(decay_start=1.0, decay_end=2.5),
            ),
            optimizer=OptimizerConfig(clip_norm=None, decay_start=7),
        ),
        ClassConditionalTraining(
            run=RunConfig(workdir="runs/b", steps=10), model=TOY, tokenizer="runs/a/model"
        ),
    ],
    ids=lambda config: type(config).__name__,
)
def test_json_round_trip(config):
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


EXAMPLES = [
    TOY,
    TextToImageConfig.released("14b_64x"),
    SamplerConfig(),
    MeshConfig(),
    HostsConfig(),
    TokenizerTraining(
        run=RunConfig(workdir="runs/a", steps=10), model=TokenizerConfig(), image_size=64
    ),
    ClassConditionalTraining(
        run=RunConfig(workdir="runs/b", steps=10), model=TOY, tokenizer="runs/a/model"
    ),
    Versions(),
]


def fields_of(config: Config) -> Iterator[tuple[Config, str]]:
    """Every field of a config and of those in it."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        yield config, field.name
        if isinstance(value, Config):
            yield from fields_of(value)


def refused(hint: Any) -> Iterator[Any]:
    """Values that no field of this type takes."""
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin is Annotated:
        for bounds in (mark for mark in args[1:] if isinstance(mark, Range)):
            for value in (
                bounds.low if bounds.above else bounds.low - 1,
                bounds.high if bounds.below else bounds.high + 1,
            ):
                yield args[0](value) if math.isfinite(value) else math.nan
            yield -(10**5000)
        yield from refused(args[0])
        if any(isinstance(mark, OneOf) for mark in args[1:]):
            yield from ("", "ddim")
    elif origin in (types.UnionType, typing.Union):
        yield from refused(next(a for a in args if a is not type(None)))
    elif origin is tuple:
        yield from (3, "12", [object()])
    elif hint is float:
        yield from (math.nan, math.inf, -math.inf, 10**400, "1", True, object())
    elif hint is int:
        yield from (1.5, 2.0, math.nan, "1", True, np.zeros(2, int), object())
    elif hint is bool:
        yield from (0, 1, "yes", None)
    else:  # a choice, a name or another config
        yield from (
            ("", "ddim", 1, True, object()) if origin is Literal else (1, 1.5, True, object(), [1])
        )


def test_every_config_checks_its_fields():
    assert all(
        issubclass(cls, Config)
        for cls in vars(config_package).values()
        if dataclasses.is_dataclass(cls)
    )


@pytest.mark.parametrize(
    ("config", "name"),
    {
        (type(config), name): (config, name)
        for example in EXAMPLES
        for config, name in fields_of(example)
    }.values(),
    ids=lambda part: part if isinstance(part, str) else type(part).__name__,
)
def test_no_field_takes_a_value_of_another_type_choice_or_range(as_users_call, config, name):
    """The message is one line that names the field."""
    hint = typing.get_type_hints(type(config), include_extras=True)[name]
    for value in refused(hint):
        with pytest.raises(ConfigError, match=rf"^{name}[ \[]") as error:
            dataclasses.replace(config, **{name: value})
        assert "\n" not in str(error.value) and len(str(error.value)) < 300, value


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"solver": "ddim"},
            "solver must be one of euler_maruyama, euler, heun, multistep_sde, multistep_ode, "
            "got 'ddim'",
        ),
        (
            {"guidance_schedule": "cosine"},
            "guidance_schedule must be one of linear, constant, got 'cosine'",
        ),
        ({"head_steps": 2.5}, "head_steps must be int, got 2.5"),
        ({"head_steps": 10**12}, "head_steps must be between 1 and 10000, got 1000000000000"),
        ({"guidance_scale": "3"}, "guidance_scale must be float, got '3'"),
    ],
)
def test_sampler_fields(fields, message):
    with pytest.raises(ConfigError) as error:
        SamplerConfig(**fields)
    assert str(error.value) == message


def test_named_samplers():
    """The solver changes, guidance stays."""
    released = SamplerConfig(head_steps=50, guidance_scale=7.5, guidance_schedule="constant")
    expected = dataclasses.replace(released, solver="multistep_sde", head_steps=12)
    assert released.named("fast") == expected
    with pytest.raises(ConfigError, match=r"^sampler must be one of fast, got 'quick'$"):
        released.named("quick")


def test_numpy_numbers_and_paths_are_converted():
    sampler = SamplerConfig(head_steps=np.int64(5), guidance_scale=np.float32(3))
    assert sampler == SamplerConfig(head_steps=5, guidance_scale=3.0) and json.dumps(
        to_dict(sampler)
    )
    assert isinstance(SamplerConfig(guidance_scale=3).guidance_scale, float)
    assert TokenizerConfig(ch_mult=[1, 2]).ch_mult == (1, 2)
    assert RunConfig(workdir=Path("runs"), steps=1).workdir == "runs"


def changed(path: str, value: object) -> dict:
    """TOY as plain data with one field, given by a dotted path, set."""
    data = to_dict(TOY)
    *parents, name = path.split(".")
    node = data
    for parent in parents:
        node = node[parent]
    node[name] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("num_classes", "ten", "config.num_classes must be int, got 'ten'"),
        ("num_classes", 9.5, "config.num_classes must be int, got 9.5"),
        ("num_classes", True, "config.num_classes must be int, got True"),
        ("head.use_swiglu", 1, "config.head.use_swiglu must be bool, got 1"),
        ("head.time_shift", "fast", "config.head.time_shift must be float, got 'fast'"),
        ("head.time_shift", False, "config.head.time_shift must be float, got False"),
        ("order", "spiral", "config.order must be one of patch, token, got 'spiral'"),
        ("tokenizer.ch_mult", 3, "config.tokenizer.ch_mult must be a list, got 3"),
        ("tokenizer.ch_mult", [1, "2"], "config.tokenizer.ch_mult[1] must be int, got '2'"),
        ("transformer", [1, 2], "config.transformer must be a TransformerConfig, got list"),
        ("tokenizer.ch", 33, "ch must be a multiple of 32 (GroupNorm groups), got 33"),
    ],
)
def test_ill_typed_fields(path, value, message):
    with pytest.raises(ConfigError) as error:
        from_dict(ClassConditionalConfig, changed(path, value))
    assert str(error.value) == message


def test_optional_fields():
    data = to_dict(AugmentConfig(decay_start=0.5, decay_end=2.0))
    with pytest.raises(ConfigError, match=r"config\.decay_end must be float, got 'never'"):
        from_dict(AugmentConfig, data | {"decay_end": "never"})
    assert (
        from_dict(AugmentConfig, data | {"decay_start": None, "decay_end": None}) == AugmentConfig()
    )


def test_integers_serve_as_floats():
    config = from_dict(ClassConditionalConfig, changed("head.time_shift", 3))
    assert config.head.time_shift == 3.0
    assert isinstance(config.head.time_shift, float)


def test_unknown_fields_are_listed_with_the_known_ones():
    data = to_dict(TOY.transformer) | {"rope_theta": 1, "depth": 2}
    with pytest.raises(ConfigError) as error:
        from_dict(TransformerConfig, data)
    known = "num_layers, dim, num_heads, rope_base, norm_eps, residual_dtype"
    assert str(error.value) == f"config has unknown fields: depth, rope_theta; known: {known}"


def test_missing_fields_are_listed_and_defaults_filled_in():
    with pytest.raises(ConfigError, match="model lacks the fields: num_layers, num_heads"):
        from_dict(TransformerConfig, {"dim": 64}, where="model")
    assert (
        from_dict(TransformerConfig, {"dim": 64, "num_layers": 2, "num_heads": 4})
        == TOY.transformer
    )


@pytest.mark.parametrize("name", ["b_1x", "B-4x", "B_16x", "L_1x", "h_16x"])
def test_imagenet_presets(name):
    """The table of sizes in section 4.2, at 256 pixels."""
    config = ClassConditionalConfig.imagenet(name)
    layers, dim, heads, blocks, groups = {
        "b": (24, 768, 12, 6, 2),
        "l": (32, 1024, 16, 8, 2),
        "h": (40, 1280, 20, 12, 3),
    }[name[0].lower()]
    assert (
        config.transformer.num_layers,
        config.transformer.dim,
        config.transformer.num_heads,
    ) == (layers, dim, heads)
    assert (config.head.num_blocks, config.head.width, config.head.num_groups) == (
        blocks,
        dim,
        groups,
    )
    assert config.transformer.head_dim == 64
    assert config.tokens_per_step == int(name[2:-1])
    assert config.num_tokens == 256
    assert config.num_steps * config.tokens_per_step == 256
    assert config.bit_flip_rate == (0.1 if name[0].lower() == "b" else 0.05)


def test_unknown_preset():
    with pytest.raises(ConfigError, match="unknown ImageNet model 'xl_1x'; one of: b_1x, b_4x"):
        ClassConditionalConfig.imagenet("xl_1x")


@pytest.mark.parametrize(("dim", "hidden"), [(768, 2048), (1024, 2816), (1280, 3584), (128, 512)])
def test_hidden_width(dim, hidden):
    assert TransformerConfig(num_layers=1, dim=dim, num_heads=4).hidden_dim == hidden
