"""Training text to image on packed documents (paper sections 3.3 and 4.3)."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from bitdance_jax.config import LoraConfig, TokenizerConfig, from_dict, to_dict
from bitdance_jax.convert import peft
from bitdance_jax.data.captioned_tokens import check_encoders
from bitdance_jax.data.edit_config import EditDataConfig
from bitdance_jax.data.image_encoder import ImageEncoder
from bitdance_jax.data.mixture import Mixture
from bitdance_jax.data.packed_batches import Documented, PackedBatches, SampleReader, Samples
from bitdance_jax.data.packing import Lengths
from bitdance_jax.errors import ConfigError, ResourceError
from bitdance_jax.io import image_files, model_lookup, readers
from bitdance_jax.io.model_lookup import RunRecord, fingerprint
from bitdance_jax.io.progress import report
from bitdance_jax.nn.attention import check_kernel
from bitdance_jax.pipelines import checks, toy_text_to_image
from bitdance_jax.pipelines.hub_models import local_folder
from bitdance_jax.pipelines.text_to_image import TextToImage
from bitdance_jax.text.prompt_tokenizer import LongPrompt
from bitdance_jax.train import freezing
from bitdance_jax.train.frozen_tokenizer import load_tokenizer
from bitdance_jax.train.image_task import save_model
from bitdance_jax.train.sample_documents import AnySample, Documents
from bitdance_jax.train.task import Params
from bitdance_jax.train.text_to_image_config import (
    BYTES,
    PackedDataConfig,
    PreviewConfig,
    TextToImageSettings,
)
from bitdance_jax.train.text_to_image_data import TrainingData
from bitdance_jax.train.text_to_image_init import (
    open_prompts,
    prompt_files,
    read_adapters,
    read_init,
)
from bitdance_jax.train.text_to_image_objective import TextToImageObjective


HELD_OUT_BATCHES = 4
PREVIEW_CAPTIONS = 8
TITLE = 60
"""Characters of a prompt that are written beside its previews."""


@dataclass(frozen=True, kw_only=True)
class TextToImageTraining(TextToImageSettings):
    """A training run of a text-to-image model; the fields are those of `TextToImageSettings`."""

    def make_objective(self) -> TextToImageObjective:
        return TextToImageObjective(self)

    def make_task(self) -> "TextToImageTask":
        return TextToImageTask(self)

    def trial(self) -> "TextToImageTraining":
        embedded = model_lookup.read_config(model_lookup.EMBEDDED).config["tokenizer"]
        replace = dataclasses.replace
        toy = toy_text_to_image.config(self.model.tokens_per_step)
        return replace(
            self,
            run=self.trial_run(steps=50),
            model=replace(toy, tokenizer=from_dict(TokenizerConfig, embedded)),
            data=PackedDataConfig(
                paths=(model_lookup.EMBEDDED,),
                resolutions=(64,),
                resolution_weights=(),
                batch_size=8,
                packing=Lengths(target=640, row=768, document=512, buffer=8),
                edits=self._trial_edits(),
            ),
            tokenizer=model_lookup.EMBEDDED,
            text_tokenizer=BYTES,
            optimizer=replace(self.optimizer, learning_rate=2e-3, warmup_steps=5),
            preview=PreviewConfig(head_steps=10, guidance_scale=2.0, guidance_schedule="constant"),
            freeze=(),
            lora=LoraConfig(),
            profile=None,
            init=None,
        )

    def _trial_edits(self) -> EditDataConfig:
        """The embedded pairs, in the trial of a run on pairs."""
        if not self.data.edits.paths:
            return EditDataConfig()
        return dataclasses.replace(self.data.edits, paths=(model_lookup.EMBEDDED,), resolution=64)

    def read_initial(self, folder: str) -> tuple[Params, frozenset[str]]:
        if self.lora.rank:
            if self.lora.init is not None:
                return read_adapters(self, self.lora.init), frozenset()
            adapters = jax.eval_shape(self.make_objective().init, jax.random.key(0))
            return {}, frozenset(freezing.flat(adapters, "/"))
        given = freezing.split(read_init(self, folder), self.freeze)[0]
        if model_lookup.read_config(folder).kind == "text_to_image":
            return given, frozenset()
        everything = jax.eval_shape(self.make_objective().init, jax.random.key(0))
        random = freezing.flat(everything, "/").keys() - freezing.flat(given, "/").keys()
        return given, frozenset(random)


class TextToImageTask:
    """Trains language model, connector and head on the bits of a frozen tokenizer; its previews are
    images of prompts."""

    steps_per_epoch: float | None = None
    previews_on_mesh = True

    def __init__(self, config: TextToImageTraining) -> None:
        check_kernel(config.run.attention)
        self._config = config
        data = config.data
        self.objective = config.make_objective()
        self.batch_size = data.batch_size
        self.held_out_size = HELD_OUT_BATCHES * data.batch_size
        opened = TrainingData(data)
        files = prompt_files(config, opened.train)
        self._prompts = open_prompts(files, config.model)
        opened.report()
        multiple = config.model.size_multiple
        self._train = opened.training_samples(seed=config.run.seed, size_multiple=multiple)
        self._preview_prompts = self._read_prompts(opened.held_out_captions(multiple))
        self._tokenizer_folder = local_folder(config.tokenizer or config.init)
        self._tokenizer = load_tokenizer(self._tokenizer_folder, config.model.tokenizer)
        sources = [*opened.train, *opened.held_out]
        check_encoders(sources, self._tokenizer.config, self._tokenizer.params)
        # In host memory: the devices have the encoder in the compute type.
        self._tokenizer.params = jax.tree.map(np.asarray, self._tokenizer.params)
        self._encoder: ImageEncoder | None = None
        if data.cache_latents:
            opened.encode(self._image_encoder(), multiple)
            self._train = opened.training_samples(seed=config.run.seed, size_multiple=multiple)
        self._held_out = opened.held_out_samples(multiple)
        self._pipeline: TextToImage | None = None
        self._shows_previews = True
        self.frozen = self._read_frozen()
        self.record = self._record(files)

    def batches(self, rows: np.ndarray) -> PackedBatches:
        return self._batches(self._train, rows, ahead=1)

    def held_out(self, rows: np.ndarray) -> PackedBatches:
        return self._batches(self._held_out, rows, ahead=0)

    def preview(self, ema_params: Params, step: int) -> dict[str, np.ndarray]:
        if not self._shows_previews:
            return {}
        config = self._config
        if self._pipeline is None:
            self._pipeline = TextToImage(
                config.model,
                None,
                self._tokenizer,
                self._prompts,
                config.preview.sampler,
                jnp.dtype(config.run.compute_dtype),
                mesh=config.mesh,
            )
        prompts = self._preview_prompts
        each = config.preview.per_prompt
        self._pipeline.set_params(self.objective.all_params(ema_params, self.frozen))
        try:
            images = self._pipeline.sample(
                prompts,
                config.run.seed,
                images_per_input=each,
                size=self._preview_size(),
                progress=False,
            )
        except ResourceError as error:
            report(f"no previews: {error}")
            self._shows_previews = False
            return {}
        finally:
            self._pipeline.set_params(None)
        titles = [text if len(text) <= TITLE else f"{text[:TITLE]}..." for text in prompts]
        return {"samples": image_files.grid(images, each, titles)}

    def export(
        self, ema_params: Params, folder: str, *, step: int, metrics: dict[str, float]
    ) -> None:
        config = self._config
        if config.lora.rank:
            base = self.record.base
            adapters = peft.Adapters(config.lora, ema_params, base and base[1])
            peft.save(folder, adapters, config.model, base=config.init or "", force=True)
            return
        model = self.objective.all_params(ema_params, self.frozen)
        params = {"model": model, "tokenizer": self._tokenizer.params}
        dtype = config.run.export_dtype
        save_model(folder, self.record, params, step=step, metrics=metrics, dtype=dtype)

    def _batches(self, samples: Samples[AnySample], rows: np.ndarray, ahead: int) -> PackedBatches:
        config = self._config
        documents = Documented(samples, Documents(config, self._prompts))
        return PackedBatches(
            SampleReader(documents, config.data.workers),
            self._image_encoder(),
            batch_size=self.batch_size,
            rows=rows,
            lengths=config.data.packing,
            tokens_per_step=config.model.tokens_per_step,
            num_bytes=-(-config.model.tokenizer.bits // 8),
            num_sources=len(config.data.source_names),
            ahead=ahead,
        )

    def _image_encoder(self) -> ImageEncoder:
        if self._encoder is None:
            dtype = jnp.dtype(self._config.run.compute_dtype)
            tokenizer = self._config.model.tokenizer
            self._encoder = ImageEncoder(tokenizer, self._tokenizer.params, dtype)
        return self._encoder

    def _read_prompts(self, held_out: Mixture) -> list[str]:
        """Those of the previews.

        Args:
          held_out: whose captions they are without a file.

        Raises:
          UserError: the file is missing or has none, or has one that the model does not take.
        """
        path = self._config.preview.prompts
        limit = self._config.data.max_prompt
        if path is None:
            samples = [held_out.draw(n) for n in range(PREVIEW_CAPTIONS)]
            captions = dict.fromkeys(sample.caption for sample in samples if sample.caption)
            return [text for text in captions if self._is_short(text)] or ["an image"]
        prompts = [line.strip() for line in readers.read_text(path).splitlines() if line.strip()]
        if not prompts:
            raise ConfigError(f"preview.prompts {path} has no prompts", "preview.prompts")
        for prompt in prompts:
            self._prompts.encode(prompt, limit)
        return prompts

    def _is_short(self, caption: str) -> bool:
        try:
            self._prompts.encode(caption, self._config.data.max_prompt)
        except LongPrompt:
            return False
        return True

    def _preview_size(self) -> tuple[int, int]:
        size = self._config.preview.size
        largest = max(self._config.data.resolutions)
        return (largest, largest) if size is None else checks.parse_size(size)

    def _read_frozen(self) -> Params:
        config = self._config
        if not config.freeze and not config.lora.rank:
            return {}
        assert config.init is not None  # Checked in __post_init__.
        dtype = jnp.dtype(config.run.compute_dtype)
        frozen = read_init(config, config.init)
        if not config.lora.rank:
            _, frozen = freezing.split(frozen, config.freeze)
        return jax.tree.map(lambda x: x.astype(dtype)[...], frozen)

    def _record(self, files: dict[str, bytes]) -> RunRecord:
        config = self._config
        height, width = self._preview_size()
        metadata = {
            "sampler": to_dict(config.preview.sampler),
            "size": f"{width}x{height}",
        }
        base = None
        if (config.freeze or config.lora.rank) and config.init is not None:
            init = local_folder(config.init)
            base = (init, fingerprint(init))
        return RunRecord(
            "text_to_image",
            to_dict(config.model),
            metadata,
            config.run.checkpoints,
            (self._tokenizer_folder, fingerprint(self._tokenizer_folder)),
            base,
            files,
            is_adapter=config.lora.rank > 0,
        )
