"""The model card of a saved model: a README.md made from what its folder holds.

The card stands between two marks. When it is made again, text outside of them is kept, as are metadata that
it does not set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from memlm.files import parse_yaml, read_json, write_text

if TYPE_CHECKING:
    from huggingface_hub import ModelCard, ModelCardData

CARD = "README.md"
# What a folder may hold, from which the card is made.
CONFIG, ADAPTER_CONFIG, LORA_CONFIG = "config.json", "memlm_config.json", "adapter_config.json"
RECIPE, SUMMARY = "recipe.yaml", "summary.json"
# A folder for each model in the package, as `memlm train` leaves it.
SHIPPED = Path(__file__).resolve().parent / "recipes" / "weights"
TEMPLATE = Path(__file__).with_name("card.md")
BEGIN, END = "<!-- memlm: the card begins -->", "<!-- memlm: the card ends -->"
_OURS = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Result:
    """An evaluation found beside a model: what it was, its table, and its accuracies for the metadata."""

    heading: str
    table: str
    scores: dict[tuple[str, str], float]


def write_card(
    directory: str | os.PathLike[str],
    *,
    sources: str | os.PathLike[str] | None = None,
    name: str | None = None,
    license: str | None = None,
    before: ModelCard | None = None,
    tags: Iterable[str] = (),
) -> Path:
    """Write README.md into the folder of a saved model or adapter, and return its path.

    sources: the folder whose recipe and evaluations (`summary.json`, in it or below) the card tells of.
    None is the folder itself, without evaluations: weights just saved have not been measured. name: what
    loads the model, an id of the hub; the folder's name by default. license: of these weights, as the hub
    names licences; None keeps that of an earlier card, else takes the base's, where the base's own card is
    at hand. before: an earlier card, by default the folder's. tags: more tags for the metadata.
    ValueError where the folder holds no model of memlm, or a README.md whose metadata cannot be read.
    """
    from huggingface_hub import ModelCard

    directory = Path(directory)
    saved = read_config(directory)
    if before is None:
        before = _read_card(directory / CARD)
    known = {} if before is None else before.data.to_dict()
    base = base_name(saved)
    recipe = _read_recipe(directory if sources is None else Path(sources))
    results = [] if sources is None else list(_read_results(Path(sources)))
    name = name or directory.resolve().name
    license = license or known.get("license") or license_of(base)
    adapter = not (directory / CONFIG).is_file()
    has_tokenizer = (directory / "tokenizer_config.json").is_file() or not adapter
    card = ModelCard.from_template(
        _metadata(saved, name, license, known, results, adapter, tags),
        template_path=str(TEMPLATE),
        begin=BEGIN,
        end=END,
        name=name,
        adapter=adapter,
        shipped=directory.resolve().parent == SHIPPED,
        tokenizer=name if has_tokenizer else base,
        facts=_facts(saved, directory, license),
        data=_as_yaml(recipe.get("data")),
        recipe=_as_yaml(recipe),
        results=results,
    )
    if before is not None and before.text.strip():
        new = _OURS.search(card.text)
        assert new is not None
        # A function, as the new text may hold what means a group in a replacement.
        card.text = _OURS.sub(lambda _: new.group(), before.text)
    content = str(card)
    write_text(directory / CARD, content)
    return directory / CARD


def license_of(base: str, fetch: bool = False, token: str | None = None) -> str | None:
    """The licence on the base model's own card; None where it is not known.

    The card is looked for in the base's folder and among what was downloaded before; with `fetch` on the
    hub, too.
    """
    from huggingface_hub import ModelCard, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not base:
        return None
    path = Path(base) / CARD
    if not Path(base).is_dir():
        with contextlib.suppress(HFValidationError):
            found = try_to_load_from_cache(base, CARD)
            path = Path(found) if isinstance(found, str) else path
    # Whatever is wrong with somebody else's card must not keep ours from being written.
    with contextlib.suppress(ValueError, OSError, HfHubHTTPError):
        if path.is_file():
            card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
            return card.data.get("license")
        if fetch and not Path(base).is_dir():
            card = ModelCard.load(base, token=token, ignore_metadata_errors=True)
            return card.data.get("license")
    return None


def base_name(saved: dict[str, Any]) -> str:
    """The base that a saved configuration names: an id of the hub or a folder; "" for random weights."""
    found = saved.get("base", (saved.get("text_config") or {}).get("_name_or_path"))
    return found if isinstance(found, str) else ""


def read_config(directory: Path) -> dict[str, Any]:
    """The configuration of the model or adapter saved in a folder. ValueError where there is none."""
    for name in (CONFIG, ADAPTER_CONFIG):
        with contextlib.suppress(OSError, ValueError):
            saved = read_json(directory / name)
            if isinstance(saved, dict) and "memlm_version" in saved:
                _check_config(saved)
                return saved
    raise ValueError(
        f"directory={str(directory)!r} holds no model of memlm; give a folder that save_pretrained or "
        "save_adapter wrote"
    )


def _check_config(saved: dict[str, Any]) -> None:
    """ValueError where a configuration lacks what a card tells of, or has it in another form."""
    memories, inner = saved.get("memory") or [], saved.get("text_config") or {}
    named = isinstance(memories, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in memories
    )
    if not named or not isinstance(inner, dict) or "segment_length" not in saved:
        raise ValueError("it is no configuration of memlm")


def _read_card(path: Path) -> ModelCard | None:
    from huggingface_hub import ModelCard

    if not path.is_file():
        return None
    import yaml

    try:
        return ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{str(path)!r} has metadata that cannot be read ({reason}); mend or remove it"
        ) from error


def _read_recipe(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = parse_yaml((folder / RECIPE).read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _read_results(folder: Path) -> Iterator[Result]:
    """The evaluations in a folder and below, those that differ in their lengths alone in one table."""
    found: dict[str, list[dict[str, Any]]] = {}
    own = set()
    for path in sorted(folder.glob(f"**/{SUMMARY}")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            saved = read_json(path)
            settings, cells = saved["settings"], saved["cells"]
            told = [f"{key} {settings[key]}" for key in _TOLD if settings.get(key) is not None]
            heading = f"Percent of answers right (samples), `memlm eval` with {', '.join(told)}:"
            # Read here, so that a file that is none is passed over whole.
            rows = [{key: cell[key] for key in _CELL} for cell in cells]
            found.setdefault(heading, []).extend(rows)
            if settings.get("baseline") == "memory":
                own.add(heading)
    for heading, cells in found.items():
        cells.sort(key=lambda cell: cell["tokens"] / cell["samples"])
        lengths = list(dict.fromkeys(cell["length"] for cell in cells))
        lines = ["| task | " + " | ".join(lengths) + " |", "|---" * (1 + len(lengths)) + "|"]
        shares = {(c["task"], c["length"]): c["correct"] / c["samples"] for c in cells}
        counts = {(c["task"], c["length"]): c["samples"] for c in cells}
        for task in sorted({cell["task"] for cell in cells}):
            row = [
                f"{100 * shares[task, x]:.0f} ({counts[task, x]})" if (task, x) in shares else ""
                for x in lengths
            ]
            lines.append(f"| {task} | " + " | ".join(row) + " |")
        yield Result(heading, "\n".join(lines), shares if heading in own else {})


_CELL = ("task", "length", "samples", "correct", "tokens")
# Settings of an evaluation that say what its figures are about.
_TOLD = ("baseline", "data", "haystack", "stories", "composition", "seed", "write_threshold")


def _metadata(
    saved: dict[str, Any],
    name: str,
    license: str | None,
    known: dict[str, Any],
    results: list[Result],
    adapter: bool,
    tags: Iterable[str],
) -> ModelCardData:
    """The card's metadata; of `known` ones, those stay that are not set here."""
    from huggingface_hub import EvalResult, ModelCardData

    base = base_name(saved)
    memories = [entry["name"] for entry in saved.get("memory") or []]
    fields: dict[str, Any] = {k: v for k, v in known.items() if k != "model-index"}
    tags = [*fields.get("tags", []), "memlm", "long-context", *memories, *tags]
    fields |= {"library_name": "memlm", "pipeline_tag": "text-generation", "tags": tags}
    if license is not None:
        fields["license"] = license
    # A folder of this machine means nothing to others.
    if _HUB_ID.fullmatch(base) and not Path(base).is_dir():
        fields |= {
            "base_model": base,
            "base_model_relation": "adapter" if adapter else "finetune",
        }
    scores = [(key, value) for result in results for key, value in result.scores.items()]
    if scores:
        fields |= {
            "model_name": PurePosixPath(name).name,
            "eval_results": [
                EvalResult(
                    task_type="text-generation",
                    dataset_type="memlm",
                    dataset_name=f"{task} at {length}",
                    # Without it, results of one type would be taken for one data set's.
                    dataset_config=f"{task}-{length}",
                    metric_type="accuracy",
                    metric_value=round(value, 4),
                )
                for (task, length), value in scores
            ],
        }
    return ModelCardData(**fields)


