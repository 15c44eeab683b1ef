"""What every use of a checkpoint starts with: is it a model we know, and is it whole?"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from mlxedge.encodings import PLAIN
from mlxedge.errors import CorruptFileError, UnsupportedEncodingError, UnsupportedModelError
from mlxedge.models import ModelSpec, known_model_types, normalise, spec_for
from mlxedge.models.recasts import WORLDS

if TYPE_CHECKING:
    from collections.abc import Container

    from mlxedge.sources.checkpoint import Checkpoint, SourceTensor


def prepare(checkpoint: Checkpoint) -> tuple[ModelSpec, Checkpoint]:
    """The architecture of ``checkpoint``, and the checkpoint with its config normalised and without
    tensors that carry nothing (buffers, the second copy of a tied head), of a model that sees or
    hears as well its language model.

    Raises UnsupportedModelError for an architecture that is not known or a config that makes no
    sense, UnsupportedEncodingError for weights of a type that is not read.
    """
    from mlxedge.sources.checkpoint import Tensors
    from mlxedge.sources.recasts import from_world

    checkpoint = text_part(checkpoint)
    spec = spec_for(checkpoint.config)
    config = spec.settle(normalise(checkpoint.config, checkpoint.tensors))
    unused = {name for name in checkpoint.tensors if spec.unused(name, config)}
    if unused:
        note = f"{len(unused)} tensors that nothing computes with are left out"
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, note))
    ahead = {name for name in checkpoint.tensors if spec.predicts(name, checkpoint.config)}
    if ahead:
        note = f"{len(ahead)} tensors of layers that predict further tokens are left out"
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, note))
    kept = _canonical(spec, checkpoint, ahead | unused)
    kept = from_world(spec, config, kept, WORLDS[checkpoint.origin.kind])
    head, table = kept.get("lm_head.weight"), kept.get("model.embed_tokens.weight")
    if config["tie_word_embeddings"] and head is not None:
        # As in transformers 5, a head that differs is the model's own, whatever the config says.
        if table is None or not checkpoint.has_weights_here or _same_weights(head, table):
            del kept["lm_head.weight"]
        else:
            config = config | {"tie_word_embeddings": False}
    if not kept:
        raise UnsupportedModelError(f"{checkpoint.origin.path} holds no weights")
    for name, tensor in kept.items():
        if tensor.encoding.family == "plain" and tensor.encoding.name not in PLAIN:
            raise UnsupportedEncodingError(
                f"{name} is {tensor.encoding.name}: mlxedge converts {', '.join(PLAIN)} and "
                "quantized weights that it knows; this checkpoint needs another source"
            )
    return spec, replace(checkpoint, config=config, tensors=Tensors(kept))


#: What the tensors of a language model are called within one that sees or hears as well.
_WITHIN = (
    (re.compile(r"(?:model\.)?(?:language|text)_model\.lm_head\."), "lm_head."),
    (re.compile(r"(?:model\.)?(?:language|text)_model\.(?:model\.)?"), "model."),
    (re.compile(r"lm_head\."), "lm_head."),
    (re.compile(r"model\.(?=(?:embed_tokens|layers|norm)\.)"), "model."),
)
#: Of the whole, where its language model does not say: all else in its config is not of text.
_OF_THE_WHOLE = (
    "dtype",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "quantization",
    "quantization_config",
)


#: Where configs hold that of the language model; the others are those of remote code.
_TEXT_KEYS = ("text_config", "llm_config", "language_config")


def text_part(checkpoint: Checkpoint) -> Checkpoint:
    """The language model of a checkpoint that holds one beside encoders of images or sound and is
    itself of no type that is known; any other checkpoint as it is."""
    from mlxedge.sources.checkpoint import Tensors

    config = checkpoint.config
    text = next((config[key] for key in _TEXT_KEYS if key in config), None)
    known = known_model_types()
    if text is None and isinstance(config.get("vision_config"), dict):
        # Configs of old have the keys of both in one.
        text = {key: value for key, value in config.items() if not key.endswith("_config")}
        text["model_type"] = f"{config.get('model_type')}_text"
    if not isinstance(text, dict) or config.get("model_type") in known:
        return checkpoint
    if text.get("model_type") not in known:
        return checkpoint
    kept: dict[str, SourceTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        for pattern, prefix in _WITHIN:
            if match := pattern.match(name):
                inner = prefix + name[match.end() :]
                kept[inner] = replace(tensor, name=inner)
                break
    left = len(checkpoint.tensors) - len(kept)
    note = (
        f"the language model of this {config.get('model_type')} alone: {left} tensors of its other "
        "parts are left out"
    )
    own = {key: config[key] for key in _OF_THE_WHOLE if key in config} | text
    if "lm_head.weight" not in kept:
        own["tie_word_embeddings"] = True  # the whole decides, and may not say so
    return replace(
        checkpoint,
        config=own,
        tensors=Tensors(kept),
        notes=(*checkpoint.notes, note),
    )


def _canonical(
    spec: ModelSpec, checkpoint: Checkpoint, without: Container[str]
) -> dict[str, SourceTensor]:
    """The tensors by their canonical names, experts that are apart in the files stacked."""
    from mlxedge.sources.checkpoint import stacked

    found: dict[str, SourceTensor] = {}
    experts: dict[str, dict[int, SourceTensor]] = {}
    world = WORLDS[checkpoint.origin.kind]
    for stored, tensor in checkpoint.tensors.items():
        if stored in without or spec.is_ignored(stored):
            continue
        name, expert = spec.canonical(spec.spelt(stored), world)
        if expert is None:
            found[name] = tensor if name == stored else replace(tensor, name=name)
        else:
            experts.setdefault(name, {})[expert] = tensor
    for name, apart in experts.items():
        tensors = [apart[number] for number in sorted(apart)]
        missing = sorted(set(range(max(apart) + 1)) - set(apart))
        kinds = {(t.shape, t.encoding) for t in tensors}
        if missing or len(kinds) > 1 or name in found:
            problem = f"has no expert {missing[0]}" if missing else "has experts that differ"
            raise CorruptFileError(checkpoint.origin.path, f"{name} {problem}")
        found[name] = stacked(name, tensors)
    return found


def check_weights(spec: ModelSpec, checkpoint: Checkpoint) -> None:
    """Raise CorruptFileError or UnsupportedModelError unless a prepared checkpoint's tensors are
    those of the model that its config describes."""
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    spec.check_tensors(checkpoint.config, shapes, checkpoint.origin.path)


def _same_weights(one: SourceTensor, other: SourceTensor) -> bool:
    """Whether two tensors are stored alike, byte for byte."""
    if (one.shape, one.encoding) != (other.shape, other.encoding):
        return False
    step = max(1, (1 << 24) * one.rows // max(1, one.nbytes))
    for start in range(0, one.rows, step):
        stop = min(start + step, one.rows)
        left, right = one.read_rows(start, stop), other.read_rows(start, stop)
        if any(left[part].tobytes() != right[part].tobytes() for part in left):
            return False
    return True
