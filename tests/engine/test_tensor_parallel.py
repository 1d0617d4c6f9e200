"""A base model over two processes gives the numbers of one, and both processes stay the same to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from gpuworker import group as group_module
from gpuworker.engine.adapters import AdapterState, Layout
from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import (
    AdapterNotLoaded,
    BaseModelError,
    CheckpointError,
    LoraSpecError,
    NonFiniteError,
)
from gpuworker.engine.memory import is_out_of_memory
from gpuworker.engine.residency import AdapterMemory
from gpuworker.engine.sampling import Sampler
from gpuworker.engine.types import (
    AdamParams,
    ForwardBackwardResult,
    LoraSpec,
    OptimStep,
    SampleRequest,
    SampleResult,
    SamplingParams,
)
from gpuworker.group import WorkerGroup

from .conftest import CONFIGS, random_tokens
from .jobs import make_job, results, take_gradient

# Sums over the processes are made in another order than within one, so float32 rounds them elsewhere. The tolerance
# is absolute for log-probabilities (of about -6), and relative to a factor's largest number for the rest.
TOLERANCE = 2e-5
pytestmark = pytest.mark.skipif(
    torch.accelerator.current_accelerator() is not None, reason="this torch splits over its GPUs only"
)
TIMEOUT_S = 60.0

LoadEngine: TypeAlias = Callable[..., Engine]
ModelDirectory: TypeAlias = Callable[[str], Path]


@pytest.fixture(scope="module")
def group() -> Iterator[WorkerGroup]:
    """Two processes, this one among them, for the tests of this module."""
    reasons: list[str] = []
    made = WorkerGroup(["cpu", "cpu"], timeout_s=TIMEOUT_S, on_lost=reasons.append)
    yield made
    made.close()
    assert not reasons
    assert not torch.distributed.is_initialized()


@pytest.fixture(scope="module")
def load_shared(group: WorkerGroup, model_directory: ModelDirectory) -> LoadEngine:
    """Return an engine over both processes."""
    made: dict[str, Engine] = {}

    def load(name: str = "qwen3") -> Engine:
        if name not in made:
            made[name] = group.load(
                model_directory(name), dtype="float32", adapter_memory=AdapterMemory(host_bytes=1 << 30)
            )
        return made[name]

    return load


def hold(engine: Engine, adapter_id: str, **spec: object) -> AdapterState:
    """Have an engine hold an adapter whose factors are all random, not zero as B is at first, and return its state."""
    chosen = LoraSpec(**({"rank": 4, "seed": 5} | spec))  # type: ignore[arg-type]
    engine.create_adapter(adapter_id, chosen)
    state = engine.export_state(adapter_id, optimizer=True, gradients=False)
    generator = torch.Generator().manual_seed(chosen.seed)
    weights = torch.randn(state.weights.shape, generator=generator) * 0.05
    engine.import_state(adapter_id, replace(state, weights=weights), optimizer=True)
    return engine.export_state(adapter_id, optimizer=True, gradients=False)


def gradient_of(engine: Engine, adapter_id: str) -> tuple[Layout, torch.Tensor]:
    state = engine.export_state(adapter_id, optimizer=False, gradients=True)
    assert state.gradient is not None
    return state.layout, state.gradient


def assert_close(value: torch.Tensor, expected: torch.Tensor, *, layout: Layout, tolerance: float) -> None:
    """Compare flat buffers factor by factor: the largest difference, by the factor's largest number."""
    factors = zip(layout.views(value).items(), layout.views(expected).values(), strict=True)
    for (name, pair), wanted_pair in factors:
        for factor, wanted in zip(pair, wanted_pair, strict=True):
            assert wanted.abs().max() > 0, name
            assert float((factor - wanted).abs().max() / wanted.abs().max()) < tolerance, name


def largest_difference(answers: list[ForwardBackwardResult], expected: list[ForwardBackwardResult]) -> float:
    pairs = zip(answers, expected, strict=True)
    return max(
        float(np.abs(values - wanted).max())
        for answer, other in pairs
        for values, wanted in zip(answer.logprobs, other.logprobs, strict=True)
    )


def methods_of(kind: type) -> set[str]:
    """Return the public methods, without properties."""
    return {name for name, value in vars(kind).items() if name[0] != "_" and not isinstance(value, property)}


def draw(engine: Engine, request: SampleRequest) -> SampleResult:
    engine.sampler.submit(request)
    while True:
        for _, outcome in engine.sampler.step():
            assert isinstance(outcome, SampleResult), outcome
            return outcome


def test_every_call_is_repeated_or_known_to_change_nothing() -> None:
    """A new method of the engine has to be put on one of the two sides."""
    asked_alone = {"has_adapter", "adapter_bytes", "has_sampler", "load", "watch"}
    assert methods_of(Engine) == set(group_module.ENGINE_CALLS) | asked_alone
    called_by_those = {"release_unused"}
    asked_alone = {"tokens_of"}
    assert methods_of(Sampler) == set(group_module.SAMPLER_CALLS) | asked_alone | called_by_those


