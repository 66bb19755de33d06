"""What the processes of test_parallel.py do: each function is one process's share of one check."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from omni import OmniConfig, OmniInputs, OmniModel
from omni.training.parallel.parallelise import (
    ParallelConfig,
    clip_grad_norm,
    full_weight,
    make_mesh,
    parallelise,
    sum_gradients,
)
from omni.training.parallel.processes import batch_share, init_from_env, is_main, shut_down, sum_over_ranks
from omni.training.run.distributed_checkpoint import export, load_distributed, save_distributed

TINY = Path(__file__).parents[3] / "configs" / "tiny.json"
ROWS, STEPS, MAX_NORM = 4, 3, 0.5  # of the longest check; most take one step on two rows
FROZEN = ("thinker.layers.1.", "vision_encoder.blocks.0.")


def small_model() -> OmniModel:
    """The same random fp64 model in every process, wide enough that routing and logits differ between tokens."""
    torch.manual_seed(0)
    model = OmniModel(OmniConfig.from_pretrained(TINY)).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and not name.startswith("code2wav"):
                p.mul_(5)
            p.requires_grad_(not name.startswith(FROZEN))
    return model


def inputs_of(row: int) -> OmniInputs:
    """One text of its own length."""
    generator = torch.Generator().manual_seed(row)
    return OmniInputs(input_ids=torch.randint(0, 256, (1, 7 + 3 * row), generator=generator))


def loss_of(model: OmniModel, row: int) -> tuple[Tensor, int]:
    """(sum, count) over one row's text, sound, picture and speech: every part, and several ways of calling them."""
    generator = torch.Generator().manual_seed(100 + row)
    inputs = inputs_of(row)
    ids = inputs.input_ids
    out = model(inputs)
    total = F.cross_entropy(out.logits[0, :-1], ids[0, 1:], reduction="sum")
    weight = full_weight(model.thinker.lm_head.weight)  # a loss that uses the head's weight itself
    total = total + (out.logits.detach() @ weight.to(out.logits)).square().mean() * 1e-3
    codes = torch.randint(0, 64, (4 + row, 4), generator=generator)
    embeds = model.talker.hidden_projection(out.hidden[0, : 4 + row]) + model.talker.embed_frames(codes)
    for _ in range(row + 1):  # as many calls as this row's turns, unlike other rows
        embeds = embeds + model.talker.text_projection(model.thinker.embed_tokens(ids[0, : 4 + row]))
    positions = torch.arange(4.0 + row).expand(3, 1, -1)
    spoken = model.talker(embeds[None], positions)
    first = model.talker.codec_embedding(codes[:, 0])
    residual = model.talker.mtp(spoken.hidden[0], first, codes[:, 1:])
    total = total + F.cross_entropy(spoken.logits[0], codes[:, 0], reduction="sum")
    total = total + F.cross_entropy(residual.flatten(0, 1), codes[:, 1:].flatten(), reduction="sum")
    features = torch.randn(1, 128, 150 + 10 * row, generator=generator, dtype=torch.float64)
    total = total + model.audio_encoder(features, [150 + 10 * row]).embeds.square().sum()
    pixels = torch.randn(16, 3 * 2 * 16 * 16, generator=generator, dtype=torch.float64)
    seen = model.vision_encoder(pixels, torch.tensor([[1, 4, 4]]))
    total = total + sum(x.square().sum() for x in (seen.embeds, *seen.taps))
    total = total + model.code2wav(codes.T[None]).square().sum()
    return total, ids.shape[1] - 1


def optimiser_of(model: OmniModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)


def train(
    model: OmniModel, optimiser: torch.optim.Optimizer, rows: Sequence[int], mesh: Any = None, steps: int = 1
) -> list[float]:
    """Some steps, a backward pass a row -> loss and gradient norm of each step, alike on all processes."""
    curve = []
    for _ in range(steps):
        count = sum_over_ranks(torch.tensor(float(sum(inputs_of(row).input_ids.shape[1] - 1 for row in rows))), mesh)
        loss = torch.zeros((), dtype=torch.float64)
        for row in rows:
            total, _ = loss_of(model, row)
            (total / count).backward()
            loss += total.detach() / count
        if mesh is not None:
            sum_gradients(model, mesh)
        norm = clip_grad_norm(model.parameters(), MAX_NORM)
        optimiser.step()
        optimiser.zero_grad()
        curve += [sum_over_ranks(loss, mesh).item(), norm.item()]
    return curve


def whole_state(model: OmniModel) -> dict[str, Tensor]:
    return {name: full_weight(p.detach()).clone() for name, p in model.state_dict().items()}


def check_equal(model: OmniModel, folder: Path, what: str) -> None:
    """The whole parameters are those of the single process, and the frozen ones have not moved."""
    expected = torch.load(folder / f"{what}.pt", weights_only=True)
    state = whole_state(model)
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def reference(folder: Path, rows: int, steps: Sequence[int]) -> None:
    """What one process alone gets from all rows: parameters after some numbers of steps, and the curve so far."""
    model = small_model()
    optimiser = optimiser_of(model)
    curve: list[float] = []
    for done in range(1, max(steps) + 1):
        curve += train(model, optimiser, range(rows), steps=1)
        if done in steps:
            torch.save(model.state_dict(), folder / f"{rows}_rows_{done}_steps.pt")
            torch.save(curve, folder / f"{rows}_rows_{done}_steps_curve.pt")


