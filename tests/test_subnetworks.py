"""What the tasks' heads read: masks by hand, networks, chance, runs, what is refused."""

import shutil
from dataclasses import asdict

import numpy as np
import pytest
import subnetworks
import torch
from test_benchmark import MT3, TINY, one_line_of_error

import moe_sparse
import mtppo_gmp
import mtppo_set

SHORT = TINY | dict(benchmark="MT3", total_timesteps=300, eval_frequency=300, prune_frequency=25)


def head_masks(*features, num_features=16):
    """Masks of heads, each with one useful hidden neuron that is connected to these features."""
    hidden = np.zeros((len(features), 2, num_features), bool)
    for task, own in enumerate(features):
        hidden[task, 0, own] = True
    output = np.zeros((len(features), 3, 2), bool)
    output[:, 1, 0] = True
    return dict(head_hidden=hidden, head_output=output)


def write_checkpoint(folder, actor, critic=None, **flags):
    """A checkpoint at timestep 2000 with no more than masks and arguments."""
    args = mtppo_set.Args(**dict(benchmark="MT3", total_timesteps=2000) | flags)
    state = dict(script="mtppo_set", args=asdict(args), timestep=2000)
    for name, masks in dict(actor=actor, critic=critic or actor).items():
        own = {layer: torch.from_numpy(mask).float() for layer, mask in masks.items()}
        state[name] = dict(_extra_state=own)
    folder.mkdir(parents=True)
    torch.save(state, folder / "checkpoint.pt")
    return folder


def tables(capsys, *paths, out=None):
    subnetworks.subnetworks(subnetworks.Args(paths, out))
    return capsys.readouterr().out


def row(text, first):
    """The cells of the first row that begins so."""
    [line, *_] = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def error(capsys, *paths, out=None):
    args = subnetworks.Args(paths, out)
    return one_line_of_error(capsys, subnetworks.subnetworks, args)


# What a head reads


def test_a_hidden_neuron_without_outputs_reads_nothing():
    masks = head_masks([0, 1], [2])
    masks["head_hidden"][0, 1, [1, 5, 6]] = True  # of the second neuron, which has no output
    network = subnetworks.read_network(masks)
    assert [np.flatnonzero(own).tolist() for own in network.reads] == [[0, 1], [2]]
    assert network.connected.tolist() == [4, 1] and network.hidden.tolist() == [1, 1]
    assert network.reached == 16 and network.shares is None


@pytest.mark.parametrize("script", [mtppo_gmp, moe_sparse], ids=lambda s: s.__name__)
def test_reads_are_what_gradients_reach(script):
    """From the observation to the features, and from these to each head's output."""
    torch.manual_seed(0)
    network = script.make_networks(script.Args(benchmark="MT3"))["actor"]
    network.masks = {
        name: (torch.rand_like(network.get_submodule(name).weight) < density).float()
        for name, density in zip(network.layers, (0.1, 0.02, 0.01, 0.02, 0.05), strict=True)
    }
    script.apply_masks(network)
    for layer in (network.conv1, network.conv2, network.conv3):  # no ReLU cuts a path
        layer.weight.data.abs_()
        layer.bias.data.zero_()
    if script is moe_sparse:
        network.task_encoder.weight.data.abs_()
    layers = subnetworks.read_layers(network.state_dict())
    found = subnetworks.read_network(layers)

    obs = torch.rand(20, 7, 7, 3)
    _, features, _ = network.activations(obs, [20, 0, 0])
    varies = (features.std(0) > 0).numpy()
    assert 0 < varies.sum() < 1024 and found.reached == varies.sum()
    assert (subnetworks.reached_features(layers) == varies).all()

    features = torch.randn(3, 1, features.shape[1], requires_grad=True)
    network.head_output(torch.tanh(network.head_hidden(features))).sum().backward()
    expected = (features.grad[:, 0] != 0).numpy() & varies
    assert expected.any(1).all() and (found.reads == expected).all()
    unread = (layers["head_hidden"].any(1) & varies).sum() - expected.sum()
    assert unread > 0  # there are hidden neurons without outputs


def test_overlaps_by_hand(tmp_path, capsys):
    """Two seeds: heads that read the same, one feature in three, nothing in common."""
    first = head_masks([0, 1], [0, 1], [1, 2])
    second = head_masks([0, 1], [2, 3], [1, 2])
    other = head_masks([0], [0], [0])
    for seed, masks in enumerate((first, second), 1):
        write_checkpoint(tmp_path / f"run{seed}", masks, other, seed=seed)
    write_checkpoint(tmp_path / "zeta", other, set_zeta=0.1)  # another method
    text = tables(capsys, tmp_path, out=tmp_path / "out")
    assert "MTPPO SET on MT3, set zeta 0.3: actor, 2 seeds" in text
    assert "MTPPO SET on MT3, set zeta 0.1: critic, 1 seed\n" in text
    assert "16, 16 of 16 features" in text
    mean, chance, _, *seeds = row(text, "LavaGapS7, RedBlueDoors-6x6")
    assert mean == "0.500*" and [own.split()[0] for own in seeds] == ["1.000", "0.000"]
    # Two of 16 features, twice: both the same with 1/120, one with 28/120
    assert float(chance) == pytest.approx((1 + 28 / 3) / 120, abs=0.005)
    assert row(text, "LavaGapS7, MemoryS11")[0] == "0.333"
    assert row(text, "MemoryS11")[:4] == ["1", "2", "2", "0.250"]  # alone: 1 of 2, none of 2
    critic = text[text.index("critic") :]
    assert row(critic, "LavaGapS7, RedBlueDoors-6x6")[0] == "1.000*"
    assert (tmp_path / "out" / "subnetworks.md").read_text().startswith(text)
    assert (tmp_path / "out" / "subnetworks.png").stat().st_size > 10_000


