"""What an epoch computes: draws, training steps and metrics of one run, or of a stack.

On a GPU all tensors that steps and metrics of a stack read lie in buffers made once, so that both
are captured as CUDA graphs and replayed.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain, repeat
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from harness import objective, processes, streams
from harness.config import RunConfig
from harness.data.dataset import PURPOSE, Dataset
from harness.data.mapped import Mapped
from harness.metrics.evaluate import coefficients, conditions, fitted_scale, measure
from harness.models.stack import kernels, lift, map_tensors
from harness.models.vae import VAE
from harness.objective import Coefficients, Terms
from harness.training.mlp_gradient import MLPGradient, covers
from harness.training.optimizer import Optimizer

RANDOM = ("stochastic", "uniform")  # drawings of pixels that are new every epoch
ALIGNED = 16  # numbers in 64 bytes of float32, a cache line and a vector register
PART = 2**25  # bytes of the images that are read from a file at once, for some hundred steps
CACHED = 2**18  # pixels that are made at once, 1 MB, which a core's cache holds
MARGIN = 0.05  # of a GPU's memory left free, for metrics of finished runs and other programs
WARM_UP = 3  # calls before one is captured, in which libraries choose their kernels

Metrics = dict[str, Any]
# Of an epoch: seconds of training and of measuring, and each run's train and val metrics.
Measured = tuple[float, float, list[tuple[Metrics, Metrics]]]
Result = TypeVar("Result")
_capture_stream = cache(torch.cuda.Stream)  # one for all, since libraries keep a workspace for each


class State:
    """Weights, moments and layers' buffers of one run, or of a stack of runs computed as one.

    Numbers of the given models move into buffers, which decide bits: Adam rounds in their order,
    and matrix products read weights of linear layers as (in, out). On a CPU they lie in memory that
    worker processes share, so that any of them can train a run's next epoch.

    Attributes:
        rows: positions of the runs in the list that `train` was given.
        model: the architecture of each run; of one run the model itself, after `attach`.
        weights, first, second: weights and the optimiser's moments, shape (S, P).
        counts: steps taken, shape (S,).
        constants: layers' buffers and frozen parameters by name, shape (S, ...).
        best: weights and constants of the best epoch so far; none unless all runs keep them.
    """

    def __init__(
        self,
        rows: Sequence[int],
        configs: Sequence[RunConfig],
        models: Sequence[VAE],
        terms: Terms,
        *,
        stacked: bool,
    ) -> None:
        self.rows, self.configs, self.terms, self.stacked = rows, configs, terms, stacked
        self.model = model = models[0]
        given = [dict(_tensors(model)) for model in models]
        self._places: dict[str, tuple[int, int, Sequence[int], bool]] = {}
        size = 0
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                end = size + parameter.numel()
                transposed = parameter.dim() == 2 and parameter.t().is_contiguous()
                stored = parameter.shape[::-1] if transposed else parameter.shape
                self._places[name] = size, end, stored, transposed
                size = -(-end // ALIGNED) * ALIGNED  # where matrix products read fastest
        zeros = torch.zeros(len(models), size, dtype=model.dtype, device=model.device)
        self.weights, self.first, self.second = (processes.shared(zeros) for _ in range(3))
        self.counts = processes.shared(torch.zeros(len(models), device=zeros.device))
        self.constants = {
            name: processes.shared(torch.stack([one[name].detach() for one in given]))
            for name in given[0]
            if name not in self._places
        }
        for name, view in self.views(self.weights).items():
            for row, one in enumerate(given):
                view[row].copy_(one[name].detach())
        kept = [self.weights, *self.constants.values()] if configs[0].keep == "best" else []
        self.best = [processes.shared(value.clone()) for value in kept]
        for tensor in given[0].values():  # a worker process is sent no numbers twice
            tensor.data = tensor.new_empty(()).expand(tensor.shape)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the numbers of each trained parameter in a buffer (S, P), shape (S, ...)."""
        found = {}
        for name, (start, end, shape, transposed) in self._places.items():
            stored = flat[:, start:end].view(len(flat), *shape)
            found[name] = stored.mT if transposed else stored
        return found

    def numbers(self, *, best: bool = False) -> dict[str, Tensor]:
        """Return weights and constants by name, shape (S, ...); those of the best epoch if kept."""
        weights, *constants = (best and self.best) or (self.weights, *self.constants.values())
        return self.views(weights) | dict(zip(self.constants, constants, strict=True))

    def keep_best(self, row: int) -> None:
        """Keep weights and constants of a run as those of its best epoch."""
        for kept, now in zip(self.best, (self.weights, *self.constants.values()), strict=False):
            kept[row].copy_(now[row])

    def attach(self) -> None:
        """Make the numbers of one run's model those of this state, in the process that trains."""
        numbers = self.numbers()
        for name, tensor in _tensors(self.model):
            tensor.data = numbers[name][0]

    def join(self, each: Sequence[Any], axis: int = 0) -> Any:  # noqa: ANN401 - as `map_tensors`
        """Return the value of the one run, or those of a stack joined along an axis S."""
        if not self.stacked:
            return each[0]
        return map_tensors(lambda *values: torch.stack(values, axis), *each)

    def lift(self, function: Callable[..., Any], *, gradient: bool = False) -> Callable[..., Any]:
        """Return a function (model, *arguments) as one of arguments, in a stack with an axis S."""
        if not self.stacked:
            return partial(function, self.model)
        lifted = lift(self.model, function, gradient=gradient)
        return partial(lifted, self.views(self.weights), self.constants)

    def model_of(self, row: int, *, now: bool = False) -> VAE:
        """Return a copy of a run's model; unless as it is `now`, at the best epoch if kept."""
        model, numbers = copy.deepcopy(self.model), self.numbers(best=not now)
        for name, tensor in _tensors(model):
            tensor.data = numbers[name][row].clone()
        return model.eval()

    def keep(self, places: Sequence[int]) -> State:
        """Return the state of some runs of a stack."""
        rows, configs = [self.rows[s] for s in places], [self.configs[s] for s in places]
        models = [self.model_of(s, now=True) for s in places]
        kept = State(rows, configs, models, self.terms, stacked=True)
        for new, s in enumerate(places):
            kept.restore(new, self.of_run(s))
        return kept

    def of_run(self, row: int) -> dict[str, Tensor]:
        """Return views of all tensors that a run continues from, of shapes that fit any stack."""
        found = {"steps": self.counts[row]}
        for kind in ("weights", "first", "second"):
            views = self.views(getattr(self, kind))
            found |= {f"{kind}.{name}": view[row] for name, view in views.items()}
        found |= {f"constants.{name}": value[row] for name, value in self.constants.items()}
        kept = self.numbers(best=True) if self.best else {}
        return found | {f"best.{name}": value[row] for name, value in kept.items()}

    def restore(self, row: int, given: Mapping[str, Tensor]) -> None:
        """Set a run to the tensors that `of_run` returned."""
        for name, value in self.of_run(row).items():
            value.copy_(given[name])


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


