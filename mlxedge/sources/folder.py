"""What Hugging Face and MLX folders share: config, tokenizer files, shards of safetensors."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mlxedge.errors import (
    AccessDeniedError,
    CorruptFileError,
    SourceError,
    SourceNotFoundError,
    UnsafeFileError,
)
from mlxedge.sources.files import Opener, RandomAccessFile, shown
from mlxedge.sources.gguf_names import first_parts
from mlxedge.sources.safetensors import SafetensorsFile
from mlxedge.tokenizer.spec import TokenizerSpec

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
#: What NVIDIA's ModelOpt writes beside a config that says nothing of quantization.
MODELOPT_CONFIG = "hf_quant_config.json"
#: What PEFT writes beside the factors of an adapter, which is no model of its own.
ADAPTER_CONFIG = "adapter_config.json"
MODEL_CARD = "README.md"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
    "qwen.tiktoken",
    "tiktoken.model",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATE_FOLDER = "additional_chat_templates"
#: Files that only pickle can load.
PICKLES = re.compile(r".*\.(bin|pt|pth|pkl|pickle|ckpt)", re.IGNORECASE)
PICKLE_ADVICE = (
    "loading one can run any code, so mlxedge never does. Use a safetensors version of the model, "
    "or save it as safetensors with a program that you trust"
)
#: A config or a tokenizer above this size is not one.
MAX_SIDE_FILE = 1 << 28
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


def only_pickles(where: str, names: list[str]) -> str:
    """Why a model whose weights are all pickled is refused, and what to do."""
    return f"{where} holds only pickles ({', '.join(sorted(names)[:3])}): {PICKLE_ADVICE}"


def only_adapter(where: str) -> str:
    """What to do with an adapter that was given as a model."""
    return (
        f"{where} is an adapter, no model: give the model that it was trained for, and this with "
        "convert --adapter"
    )


def read_side_file(path: Path) -> bytes:
    """The bytes of a small file such as a config."""
    try:
        size = path.stat().st_size
        if size > MAX_SIDE_FILE:
            raise CorruptFileError(path, f"{size} bytes are too many for such a file", 0)
        return path.read_bytes()
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"{path}: no such file") from error
    except PermissionError as error:
        raise AccessDeniedError(f"{path}: no permission to read it") from error
    except OSError as error:
        raise SourceError(f"{path}: cannot read: {error.strerror or error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises CorruptFileError if the file is anything else."""
    data = read_side_file(path)
    try:
        value = json.loads(data)
    except UnicodeDecodeError as error:
        raise CorruptFileError(path, "not UTF-8", error.start) from error
    except json.JSONDecodeError as error:
        at = len(error.doc[: error.pos].encode())
        raise CorruptFileError(path, f"not JSON: {error.msg}", at) from error
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(path, f"not sane JSON: {error}", 0) from error
    if not isinstance(value, dict):
        raise CorruptFileError(path, "not a JSON object", 0)
    return value


@dataclass(frozen=True)
class Shards:
    """The weight files of a folder. ``owner`` tells which file a tensor is in, and is empty without
    an index; ``index`` is the index file, if one was read."""

    files: tuple[Path, ...]
    owner: dict[str, Path]
    index: Path | None = None


def find_shards(folder: Path) -> Shards:
    """Which files hold the weights.

    As in transformers, model.safetensors goes before the index; without either, the shards
    ``model*.safetensors`` that mlx-lm would load, or else the folder's only safetensors file.
    """
    if (folder / WEIGHTS).is_file():
        return Shards((folder / WEIGHTS,), {})
    if (folder / INDEX).is_file():
        owner = {name: folder / file for name, file in read_index(folder / INDEX).items()}
        files = tuple(sorted(set(owner.values())))
        for file in files:
            if not file.is_file():
                raise SourceNotFoundError(
                    f"{file}: this shard is missing, though {INDEX} names it; download it again"
                )
        return Shards(files, owner, folder / INDEX)
    found = sorted(folder.glob("*.safetensors"))
    shards = [f for f in found if f.name.startswith("model")] or found
    _check_numbering(shards)
    if not shards:
        raise _nothing_to_read(folder)
    if len(shards) > 1 and not all(_SHARD.fullmatch(f.name) for f in shards):
        raise SourceNotFoundError(
            f"{folder}: several safetensors files ({', '.join(f.name for f in shards[:3])}) and "
            f"no {INDEX} that says what belongs together"
        )
    return Shards(tuple(shards), {})


