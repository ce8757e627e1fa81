"""The laws as a table, mechanism by law: runs the suite of laws and writes docs/laws.md.

python -m tests.law_table [--default] [--on=gpt2,qwen3] [NAME ...]

With names, only these mechanisms are run, and the other rows stay as they are. --default: what `make
test` runs, without the long documents and the other architectures. --on: these architectures alone, without
the long documents. With either, letters that a row has already stay.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

import torch
import transformers

from memlm.memory import available_memories
from tests.cases import families_of

OUT = Path(__file__).parent.parent / "docs" / "laws.md"
# Functions of tests/memory/test_laws.py by what they say.
LAWS = {
    "carry": "carry",
    "causality": "causality",
    "not vacuous": "the_first_segment_reaches_the_last",
    "rows": "rows_of_a_ragged_batch_equal_rows_alone",
    "bptt": "bptt_depth_cuts_exactly_there",
    "wavefront": "the_wavefront_is_the_sequence",
    "recompute": "recomputing_segments_changes_no_gradient",
    "checkpoint": "layer_checkpointing_of_the_base_changes_no_gradient",
    "gradients": "every_memory_parameter_gets_a_gradient",
    "purity": "purity",
    "size": "constant_size",
    "neutral": "neutral_at_the_start",
    "round trips": "round_trips",
    "numbers": "bfloat16_stays_close",
    "bounded": "long_documents_stay_bounded",
    "silence": "silence_leaves_the_state_as_it_was",
    "cache": "the_cache_changes_no_logit",
}
INITIALS = {
    "llama": "L",
    "gpt2": "G",
    "qwen3": "Q",
    "mamba2": "M",
    "falcon_h1": "F",
    "qwen3_next": "N",
}
ORDER = "".join(INITIALS.values()) + "x"
TEXT = """# The laws, mechanism by mechanism

One letter per architecture on which all checks of the law passed ({families}), an x where
some failed. All in float64 unless the law is about numbers. A dash: the mechanism does not promise it,
or the law says nothing about it. A memory that carries the base's own recurrent state stands on bases that
have one. Written by `python -m tests.law_table`
(torch {torch}, transformers {transformers}); `make test` runs on Llama what asks most of a
mechanism, for one mechanism per site another architecture, for two the other cases (padding on one side,
other windows of gradients), and beams for one of each way of going on within a segment. Where L stands
alone, no more than that was run; other letters may be from an earlier whole run.

{table}

- **carry**: segments in one call equal the same segments in any grouping of calls.
- **causality**: a changed token changes its own logit and none before it.
- **not vacuous**: a change in the first segment changes the last one's logits.
- **rows**: ragged rows, padded left, right and with holes, equal the same rows run alone.
- **bptt**: `bptt_depth` cuts gradients exactly there.
- **wavefront**: layers and segments that are run together give the outputs, states and gradients
  of the sequence; who cannot is refused by name.
- **recompute**, **checkpoint**: recomputing segments, or the base's layers, changes no gradient and
  writes once.
- **gradients**: every memory parameter gets one.
- **purity**: the same call twice gives the same result; nothing on the modules changes; `write=False`
  returns the state itself.
- **size**: shapes and bytes are the same after 1 and after 400 segments.
- **neutral**: freshly attached, the first segment's logits are the base model's.
- **round trips**: state, model and memory are saved and loaded, and go on as if they had not been.
- **numbers**: bfloat16 and autocast stay close.
- **bounded**: 100,000 tokens in float32 stay finite and no larger than in the first 12,800 (Llama, Mamba2).
- **silence**: where every write gate is zero, 1,000 segments leave the state as it was, to the bit (Llama).
- **cache**: generating with what is kept of the open segment gives the logits of reading it anew, past
  borders, in ragged batches, greedily and with beams.

Besides these each mechanism has an oracle of its own, named on its [page](methods.md), and a check that it
learns ([results](results.md)).
"""


def rows_before() -> dict[str, dict[str, str]]:
    """name -> law -> letters, as the file has them."""
    table = [line for line in OUT.read_text().splitlines() if line.startswith("| ")]
    laws = [cell.strip() for cell in table[0].strip("|").split("|")][1:]
    found = {}
    for line in table[1:]:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found[name.strip("`")] = dict(zip(laws, cells, strict=True))
    return found


def main(arguments: list[str]) -> int:
    default = "--default" in arguments
    wanted = [f for a in arguments if a.startswith("--on=") for f in a[5:].split(",")]
    unknown = [f for f in wanted if f not in INITIALS]
    if unknown:
        raise SystemExit(f"--on={unknown[0]} is unknown; use {', '.join(INITIALS)}")
    chosen = [a for a in arguments if not a.startswith("--")] or list(available_memories())
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "laws.xml"
        # Every architecture and the long documents too, which the default run leaves out.
        marks = "not gpu and not slow" if default else "not gpu"
        command = [sys.executable, "-m", "pytest", "tests/memory/test_laws.py", "-m", marks]
        groups = [chosen] if len(chosen) < len(available_memories()) else []
        groups += [wanted] if wanted else []
        if groups:
            command += ["-k", " and ".join(f"({' or '.join(group)})" for group in groups)]
        code = subprocess.run([*command, f"--junitxml={report}"], check=False).returncode
        cases = list(ElementTree.parse(report).iter("testcase"))
    found: dict[tuple[str, str, str], list[bool]] = defaultdict(list)
    for case in cases:
        match = re.fullmatch(r"test_(\w+)\[(.+)\]", case.get("name", ""))
        if match is None or case.find("skipped") is not None:
            continue
        law, label = match.groups()
        # "left-titans-mac-llama": names contain the separator, so the longest that fits counts.
        names = [name for name in available_memories() if f"-{name}-" in f"-{label}-"]
        if names:
            good = case.find("failure") is None and case.find("error") is None
            name = max(names, key=len)
            families = families_of(name)
            family = next((f for f in families if f"-{f}-" in f"-{label}-"), families[0])
            found[name, law, family].append(good)
    before = rows_before()
    lines = [f"| memory | {' | '.join(LAWS)} |", "|---" * (len(LAWS) + 1) + "|"]
    for name in available_memories():
        cells = []
        for title, law in LAWS.items():
            results = [(f, found[name, law, f]) for f in families_of(name) if found[name, law, f]]
            letters = {INITIALS[f] if all(good) else "x" for f, good in results}
            if name not in chosen or default or wanted:
                letters |= set(before.get(name, {}).get(title, "-")) - {"-"}
            cells.append("".join(sorted(letters, key=ORDER.index)) or "-")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    text = TEXT.format(
        families=", ".join(f"{letter} {family}" for family, letter in INITIALS.items()),
        torch=torch.__version__,
        transformers=transformers.__version__,
        table="\n".join(lines),
    )
    OUT.write_text(text)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