class Draw(NamedTuple):
    """The draws of an epoch or a part of it; a stack's have an axis S behind that of steps."""

    order: Tensor  # rows of the images, int64, shape (steps, B)
    noise: Tensor  # of the posterior samples, shape (steps, B, L)
    betas: Tensor  # weight of the rate, shape (steps,)
    progress: Tensor  # of training, in [0, 1], shape (steps,)
    prior: Tensor | None  # N(0, I) for loss terms, shape (steps, B, L); None without terms


Drawn = tuple[Tensor, Draw]  # images, uint8 or a table's, and draws of consecutive steps


class Step:
    """The training step of one run or of a stack, with its buffers, and their metrics.

    `state` is updated in place; `data` is the dataset for each `drawing`, as runs are measured
    on it; `linear` has the exact linear model's losses by row of the run, on train and val.
    """

    def __init__(self, state: State, data: Mapping[str, Dataset], linear: Tensor) -> None:
        config, pixels, new = state.configs[0], state.model.pixels, state.weights.new_zeros
        self.state, self.data = state, data[config.drawing]
        self.images = data["none"].train if config.drawing in RANDOM else self.data.train
        self.steps = len(self.images) // config.batch_size
        size = config.batch_size * pixels
        several = len(state.rows) if state.stacked else min(self.steps, max(1, CACHED // size))
        rows = new(several, -(-size // ALIGNED) * ALIGNED)[:, :size]
        self._x = rows.unflatten(1, (config.batch_size, pixels))  # of runs, or of steps of one
        self._coefficients: Coefficients = state.join(
            [coefficients(c, pixels, self._x.device, self._x.dtype) for c in state.configs]
        )
        gradient = torch.zeros_like(state.weights)
        self._gradient, self._slopes = gradient, state.views(gradient)
        buffers = (state.weights, gradient, state.first, state.second, state.counts)
        self._optimizer = Optimizer(state.configs, *buffers, captured=state.stacked)
        self._written: MLPGradient | None = None
        if not state.stacked:
            state.attach()
            for name, parameter in state.model.named_parameters():
                parameter.grad = self._slopes[name][0] if name in self._slopes else None
            if not self._x.is_cuda and covers(config, state.model, state.terms):
                self._written = MLPGradient(config, state.model)
        self._first, self._val = self.data.train.head(len(self.data.val)), self.data.val
        if state.stacked:  # a GPU's graph reads no file
            self._first, self._val = (s.loaded(self._x.device) for s in (self._first, self._val))
        given = []  # to `measure`, of each run on both splits
        for c, losses in zip(state.configs, linear[list(state.rows)], strict=True):
            on_train = conditions(c, state.model, "train", len(self._first), losses[0])
            on_val = conditions(c, state.model, "val", len(self._val), losses[1])
            given.append((on_train, on_val))
        self._given = state.join(given)
        self._ahead: dict[int, Iterator[Drawn]] = {}
        if state.stacked:
            self.capture()

    def epoch(self, epoch: int) -> Measured:
        """Train an epoch, counted from 1, and measure the runs."""
        start = time.perf_counter()
        self.train(self._ahead.pop(epoch) if epoch in self._ahead else self.parts(epoch), epoch)
        if self.state.stacked and epoch < self.state.configs[0].epochs:
            self._ahead = {epoch + 1: _begun(self.parts(epoch + 1))}  # while a GPU computes
        if self._x.is_cuda:
            torch.cuda.synchronize(self._x.device)
        between = time.perf_counter()
        metrics = self.measure()
        return between - start, time.perf_counter() - between, metrics

    def parts(self, epoch: int) -> Iterator[Drawn]:
        """Yield the images of an epoch and its draws; of a file in parts of some steps.

        There is a copy of the images for each seed if pixels are drawn.
        """
        configs, steps, images = self.state.configs, self.steps, self.images.images
        of_seed = {c.seed: c for c in configs}
        first, seeds = configs[0], list(of_seed)
        purposes = ("noise", "prior") if first.terms else ("noise",)
        noise = {
            (seed, purpose): streams.generator(seed, purpose, epoch, first.latent_size)
            for seed in seeds
            for purpose in purposes
        }
        orders = (streams.batches(c, len(images), epoch) for c in of_seed.values())
        order = torch.stack([each.view(steps, first.batch_size) for each in orders], 1)
        if (kind := first.drawing) in RANDOM:
            drawn = (streams.generator(seed, PURPOSE[kind], epoch) for seed in seeds)
            images = torch.cat([self.images.drawn(kind, s).images[:] for s in drawn])
            order += len(self.images) * torch.arange(len(seeds)).unsqueeze(1)
        done = (epoch - 1) * steps + torch.arange(steps, dtype=torch.float64)
        betas = [
            objective.kl_warmup(c, epoch, steps) * objective.beta(c, self.data.pixels)
            for c in configs
        ]
        size = steps
        if isinstance(images, Mapped):
            row = images.shape[1] * images.dtype.itemsize
            size = max(1, PART // (order[0].numel() * row))

        def moved(part: Tensor) -> Tensor:
            return part.to(self._x if part.is_floating_point() else self._x.device)

        for start in range(0, steps, size):
            some = slice(start, start + size)
            places, held = order[some], images
            shape = len(places), first.batch_size, first.latent_size
            if isinstance(held, Mapped):
                held = held[places.flatten()]
                if self._x.is_cuda:  # copied while it computes
                    held = held.pin_memory().to(self._x.device, non_blocking=True)
                places = torch.arange(len(held)).view(places.shape)
            latents = {
                key: streams.normal(stream, shape[0] * shape[1], shape[2]).view(shape)
                for key, stream in noise.items()
            }
            draws = [
                Draw(
                    places[:, seeds.index(c.seed)],
                    latents[c.seed, "noise"],
                    beta[some],
                    done[some] / (c.epochs * steps),
                    latents.get((c.seed, "prior")),
                )
                for c, beta in zip(configs, betas, strict=True)
            ]
            yield held, map_tensors(moved, self.state.join(draws, 1))

    def train(self, parts: Iterable[Drawn], epoch: int) -> None:
        """Take every step of an epoch; a GPU may still compute on return."""
        self._optimizer.begin(epoch)
        with kernels(self.state.configs[0].precision):
            if self.state.stacked:
                for images, draw in parts:
                    map_tensors(_lay_out, self._laid_out, (images, draw))
                    self._now.zero_()
                    for _ in range(len(draw.betas)):
                        self._replay()
                return
            gpus, may_draw = [self._x.device] if self._x.is_cuda else [], self._written is None
            with torch.random.fork_rng(gpus, enabled=may_draw), torch.inference_mode(not may_draw):
                if may_draw:  # layers draw the same numbers in every process
                    stream = streams.generator(self.state.configs[0].seed, "layers", epoch)
                    torch.manual_seed(int(stream.integers(2**63)))
                    self.state.model.train()
                for images, draw in parts:
                    each = (repeat(None) if part is None else part.unbind() for part in draw)
                    steps = map(Draw, *each)
                    for order in draw.order.split(len(self._x)):
                        for x, now in zip(self._pixels(images, order), steps, strict=False):
                            self._take(x, now)
                if may_draw:
                    self.state.model.eval()

    def _pixels(self, images: Tensor, order: Tensor) -> Tensor:
        grey = images.index_select(0, order.flatten())
        x = self._x[: len(order)]
        return x.copy_(grey.view(x.shape)).div_(self.data.train.largest)

    def _take(self, x: Tensor, now: Draw) -> None:
        state = self.state
        if self._written is not None:
            self._written(x, now.noise, now.betas)
        else:
            given = x.unflatten(-1, state.model.data_shape), now, self._coefficients
            if state.stacked:
                slopes = state.lift(self._loss, gradient=True)(*given)
                torch._foreach_copy_([self._slopes[n] for n in slopes], list(slopes.values()))
            else:
                self._gradient.zero_()
                with torch.enable_grad():
                    self._loss(state.model, *given).backward()
        self._optimizer.step()

    def _loss(self, model: VAE, x: Tensor, now: Draw, coefficients: Coefficients) -> Tensor:
        batch = model.batch(x, now.noise, now.prior, len(self.images), now.progress)
        coefficients = coefficients._replace(beta=now.betas)
        given = self.state.configs[0], batch, coefficients, self.state.terms, model.kind
        return objective.objective(*given)

    def measure(self) -> list[tuple[Metrics, Metrics]]:
        """Return each run's metrics on the first training images and on validation images."""
        splits = []
        with kernels(), torch.no_grad():
            for named in (self._measure if self.state.stacked else self._metrics)():
                table = torch.stack([value.reshape(-1) for value in named.values()], 1).tolist()
                splits.append([dict(zip(named, values, strict=True)) for values in table])
        return list(zip(*splits, strict=True))

    def _metrics(self) -> tuple[Metrics, Metrics]:
        return self.state.lift(self._of_run)(*self._given)

    def _of_run(self, model: VAE, on_train: Metrics, on_val: Metrics) -> tuple[Metrics, Metrics]:
        config, classes = self.state.configs[0], self.data.classes
        same: dict[str, Any] = {"terms": self.state.terms, "training_size": len(self.images)}
        val = measure(config, model, self._val, classes, **on_val, **same)
        same["variance"] = fitted_scale(val)
        return measure(config, model, self._first, classes, **on_train, **same), val

    def capture(self) -> None:
        """Make step and metrics of a stack repeatable, and take the memory of an epoch."""
        state, device = self.state, self._x.device
        self._laid_out = next(self.parts(1))
        self._now = torch.zeros(1, dtype=torch.int64, device=device)
        changed = [state.weights, state.first, state.second, state.counts, self._now]
        with kernels(state.configs[0].precision):
            self._replay = repeatable(self._step, device, [*changed, *state.constants.values()])
        with kernels(), torch.no_grad():
            self._measure = repeatable(self._metrics, device)
        self._ahead = {1: _begun(self.parts(1))}
        if (free := free_memory(device)) < MARGIN:
            raise torch.OutOfMemoryError(f"{free:.1%} of the memory is left")

    def _step(self) -> None:
        images, draw = self._laid_out
        now = map_tensors(lambda every: every.index_select(0, self._now)[0], draw)
        self._take(self._pixels(images, now.order), now)
        self._now.add_(1)


def _begun(parts: Iterator[Drawn]) -> Iterator[Drawn]:
    return chain([next(parts)], parts)


def _lay_out(buffer: Tensor, part: Tensor) -> Tensor:
    return buffer[: len(part)].copy_(part)


def repeatable(
    function: Callable[[], Result], device: torch.device, changed: Sequence[Tensor] = ()
) -> Callable[[], Result]:
    """Return a function that repeats one: on a GPU a CUDA graph, without the Python interpreter.

    The function is tried, and undone in the tensors that it changes; a RuntimeError if it waits for
    the GPU. A graph reads and writes tensors in place, the result's too.
    """
    before = [tensor.clone() for tensor in changed]

    def tried() -> None:
        function()
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)

    if device.type != "cuda":
        tried()
        return function
    stream, waits = _capture_stream(), torch.cuda.get_sync_debug_mode()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls the mode a prototype
        tried()
        torch.cuda.set_sync_debug_mode("error")  # before a capture is broken by it
        try:
            for _ in range(WARM_UP - 1):
                tried()
        finally:
            torch.cuda.set_sync_debug_mode(waits)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = function()

    def replay() -> Result:
        graph.replay()
        return result

    return replay


def free_memory(device: torch.device) -> float:
    """Return the share of a GPU's memory that is free; 1 on a CPU."""
    if device.type != "cuda":
        return 1.0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return free / total
