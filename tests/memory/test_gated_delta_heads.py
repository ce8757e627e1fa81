"""The gated delta rule at the softmax against its recurrence, with keys as they are handed out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from memlm.memory import QKV, GatedDeltaHeadsConfig
from memlm.memory.base import Dims
from memlm.memory.gated_delta_heads import GatedDeltaHeads
from memlm.memory.parts.gates import STRETCH
from tests.cases import randomise

EXACT = {"rtol": 0.0, "atol": 1e-10}
H, G, T, D, ROWS = 4, 2, 5, 3, 2


def cell(**options) -> GatedDeltaHeads:
    dims = Dims(H * D, H * D, 1, H, G, D, T)
    config = GatedDeltaHeads.resolve(GatedDeltaHeadsConfig(chunk_length=2, **options), dims)
    memory = GatedDeltaHeads(config, dims).double()
    memory.reset_parameters(1.0)
    randomise(memory)
    return memory


@pytest.mark.parametrize("gate", ["sigmoid", "hard"])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize(("erases", "decays"), [(True, True), (True, False), (False, True)])
@torch.no_grad()
def test_equals_the_recurrence(gate: str, threshold: float, erases: bool, decays: bool) -> None:
    memory = cell(write_gate=gate, write_threshold=threshold, erases=erases, decays=decays).eval()
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> torch.Tensor:
        return torch.randn(ROWS, heads, T, D, generator=generator, dtype=torch.float64)

    state = memory.init_state(ROWS)
    slow = torch.zeros(ROWS, G, D, D, dtype=torch.float64)
    for _ in range(3):
        x = QKV(random(H), random(G), random(G))
        mask = torch.rand(ROWS, T, generator=generator) < 0.7
        y, state = memory(x, state, lambda x: x.q, mask=mask)
        for row in range(ROWS):
            for t in mask[row].nonzero().flatten().tolist():
                for group in range(G):
                    k, v = x.k[row, group, t], x.v[row, group, t]
                    open_ = torch.sigmoid(memory.gates[0, group] @ k + memory.biases[0, group])
                    if gate == "hard":
                        open_ = (open_ * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)
                    open_ = open_ if open_ >= threshold else torch.zeros(())
                    held = slow[row, group]
                    if decays:
                        fading = torch.sigmoid(memory.gates[1, group] @ k + memory.biases[1, group])
                        log = torch.log(1 - fading)
                        if gate == "hard":
                            log = log * open_
                        elif open_ == 0:
                            log = torch.zeros(())
                        held = held * log.exp()
                    k = k / k.norm()
                    known = k @ held if erases else 0.0
                    slow[row, group] = held + open_ * torch.outer(k, v - known)
                    for head in range(group * H // G, (group + 1) * H // G):
                        q = F.normalize(x.q[row, head, t], dim=0)
                        expected = x.q[row, head, t] + memory.mix[head] * (q @ slow[row, group])
                        torch.testing.assert_close(y[row, head, t], expected, **EXACT)
        torch.testing.assert_close(state.memory, slow, **EXACT)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"write_gate": "soft"}, "write_gate='soft'"),
        ({"initial_decay": 0.0}, "initial_decay=0.0"),
        ({"write_cost": -1.0}, "write_cost=-1.0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cell(**options)
