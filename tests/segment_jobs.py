"""Models, data and workers of the tests of ``lrtt_ddp``. Workers are forked from a server that has imported everything."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing as mp
import os
import signal
import socket
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_lrtt import LRTT, IOConfig, LRTTConfig, LRTTDDPStrategy, convert_to_lrtt, devices
from lightning_lrtt.nn import find_tiles
from lightning_lrtt.strategies import segment_fit
from lightning_lrtt.weights import Pretrained, plan

BATCH, ROWS = 24, 96
SOFT = devices.SoftBounds(dw_min=0.002, w_max=1.0, w_min=-1.0)
DIGITAL = LRTTConfig(rank=2, transfer_every=3)
PULSED = LRTTConfig(rank=2, transfer_every=3, reinit_gain=1.0, fast_device=SOFT, visible_device=SOFT)
NOISY = replace(DIGITAL, io=IOConfig(inp_noise=0.02, out_noise=0.1))
NOISY_PULSED = replace(PULSED, io=IOConfig(inp_noise=0.02, out_noise=0.1))


class Rows(Dataset[Any]):
    """Fixed inputs, with random noise added at every access, as augmentation does."""

    def __init__(self, shape: tuple[int, ...], rows: int = ROWS, bad: int = -1) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(rows, *shape, generator=generator)
        self.y = self.x.flatten(1)[:, :3].sin()
        if bad >= 0:
            self.x[bad] = float("nan")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] + 0.01 * torch.randn(self.x[i].shape), self.y[i]


class Transformer(nn.Module):
    """One encoder layer with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def network(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A small network and the shape of its input."""
    if kind == "conv":
        body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.Flatten(),
            nn.Linear(4 * 16, 3),
        )
        return body, (1, 6, 6)
    if kind == "transformer":
        return Transformer(), (5, 8)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3)), (6,)


class Net(pl.LightningModule):
    """Squared error; counts its calls and can misbehave at one step on one rank."""

    def __init__(self, kind: str = "mlp", trouble: Callable[[pl.LightningModule], None] | None = None) -> None:
        super().__init__()
        self.net, self.shape = network(kind)
        self.calls, self.trouble = 0, trouble

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        if self.trouble is not None:
            self.trouble(self)
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val/loss", (self.net(x) - y).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.2),
                "monitor": "val/loss",
            },
        }


def digest(module: nn.Module) -> str:
    """Of every parameter and buffer."""
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not name.endswith("_extra_state"):
            sha.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def fit(
    workers: int,
    kind: str = "mlp",
    config: LRTTConfig | None = None,
    *,
    epochs: int = 2,
    resume: str | None = None,
    save: str | None = None,
    trouble: Any = None,
    batch: int = BATCH,
    rows: int = ROWS,
    bad: int = -1,
    drop_last: bool = False,
    accelerator: str = "cpu",
    trainer: dict[str, Any] | None = None,
    **strategy: Any,
) -> dict[str, Any]:
    """Train in this process, which is one of ``workers``; return the digest and what the tests look at."""
    warnings.simplefilter("ignore")
    pl.seed_everything(3, verbose=False)
    model = Net(kind, trouble)
    options: dict[str, Any] = {"exclude": ["*"]} if config is None else {"config": config}
    defaults = {"timeout": 600.0, "verify_every": 3}
    run = pl.Trainer(
        accelerator=accelerator,
        devices=workers,
        strategy=LRTTDDPStrategy(**(options | defaults | strategy)),
        max_epochs=epochs,
        **(
            {
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "logger": False,
                "enable_checkpointing": False,
                "gradient_clip_val": 1.0,
                "num_sanity_val_steps": 0,
            }
            | (trainer or {})
        ),
    )
    loader = DataLoader(Rows(model.shape, rows, bad), batch_size=batch, shuffle=True, drop_last=drop_last)
    run.fit(model, loader, DataLoader(Rows(model.shape, 30), batch_size=8), ckpt_path=resume)
    if save is not None:
        run.save_checkpoint(save)
    return {
        "digest": digest(model),
        "step": run.global_step,
        "calls": model.calls,
        "loss": float(run.callback_metrics.get("train/loss", 0.0)),
        "lr": run.optimizers[0].param_groups[0]["lr"],
        "metrics": {k: float(v) for k, v in run.callback_metrics.items()},
    }


# -------------------------------------------------------------- processes


_LIMIT = 150.0  # s; reached by hanging workers only, so far above what a busy machine needs


class Failed(Exception):
    """What went wrong on the workers, by rank."""

    def __init__(self, errors: dict[int, str]) -> None:
        super().__init__("\n".join(f"worker {r}: {e}" for r, e in sorted(errors.items())))
        self.errors = errors


@contextlib.contextmanager
def _free_port() -> Iterator[int]:
    """A port of this host that nobody else is given meanwhile."""
    with socket.socket() as probe:
        # A bound socket that does not listen keeps the port from everybody who asks for any, connections included; with
        # this option on both sides the workers' store, which asks for this one, can still listen on it.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]


def run(workers: int, job: Callable[..., Any], *args: Any, patience: float = 60.0, **kwargs: Any) -> list[Any]:
    """``job(workers, *args)`` in that many processes; their results by rank.

    After a worker has failed the others have ``patience`` seconds left. By default that is far below the ``timeout`` of `fit`,
    so an error that arrives in it did not wait for that one.

    Raises:
        Failed: If a worker raised or ended without a result, or time was up (every worker that is left is ended).
    """
    context = mp.get_context("forkserver")
    # The server finds this module by PYTHONPATH only; otherwise every worker would import everything again.
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(os.pathsep.join(paths).split(os.pathsep)))
    context.set_forkserver_preload(["segment_jobs", "torch._dynamo"])
    with _free_port() as port:
        results, errors = _run(context, workers, port, job, args, kwargs, patience)
    if errors:
        raise Failed(errors)
    return [results[rank] for rank in range(workers)]


def _run(
    context: Any, workers: int, port: int, job: Any, args: Any, kwargs: Any, patience: float
) -> tuple[dict[int, Any], dict[int, str]]:
    """Results and errors by rank, after all workers have ended."""
    end = time.monotonic() + _LIMIT
    pipes, processes = [], []
    for rank in range(workers):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_worker, args=(theirs, rank, workers, port, job, args, kwargs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = connection.wait(list(waiting), max(end - time.monotonic(), 0.0))
        if not ready:
            errors |= dict.fromkeys(waiting.values(), "no result in time")
            break
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                kind, value = pipe.recv()
            except EOFError:
                kind, value = "error", "ended without a result"
            (results if kind == "result" else errors)[rank] = value
            if kind == "error":
                end = min(end, time.monotonic() + patience)
    for process in processes:
        process.join(0.0 if errors else 5.0)
        if process.is_alive():
            process.kill()
            process.join()
    return results, errors


def _worker(pipe: Any, rank: int, workers: int, port: int, job: Callable[..., Any], args: Any, kwargs: Any) -> None:
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        try:
            pipe.send(("result", job(workers, *args, **kwargs)))
        except BaseException as error:
            text = (
                "".join(traceback.format_exception(error))
                if os.environ.get("SEGMENT_TRACE")
                else f"{type(error).__name__}: {error}"
            )
            pipe.send(("error", text))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def several(workers: int, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several fits one after the other in the same workers."""
    return [fit(workers, **job) for job in jobs]


# -------------------------------------------------------------- trouble, on worker 1 at the third step


def _now(model: pl.LightningModule, step: int = 2) -> bool:
    return model.trainer.global_rank == 1 and model.trainer.global_step == step


def raises(model: pl.LightningModule) -> None:
    """An error in the user's code; the message ends with the time."""
    if _now(model):
        raise ValueError(f"on purpose at {time.monotonic()}")


def dies(model: pl.LightningModule) -> None:
    """kill -9."""
    if _now(model, 3):
        os.kill(os.getpid(), signal.SIGKILL)


def sleeps(model: pl.LightningModule) -> None:
    """Never comes back."""
    if _now(model):
        time.sleep(1000)


def computes_differently(model: pl.LightningModule) -> None:
    """As another machine might: one parameter's bits differ, in the self-test's segment."""
    if _now(model, 0) and model.calls == 1:
        with torch.no_grad():
            next(model.parameters()).view(-1)[0].mul_(1.001)


def drifts(model: pl.LightningModule) -> None:
    """A replica is changed on one worker."""
    if _now(model, 1):
        with torch.no_grad():
            next(model.parameters()).view(-1)[0].add_(1e-3)


def remembers(model: pl.LightningModule) -> None:
    """A result that depends on the calls before."""
    model.net[1].scale = getattr(model.net[1], "scale", 0) + 1
    with torch.no_grad():
        torch.rand(model.calls)  # moves the generator that dropout draws from


def keep_all(folder: Path) -> dict[str, Any]:
    """Trainer options: a checkpoint at every step."""
    callback = pl.callbacks.ModelCheckpoint(str(folder), every_n_train_steps=1, save_last=True)
    return {"enable_checkpointing": True, "callbacks": [callback]}


def fit_pretrained(workers: int, path: str, mode: str, config: LRTTConfig, trouble: str = "", **options: Any) -> Any:
    """A fit from a checkpoint, other random weights on every worker; what was read, sent and computed.

    ``trouble``: ``missing`` or ``other`` gives worker 1 no file, or one with other values; ``slow`` holds up every tensor
    that worker 0's prefetching thread reads.
    """
    rank = int(os.environ["LOCAL_RANK"])
    loads: list[str] = []
    sent: list[int] = []
    fill, broadcast, seeded = plan.LoadPlan.fill, torch.distributed._broadcast_coalesced, pl.seed_everything

    def counted(self: Any, entry: Any) -> None:
        loads.append(entry.name)
        if trouble == "slow" and rank == 0 and threading.current_thread().name == "lrtt-prefetch":
            time.sleep(0.3)
        fill(self, entry)

    def watched(group: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        sent.extend(t.data_ptr() for t in tensors)
        return broadcast(group, tensors, *args, **kwargs)

    def filled(self: Any) -> None:
        original(self)
        module = self.lightning_module
        found["start"] = {name: t.effective_weight().tolist() for name, t in find_tiles(module).items()}
        found["sent_c"] = len({t.weight.data_ptr() for t in find_tiles(module).values()} & set(sent))

    found: dict[str, Any] = {}
    original = LRTTDDPStrategy.on_train_start
    plan.LoadPlan.fill, torch.distributed._broadcast_coalesced = counted, watched  # type: ignore[method-assign]
    LRTTDDPStrategy.on_train_start = filled  # type: ignore[method-assign]
    pl.seed_everything = lambda seed, **kwargs: seeded(3, **kwargs) and torch.manual_seed(100 + rank)
    try:
        where = f"{path}.{trouble}" if trouble in ("missing", "other") and rank == 1 else path
        found |= fit(workers, config=config, pretrained=Pretrained(where, mode), **options)  # type: ignore[arg-type]
    finally:
        plan.LoadPlan.fill, torch.distributed._broadcast_coalesced = fill, broadcast  # type: ignore[method-assign]
        LRTTDDPStrategy.on_train_start, pl.seed_everything = original, seeded  # type: ignore[method-assign]
    return found | {"loads": loads, "sent": len(sent)}


def fit_under_torchrun(workers: int, port: int, attempt: int) -> str:
    """The digest of a fit in the environment that torchrun gives to its ``attempt``; worker 0 comes to the store first."""
    rank = os.environ["LOCAL_RANK"]
    os.environ.update(
        RANK=rank,
        WORLD_SIZE=str(workers),
        LOCAL_WORLD_SIZE=str(workers),
        GROUP_RANK="0",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="none",
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT=str(attempt),
    )
    if rank == "1":
        time.sleep(3)
    return fit(workers, "mlp", DIGITAL, epochs=1)["digest"]


class OtherNet(Net):
    """The same network from other source code."""


def fit_differently(workers: int, what: str) -> None:
    """A fit in which worker 1 differs."""
    other = int(os.environ["LOCAL_RANK"]) == 1
    if what == "settings":
        fit(workers, segment_clip=1.0 if other else None)
    elif what == "code":
        globals()["Net"] = OtherNet if other else Net
        fit(workers)
    else:
        original = segment_fit.pin

        def pin(threads: int) -> Any:
            return original(threads + other)

        segment_fit.pin = pin
        fit(workers)


def fit_and_look(workers: int) -> dict[str, Any]:
    """A fit, and what it left behind."""
    os.environ["OMP_NUM_THREADS"] = "2"  # otherwise Lightning's launcher sets the number, before the strategy sees it
    torch.set_num_threads(2)
    before, original = torch.get_num_threads(), LRTTDDPStrategy.teardown
    seconds = []

    def teardown(self: Any) -> None:
        start = time.monotonic()
        original(self)
        seconds.append(time.monotonic() - start)

    LRTTDDPStrategy.teardown = teardown  # type: ignore[method-assign]
    fit(workers, epochs=1)
    files = [path.name for path in Path("/dev/shm").glob(f"lrtt-{os.getpid()}-*")]
    return {"teardown": sum(seconds), "threads": torch.get_num_threads(), "threads_before": before, "files": files}


class WithTiles(Net):
    """A module that brings its own tiles and optimizer."""

    def __init__(self) -> None:
        super().__init__()
        convert_to_lrtt(self.net, NOISY)

    def configure_optimizers(self) -> Any:
        return LRTT(self.parameters(), lr=0.1)


def plain_ddp(workers: int) -> list[tuple[int, int]]:
    """A fit under Lightning's DDP with noisy reads; where each tile's samples are numbered from, and how many may be."""
    model = WithTiles()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=workers,
        strategy="ddp",
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, DataLoader(Rows(model.shape), batch_size=BATCH))
    return [(tile.first_sample, tile.most_samples) for tile in find_tiles(model).values()]
