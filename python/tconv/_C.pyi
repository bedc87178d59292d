"""The core (python/bindings.cpp). Tensors are addresses; enumerations are those of problem.h, in its order."""

from typing import Any, Optional

class Plan:
    workspace_bytes: int
    microseconds: float
    output_size: tuple[int, ...]
    num_statistics: int
    problem: str
    steps: list[dict[str, Any]]
    candidates: list[dict[str, Any]]
    def explain(self) -> str: ...

_Dims = tuple[int, ...]
_Address = Optional[int]

def geometry_key(
    rank: int, stride: Any, padding: Any, output_padding: Any, groups: Any, dilation: Any, /
) -> Optional[bytes]: ...
def plans(requests: list[tuple[Any, ...]], /) -> list[Plan]: ...
def plan_string(problem: str, device: str, only: str, /) -> Plan: ...
def parse_problem(text: str, /) -> dict[str, Any]: ...
def run(
    plan: Plan,
    stream: _Address,
    num_threads: int,
    input: _Address,
    weight: _Address,
    bias: _Address,
    grad_output: _Address,
    output: _Address,
    grad_bias: _Address,
    raw: _Address,
    mean: _Address,
    rstd: _Address,
    workspace: _Address,
    operands: Optional[tuple[_Address, ...]],
    grad_operands: Optional[tuple[_Address, ...]],
    weight_channels_last: bool,
    /,
) -> None: ...
def compile(problem: str, device: str, /) -> list[dict[str, Any]]: ...
def device_info(name: str, /) -> dict[str, Any]: ...
def cuda_device_count() -> int: ...
def kernel_names(backend: str, /) -> list[str]: ...
def operations() -> list[dict[str, Any]]: ...
def forget_functions() -> None: ...
def add_search_path(folder: str, /) -> None: ...