def read_index(path: Path) -> dict[str, str]:
    """Tensor name → file name of a safetensors index.

    Raises UnsafeFileError if a name leads outside the folder or is not a safetensors file.
    """
    owner = read_json(path).get("weight_map")
    if not isinstance(owner, dict) or not owner:
        raise CorruptFileError(path, "weight_map is missing or empty", 0)
    if not all(isinstance(name, str) and name for name in owner.values()):
        raise CorruptFileError(path, "weight_map must map tensor names to file names", 0)
    for name in set(owner.values()):
        parts = PurePosixPath(name)
        outside = parts.is_absolute() or ".." in parts.parts or set(name) & set("\\:")
        if outside or not name.isprintable():
            raise UnsafeFileError(f"{path}: names a file outside its folder: {name!r}")
        if parts.suffix != ".safetensors":
            raise UnsafeFileError(
                f"{path}: names {name!r}; only safetensors shards are loaded, never pickles"
            )
    return owner


def _check_numbering(shards: list[Path]) -> None:
    """Raise SourceNotFoundError if one of ``x-00001-of-0000N`` is absent."""
    names = {f.name for f in shards}
    for file in shards:
        if match := _SHARD.fullmatch(file.name):
            for i in range(1, int(match[3]) + 1):
                name = f"{match[1]}-{i:05d}-of-{match[3]}.safetensors"
                if name not in names:
                    raise SourceNotFoundError(f"{file.parent / name}: this shard is missing")


def _nothing_to_read(folder: Path) -> SourceError:
    names = [f.name for f in folder.iterdir() if f.is_file()]
    if ggufs := first_parts(sorted(n for n in names if n.endswith(".gguf"))):
        return SourceNotFoundError(
            f"{folder}: a folder of GGUF files; name one of them: {', '.join(ggufs)}"
        )
    if pickles := [n for n in names if PICKLES.fullmatch(n)]:
        return UnsafeFileError(only_pickles(str(folder), pickles))
    return SourceNotFoundError(f"{folder}: no safetensors files in this folder")


class Weights:
    """All tensors of a folder's shards, by name.

    With an index, a tensor comes from the shard that the index names; tensors that a shard holds
    beside those are handed out too, as transformers and mlx-lm do.
    """

    def __init__(self, shards: Shards, open_file: Opener = RandomAccessFile) -> None:
        self.files: list[SafetensorsFile] = []
        self.home: dict[str, SafetensorsFile] = {}
        try:
            for path in shards.files:
                self._add(SafetensorsFile(path, open_file), shards.owner)
            for name, path in shards.owner.items():
                if name not in self.home:
                    raise CorruptFileError(
                        path, f"tensor {shown(name)} is not in it, though {INDEX} says so"
                    )
        except BaseException:
            self.close()
            raise

    def _add(self, file: SafetensorsFile, owner: dict[str, Path]) -> None:
        self.files.append(file)
        for name in file.entries:
            if owner.get(name, file.path) != file.path:
                continue
            if name in self.home:
                raise CorruptFileError(
                    file.path, f"tensor {shown(name)} is also in {self.home[name].path.name}", 8
                )
            self.home[name] = file

    def close(self) -> None:
        for file in self.files:
            file.close()


def read_tokenizer(folder: Path) -> tuple[TokenizerSpec | None, list[Path]]:
    """The folder's tokenizer files, and their paths; ``None`` if it has none."""
    paths = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    paths += sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    if not paths:
        return None, []
    files = {p.relative_to(folder).as_posix(): read_side_file(p) for p in paths}
    return TokenizerSpec(files), paths


def read_license(folder: Path) -> str | None:
    """The licence identifier in the front matter of the model card, if there is one."""
    found = re.search(r"^license:[ \t]*[\"']?([\w.+-]+)", _front_matter(folder), re.MULTILINE)
    return found[1] if found else None


def read_base_model(folder: Path) -> str | None:
    """The Hub id that the front matter of the model card names as the base, or names first."""
    found = _BASE_MODEL.search(_front_matter(folder))
    return found[1] if found else None


#: A value, or the first item of a list in either of YAML's styles.
_BASE_MODEL = re.compile(
    r"^base_model:[ \t]*(?:\[\s*|\n[ \t]*-[ \t]+)?[\"']?(?:https://huggingface\.co/)?"
    r"([\w.-]+/[\w.-]+)[\"']?[ \t]*(?:[\],#]|$)",
    re.MULTILINE,
)


def _front_matter(folder: Path) -> str:
    card = folder / MODEL_CARD
    if not card.is_file():
        return ""
    text = read_side_file(card).decode(errors="replace")
    front = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    return front[1] if front else ""


def model_name(folder: Path) -> str:
    """A short name: the folder's, or the repository's for a snapshot in the Hub's cache."""
    folder = folder.absolute()
    home = folder.parent.parent.name
    if folder.parent.name == "snapshots" and home.startswith("models--"):
        return home.rpartition("--")[2]
    return folder.name or folder.resolve().name or "model"
