"""Compiling at run time: C by the machine's compiler, CUDA C++ by PyTorch's, and the cache of both."""
