"""Show the agent of a run: an animated picture of all its tasks, side by side.

The agent of the last checkpoint plays some episodes of each task as in an evaluation (MiniGrid:
actions drawn from the policy; Meta-World: its mode, on the run's goals). They are then played once
more, action by action, and rendered without a display. An episode with more steps than fit skips
some, but shows its last one; a task that is through keeps its last picture.

    python benchmark/watch.py runs/sweep/MT5__mtppo_gmp__default__1
"""

import importlib
import math
import os
import sys
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont
from sweep import ROOT, fail

SCRIPTS = [path.stem for path in ROOT.glob("*.py") if path.stem != "plasticity_metrics"]
SIZE, CAPTION = 160, 54  # pixels of a task's picture, square, and of the three lines below it
MAX_FRAMES, HOLD, MILLISECONDS = 200, 5, 120  # of a GIF; of an episode's end; of a frame
NUM_COLORS = 128


@dataclass
class Args:
    """Show the agent of a run: an animated picture of all its tasks, side by side."""

    run_dir: tyro.conf.Positional[Path]  # folder of a run
    out: Path | None = None  # GIF to write (default: agent.gif in the run folder)
    episodes: int = 3  # episodes of each task
    seed: int = 1  # seed of the episodes


def check_args(args: Args) -> str:
    """Refuse what cannot be shown, before anything is played; the name of the run's script."""
    if args.episodes < 1:
        fail(f"--episodes {args.episodes}: must be at least 1")
    if not 0 <= args.seed < 2**63:
        fail(f"--seed {args.seed}: must be in [0, 2^63)")
    try:
        path = args.run_dir / "checkpoint.pt"
        name = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["script"]
    except (FileNotFoundError, NotADirectoryError):
        fail(f"{args.run_dir}: holds no checkpoint.pt, must be the folder of a run")
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        fail(f"{args.run_dir}: checkpoint.pt is not of a run ({type(error).__name__})")
    if name not in SCRIPTS:
        fail(f"{args.run_dir}: checkpoint.pt is of {name}, must be of one of {', '.join(SCRIPTS)}")
    try:
        if args.out.is_dir():
            raise IsADirectoryError(0, "is a folder")
        tempfile.TemporaryFile(dir=args.out.parent).close()
    except OSError as error:
        fail(f"--out {args.out}: must be a file that can be written ({error.strerror})")
    return name


def check_renderer() -> None:
    """End with an error where MuJoCo cannot render without a display."""
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # read when mujoco is imported
    try:
        with warnings.catch_warnings(action="ignore"):
            import mujoco

            mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), SIZE, SIZE).close()
    except Exception as error:  # a renderer that does not work raises anything
        sys.unraisablehook = lambda _: None  # what it made by half complains when it is freed
        fail(
            f"MuJoCo cannot render ({type(error).__name__}): install libegl1 (Debian, Ubuntu), or "
            "libosmesa6 and set MUJOCO_GL=osmesa"
        )


