"""Training the tokenizer (paper sections 3.1 and 4.1)."""

import dataclasses
from dataclasses import dataclass

import jax
import numpy as np

from bitdance_jax.config import to_dict
from bitdance_jax.data.config import DataConfig
from bitdance_jax.errors import ConfigError
from bitdance_jax.io import image_files
from bitdance_jax.io.model_lookup import RunRecord, fingerprint
from bitdance_jax.pipelines.hub_models import local_folder
from bitdance_jax.train.image_task import ImageTask, TaskData, open_splits, save_model
from bitdance_jax.train.task import Params
from bitdance_jax.train.tokenizer_config import TokenizerSettings
from bitdance_jax.train.tokenizer_objective import TokenizerObjective
from bitdance_jax.train.tokenizer_weights import read_frozen, read_tokenizer, with_noise_inputs


PREVIEW_IMAGES = 16


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining(TokenizerSettings):
    """A training run of the tokenizer; the fields are those of `TokenizerSettings`."""

    def make_objective(self) -> TokenizerObjective:
        return TokenizerObjective(self)

    def make_task(self) -> "TokenizerTask":
        return TokenizerTask(self)

    def trial(self) -> "TokenizerTraining":
        return dataclasses.replace(
            self,
            run=self.trial_run(steps=50),
            data=DataConfig(batch_size=8, augment=self.data.augment),
            image_size=64,
            crop_sizes=(),
            crop_weights=(),
            model=dataclasses.replace(self.model, ch=32, ch_mult=(1, 1, 2, 4), num_res_blocks=1),
            optimizer=dataclasses.replace(
                self.optimizer,
                learning_rate=2e-3,
                warmup_steps=5,
                decay_start=None,
                ema_decay=0.9,
                ema_warmup=True,
            ),
            loss=dataclasses.replace(self.loss, perceptual=0.0),
            profile=None,
            init=None,
            train_encoder=True,
        )

    def read_initial(self, folder: str) -> tuple[Params, frozenset[str]]:
        params = read_tokenizer(folder)
        bits = self.model.bits
        is_plain = params["decoder"]["conv_in"]["kernel"].shape[2] == bits
        if self.model.decoder == "gan" and is_plain:
            params = {**params, "decoder": with_noise_inputs(params["decoder"], bits)}
        if not self.train_encoder:
            params = {"decoder": params["decoder"]}
        return params, frozenset()


class TokenizerTask(ImageTask):
    """Trains the tokenizer; its previews are reconstructions of held-out images."""

    def __init__(self, config: TokenizerTraining) -> None:
        if config.data.gives_codes:
            raise ConfigError(
                "a tokenizer is trained on images; "
                "set neither data.source tokens nor data.cache_latents",
                "data",
            )
        data, seed = config.data, config.run.seed
        train, held_out = open_splits(data)
        super().__init__(
            TaskData(
                data,
                seed,
                config.image_size,
                train,
                held_out,
                config.crops() if config.crop_sizes else None,
            )
        )
        if config.inception is not None and self.held_out_size < 2:
            raise ConfigError(
                f"rFID needs at least two held-out images, got {self.held_out_size}", "inception"
            )
        self._export_dtype = config.run.export_dtype
        self.objective = config.make_objective()
        encoder_of = None if config.train_encoder else local_folder(config.init)
        self.frozen = read_frozen(config.loss, inception=config.inception, encoder_of=encoder_of)
        self.record = RunRecord(
            "tokenizer",
            to_dict(config.model),
            {"image_size": config.image_size},
            config.run.checkpoints,
            None if encoder_of is None else (encoder_of, fingerprint(encoder_of)),
        )
        self._reconstruct = jax.jit(self.objective.reconstruct)

    def preview(self, ema_params: Params, step: int) -> dict[str, np.ndarray]:
        originals = next(self._data.held_out_batches(PREVIEW_IMAGES))["image"]
        keys = jax.random.split(jax.random.key(0), len(originals))
        reconstructions = self._reconstruct(ema_params, self.frozen, originals, keys)
        pairs = np.concatenate([originals, reconstructions])
        return {"reconstructions": image_files.grid(pairs, columns=len(originals))}

    def export(
        self, ema_params: Params, folder: str, *, step: int, metrics: dict[str, float]
    ) -> None:
        # An encoder that was not trained is part of the tokenizer all the same.
        params = {name: part for name, part in self.frozen.items() if name == "encoder"}
        params |= ema_params
        record = self.record
        if spread := metrics.get("latent_std"):
            # A model learns latents of about unit variance.
            scale = float(f"{record.config['latent_scale'] / spread:.4g}")
            record = dataclasses.replace(record, config=record.config | {"latent_scale": scale})
        dtype = self._export_dtype
        save_model(folder, record, params, step=step, metrics=metrics, dtype=dtype)
