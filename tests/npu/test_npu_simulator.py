"""What the simulated device must refuse, because a device would: tensors of the host among its own."""

from npu_environment import require_simulation

require_simulation()

from collections.abc import Callable, Iterator  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch_npu  # noqa: E402
from simulator import simulated_npu  # noqa: E402

from modellink.ops.npu.parallel_linear import communicator  # noqa: E402

Case = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture
def pair() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """[3, 4] fp32 on the npu and on the CPU."""
    with simulated_npu(), torch.no_grad():
        yield torch.ones(3, 4, device="npu"), torch.ones(3, 4)


MIXED: dict[str, Case] = {
    "add": lambda npu, cpu: npu + cpu,
    "add to the cpu": lambda npu, cpu: cpu.add_(npu),
    "single npu number": lambda npu, cpu: cpu * npu[0, 0],
    "product": lambda npu, cpu: npu @ cpu.t(),
    "list": lambda npu, cpu: torch.cat([npu, cpu]),
    "condition": lambda npu, cpu: torch.where(cpu > 0, npu, npu),
    "embedding": lambda npu, cpu: torch.nn.functional.embedding(torch.tensor([0]), npu),
    "gather": lambda npu, cpu: npu.gather(0, torch.zeros(1, 4, dtype=torch.int64)),
    "npu indices of the cpu": lambda npu, cpu: cpu[torch.tensor([0], device="npu")],
    "cpu values put": lambda npu, cpu: npu.index_put_((torch.tensor([0, 1, 2]),), cpu),
    "fused": lambda npu, cpu: torch_npu.npu_rms_norm(npu, cpu[0], epsilon=1e-6)[0],
}
ALLOWED: dict[str, Case] = {
    "copy": lambda npu, cpu: cpu.copy_(npu),
    "copy to the npu": lambda npu, cpu: npu.copy_(cpu),
    "move": lambda npu, cpu: npu.cpu() * cpu,
    "single cpu number": lambda npu, cpu: npu * cpu[0, 0],
    "cpu indices": lambda npu, cpu: npu[torch.tensor([0, 1, 2])],
    "cpu indices put": lambda npu, cpu: npu.index_put_((torch.tensor([0, 1, 2]),), npu.clone()),
}


@pytest.mark.parametrize("name", MIXED)
def test_an_operator_on_tensors_of_two_devices_raises(name: str, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        MIXED[name](*pair)


@pytest.mark.parametrize("name", ALLOWED)
def test_copies_single_numbers_and_indices_may_come_from_the_host(
        name: str, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert ALLOWED[name](*pair).cpu().tolist() == torch.ones(3, 4).tolist()


def test_collectives_take_npu_tensors_and_objects(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    npu, cpu = pair
    dist.init_process_group("hccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dist.all_reduce(npu)
        with pytest.raises(RuntimeError, match="hccl takes npu tensors only"):
            dist.all_reduce(cpu)
        found: list[str] = [""]
        dist.all_gather_object(found, "words")
        dist.broadcast_object_list(found)
        assert found == ["words"]
    finally:
        dist.destroy_process_group()


def test_mc2_does_not_start_beside_a_collective_of_its_group(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Both would use one communicator on two streams; with one rank alone the operator has another objection."""
    npu, _ = pair
    dist.init_process_group("hccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        name = communicator(dist.group.WORLD)
        work = dist.all_reduce(npu, async_op=True)
        for objection in ("under way", "factors"):
            with pytest.raises(RuntimeError, match=objection):
                torch_npu.npu_mm_reduce_scatter_base(npu, npu.t(), name, 1, reduce_op="sum")
            work.wait()
    finally:
        dist.destroy_process_group()
