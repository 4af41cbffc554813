"""`jaxpost export`: a trained model, or an adapter merged into its base, as a plain Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path

from jaxpost.errors import ConfigError
from jaxpost.models.adapters import merge_adapter
from jaxpost.models.export import save_pretrained
from jaxpost.models.hf import PARAMETER_DTYPES
from jaxpost.models.peft import save_adapter
from jaxpost.models.pretrained import open_source
from jaxpost.models.transformer import HEADS
from jaxpost.options import check_choices, option


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Flags of `jaxpost export`."""

    model_name_or_path: str | None = option(None, "Run, adapter, local folder, hub id or .gguf file.")
    output_dir: str | None = option(None, "Folder to write.")
    merge_adapter: bool = option(True, "Write base and adapter as one model; false for the adapter in PEFT's format.")
    head: str = option("lm", "Kind of model: lm or reward.", choices=HEADS)
    dtype: str = option("float32", "Of the weights: float32, bfloat16 or float16.", choices=PARAMETER_DTYPES)
    max_shard_size: str = option("5GB", "Most bytes of one file.")
    allow_nonfinite_weights: bool = option(False, "Load a model even if its weights hold NaN or infinity.")

    def __post_init__(self) -> None:
        check_choices(self)


def run_export(config: ExportConfig) -> None:
    """Write the folder.

    Raises:
        ConfigError: there is no such model, or the folder is a file.
        CheckpointError: it cannot be written.
    """
    for name in ("model_name_or_path", "output_dir"):
        if vars(config)[name] is None:
            raise ConfigError(f"export needs --{name}")
    source, target = open_source(str(config.model_name_or_path)), str(config.output_dir)
    if not source.has_trained_head(config.head):
        raise ConfigError(
            f"{source.name} has no trained reward head; train one with jaxpost reward, or leave out --head"
        )
    if Path(target).resolve() == Path(str(config.model_name_or_path)).resolve():
        raise ConfigError(f"output_dir {target} is the folder of the model itself; give another")
    model = source.load(head=config.head, dtype=config.dtype, allow_nonfinite=config.allow_nonfinite_weights)
    tokenizer = source.tokenizer()
    if config.merge_adapter:
        generation_config = source.checkpoint.generation_config
        options = {"generation_config": generation_config, "max_shard_size": config.max_shard_size}
        save_pretrained(merge_adapter(model), tokenizer, target, **options)
    else:
        save_adapter(model, target, source.name, revision=source.revision, tokenizer=tokenizer)
