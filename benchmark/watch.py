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
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont

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

    def __post_init__(self):
        if not (self.run_dir / "checkpoint.pt").is_file():
            raise ValueError(f"{self.run_dir}: holds no checkpoint.pt, must be the folder of a run")
        if self.episodes < 1 or self.seed < 0:
            what = f"--episodes {self.episodes} --seed {self.seed}"
            raise ValueError(f"{what}: must be at least 1 and at least 0")
        if self.out and not self.out.absolute().parent.is_dir():
            raise ValueError(f"--out {self.out}: must be a file in a folder that there is")


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
        sys.exit(
            f"error: MuJoCo cannot render ({type(error).__name__}): install libegl1 and "
            "libgl1-mesa-dri (Debian, Ubuntu), or libosmesa6 and set MUJOCO_GL=osmesa"
        )


class Recorder(gym.Wrapper):
    """Notes how each episode was reset and its actions; it is played once more from them."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.episodes = []  # (arguments of reset, actions)

    def reset(self, **how):
        self.episodes.append((how, []))
        return self.env.reset(**how)

    def step(self, action):
        self.episodes[-1][1].append(action)
        return self.env.step(action)


def play(script, args: Args) -> dict[str, tuple[gym.Env, list]]:
    """Play the episodes; task -> its environment, (reset, actions) of each of its episodes."""
    actor, agent_args, tasks = script.load_agent(str(args.run_dir))
    if hasattr(script, "draw_goals"):  # Meta-World
        vector_env = script.make_vector_env(replace(agent_args, vectorization="sync"))
        vector_env.envs = [Recorder(env) for env in vector_env.envs]
        goals = script.draw_goals(args.seed, len(tasks), args.episodes)
        script.play(actor, vector_env, goals, "cpu", draw=False)
        envs = [[env] for env in vector_env.envs]
    else:
        envs = [[Recorder(script.make_env(task)) for _ in range(args.episodes)] for task in tasks]
        seeds = script.seed_all(args.seed, script.EVALUATION, 0, len(tasks) * args.episodes)
        space = envs[0][0].observation_space
        script.evaluate(script.PolicyTable(actor, space, len(tasks), "cpu"), envs, seeds)
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
        for number, (how, actions) in enumerate(episodes, 1):
            stride = math.ceil(len(actions) / room)
            env.reset(**how)
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
            room = (SIZE - 8) / ImageFont.load_default(14).getlength(text)
            font = ImageFont.load_default(14 * min(1, room))  # a long name in small letters
            place = x + SIZE // 2, y + SIZE + 10 + 17 * line
            draw.text(place, text, "black", font, anchor="mm")
    return image


def write_gif(films: list, out: Path) -> int:
    """Write the films side by side; returns the number of frames."""
    num_frames = max(len(shots) for shots in films)
    some = [np.asarray(mosaic(films, t)) for t in range(0, num_frames, 1 + num_frames // 20)]
    far_apart = Image.Quantize.MAXCOVERAGE  # the few red pixels of a door stay red
    palette = Image.fromarray(np.concatenate(some)).quantize(NUM_COLORS, far_apart)
    plain = dict(palette=palette, dither=Image.Dither.NONE)
    first, *others = (mosaic(films, t).quantize(**plain) for t in range(num_frames))
    first.save(out, "GIF", save_all=True, append_images=others, duration=MILLISECONDS, loop=0)
    return num_frames


def watch(args: Args) -> None:
    """Write the GIF of a run's agent."""
    out = args.out or args.run_dir / "agent.gif"
    checkpoint = torch.load(args.run_dir / "checkpoint.pt", "cpu", weights_only=True, mmap=True)
    if checkpoint["script"].startswith("mtsac"):
        check_renderer()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    torch.set_num_threads(1)  # many tiny operations
    played = play(importlib.import_module(checkpoint["script"]), args)
    num_frames = write_gif([film(task, *episodes) for task, episodes in played.items()], out)
    print(f"{out}: {num_frames} frames, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    watch(tyro.cli(Args))
