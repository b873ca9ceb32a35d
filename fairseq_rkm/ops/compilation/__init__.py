"""Compile at run time: C with the machine's compiler, CUDA C++ with PyTorch's; and keep the results."""