def _facts(saved: dict[str, Any], directory: Path, license: str | None) -> list[tuple[str, str]]:
    """Rows of the card's table."""
    base, inner = base_name(saved), saved.get("text_config") or {}
    told = _without_folder(base) if base else "none: trained from random weights"
    if inner.get("model_type"):
        told += f" ({inner['model_type']})"
    counts = _count_parameters(directory)
    facts = [
        ("base", told),
        ("memory", "; ".join(map(_memory, saved.get("memory") or [])) or "none"),
        ("segment length", f"{saved['segment_length']} tokens"),
        ("parameters", ", ".join(f"{part} {count:,}" for part, count in counts.items())),
    ]
    with contextlib.suppress(OSError, ValueError):
        lora = read_json(directory / LORA_CONFIG)
        facts.append(("LoRA", f"rank {lora.get('r')}, alpha {lora.get('lora_alpha')}"))
    of_base = f"not stated; that of {_without_folder(base)} applies" if base else "not stated"
    return [*facts, ("licence", license or of_base)]


def _memory(entry: dict[str, Any]) -> str:
    """A memory's name, and the settings that are not its mechanism's own."""
    from memlm.memory import resolve_memories

    (config,) = resolve_memories([entry])
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    changed = [
        f"{key}={value}" for key, value in entry.items() if key in fields and value != fields[key]
    ]
    return entry["name"] + (f" ({', '.join(changed)})" if changed else "")


def _count_parameters(directory: Path) -> dict[str, int]:
    """How many numbers the folder's files hold, from their headers alone."""
    from safetensors import SafetensorError, safe_open

    counts = {"memory": 0, "LoRA": 0, "base": 0}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                sizes = {key: math.prod(file.get_slice(key).get_shape()) for key in file.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{str(path)!r} is not a readable safetensors file ({error})"
            ) from error
        for key, size in sizes.items():
            own = key.startswith("memory.") or path.name == "memory.safetensors"
            counts["memory" if own else "LoRA" if ".lora_" in key else "base"] += size
    return {part: count for part, count in counts.items() if count}


def _as_yaml(value: Any) -> str:
    import yaml

    if not value:
        return ""
    return yaml.safe_dump(_without_folders(value), sort_keys=False, allow_unicode=True).strip()


def _without_folders(value: Any) -> Any:
    """A recipe's values without the folders of the machine it ran on, which are nobody's business."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return _without_folder(value) if isinstance(value, str) else value


def _without_folder(path: str) -> str:
    if path.startswith(("/", "~")):
        return PurePosixPath(path).name
    return PureWindowsPath(path).name if PureWindowsPath(path).is_absolute() else path
