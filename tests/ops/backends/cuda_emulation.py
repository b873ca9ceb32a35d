"""A CUDA kernel that needs no GPU: compiled as C++, its threads take turns on one processor.

Threads are contexts (``ucontext.h``). Each runs until it waits at a barrier, a shuffle or a product on the tensor
cores, or looks whether other blocks have arrived (``seen``); then the next one runs. Blocks run one after another, or
in turns if they wait for each other. This is for kernels in float32. A GPU refuses reads and writes at addresses that
are no multiple of their size; so do these.
"""

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from fairseq_rkm.ops.compilation import nvrtc

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile the kernel")

BEFORE = r"""
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>
#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
struct Index { unsigned x; };
static Index threadIdx, blockIdx, blockDim, gridDim;
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static unsigned misaligned;
extern "C" void __ubsan_handle_type_mismatch_v1(void*, void*) { ++misaligned; }  // -fsanitize=alignment calls it
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
#define __expf expf
using std::min;
static unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
static float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
static ucontext_t scheduler;
static std::vector<ucontext_t> threads;
static unsigned me() { return blockIdx.x * blockDim.x + threadIdx.x; }
static void take_turns() { swapcontext(&threads[me()], &scheduler); }
struct Barrier {
    unsigned arrived = 0, turn = 0;
    void wait(unsigned count) {
        const unsigned mine = turn;
        if (++arrived == count) arrived = 0, ++turn;
        while (turn == mine) take_turns();
    }
};
static std::vector<Barrier> of_blocks, of_warps;
static std::vector<float> shuffled;
static void __syncthreads() { of_blocks[blockIdx.x].wait(blockDim.x); }
static void wait_for_warp() { of_warps[me() / 32].wait(32); }
static void __threadfence() {}
static unsigned atomicAdd(unsigned* at, unsigned more) { const unsigned before = *at; *at += more; return before; }
static float shuffle(float value, unsigned from) {
    shuffled[me()] = value;
    wait_for_warp();
    const float result = shuffled[blockIdx.x * blockDim.x + from];
    wait_for_warp();
    return result;
}
static float __shfl_sync(unsigned, float value, int lane, int width) {
    return shuffle(value, threadIdx.x / width * width + lane);
}
static float __shfl_xor_sync(unsigned, float value, int lanes) { return shuffle(value, threadIdx.x ^ lanes); }
static std::vector<unsigned> factors;  // of a product on the tensor cores, six of each lane
static void product_m16n8k8(float* sums, const unsigned (&mine)[6]) {
    std::copy(mine, mine + 6, &factors[6 * me()]);
    wait_for_warp();
    const unsigned lane = threadIdx.x % 32, *all = &factors[6 * (me() - lane)];
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 8; ++k)
            sums[i] += __uint_as_float(all[6 * (row % 8 * 4 + k % 4) + row / 8 + k / 4 * 2]) *
                       __uint_as_float(all[6 * (column * 4 + k % 4) + 4 + k / 4]);
    }
    wait_for_warp();
}
"""
BEHIND = r"""
float4 room[1 << 14];
static const uint64_t* arguments;
static std::vector<unsigned> running;  // threads of each block
template <typename... A, size_t... I>
static void call(void (*kernel)(A...), std::index_sequence<I...>) { kernel((A)arguments[I]...); }
template <typename... A>
static void call(void (*kernel)(A...)) { call(kernel, std::index_sequence_for<A...>()); }
static void run() {
    call(KERNEL);
    --running[blockIdx.x];
    while (true) take_turns();
}
// The number of reads and writes that a GPU would refuse. `together`: blocks take turns; they have no shared memory.
extern "C" unsigned launch(unsigned blocks, unsigned count, const uint64_t* given, bool together) {
    arguments = given, misaligned = 0;
    blockDim.x = count, gridDim.x = blocks;
    const size_t all = size_t(blocks) * count;
    threads.assign(all, {}), shuffled.assign(all, 0), factors.assign(6 * all, 0);
    of_blocks.assign(blocks, {}), of_warps.assign((all + 31) / 32, {}), running.assign(blocks, count);
    const unsigned each = together ? blocks : 1;  // that take turns
    std::vector<char> stacks(size_t(each) * count << 16);
    for (unsigned first = 0; first < blocks; first += each) {
        for (float4& value : room) value = {NAN, NAN, NAN, NAN};
        for (unsigned i = 0; i < each * count; ++i) {
            ucontext_t& thread = threads[size_t(first) * count + i];
            getcontext(&thread);
            thread.uc_stack.ss_sp = &stacks[size_t(i) << 16];
            thread.uc_stack.ss_size = 1 << 16;
            makecontext(&thread, run, 0);
        }
        for (bool left = true; left;) {
            left = false;
            for (unsigned block = first; block < first + each; ++block) {
                if (!running[block]) continue;
                left = true;
                for (unsigned thread = 0; thread < count; ++thread) {
                    blockIdx.x = block, threadIdx.x = thread;
                    swapcontext(&scheduler, &threads[me()]);
                }
            }
        }
    }
    return misaligned;
}
"""
STAND_INS = {
    "operand": "return x;",
    "multiply_tile": "product_m16n8k8(c, {a0, a1, a2, a3, b0, b1});",
    "fresh": "return *reinterpret_cast<const Vector*>(at);",
    "seen": "take_turns(); return *counter;",
}
"""The bodies of functions that are written in a GPU's assembler."""


