"""Keep of complete runs what sweep.py, report.py and subnetworks.py read, in small folders.

A run of 400,000 timesteps on MT5 leaves about 70 KB: its arguments, its evaluations, measurements
of plasticity, and what it printed; a sparse one also its masks, 60 KB (masks.npz, a bit a weight).
A study that takes days goes on elsewhere from there:

    python benchmark/archive.py runs/sweep benchmark/logs
    cp -r benchmark/logs/. runs/sweep                       # on a new machine, before sweep.py
"""

import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from sweep import fail, printed_summary
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    """Keep of complete runs what sweep.py, report.py and subnetworks.py read."""

    runs_dir: tyro.conf.Positional[Path]  # folder of run folders, as sweep.py makes it
    out: tyro.conf.Positional[Path]  # folder to write to; what is there already stays


class Masks(NamedTuple):
    """The masks of a run's networks, as bool, and the weights of their task encoders, as float."""

    script: str
    args: dict
    timestep: int  # that they are of
    arrays: dict[str, np.ndarray]  # by network and layer, like actor/conv1; none: a dense run


def read_masks(folder: Path) -> Masks | None:
    """The masks in a run's checkpoint.pt, or in its masks.npz; None if it has neither."""
    try:
        if (folder / "checkpoint.pt").exists():
            state = torch.load(folder / "checkpoint.pt", "cpu", weights_only=True, mmap=True)
            arrays = {}
            for network in ("actor", "critic"):
                for layer, mask in state[network]["_extra_state"].items():
                    arrays[f"{network}/{layer}"] = mask.numpy() > 0
                if arrays and "task_encoder.weight" in state[network]:
                    weight = state[network]["task_encoder.weight"]
                    arrays[f"{network}/task_encoder"] = weight.numpy().copy()
            return Masks(state["script"], state["args"], state["timestep"], arrays)
        if (folder / "masks.npz").exists():
            with np.load(folder / "masks.npz") as file:
                arrays = dict(file)
            run = json.loads(str(arrays.pop("run")))
            for name, shape in run.pop("shapes").items():
                bits = np.unpackbits(arrays[name], count=math.prod(shape))
                arrays[name] = bits.reshape(shape).astype(bool)
            return Masks(**run, arrays=arrays)
    except Exception as error:  # torch.load and np.load raise nearly anything on a damaged file
        fail(f"{folder}: checkpoint.pt or masks.npz is damaged ({type(error).__name__})")
    return None


def keep_masks(folder: Path, target: Path) -> None:
    """Write the masks of a run to masks.npz in target, if it has any and they are not there yet."""
    masks = None if (target / "masks.npz").exists() else read_masks(folder)
    if masks is None or not masks.arrays:
        return
    bits = {name: array for name, array in masks.arrays.items() if array.dtype == bool}
    run = masks._asdict() | {"shapes": {name: mask.shape for name, mask in bits.items()}}
    packed = {name: np.packbits(mask) for name, mask in bits.items()}
    arrays = run.pop("arrays") | packed
    arrays["run"] = np.array(json.dumps(run))
    np.savez_compressed(target / "partial.npz", **arrays)
    os.replace(target / "partial.npz", target / "masks.npz")


def archive_run(folder: Path, target: Path) -> None:
    """Write a run's log to a new folder, thinned to what report.py reads, and what it printed."""
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = log.Tags()["scalars"]
    evaluated = {
        event.step for tag in tags if tag.startswith("eval/") for event in log.Scalars(tag)
    }
    [text] = log.Tensors("args/text_summary")[0].tensor_proto.string_val
    with tempfile.TemporaryDirectory(dir=target.parent) as partial:
        with SummaryWriter(partial) as writer:
            writer.add_text("args", text.decode())
            for tag in tags:
                group, *rest = tag.split("/")
                events = log.Scalars(tag)
                if group == "sparsity" and len(rest) == 1:  # of a network; in every iteration
                    events = [e for e in events if e.step in evaluated or e is events[0]]
                elif group not in ("eval", "plasticity"):
                    continue
                for event in events:
                    writer.add_scalar(tag, event.value, event.step)
        [events_file] = Path(partial).glob("events.out.tfevents.*")
        target.mkdir()
        shutil.move(events_file, target / "events.out.tfevents.archive")
        shutil.copy(folder / "output.txt", target)  # last: with it, the run counts as complete


def archive(args: Args) -> None:
    """Archive every complete run that is not there yet."""
    folders = sorted(file.parent for file in args.runs_dir.glob("*/output.txt"))
    complete = [folder for folder in folders if printed_summary(folder)]
    if not complete:
        fail(f"{args.runs_dir}: holds no complete run")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{args.out}: must be a folder to write to ({error.strerror})")
    new = [folder for folder in complete if not printed_summary(args.out / folder.name)]
    for folder in new:
        shutil.rmtree(args.out / folder.name, ignore_errors=True)  # of an archiving cut off
        archive_run(folder, args.out / folder.name)
    for folder in complete:  # also those that were archived before masks were kept
        keep_masks(folder, args.out / folder.name)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(
        f"{len(new)} runs archived, {len(complete) - len(new)} were; {size:,} bytes in {args.out}"
    )


if __name__ == "__main__":
    archive(tyro.cli(Args))