@pytest.mark.parametrize("architecture", CONFIGS)
def test_logprobs_and_gradients_are_those_of_one_process(
    architecture: str, load_engine: LoadEngine, load_shared: LoadEngine
) -> None:
    alone, shared = load_engine(architecture), load_shared(architecture)
    rng = np.random.default_rng(3)
    first, second = (make_job("g", rng, [9, 21, 5]) for _ in range(2))
    answers, gradients = [], []
    for engine in (alone, shared):
        hold(engine, "g")
        answers.append(results(engine.forward_backward([first]) + engine.forward_backward([second])))
        layout, gradient = gradient_of(engine, "g")
        gradients.append(gradient)

    assert largest_difference(answers[1], answers[0]) < TOLERANCE
    assert answers[1][0].metrics["loss:sum"] == pytest.approx(
        answers[0][0].metrics["loss:sum"], rel=TOLERANCE
    )
    assert_close(gradients[1], gradients[0], layout=layout, tolerance=TOLERANCE)


def test_biases_are_added_once(group: WorkerGroup, tmp_path: Path) -> None:
    sizes = CONFIGS["llama"].to_dict() | {"attention_bias": True, "mlp_bias": True}
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path)
    job = make_job("b", np.random.default_rng(11), [9, 21])
    answers = []
    for engine in (
        Engine.load(tmp_path, device="cpu", dtype="float32"),
        group.load(tmp_path, dtype="float32", adapter_memory=AdapterMemory()),
    ):
        hold(engine, "b")
        answers.append(results(engine.forward_backward([job])))
    assert largest_difference(answers[1], answers[0]) < TOLERANCE


@pytest.mark.parametrize(
    "parts",
    [
        {"train_mlp": False, "train_unembed": False},
        {"train_attn": False, "train_unembed": False},
        {"train_attn": False, "train_mlp": False},
    ],
    ids=["attention", "mlp", "head"],
)
def test_each_kind_of_layer_can_be_trained_by_itself(
    parts: dict[str, bool], load_engine: LoadEngine, load_shared: LoadEngine
) -> None:
    rng = np.random.default_rng(4)
    job = make_job("p", rng, [9, 21, 5])
    gradients = []
    for engine in (load_engine(), load_shared()):
        hold(engine, "p", **parts)
        results(engine.forward_backward([job]))
        layout, gradient = gradient_of(engine, "p")
        gradients.append(gradient)
    assert_close(gradients[1], gradients[0], layout=layout, tolerance=TOLERANCE)


def test_steps_lead_to_the_weights_of_one_process(load_engine: LoadEngine, load_shared: LoadEngine) -> None:
    rng = np.random.default_rng(5)
    jobs = [make_job("s", rng, [9, 21, 5]) for _ in range(5)]
    # A first step of Adam is the gradient's sign: with this eps, numbers near zero stay small instead.
    step = OptimStep(adapter_id="s", params=AdamParams(learning_rate=1e-2, eps=0.1, grad_clip_norm=1.0))
    states = []
    for engine in (load_engine(), load_shared()):
        hold(engine, "s")
        for job in jobs:
            results(engine.forward_backward([job]))
            engine.optim_step([step])
        states.append(engine.export_state("s", optimizer=True, gradients=False))

    alone, shared = states
    assert shared.step == alone.step == 5
    assert alone.optimizer is not None
    assert shared.optimizer is not None
    assert not torch.equal(alone.weights, hold(load_engine(), "s").weights)
    for value, expected in (
        (shared.weights, alone.weights),
        (shared.optimizer.exp_avg, alone.optimizer.exp_avg),
        (shared.optimizer.exp_avg_sq, alone.optimizer.exp_avg_sq),
    ):
        assert_close(value, expected, layout=alone.layout, tolerance=TOLERANCE)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_samples_are_those_of_one_process(
    architecture: str, temperature: float, load_engine: LoadEngine, load_shared: LoadEngine
) -> None:
    rng = np.random.default_rng(6)
    prompt = random_tokens(rng, 11)
    params = SamplingParams(max_tokens=12, seed=3, temperature=temperature, stop_tokens=())
    request = SampleRequest(
        request_id="r", sampler_id="w", prompt=prompt, params=params, num_samples=3, prompt_logprobs=True
    )
    drawn = []
    for engine in (load_engine(architecture), load_shared(architecture)):
        hold(engine, "w")
        engine.keep_sampler("w", "w")
        drawn.append(draw(engine, request))

    alone, shared = drawn
    assert alone.prompt_logprobs is not None
    assert shared.prompt_logprobs is not None
    assert np.nanmax(np.abs(shared.prompt_logprobs - alone.prompt_logprobs)) < TOLERANCE
    for sequence, expected in zip(shared.sequences, alone.sequences, strict=True):
        assert sequence.tokens.tolist() == expected.tokens.tolist()
        assert np.abs(sequence.logprobs - expected.logprobs).max() < TOLERANCE


