"""What happens beside the steps of a run: a log file, a progress line, an orderly end."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from memlm.files import parse_json, write_text


class LogFile(TrainerCallback):
    """Append every log line to a JSON-lines file; a resumed run removes lines of steps it trains again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the last step, too."""
        if control.should_training_stop or state.global_step >= state.max_steps:
            control.should_log = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove lines after the step that training begins at."""
        if not state.is_world_process_zero or not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                keep = parse_json(line)["step"] <= state.global_step
            except (ValueError, KeyError, TypeError):
                continue  # The line a kill cut short.
            if keep:
                kept.append(line + "\n")
        write_text(self.path, "".join(kept))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Write one line."""
        if state.is_world_process_zero and logs:
            line = {"step": state.global_step, **logs, "time": round(time.time(), 2)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def held_out(loss: float, right: float | None) -> str:
    """What an evaluation on the way found: the loss, and the share of answers right if any were asked."""
    answers = "" if right is None else f", {right:.0%} of answers right"
    return f"held-out loss {loss:.3f}{answers}"


class ProgressLine(TrainerCallback):
    """One line: steps with an estimate, the stage, loss and the share of answers right."""

    def __init__(self, stages: int) -> None:
        self.stages = stages
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if self.bar is None or not logs:
            return
        if "eval_loss" in logs:
            found = held_out(logs["eval_loss"], logs.get("eval_accuracy"))
            self.bar.write(f"step {state.global_step}: {found}", file=self.bar.fp)
        if "loss" not in logs:
            return
        shown = {"loss": f"{logs['loss']:.3f}"}
        if "stage" in logs:
            shown = {"stage": f"{int(logs['stage']) + 1}/{self.stages}", **shown}
        if "accuracy" in logs:
            shown["right"] = f"{logs['accuracy']:.0%}"
        self.bar.set_postfix(shown, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


class Interrupt(TrainerCallback):
    """On Ctrl-C or SIGTERM, end at the next step with a checkpoint; on a second one, end at once."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the two signals inside this context."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kinds = (signal.SIGINT, signal.SIGTERM)
        before = {kind: signal.getsignal(kind) for kind in kinds}

        def ask(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        for kind in kinds:
            signal.signal(kind, ask)
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)