@functools.cache
def _compiled(source: Path, name: str, macros: tuple[tuple[str, int | str], ...]) -> ctypes.CDLL:
    text = source.read_text().replace(nvrtc.INCLUDE.decode(), nvrtc.HEADER.read_text())
    for function, body in STAND_INS.items():
        text = re.sub(rf"(inline__ \w+ {function}\([^)]*\) \{{\n).*?\n\}}\n", rf"\1{body}\n}}\n", text, flags=re.DOTALL)
    folder = Path(tempfile.mkdtemp())
    file, part, library = (folder / f"{name}.{ending}" for ending in ("cpp", "o", "so"))
    file.write_text(f"{BEFORE}\n{text}\n#define KERNEL {name}\n{BEHIND}")
    options = [f"-D{key}={value}" for key, value in macros]
    checked = ["-fsanitize=alignment", "-std=c++17", "-O1", "-w", "-fPIC", *options]
    subprocess.run(["g++", *checked, "-c", "-o", str(part), str(file)], check=True)
    subprocess.run(["g++", "-shared", "-o", str(library), str(part)], check=True)
    loaded = ctypes.CDLL(str(library))
    shutil.rmtree(folder)
    return loaded


class EmulatedKernel:
    """Takes the place of :class:`fairseq_rkm.ops.compilation.nvrtc.Kernel`, on tensors of a CPU.

    Args:
        source: the CUDA file.
        name: the kernel's name.
        macros: names and values to define.
        most: the number of blocks that a GPU would hold at a time, for blocks that wait for each other.
    """

    device = 0

    def __init__(
        self, source: Path, name: str, macros: tuple[tuple[str, int | str], ...], most: int | None = None
    ) -> None:
        self.name, self.macros, self._library, self.blocks = name, dict(macros), _compiled(source, name, macros), []
        self._most = most

    def most_blocks(self, _threads: int) -> int:
        """As :meth:`nvrtc.Kernel.most_blocks`."""
        assert self._most is not None
        return self._most

    def launch(self, blocks: int, threads: int, *arguments: torch.Tensor | int | None) -> None:
        """As :meth:`nvrtc.Kernel.launch`; returns when the kernel is done."""
        for tensor in arguments:
            assert not isinstance(tensor, torch.Tensor) or tensor.is_contiguous()
        values = [0 if a is None else a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        assert self._most is None or blocks <= self._most, "a cooperative launch would be refused"
        given = (ctypes.c_uint64 * len(values))(*values)
        misaligned = self._library.launch(blocks, threads, given, self._most is not None)
        assert not misaligned, f"{self.name} reads or writes at {misaligned} misaligned addresses"
        self.blocks.append(blocks)
