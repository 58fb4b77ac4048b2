"""SOLVER.ACCUMULATE: a batch in parts gives what the whole batch does."""

import warnings

import pytest
import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from balanced_d2 import load_config
from balanced_d2.config.checks import check_config
from balanced_d2.engine.accumulate import accumulating, split
from balanced_d2.utils.errors import StopTraining, UserError

from .conftest import ROOT, TINY_CONFIG, TINY_MODEL, Killed, needs_localhost
from .test_reliability import assert_same_weights, losses, weights


class Regression(nn.Module):
    """Two losses, each the mean over the images of a batch."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, batch):
        x = torch.stack(batch)
        out = self.layers(x.to(self.layers[0].weight.dtype))
        return {"square": (out - 1).square().mean(), "absolute": 0.1 * (out + 1).abs().mean()}


class Counted(torch.optim.SGD):
    steps = 0

    def step(self, closure=None):
        Counted.steps += 1
        return super().step(closure)


def batches(size, number=5):
    generator = torch.Generator().manual_seed(1)
    return [list(torch.randn(size, 3, generator=generator).double()) for _ in range(number)]


def clipped(optimizer_class):
    options = ["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"]
    options += ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.05"]
    return maybe_add_gradient_clipping(load_config("", options), optimizer_class)


def train(num_parts, size=6, wrap=lambda model: model, data=None, make=SimpleTrainer, **arguments):
    """Train five iterations: the weights, the losses of the last one, and the number of steps."""
    torch.manual_seed(0)
    model = Regression().double()
    optimizer = clipped(Counted)(model.parameters(), lr=0.5, momentum=0.9)
    trainer = make(wrap(model), data or batches(size), optimizer, **arguments)
    if num_parts:
        trainer = accumulating(trainer, num_parts)
    Counted.steps = 0
    with EventStorage(0) as storage:
        for trainer.iter in range(5):
            trainer.run_step()
    last = {k: v[0] for k, v in storage.latest().items() if "time" not in k}
    return model.state_dict(), last, Counted.steps


def test_parts():
    assert split("abcdefg", 3) == ["ab", "cd", "efg"]
    assert split("abcd", 1) == ["abcd"]
    for size in range(1, 20):
        for number in range(1, size + 1):
            parts = split(range(size), number)
            assert [i for part in parts for i in part] == list(range(size))
            assert len(parts) == number
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(StopTraining, match="ACCUMULATE is 3, but a batch has 2"):
        split("ab", 3)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 4, 6])
def test_a_batch_in_parts_is_the_whole_batch(num_parts):
    """Also where the parts are of different sizes. Gradients are clipped once in a step."""
    expected, expected_losses, _ = train(0)
    got, got_losses, steps = train(num_parts)
    assert steps == 5
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12)
    assert got_losses.keys() == expected_losses.keys()
    for name, value in expected_losses.items():
        assert got_losses[name] == pytest.approx(value, rel=1e-10)
    assert {"square", "absolute", "total_loss"} <= got_losses.keys()


def test_with_scaled_gradients():
    """A step in one of whose parts the gradients overflow is left out, as by ``AMPTrainer``."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no CUDA
        expected, _, _ = train(0)
        got, _, steps = train(3, make=AMPTrainer, grad_scaler=scaler)
        assert steps == 5 and scaler.get_scale() == 4
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12)

        calls = []

        def overflowing_once(model):
            def overflow(gradient):
                calls.append(1)
                return gradient * float("inf") if len(calls) == 5 else gradient

            model.layers[0].weight.register_hook(overflow)
            return model

        _, _, steps = train(3, wrap=overflowing_once, make=AMPTrainer, grad_scaler=scaler)
        assert len(calls) == 15 and steps == 4 and scaler.get_scale() == 2


def _in_two_processes(rank, address, queue):
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    from detectron2.utils import comm

    comm.create_local_process_group(2) if hasattr(comm, "create_local_process_group") else None
    exchanges = []

    def wrap(model):
        model = DistributedDataParallel(model)

        def count(state, bucket):
            exchanges.append(1)
            future = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
            return future.then(lambda done: done.value()[0] / 2)

        model.register_comm_hook(None, count)
        return model

    mine = [batch[rank::2] for batch in batches(8)]
    state, _, _ = train(2, wrap=wrap, data=mine)
    if rank == 0:
        queue.put(({name: value.numpy() for name, value in state.items()}, len(exchanges)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@needs_localhost
@pytest.mark.slow
def test_several_processes_exchange_gradients_once(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    address = f"file://{tmp_path / 'meeting'}"
    processes = [
        context.Process(target=_in_two_processes, args=(rank, address, queue)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    got, exchanges = queue.get()
    for process in processes:
        process.join()
    assert exchanges == 5
    expected, _, _ = train(0, size=8)
    for name, value in expected.items():
        torch.testing.assert_close(torch.from_numpy(got[name]), value, rtol=1e-10, atol=1e-12)


def test_killed_and_resumed(training, tmp_path):
    options = ("SOLVER.ACCUMULATE", "2")
    training(tmp_path / "whole", [0.0] * 4, *options)
    with pytest.raises(Killed):
        training(tmp_path / "killed", [0.0] * 4, *options, kill_in=1)
    training(tmp_path / "killed", [0.0] * 4, *options, resume=True)
    states = [torch.load(tmp_path / name / "model_final.pth") for name in ("whole", "killed")]
    assert_same_weights(states[0]["model"], states[1]["model"])
    assert [state["trainer"]["loader"]["position"] for state in states] == [8, 8]


@pytest.mark.parametrize(
    "parts, message", [("0", "ACCUMULATE is 0"), ("3", "only 2 of the SOLVER.IMS_PER_BATCH 2")]
)
def test_settings_that_cannot_be(parts, message):
    options = ["SOLVER.ACCUMULATE", parts, "SOLVER.IMS_PER_BATCH", "2"]
    with pytest.raises(UserError, match=message):
        check_config(load_config(str(ROOT / TINY_CONFIG), options), train=True)


@pytest.mark.slow
def test_a_detector(tiny_coco, tmp_path, train_net_here):
    """Everything is sampled and each image has equally many proposals, so that means over images
    and over proposals are the same, and all images have one size, so that nothing is padded."""
    options = [
        *("--register", "parts", tiny_coco, tiny_coco.parent / "images", *TINY_MODEL),
        *("DATASETS.TRAIN", "('parts',)", "DATASETS.TEST", "()", "SEED", "2"),
        *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "3", "SOLVER.BASE_LR", "0.01"),
        *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "100000", "MODEL.RPN.POSITIVE_FRACTION", "1.0"),
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "4000", "MODEL.RESNETS.NORM", "FrozenBN"),
        *("MODEL.RPN.NMS_THRESH", "1.0", "DATALOADER.NUM_WORKERS", "0"),
        *("MODEL.ROI_HEADS.POSITIVE_FRACTION", "1.0"),
    ]
    for parts in ("1", "2", "4"):
        output = tmp_path / parts
        result = train_net_here(*options, "OUTPUT_DIR", output, "SOLVER.ACCUMULATE", parts)
        assert result.returncode == 0, result.stderr
    whole = weights(tmp_path / "1")
    for parts in ("2", "4"):
        for name, value in weights(tmp_path / parts).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-5)
        a, b = (losses(tmp_path / name)[-1]["total_loss"] for name in ("1", parts))
        assert a == pytest.approx(b, rel=1e-4)