class Recorder(gym.Wrapper):
    """Notes the seed and the actions of each episode, which is then played once more from them."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.episodes = []  # (seed, actions)

    def reset(self, *, seed: int, options=None):
        self.episodes.append((seed, []))
        return self.env.reset(seed=seed)

    def step(self, action):
        self.episodes[-1][1].append(action)
        return self.env.step(action)


def play(script, args: Args) -> dict[str, tuple[gym.Env, list]]:
    """Play the episodes; task -> its environment, (seed, actions) of each of its episodes."""
    actor, agent_args, tasks = script.load_agent(str(args.run_dir))
    if script.__name__ == "mtsac_sparse_metaworld":
        vector_env = script.make_vector_env(replace(agent_args, vectorization="sync"))
        vector_env.envs = [Recorder(env) for env in vector_env.envs]
        goals = script.draw_goals(args.seed, len(tasks), args.episodes)
        script.evaluate_mode(actor, vector_env, goals, "cpu")
        envs = [[env] for env in vector_env.envs]
    else:
        envs = [[Recorder(script.make_env(task)) for _ in range(args.episodes)] for task in tasks]
        seeds = script.seed_all(args.seed, script.EVALUATION, 0, len(tasks) * args.episodes)
        script.evaluate(actor, envs, seeds, "cpu")
    return {
        task: (recorders[0].env, [episode for each in recorders for episode in each.episodes])
        for task, recorders in zip(tasks, envs, strict=True)
    }


@contextmanager
def camera(env: gym.Env):
    """What takes a picture of the environment, (h, w, 3) bytes of at most SIZE pixels a side."""
    env = env.unwrapped
    if hasattr(env, "get_frame"):  # MiniGrid
        yield lambda: env.get_frame(tile_size=SIZE // max(env.width, env.height))
        return
    import mujoco

    env.model.vis.quality.offsamples = 0  # without a GPU all three take ten times as long
    with mujoco.Renderer(env.model, SIZE, SIZE) as renderer:
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            renderer.scene.flags[flag] = False

        def picture():
            renderer.update_scene(env.data, camera="corner")
            return renderer.render()[::-1, ::-1]  # Meta-World's camera hangs upside down

        yield picture


def film(task: str, env: gym.Env, episodes: list) -> list[tuple[np.ndarray, list[str]]]:
    """Play a task's episodes once more: its pictures with their captions, in order."""
    name = task.removeprefix("MiniGrid-").removesuffix("-v0").removesuffix("-v3")
    room = max(1, MAX_FRAMES // len(episodes) - HOLD)
    shots = []
    with camera(env) as picture:
        for number, (seed, actions) in enumerate(episodes, 1):
            stride = math.ceil(len(actions) / room)
            env.reset(seed=seed)
            episodic_return = 0.0
            for step in range(len(actions) + 1):
                if step > 0:
                    episodic_return += env.step(actions[step - 1])[1]
                is_last = step == len(actions)
                if is_last or step % stride == 0:
                    where = f"episode {number}/{len(episodes)}, step {step}"
                    caption = [name, where, f"return {episodic_return:.2f}"]
                    shots += [(picture(), caption)] * (HOLD if is_last else 1)
    return shots


def mosaic(films: list, t: int) -> Image.Image:
    """The t-th picture of all tasks, or their last, in rows of 5 (of more than 10 tasks: of 10)."""
    columns = min(len(films), 5 if len(films) <= 10 else 10)
    width, height = columns * SIZE, math.ceil(len(films) / columns) * (SIZE + CAPTION)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for i, shots in enumerate(films):
        frame, caption = shots[min(t, len(shots) - 1)]
        x, y = i % columns * SIZE, i // columns * (SIZE + CAPTION)
        h, w = frame.shape[:2]
        image.paste(Image.fromarray(frame), (x + (SIZE - w) // 2, y + (SIZE - h) // 2))
        for line, text in enumerate(caption):
            size = 14
            while ImageFont.load_default(size).getlength(text) > SIZE - 8:
                size -= 1  # a long name in small letters
            place = x + SIZE // 2, y + SIZE + 10 + 17 * line
            draw.text(place, text, "black", ImageFont.load_default(size), anchor="mm")
    return image


def write_gif(films: list, out: Path) -> int:
    """Write the films side by side, whole or not at all; returns the number of frames."""
    num_frames = max(len(shots) for shots in films)
    some = [np.asarray(mosaic(films, t)) for t in range(0, num_frames, 1 + num_frames // 20)]
    far_apart = Image.Quantize.MAXCOVERAGE  # the few red pixels of a door stay red
    palette = Image.fromarray(np.concatenate(some)).quantize(NUM_COLORS, far_apart)
    plain = dict(palette=palette, dither=Image.Dither.NONE)
    frames = [mosaic(films, t).quantize(**plain) for t in range(num_frames)]
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    timing = dict(duration=MILLISECONDS, loop=0)
    try:
        frames[0].save(partial, "GIF", save_all=True, append_images=frames[1:], **timing)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return num_frames


def watch(args: Args) -> None:
    """Write the GIF of a run's agent."""
    args = replace(args, out=args.out or args.run_dir / "agent.gif")
    name = check_args(args)
    if name == "mtsac_sparse_metaworld":
        check_renderer()
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)  # many tiny operations
    played = play(importlib.import_module(name), args)
    num_frames = write_gif([film(task, *episodes) for task, episodes in played.items()], args.out)
    print(f"{args.out}: {num_frames} frames, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    watch(tyro.cli(Args))