# Chance


def test_chance_against_sets_drawn():
    sizes, rng = np.array([9, 14, 4]), np.random.default_rng(0)
    sets = rng.random((4000, 3, 20)).argsort(2) < sizes[:, None]  # (draw, task, D)
    overlaps = [subnetworks.overlap(a, b) for a, b, _ in sets]
    alone = [subnetworks.alone(own, 0) for own in sets]
    for found, expected in (
        (subnetworks.overlap_by_chance(9, 14, 20, rng), overlaps),
        (subnetworks.alone_by_chance(sizes, 0, 20, rng), alone),
    ):
        assert found.mean() == pytest.approx(np.mean(expected), abs=0.006)
        assert found.std() == pytest.approx(np.std(expected), rel=0.05)


def test_sets_drawn_at_random_are_rarely_marked():
    rng = np.random.default_rng(0)
    networks = []
    for _ in range(3):
        sizes = rng.integers(50, 400, 7)
        reads = rng.random((7, 512)).argsort(1) < sizes[:, None]
        networks.append(subnetworks.Network(reads, sizes, sizes, 512, 1 * reads))
    pairs = subnetworks.compare_pairs(networks)
    assert len(pairs) == 21 and sum(own.mark == "*" for own in pairs.values()) <= 4


def test_no_features_and_all_of_them():
    nothing, everything = np.zeros((2, 8), bool), np.ones((2, 8), bool)
    for reads, expected in ((nothing, 0.0), (everything, 1.0)):
        network = subnetworks.Network(reads, None, None, 8)
        [own] = subnetworks.compare_pairs([network]).values()
        assert own.observed == own.chance == own.low == own.high == expected and own.mark == ""
        assert [own.mark for own in subnetworks.compare_alone([network])] == ["", ""]


# Runs


def test_experts_may_change_places_between_seeds():
    shares = np.array([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], [[0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]])
    text = subnetworks.describe_experts(("a", "b"), shares, ["seed 1", "seed 2"])
    assert row(text, "a") == ["0.50", "2.00", "0.50 0.50 0.00", "0.00 0.50 0.50"]
    assert row(text, "b") == ["1.00", "1.00", "1.00 0.00 0.00", "0.00 0.00 1.00"]


def test_the_tables_of_a_run_count_what_its_masks_connect(tmp_path, capsys):
    for name, flags in dict(sparse={}, dense=dict(sparsifier="none")).items():
        moe_sparse.train(moe_sparse.Args(**SHORT, **flags, run_dir=str(tmp_path / name)))
    capsys.readouterr()
    text = tables(capsys, tmp_path)
    assert "MoE GMP on MT3: actor, 1 seed\n" in text and "Experts" in text
    assert "- dense: dense, it has no masks" in text
    state = torch.load(tmp_path / "sparse" / "checkpoint.pt")["critic"]
    reads = (state["_extra_state"]["head_hidden"].sum(1) > 0).sum(1)
    critic = text[text.index("critic") :]
    assert [int(row(critic, task)[1]) for task in MT3] == reads.tolist()


def test_bad_input_is_refused(tmp_path, capsys):
    masks, runs = head_masks([0], [1], [2]), tmp_path / "runs"
    assert "no runs given" in error(capsys)
    assert "must be a run folder or a folder of run" in error(capsys, tmp_path / "nothing")
    write_checkpoint(runs / "dense", {})
    write_checkpoint(runs / "early", masks, total_timesteps=4000)
    write_checkpoint(runs / "one", head_masks([0]), env_ids=("MiniGrid-DoorKey-6x6-v0",))
    write_checkpoint(runs / "sac", dict(hidden1=np.ones((1, 2, 3), bool)))
    assert "none of 4 runs has masks to compare, the first: dense: dense" in error(capsys, runs)
    good = write_checkpoint(runs / "good", masks)
    assert tables(capsys, runs).endswith(
        "- dense: dense, it has no masks\n- early: incomplete: at timestep 2000 of 4000\n"
        "- one: a single task\n- sac: mtppo_set, must be a run on MiniGrid\n"
    )
    (tmp_path / "file").touch()
    assert "must be a folder to write to" in error(capsys, good, out=tmp_path / "file")
    shutil.copytree(good, tmp_path / "again")
    assert "both MTPPO SET on MT3 with seed 1" in error(capsys, good, tmp_path / "again")
    (good / "checkpoint.pt").write_text("not a file of torch")
    assert "is damaged" in error(capsys, good)
