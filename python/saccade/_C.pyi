with_cuda: bool
cuda_archs: str
instruction_sets: tuple[str, ...]
compiler: str
torch_target: tuple[int, int]

def cpu_features() -> list[str]: ...
