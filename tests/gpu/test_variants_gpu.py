"""Variants on a GPU: close to eager, CUDA graphs from several threads, refusals of what is the CPU's."""

import threading

import pytest
import torch

from deployments.runtime.adapter import Adapter, ModelClassError

pytestmark = pytest.mark.gpu


class Net:
    def load(self, device: str) -> None:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 16)]
        self.net = torch.nn.Sequential(*layers).eval().to(device)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.net(batch)
        return answer

    def examples(self) -> list[list[float]]:
        torch.manual_seed(3)
        return torch.randn(4, 64).tolist()  # type: ignore[no-any-return]


def loaded(*optimise: str) -> Adapter:
    adapter = Adapter(Net, {}, optimise)
    adapter.load("cuda")
    return adapter


def answers(adapter: Adapter, rows: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.as_tensor(part) for part in adapter.forward_batch(list(rows))])


@pytest.mark.parametrize(
    "name", ["bf16", "fp16", "int8_weights", "int4_weights", "torchscript", "cuda_graphs"]
)
def test_answers_stay_close(name: str) -> None:
    rows = torch.randn(5, 64)
    eager, found = answers(loaded(), rows), answers(loaded(name), rows)
    bound = {"int4_weights": 0.15, "torchscript": 1e-3, "cuda_graphs": 1e-3}.get(name, 0.02)
    assert (found - eager).norm() / eager.norm() < bound


def test_graphs_serve_every_size_and_larger_batches_run_eagerly() -> None:
    eager, graphs = loaded(), loaded("cuda_graphs")
    for size in (1, 2, 3, 8, 9, 40):
        rows = torch.randn(size, 64)
        assert torch.allclose(answers(eager, rows), answers(graphs, rows), rtol=1e-3, atol=1e-4)


def test_threads_share_graphs_without_mixing_answers() -> None:
    eager, graphs = loaded(), loaded("cuda_graphs")
    wrong: list[int] = []

    def ask(seed: int) -> None:
        rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
        wanted = answers(eager, rows)
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            for _ in range(200):
                if not torch.allclose(answers(graphs, rows), wanted, rtol=1e-3, atol=1e-4):
                    wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", ["packed", "dynamic_int8"])
def test_what_is_the_cpus_is_refused(name: str) -> None:
    with pytest.raises(ModelClassError, match=f"'{name}' needs cpu"):
        loaded(name)
