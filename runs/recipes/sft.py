"""Supervised fine-tuning as a recipe: what each step submits. A pure function of settings, data and step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from runs.models import Operation
from runs.recipes import schedules
from runs.recipes.batches import BatchPlan, Int64Array
from runs.recipes.tokens import TokenStore
from runs.schemas import forward_backward as fb
from runs.schemas import requests
from runs.schemas.data import DatumArrays
from runs.schemas.forward_backward import ForwardBackwardPayload
from runs.schemas.recipes import SftConfig
from runs.services.recipe_steps import NewOperation

# Tokens of one validation forward: small enough that a neighbour's step waits no longer than for another step.
FORWARD_TOKENS: Final = 8_192


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Rows that the validation loss is measured on; `label` tells several datasets apart."""

    label: str
    store: TokenStore
    rows: Int64Array


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a run trains on and is measured on."""

    store: TokenStore
    rows: Int64Array
    plan: BatchPlan
    held_out: Sequence[HeldOut]


def train_step(
    material: Material, config: SftConfig, *, step: int, model_id: str, seq: int
) -> tuple[NewOperation, NewOperation]:
    """Return the forward_backward and the optimizer step of a step, counted from 0; they take `seq` and `seq + 1`."""
    data = _data(material.store, material.plan.rows_of(step), as_mean=True)
    forward_backward = _forward(data, model_id=model_id, seq=seq, forward_only=False)
    return forward_backward, _optim_step(config, step=step, model_id=model_id, seq=seq + 1)


def validation_forwards(held_out: HeldOut, *, model_id: str, first_seq: int) -> Iterator[NewOperation]:
    """Yield the forwards that measure the loss on held-out rows; their seqs count up from `first_seq`."""
    for number, rows in enumerate(_chunks(held_out)):
        data = _data(held_out.store, rows, as_mean=False)
        yield _forward(data, model_id=model_id, seq=first_seq + number, forward_only=True)


def _data(store: TokenStore, rows: Int64Array, *, as_mean: bool) -> tuple[DatumArrays, ...]:
    """Return the rows as data; as a mean their weights sum to 1, so that gradients do not grow with the batch."""
    token_rows = [store[int(row)] for row in rows]
    total = sum(int(row.mask[1:].sum()) for row in token_rows) if as_mean else 1
    return tuple(
        DatumArrays(
            tokens=row.tokens[:-1].astype(np.int64),
            target_tokens=row.tokens[1:].astype(np.int64),
            inputs={"weights": (row.mask[1:] / total).astype(np.float32)},
        )
        for row in token_rows
    )


def _forward(data: tuple[DatumArrays, ...], *, model_id: str, seq: int, forward_only: bool) -> NewOperation:
    payload = ForwardBackwardPayload(
        model_id=model_id,
        seq_id=seq,
        data=data,
        loss_fn="cross_entropy",
        loss_config={},
        forward_only=forward_only,
    )
    kind = Operation.Kind.FORWARD if forward_only else Operation.Kind.FORWARD_BACKWARD
    return NewOperation(kind=kind, payload=fb.to_bytes(payload), num_tokens=payload.num_tokens)


def _optim_step(config: SftConfig, *, step: int, model_id: str, seq: int) -> NewOperation:
    assert config.learning_rate is not None
    assert config.num_steps is not None
    params = requests.AdamParams(
        learning_rate=schedules.learning_rate(
            step,
            peak=config.learning_rate,
            num_steps=config.num_steps,
            schedule=config.schedule,
            warmup_share=config.warmup_share,
        ),
        weight_decay=config.weight_decay,
        grad_clip_norm=config.grad_clip_norm,
    )
    body = requests.OptimStep(model_id=model_id, seq_id=seq, adam_params=params)
    return NewOperation(kind=Operation.Kind.OPTIM_STEP, payload=requests.canonical_json(body))


def _chunks(held_out: HeldOut) -> Iterator[Int64Array]:
    """Yield the rows in groups of at most FORWARD_TOKENS tokens; a longer row goes alone."""
    group: list[int] = []
    num_tokens = 0
    for row in held_out.rows.tolist():
        length = int(held_out.store.lengths[row])
        if group and num_tokens + length > FORWARD_TOKENS:
            yield np.array(group, dtype=np.int64)
            group, num_tokens = [], 0
        group.append(row)
        num_tokens += length
    if group:
        yield np.array(group, dtype=np.int64)