def test_a_job_has_the_same_bits_whatever_runs_beside_it(load_shared: LoadEngine) -> None:
    engine, rng = load_shared(), np.random.default_rng(7)
    own, other = make_job("own", rng, [9, 21]), make_job("other", rng, [33, 4])
    seen = []
    for jobs in ([own], [other, own]):
        hold(engine, "own")
        hold(engine, "other", rank=8, seed=6)
        answer = results(engine.forward_backward(jobs))[-1]
        seen.append((np.concatenate(answer.logprobs), take_gradient(engine, "own")))
    assert np.array_equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])


def test_loaded_weights_sample_as_kept_ones(load_shared: LoadEngine) -> None:
    engine, rng = load_shared(), np.random.default_rng(8)
    state = hold(engine, "l")
    engine.keep_sampler("kept", "l")
    engine.load_sampler("loaded", state)
    params = SamplingParams(max_tokens=8, seed=1, stop_tokens=())
    prompt = random_tokens(rng, 5)
    kept, loaded = (
        draw(engine, SampleRequest(request_id=one, sampler_id=one, prompt=prompt, params=params))
        for one in ("kept", "loaded")
    )
    assert np.array_equal(kept.sequences[0].tokens, loaded.sequences[0].tokens)
    assert np.array_equal(kept.sequences[0].logprobs, loaded.sequences[0].logprobs)


def test_what_is_refused_leaves_the_processes_in_step(load_shared: LoadEngine) -> None:
    engine, rng = load_shared(), np.random.default_rng(9)
    state = hold(engine, "r")
    with pytest.raises(LoraSpecError):
        engine.create_adapter("r", LoraSpec(rank=0, seed=1))
    with pytest.raises(CheckpointError):
        engine.import_state("r", replace(state, weights=state.weights[1:]), optimizer=True)
    (unknown, good) = engine.forward_backward([make_job("nobody", rng, [5]), make_job("r", rng, [5])])
    assert isinstance(unknown, AdapterNotLoaded)
    assert isinstance(good, ForwardBackwardResult)
    assert take_gradient(engine, "r").abs().max() > 0


def test_a_loss_that_is_not_finite_adds_nothing_anywhere(load_shared: LoadEngine) -> None:
    engine, rng = load_shared(), np.random.default_rng(10)
    hold(engine, "n")
    good = make_job("n", rng, [9])
    datum = good.data[0]
    endless = replace(datum, inputs={"weights": np.full(9, np.inf, dtype=np.float32)})
    (refused,) = engine.forward_backward([replace(good, data=(endless,))])
    assert isinstance(refused, NonFiniteError)
    assert engine.export_state("n", optimizer=False, gradients=True).gradient is None
    results(engine.forward_backward([good]))


@pytest.mark.usefixtures("group")
def test_a_lack_of_memory_is_no_reason_to_try_otherwise() -> None:
    """The other process may have had room, and would wait in another place of the pass."""
    assert not is_out_of_memory(torch.OutOfMemoryError("no room"))


def test_the_fingerprint_and_the_sizes_tell_of_the_group(
    load_engine: LoadEngine, load_shared: LoadEngine
) -> None:
    alone, shared = load_engine(), load_shared()
    assert alone.fingerprint["num_devices"] == "1"
    assert shared.fingerprint["num_devices"] == "2"
    assert shared.num_parameters == alone.num_parameters
    assert alone.sizes["weight_bytes"] // 2 < shared.sizes["weight_bytes"] < alone.sizes["weight_bytes"]


def test_a_model_that_cannot_be_divided_is_refused(group: WorkerGroup, tmp_path: Path) -> None:
    sizes = CONFIGS["qwen3"].to_dict() | {"num_attention_heads": 6, "num_key_value_heads": 3}
    AutoModelForCausalLM.from_config(Qwen3Config(**sizes)).save_pretrained(tmp_path)
    sentence = "num_key_value_heads 3 of .* cannot be divided among 2 devices, only among 1$"
    with pytest.raises(BaseModelError, match=sentence):
        group.load(tmp_path, dtype="float32", adapter_memory=AdapterMemory())


def test_a_model_that_no_process_can_load_is_refused_and_others_still_load(
    group: WorkerGroup, model_directory: ModelDirectory, tmp_path: Path
) -> None:
    with pytest.raises(BaseModelError, match="holds no config"):
        group.load(tmp_path, dtype="float32", adapter_memory=AdapterMemory())
    engine = group.load(model_directory("llama"), dtype="auto", adapter_memory=AdapterMemory())
    assert engine.precision == "float32: the rule on several CPU processes"
