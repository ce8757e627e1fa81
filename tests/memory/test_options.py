"""The laws, on Llama, of mechanisms with options that their cases leave off."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from memlm.memory import (
    ARMTConfig,
    BlockRecurrentConfig,
    FAMConfig,
    GatedDeltaConfig,
    KNNConfig,
    LaCTConfig,
    LandmarkConfig,
    MemoryCachingConfig,
    MemoryConfig,
    MoMConfig,
    RMTRConfig,
    TitansMACConfig,
    TitansMAGConfig,
    TitansMALConfig,
    TTTLinearConfig,
    name_of,
)
from tests.cases import CASES, by_default
from tests.memory import test_laws as laws

OPTIONS: dict[str, MemoryConfig] = {
    "armt-heads": ARMTConfig(
        num_memory_tokens=3, d_mem=8, num_heads=2, unit_features=True, vector_gate=True
    ),
    "armt-undivided": ARMTConfig(
        num_memory_tokens=2, d_mem=8, unit_features=True, normaliser="none", query_scale=2.0
    ),
    "titans-mac": TitansMACConfig(
        chunk_length=4, conv_size=3, coupled_rate=False, max_rate=0.3, combine="multiply"
    ),
    "titans-mac-rules": TitansMACConfig(
        num_heads=2,
        chunk_length=4,
        momentum=False,
        objective="huber",
        window=3,
        key_features="quadratic",
        gated=True,
    ),
    "titans-mag-reset": TitansMAGConfig(num_heads=2, chunk_length=4, window=2, reset_every=4),
    "titans-mal-shares": TitansMALConfig(
        num_heads=2, chunk_length=3, momentum=False, retention="softmax", residual=True
    ),
    "titans-mag": TitansMAGConfig(
        num_heads=2, chunk_length=3, coupled_rate=False, max_rate=0.3, combine="multiply"
    ),
    "gated-delta-pairs": GatedDeltaConfig(
        rule="delta",
        key_map="product",
        num_heads=2,
        head_dim=8,
        value_dim=6,
        chunk_length=4,
        conv_size=3,
    ),
    "block-recurrent-lstm": BlockRecurrentConfig(num_states=3, num_heads=2, gate="lstm"),
    "fam-free": FAMConfig(num_memory_tokens=2, keeps_length=False),
    "knn-chunks": KNNConfig(capacity=20, top_k=6, chunk_length=2, layers=(0, 1)),
    "lact-muon": LaCTConfig(num_heads=2, expansion=2, muon=True),
    "memory-caching-continues": MemoryCachingConfig(
        num_slots=4, top_k=2, num_heads=2, chunk_length=4, conv_size=3, continuing=True
    ),
    "landmark-dense": LandmarkConfig(num_blocks=4, block_length=3, top_k=3, grouped=False),
    "mom-same-projections": MoMConfig(
        num_memories=3,
        rule="kda",
        own_projections=False,
        shared_memory=False,
        write_gate="hard",
        num_heads=2,
        head_dim=4,
    ),
    "rmt-r": RMTRConfig(
        num_memory_tokens=2, bank_size=2, archive_size=2, recall=1, biases=True, read_memory=False
    ),
    "ttt-linear-plain": TTTLinearConfig(num_heads=2, mini_batch=4, conv_size=0, gated=False),
}
LAWS: dict[str, Callable[..., None]] = {
    "carry": laws.test_carry,
    "causality": laws.test_causality,
    "reach": laws.test_the_first_segment_reaches_the_last,
    "rows": partial(laws.test_rows_of_a_ragged_batch_equal_rows_alone, side="holes"),
    "depth": partial(laws.test_bptt_depth_cuts_exactly_there, windows=(2, "end")),
    "recomputing": laws.test_recomputing_segments_changes_no_gradient,
    "gradients": laws.test_every_memory_parameter_gets_a_gradient,
    "purity": laws.test_purity,
    "size": partial(laws.test_constant_size, segments=20),
    "neutral": laws.test_neutral_at_the_start,
    "numbers": laws.test_bfloat16_stays_close,
}
# The default run takes those that a wrong option breaks soonest.
ALWAYS = ("carry", "rows", "gradients", "neutral", "numbers")
options = pytest.mark.parametrize("option", OPTIONS)


@pytest.fixture
def memory(option: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The mechanism's name, which stands for the config with the option while the test runs."""
    name = name_of(OPTIONS[option])
    monkeypatch.setitem(CASES, name, OPTIONS[option])
    return name


@options
@pytest.mark.parametrize("law", by_default(LAWS, ALWAYS))
def test_laws(law: str, memory: str) -> None:
    LAWS[law](memory=memory, family="llama")


# Every field of a config is saved alike: by default for some with parameters or a state of their own.
SAVED = ("armt-heads", "titans-mac-rules", "knn-chunks", "mom-same-projections")


@pytest.mark.parametrize("option", by_default(OPTIONS, SAVED))
def test_round_trips(memory: str, tmp_path) -> None:
    laws.test_round_trips(memory, "llama", tmp_path)


@pytest.mark.parametrize(
    ("option", "skips"),
    [
        (option, skips)
        for option, config in OPTIONS.items()
        for name, skips in laws.SILENCES
        # What starts again is not silent.
        if name == name_of(config) and getattr(config, "reset_every", None) is None
    ],
)
def test_silence(memory: str, skips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    laws.test_silence_leaves_the_state_as_it_was(memory, 7, skips, monkeypatch)
