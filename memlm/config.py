"""MemLMConfig: the configurations of base model and memories, and the segment length, in one JSON."""

from __future__ import annotations

from typing import Any, cast

from transformers import AutoConfig, PreTrainedConfig
from transformers import configuration_utils as _configuration_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from memlm.templates import DOCUMENT_QUESTION_TEMPLATE, DOCUMENT_RECALL_TEMPLATE

FORMAT_VERSION = 1
# Read by trainers, trackers and evaluation harnesses off the top-level config.
_MIRRORED = ("vocab_size", "hidden_size", "num_hidden_layers")
_MIRRORED_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What a missing field means in a file that was written before the field existed.
_BEFORE: dict[str, Any] = {"memory_dtype": "base"}


class MemLMConfig(PreTrainedConfig):
    """Configuration of a base model with memories.

    text_config: the base model's own configuration (or its dict). memory: one dict per memory, with its
    `name` and its fields; empty for independent segments. segment_length: tokens of text per segment,
    memory tokens not counted. question_template: the text that asks a question after a document, with
    {question} in it; the answer follows after a space. question_segment, as the model was trained: "open"
    when a question follows the document in its last, open segment; "own" when that segment ends first, and
    the question is read in a new one, from memory alone. recall_template: how a passage recalled from an
    index is written before the question, with {text} in it. memory_dtype: "float32" keeps the memories'
    parameters in float32 where the base model is in half precision, so that small training steps are not
    lost (in a wider base model they are as wide as it is); "base" keeps them in the base model's dtype.
    logits_with_labels: whether a call with labels for more than one segment keeps all logits beside the
    loss, for trainers that compute metrics of predictions. schedule: the order in which layers and segments
    are run: "sequential", "wavefront", or "auto", which takes the faster one where both are possible.
    schedule_measured: what "auto" goes by, one dict for each device and shape.
    """

    model_type = "memlm"
    # The sub-config spec appeared during transformers 5; before it, sub_configs alone did the work.
    if hasattr(_configuration_utils, "SubConfigSpec"):
        sub_configs_defaults = {
            "text_config": _configuration_utils.SubConfigSpec(
                config_class=AutoConfig, model_type="llama"
            )
        }
    else:
        sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["memory_state", "auxiliary_loss"]  # noqa: RUF012

    text_config: dict | PreTrainedConfig | None = None
    memory: list | None = None
    segment_length: int = 512
    question_template: str = DOCUMENT_QUESTION_TEMPLATE
    question_segment: str = "open"
    recall_template: str = DOCUMENT_RECALL_TEMPLATE
    memory_dtype: str = "float32"
    logits_with_labels: bool = False
    schedule: str = "auto"
    schedule_measured: list | None = None
    memlm_version: int = FORMAT_VERSION
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.memlm_version > FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has memlm format {self.memlm_version}, the installed memlm reads up "
                f"to {FORMAT_VERSION}; upgrade memlm"
            )
        if isinstance(self.text_config, dict):
            fields = dict(self.text_config)
            model_type = fields.pop("model_type", "llama")
            self.text_config = CONFIG_MAPPING[model_type](**fields)
        elif self.text_config is None:
            self.text_config = CONFIG_MAPPING["llama"]()
        self.memory = [dict(entry) for entry in self.memory or []]
        super().__post_init__(**kwargs)
        inner: Any = cast(PreTrainedConfig, self.text_config).get_text_config(decoder=True)
        for name in _MIRRORED:
            setattr(self, name, getattr(inner, name, None))
        # Asked by peft, which otherwise trains one of two weights that are the same.
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        for name in _MIRRORED_TOKENS:
            if getattr(self, name, None) is None:
                setattr(self, name, getattr(inner, name, None))
        if isinstance(self.segment_length, bool) or not isinstance(self.segment_length, int):
            raise ValueError(
                f"segment_length={self.segment_length!r} must be a whole number of tokens"
            )
        if self.segment_length < 1:
            raise ValueError(
                f"segment_length={self.segment_length} is too short; give at least 1 token"
            )
        if self.question_segment not in ("open", "own"):
            raise ValueError(
                f"question_segment={self.question_segment!r} is unknown; use 'open' or 'own'"
            )
        self.check_schedule()
        if self.memory_dtype not in ("float32", "base"):
            raise ValueError(
                f"memory_dtype={self.memory_dtype!r} is unknown; use 'float32' or 'base'"
            )
        if "{question}" not in self.question_template:
            raise ValueError(
                f"question_template={self.question_template!r} has no place for the question; "
                "put {question} into it"
            )
        if "{text}" not in self.recall_template:
            raise ValueError(
                f"recall_template={self.recall_template!r} has no place for the passage; "
                "put {text} into it"
            )

    def check_schedule(self) -> None:
        """ValueError for a schedule that there is not; it may have been set since."""
        if self.schedule not in ("auto", "sequential", "wavefront"):
            raise ValueError(
                f"schedule={self.schedule!r} is unknown; use 'auto', 'sequential' or 'wavefront'"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers does; a field missing from an older file has the value that was usual then."""
        return super().from_dict({**_BEFORE, **config_dict}, **kwargs)


AutoConfig.register(MemLMConfig.model_type, MemLMConfig, exist_ok=True)