def check_training(
    folder: Path, config: ParallelConfig, rows: int = 2, steps: int = 1, **options: Any
) -> tuple[OmniModel, Any, Any]:
    """Steps on this process's rows equal the steps of one process on all of them."""
    model, mesh = small_model(), make_mesh(config, "cpu")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    parallelise(model, mesh, config, **options)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    share, shares = batch_share(mesh)
    optimiser = optimiser_of(model)
    curve = train(model, optimiser, range(share, rows, shares), mesh, steps)
    what = f"{rows}_rows_{steps}_steps"
    torch.testing.assert_close(curve, torch.load(folder / f"{what}_curve.pt", weights_only=True), rtol=1e-8, atol=1e-8)
    check_equal(model, folder, what)
    return model, mesh, optimiser


def two_processes(folder: Path) -> None:
    """Sharded data, then plain data parallelism; checkpoint and export of the sharded model."""
    model, mesh, optimiser = check_training(folder, ParallelConfig(), ROWS, STEPS)
    held = sum(p._local_tensor.numel() if hasattr(p, "_local_tensor") else p.numel() for p in model.parameters())
    assert held < 0.75 * sum(p.numel() for p in model.parameters()), "parameters are spread"
    save_distributed(folder / "checkpoint", model, optimiser, {"step": STEPS, "note": "kept"})
    export(model, folder / "exported")
    resumed = small_model()
    parallelise(resumed, mesh, ParallelConfig())
    other = optimiser_of(resumed)
    assert load_distributed(folder / "checkpoint", resumed, other) == {"step": STEPS, "note": "kept"}
    train(resumed, other, range(batch_share(mesh)[0], ROWS, 2), mesh, steps=1)
    check_equal(resumed, folder, f"{ROWS}_rows_{STEPS + 1}_steps")
    check_training(folder, ParallelConfig(shard=False))
    half_precision(mesh)


def half_precision(mesh: Any) -> None:
    """Shards gathered in bfloat16 under autocast: a loss near that of fp32, and gradients in fp32."""
    ids = inputs_of(0).input_ids
    exact = F.cross_entropy(small_model().float()(inputs_of(0)).logits[0, :-1], ids[0, 1:])
    model = small_model().float()
    parallelise(model, mesh, ParallelConfig(), mixed_precision=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(inputs_of(0)).logits[0, :-1].float(), ids[0, 1:])
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)
    grads = [p.grad for name, p in model.named_parameters() if name.startswith("thinker.") and p.requires_grad]
    assert all(grad is not None and grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


def split_layers(folder: Path) -> None:
    """Experts, then heads and widths, over two processes."""
    check_training(folder, ParallelConfig(expert=2, shard=False))
    check_training(folder, ParallelConfig(expert=2))
    check_training(folder, ParallelConfig(tensor=2))
    check_training(folder, ParallelConfig(tensor=2, sequence=True))


def four_processes(folder: Path) -> None:
    """Two kinds at once; a checkpoint of one mesh is read by another."""
    model, mesh, optimiser = check_training(folder, ParallelConfig(data=2, expert=2), ROWS, reshard_after_forward=False)
    save_distributed(folder / "from_four", model, optimiser)
    _, mesh, _ = check_training(folder, ParallelConfig(data=2, tensor=2, sequence=True))
    other = small_model()
    parallelise(other, mesh, ParallelConfig(data=2, tensor=2))
    load_distributed(folder / "from_four", other)
    check_equal(other, folder, f"{ROWS}_rows_1_steps")
    check_training(folder, ParallelConfig(expert=2, tensor=2, shard=False))
    config = ParallelConfig(tensor=4)
    try:
        parallelise(small_model(), make_mesh(config, "cpu"), config)
        raise AssertionError("two key-value heads cannot be shared by four processes")
    except ValueError as error:
        assert "2 key-value heads" in str(error)
    try:
        make_mesh(ParallelConfig(data=3), "cpu")
        raise AssertionError("three groups cannot be made of four processes")
    except ValueError as error:
        assert "4 processes" in str(error)


def start(scenario: Callable[[Path], None], rank: int, world: int, folder: Path) -> None:
    """One process of a scenario; the group meets at a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/{scenario.__name__}", rank=rank, world_size=world)
    scenario(folder)
    shut_down()


def main() -> None:
    """Under torchrun: what each process knows of the others."""
    device = init_from_env()
    rank, ranks = batch_share()
    total = sum_over_ranks(torch.tensor(rank + 1.0))
    Path(sys.argv[1], f"{rank}.txt").write_text(f"{device.type} {ranks} {total.item():g} {is_main()}")
    shut_down()


if __name__ == "__main__":
    main()
