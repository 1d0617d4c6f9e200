"""One run under TRL's SFTTrainer, let go step by step so that it can alternate with others.

The trainer runs in a thread of its own that waits between its steps; a step is everything from
one optimizer step to the next: fetching and collating the batch, forward, backward, optimizer.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TrainerCallback

from bench.candidates.peft_runs import lora_config

_STEPS_WITHOUT_END = 1_000_000
_WAIT_S = 600


def is_installed() -> bool:
    """Return whether TRL can be imported."""
    return importlib.util.find_spec("trl") is not None


class TrlSetting(StrEnum):
    """How a step takes its batch; packed rows are as long as the longest sequence."""

    PADDED = "padded"
    SORTED = "sorted by length, two sequences at a time"
    PACKED = "packed, all rows at once"
    PACKED_ROWS = "packed, row by row"


class TrlRun:
    """SFTTrainer on a fixed batch.

    It refuses an adapter on the head, so it has that work less.

    Args:
        sequences: one batch; every step trains on all of it.
    """

    def __init__(
        self,
        load_model: Callable[[], Any],
        sequences: Sequence[list[int]],
        setting: TrlSetting,
        *,
        rank: int,
        work_dir: Path,
    ) -> None:
        self._load_model = load_model
        self._sequences = sorted(sequences, key=len)
        self._setting = setting
        self._rank = rank
        self._work_dir = work_dir
        self._gate = _Gate()
        self._thread = threading.Thread(target=self._train, daemon=True)

    def step(self) -> float:
        """Let the trainer take one step.

        Raises:
            RuntimeError: the trainer ended, with its error as the cause.
        """
        if not self._thread.is_alive():
            self._thread.start()
        self._gate.let_one_through()
        if self._gate.error is not None:
            raise RuntimeError(f"SFTTrainer: {self._gate.error}") from self._gate.error
        return 0.0

    def close(self) -> None:
        """End the trainer."""
        if self._thread.is_alive():
            self._gate.is_closing = True
            self._gate.may_go.release()
            self._thread.join(_WAIT_S)

    def _train(self) -> None:
        try:
            trainer = self._trainer()
            self._gate.may_go.acquire()
            trainer.train()
        except Exception as error:  # noqa: BLE001 - it is raised again in the thread that asked for the step
            self._gate.error = error
        finally:
            self._gate.has_ended.release()

    def _trainer(self) -> Any:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        model, num_sequences = self._load_model(), len(self._sequences)
        is_packed = self._setting in (TrlSetting.PACKED, TrlSetting.PACKED_ROWS)
        at_once = {TrlSetting.SORTED: 2, TrlSetting.PACKED_ROWS: 1}.get(self._setting, num_sequences)
        settings = SFTConfig(
            output_dir=str(self._work_dir / "trl"),
            per_device_train_batch_size=at_once,
            # An epoch is one batch, and its end ends a step: fewer packed rows than this are fine.
            gradient_accumulation_steps=-(-num_sequences // at_once),
            train_sampling_strategy="sequential",
            max_steps=_STEPS_WITHOUT_END,
            max_length=len(self._sequences[-1]) if is_packed else None,
            packing=is_packed,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            max_grad_norm=0.0,
            weight_decay=0.0,
            gradient_checkpointing=False,
            bf16=model.dtype == torch.bfloat16,
            use_cpu=model.device.type == "cpu",
            dataloader_pin_memory=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        return SFTTrainer(
            model=model,
            args=settings,
            train_dataset=Dataset.from_dict({"input_ids": [list(one) for one in self._sequences]}),
            processing_class=AutoTokenizer.from_pretrained(self._work_dir),
            peft_config=lora_config(self._rank, head=False),
            callbacks=[self._gate],
        )


class _Gate(TrainerCallback):  # type: ignore[misc]
    """Holds the trainer after each step until another is wanted."""

    def __init__(self) -> None:
        self.may_go = threading.Semaphore(0)
        self.has_ended = threading.Semaphore(0)
        self.is_closing = False
        self.error: Exception | None = None

    def let_one_through(self) -> None:
        self.may_go.release()
        if not self.has_ended.acquire(timeout=_WAIT_S):
            raise RuntimeError(f"SFTTrainer took more than {_WAIT_S} s for a step")

    def on_step_end(self, args: Any, state: Any, control: Any, **_unused: Any) -> Any:
        self.has_ended.release()
        self.may_go.acquire()
        control.should_training_stop = self.is_closing
        return control
