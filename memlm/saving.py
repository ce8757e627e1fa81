"""What is written of a model and read again: the whole, an adapter, the memories alone; and its sharing."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, Self

# transformers evaluates the annotations of a model's classes, so that these are needed at run time.
from transformers import PreTrainedModel

from memlm.attach import MemoryStack
from memlm.backbone import Backbone
from memlm.card import CARD, base_name, license_of, read_config, write_card
from memlm.config import FORMAT_VERSION, MemLMConfig
from memlm.files import read_json, write_json
from memlm.folders import CONFIG, finish_replacing, replace_together
from memlm.memory import config_to_dict, resolve_memories
from memlm.state import read_safetensors, tensors_checksum

_log = logging.getLogger(__name__)

MEMORY_WEIGHTS = "memory.safetensors"
MEMORY_CONFIG = "memlm_config.json"
# Of the tensors in the one file, in the other: the two belong together.
WEIGHTS_CHECKSUM = "memory_sha256"
LORA_WEIGHTS, LORA_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Of an adapter's LoRA, in the same description.
LORA_CHECKSUM = "lora_sha256"
# How a model is asked and recalls: of an adapter's configuration, as of a whole model's.
_ASKING = ("question_template", "question_segment", "recall_template")


class SavingMixin:
    """Saving, loading and sharing of a `MemLMForCausalLM`."""

    base: PreTrainedModel
    memory: MemoryStack
    backbone: Backbone
    config: MemLMConfig

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As transformers does, with a model card; the base model's configuration is saved as it is now.

        Whenever the save is interrupted, the folder holds the model that was there before, or the new one.
        The card (README.md) tells of the recipe where one is in the folder. It keeps what somebody wrote
        outside of its marks. push_to_hub: upload the files as well, as `push_to_hub` does, to `repo_id`,
        the folder's name by default. With LoRA of peft in the base, what `save_adapter` writes is written
        in its place, as transformers does with its own models: a base without LoRA could not load the
        whole. ValueError for a quantised base, whose packed weights would be loaded as if they were plain
        numbers.
        """
        if _lora_of(self) is not None:
            if push_to_hub:
                raise ValueError(
                    "push_to_hub=True uploads a whole model, and with LoRA in the base the adapter alone "
                    "is saved; use push_to_hub(repo_id, adapter_only=True)"
                )
            _log.warning(
                "the base has LoRA, so that the adapter alone is saved; from_adapter loads it, and after "
                "merge_and_unload the whole model is saved"
            )
            self.save_adapter(save_directory)
            return
        stored = next(
            (n for n, p in self.base.named_parameters() if not p.is_floating_point()), None
        )
        if stored is not None or getattr(self.base, "is_quantized", False):
            raise ValueError(
                f"base={type(self.base).__name__} is quantised (its weights are integers and scales), and "
                "would not be read again as it was; use save_adapter(directory), or save_memory(directory) "
                "for the memories alone, and from_adapter(directory, base) with the base loaded as it was"
            )
        uploading = {key: kwargs.pop(key) for key in _UPLOADING if push_to_hub and key in kwargs}
        hub = {key: kwargs[key] for key in ("token", "max_shard_size") if key in kwargs}
        self.config.text_config = copy.deepcopy(self.base.config)
        save = super().save_pretrained  # type: ignore[misc]
        kwargs |= {"is_main_process": is_main_process, "state_dict": state_dict}
        if not is_main_process or kwargs.get("distributed_checkpoint"):
            # The first writes nothing, of the second every process writes a part into one folder.
            save(save_directory, **kwargs)
        else:
            with replace_together(save_directory, weights_pattern(kwargs.get("variant"))) as folder:
                save(folder, **kwargs)
        if is_main_process:
            renew_card(save_directory)
            if push_to_hub:
                repo_id = uploading.pop("repo_id", Path(save_directory).resolve().name)
                self.push_to_hub(repo_id, **hub, **uploading)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        adapter_only: bool = False,
        sources: str | os.PathLike[str] | None = None,
        license: str | None = None,
        token: bool | str | None = None,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload the model and its card to the hub, as transformers does; returns the commit.

        adapter_only: what `save_adapter` writes, in place of the whole model. sources: the folder of the
        run, whose recipe and evaluations the card tells of. license: of these weights, as the hub names
        licences; None takes the base's. A card that is on the hub keeps its text outside of our marks.
        kwargs: commit_message, commit_description, private, revision and create_pr.
        """
        if unknown := kwargs.keys() - set(_UPLOADING):
            raise TypeError(f"push_to_hub() got unexpected arguments {sorted(unknown)}")
        with tempfile.TemporaryDirectory() as folder:
            if adapter_only:
                self.save_adapter(folder)
            else:
                self.save_pretrained(folder, max_shard_size=max_shard_size)
            return _upload(
                Path(folder),
                repo_id,
                token=token,
                sources=sources,
                license=license,
                tags=tags,
                **kwargs,
            )

    def save_memory(self, directory: str | os.PathLike[str]) -> None:
        """Write the memories' parameters alone, like an adapter: two files."""
        save_memory(self.memory, self._memory_description(), directory)

    def load_memory(self, directory: str | os.PathLike[str]) -> None:
        """Read what `save_memory` wrote. ValueError when it belongs to other memories or sizes."""
        load_memory(self.memory, self._memory_description(), directory)

    def save_adapter(self, directory: str | os.PathLike[str]) -> None:
        """Write everything but the base: the memories, the base's LoRA where it has one, and a card.

        `from_adapter` puts them on the base again. The memories are as `save_memory` writes them, the LoRA
        as peft does (`PeftModel.from_pretrained(model.base, directory)` reads it). ValueError for several
        LoRA adapters at once, or layers that peft put around the whole model.
        """
        lora = _lora_of(self)
        # A LoRA that an earlier save left would be put on the base again.
        with replace_together(directory, re.escape(LORA_WEIGHTS) + "|" + LORA_CONFIG) as folder:
            described = self._memory_description()
            if lora is not None:
                described[LORA_CHECKSUM] = _save_lora(self.base, lora, folder)
            save_memory(self.memory, described, folder)
        renew_card(directory)

    @classmethod
    def from_adapter(
        cls,
        directory: str | os.PathLike[str],
        base: PreTrainedModel | str | os.PathLike[str] | None = None,
        *,
        is_trainable: bool = False,
        revision: str | None = None,
        token: bool | str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Put what `save_adapter` wrote, a folder or an id of the hub, on its base.

        base: a live model (wrapped, not copied), a hub id or a path; None is the base that the adapter
        names. is_trainable: whether its LoRA is to be trained on. kwargs: for loading a base by name, such
        as dtype. ValueError when there is no base, or one of another size.
        """
        folder = _find_adapter(directory, revision, token)
        described, _ = _read(folder)
        if LORA_CHECKSUM in described:
            _check_lora(folder, described[LORA_CHECKSUM])
        base = base or base_name(described)
        if not base:
            raise ValueError(
                f"directory={os.fspath(directory)!r} does not say which base it belongs to; give base, the "
                "model it was trained on"
            )
        model = cls.from_base(  # type: ignore[attr-defined]
            base,
            memory=described["memory"],
            segment_length=described["segment_length"],
            # Older files do not say: memories then had the base's.
            memory_dtype=described.get("memory_dtype", "base"),
            **kwargs,
        )
        for key in _ASKING:
            if key in described:
                setattr(model.config, key, described[key])
        model.load_memory(folder)
        if (folder / LORA_CONFIG).is_file():
            model.base.load_adapter(str(folder), is_trainable=is_trainable)
        return model

    def _memory_description(self) -> dict[str, Any]:
        return {
            "memlm_version": FORMAT_VERSION,
            "memory": list(self.memory.configs),
            "segment_length": self.config.segment_length,
            "hidden_size": self.backbone.config.hidden_size,
            "num_hidden_layers": len(self.backbone.layers),
            "base": self.base.config._name_or_path,
            "memory_dtype": self.config.memory_dtype,
            **{key: getattr(self.config, key) for key in _ASKING},
        }


# Arguments of an upload, by transformers' names.
_UPLOADING = (
    "repo_id", "commit_message", "commit_description", "private", "revision", "create_pr",
)  # fmt: skip


def weights_pattern(variant: str | None = None) -> str:
    """The names that transformers gives to the weights of a model, whole or in parts."""
    named = "" if variant is None else re.escape(f".{variant}")
    return (
        rf"model{named}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{named}\.json"
    )


def finish_save(directory: str | os.PathLike[str], configured: bool) -> None:
    """Before a model is read: put in place what an interrupted save had ready.

    configured: the caller has a configuration already. ValueError if it may be that of before.
    """
    if CONFIG in finish_replacing(directory) and configured:
        raise ValueError(
            f"directory={str(directory)!r} held a save that had been interrupted; it is whole now, and the "
            "configuration is another one: load the model again"
        )


def renew_card(directory: str | os.PathLike[str]) -> None:
    """Write the card of what was just saved; a README.md that cannot be read is left, with a warning."""
    try:
        write_card(directory)
    except ValueError as error:
        # The weights are written; a file that somebody else put there must not end a training run.
        _log.warning("no model card was written: %s", error)


def _upload(
    folder: Path,
    repo_id: str,
    *,
    token: bool | str | None = None,
    private: bool | None = None,
    sources: str | os.PathLike[str] | None = None,
    license: str | None = None,
    tags: list[str] | None = None,
    **commit: Any,
) -> Any:
    """Make the repository where it is not there, and upload `folder` with a card for that place."""
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import EntryNotFoundError

    api = HfApi(token=token)
    # Cards are read with a token by name, or with the one that is stored.
    token = token if isinstance(token, str) else None
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    before = None
    with contextlib.suppress(EntryNotFoundError):
        before = ModelCard.load(repo_id, token=token, ignore_metadata_errors=True)
    if license is None and (before is None or before.data.get("license") is None):
        license = license_of(base_name(read_config(folder)), fetch=True, token=token)
    (folder / CARD).unlink(missing_ok=True)
    write_card(
        folder, sources=sources, name=repo_id, license=license, before=before, tags=tags or ()
    )
    message = commit.pop("commit_message", None) or "Upload memlm model"
    return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, **commit)


def _find_adapter(
    directory: str | os.PathLike[str], revision: str | None, token: bool | str | None
) -> Path:
    """The folder of an adapter; one on the hub is downloaded."""
    name = os.fspath(directory)
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(
            f"directory={name!r} does not exist; give a folder save_adapter wrote, or a hub id"
        )
    from huggingface_hub import snapshot_download

    wanted = [MEMORY_WEIGHTS, MEMORY_CONFIG, LORA_WEIGHTS, LORA_CONFIG]
    return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=wanted))


def _lora_of(model: SavingMixin) -> str | None:
    """The name of the base's adapter of peft; None without one."""
    # Without peft imported nobody can have made one.
    if "peft" not in sys.modules:
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not any(isinstance(module, BaseTunerLayer) for module in model.base.modules()):
        return None
    names = list(getattr(model.base, "peft_config", {}))
    if len(names) != 1:
        raise ValueError(
            f"base={type(model.base).__name__} has {len(names) or 'no'} adapters of its own "
            f"({', '.join(names) or 'peft wraps the whole model'}), and one is saved; keep one of them, "
            "or use save_pretrained of the PeftModel around this model"
        )
    return names[0]


def _save_lora(base: PreTrainedModel, name: str, directory: Path) -> str:
    """Write an adapter of peft as peft itself does, into a folder that is not in its place yet.

    Returns the checksum of its tensors.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = {
        # The names of peft's own wrapper around the model.
        f"base_model.model.{key}": value.detach().cpu().contiguous().clone()
        for key, value in get_peft_model_state_dict(base, adapter_name=name).items()
    }
    save_file(tensors, directory / LORA_WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(base.peft_config[name])
    config.base_model_name_or_path = base.config._name_or_path
    config.inference_mode = True
    config.save_pretrained(directory)
    return tensors_checksum(tensors)


def _check_lora(directory: Path, checksum: str) -> None:
    """ValueError unless the LoRA in a folder is whole, and the one that was saved with its memories."""
    tensors, _ = read_safetensors(directory / LORA_WEIGHTS, "save the adapter again")
    if checksum != tensors_checksum(tensors):
        raise ValueError(
            f"directory={str(directory)!r} is damaged ({LORA_WEIGHTS} is not the file that {MEMORY_CONFIG} "
            "was written with); save the adapter again"
        )


def save_memory(
    memory: MemoryStack, description: dict[str, Any], directory: str | os.PathLike[str]
) -> None:
    """Write the parameters of `memory` alone, with a `description` of the model they belong to."""
    from safetensors.torch import save_file

    tensors = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in memory.state_dict().items()
    }
    described = {**description, WEIGHTS_CHECKSUM: tensors_checksum(tensors)}
    with replace_together(directory) as folder:
        save_file(tensors, folder / MEMORY_WEIGHTS)
        write_json(folder / MEMORY_CONFIG, described)


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The description and tensors that `save_memory` wrote."""
    finish_replacing(directory)
    for name in (MEMORY_CONFIG, MEMORY_WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"directory={str(directory)!r} has no {name}; give a folder save_memory wrote"
            )
    try:
        described = read_json(directory / MEMORY_CONFIG)
        _check_description(described)
        tensors, _ = read_safetensors(directory / MEMORY_WEIGHTS, "save it again")
        known = described.get(WEIGHTS_CHECKSUM)
        if known is not None and known != tensors_checksum(tensors):
            raise ValueError(
                f"{MEMORY_WEIGHTS} is not the file that {MEMORY_CONFIG} was written with"
            )
    except (ValueError, OSError) as error:
        raise ValueError(
            f"directory={str(directory)!r} is damaged ({error}); save the memory again"
        ) from error
    if described.get("memlm_version", 0) > FORMAT_VERSION:
        raise ValueError(
            f"directory={str(directory)!r} has memlm format {described['memlm_version']}, this "
            f"memlm reads up to {FORMAT_VERSION}; upgrade memlm"
        )
    with contextlib.suppress(TypeError, ValueError):
        # A field that an older file does not name has the value it had then.
        entries = resolve_memories(described.get("memory"))
        described["memory"] = [config_to_dict(entry) for entry in entries]
    return described, tensors


def _check_description(described: Any) -> None:
    """ValueError unless these are the values that `_memory_description` gives, as far as they are there."""
    kinds: dict[str, type] = {
        "memlm_version": int,
        "memory": list,
        "segment_length": int,
        "hidden_size": int,
        "num_hidden_layers": int,
        "base": str,
        "memory_dtype": str,
        WEIGHTS_CHECKSUM: str,
        LORA_CHECKSUM: str,
        **dict.fromkeys(_ASKING, str),
    }
    if not isinstance(described, dict):
        raise ValueError(f"{MEMORY_CONFIG} holds no JSON object")
    for key, kind in kinds.items():
        if key in described and not isinstance(described[key], kind):
            raise ValueError(
                f"{MEMORY_CONFIG} has {key}={described[key]!r}, which is no {kind.__name__}"
            )
    for key in ("memory", "segment_length"):
        if key not in described:
            raise ValueError(f"{MEMORY_CONFIG} has no {key}")


def load_memory(
    memory: MemoryStack, description: dict[str, Any], directory: str | os.PathLike[str]
) -> None:
    """Read what `save_memory` wrote. ValueError when it belongs to other memories or sizes."""
    directory = Path(directory)
    described, tensors = _read(directory)
    for key in ("memory", "hidden_size", "num_hidden_layers"):
        theirs, ours = described.get(key), description[key]
        if theirs != ours:
            if key == "memory":
                theirs, ours = _differing(described["memory"], description["memory"])
            raise ValueError(
                f"directory={str(directory)!r} was saved with {key}={theirs}, but this model has {ours}; "
                "build the model with the same memory"
            )
    # Before anything is copied: a memory half of which is another's would go unnoticed.
    known = {n: tuple(t.shape) for n, t in memory.state_dict().items()}
    found = {n: tuple(t.shape) for n, t in tensors.items() if t.is_floating_point()}
    if found != known:
        odd = sorted(n for n in {*known, *tensors} if known.get(n) != found.get(n))
        raise ValueError(
            f"directory={str(directory)!r} does not fit: {odd[0]!r} there is "
            f"{found.get(odd[0], 'missing or no numbers')}, here {known.get(odd[0], 'unknown')}; "
            "build the model with the same memory"
        )
    memory.load_state_dict(tensors)


def _differing(theirs: list[Any], ours: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Two lists of memories, cut to the fields that differ where they are the same memories otherwise."""
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in theirs]
    if names != [entry["name"] for entry in ours]:
        return theirs, ours
    odd = [
        {"name", *(key for key in a | b if a.get(key, ...) != b.get(key, ...))}
        for a, b in zip(theirs, ours, strict=True)
    ]

    def cut(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        pairs = zip(entries, odd, strict=True)
        return [{k: v for k, v in entry.items() if k in shown} for entry, shown in pairs]

    return cut(theirs), cut(ours)
