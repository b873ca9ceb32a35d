import pytest
import torch
from torch.nn import functional as F

from fairseq_rkm.ops import alignment
from fairseq_rkm.ops.alignment import align, align_rows, clear_and_align_rows, unalign_rows
from ops.backends.cuda_emulation import NEEDS_COMPILER, EmulatedKernel

DTYPES = torch.bfloat16, torch.float16, torch.float32, torch.float64


def begun_at(first, *shape, dtype, device="cpu"):
    """Random numbers that begin so many elements into memory."""
    count = torch.Size(shape).numel()
    return torch.randn(first + count, device=device).to(dtype)[first:].view(shape)


def test_what_is_aligned_is_not_copied():
    inputs, weight, other = torch.randn(3, 2, 8), torch.randn(4, 3 * 8), torch.randn(6, 16)
    for given, wanted in zip(align(inputs, weight, other), (inputs, weight, other), strict=True):
        assert given.data_ptr() == wanted.data_ptr()
        assert given.shape == wanted.shape


def test_each_input_s_part_of_a_weight_is_aligned():
    inputs, weight, other = torch.randn(3, 2, 5), torch.randn(4, 3 * 5), torch.randn(6, 7)
    aligned_inputs, aligned_weight, aligned_other = align(inputs, weight, other)
    assert torch.equal(aligned_inputs, F.pad(inputs, (0, 3)))
    assert torch.equal(aligned_weight.unflatten(1, (3, 8)), F.pad(weight.unflatten(1, (3, 5)), (0, 3)))
    assert torch.equal(aligned_other, F.pad(other, (0, 1)))


def test_unalign_undoes_what_align_does():
    matrices = [torch.randn(4, 3, 5), torch.randn(2, 8), torch.randn(6, 7)]
    back = unalign_rows([(m, matrix.size(-1)) for m, matrix in zip(align_rows(*matrices), matrices, strict=True)])
    assert all(torch.equal(given, matrix) for given, matrix in zip(back, matrices, strict=True))
    assert back[1] is matrices[1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("sizes", [(8, 16), (5, 16), (5, 6, 7, 9)])
@pytest.mark.parametrize("words", [1, 1000])
def test_a_workspace_is_filled_along_the_way(device, sizes, words):
    room = torch.zeros(words + 2, dtype=torch.int32, device=device)
    matrices = [torch.randn(3, size, device=device) for size in sizes]
    for given, matrix in zip(clear_and_align_rows(room[1:-1], *matrices), matrices, strict=True):
        assert torch.equal(given[:, : matrix.size(1)], matrix)
    assert room.tolist() == [0, *[-1] * words, 0]


@NEEDS_COMPILER
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", range(4))
def test_kernels_take_rows_that_begin_anywhere(dtype, first, monkeypatch):
    def kernel(name, element, _device):
        return EmulatedKernel(alignment.SOURCE, name, (("ELEMENT", element),)), 2

    monkeypatch.setattr(alignment, "_kernel", kernel)
    monkeypatch.setattr(alignment, "THREADS", 32)
    columns = 16 // dtype.itemsize
    given = [begun_at(first, *shape, dtype=dtype) for shape in ((3, 2, 5), (7, 6), (9, 9))]
    wanted = [F.pad(matrix, (0, -matrix.size(-1) % columns)) for matrix in given]
    aligned = [torch.empty_like(matrix) for matrix in wanted]
    alignment._launch("align_rows", [(*pair, pair[0].size(-1)) for pair in zip(given, aligned, strict=True)], None, 0)
    assert all(map(torch.equal, aligned, wanted))
    back = [torch.empty_like(matrix) for matrix in given]
    alignment._launch("unalign_rows", [(*pair, pair[1].size(-1)) for pair in zip(aligned, back, strict=True)])
    assert all(map(torch.equal, back, given))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", range(4))
def test_rows_are_filled_up_with_zeros(dtype, first):
    shapes = [(1, 1), (3, 2, 7), (5, 16), (4, 0, 3), (1000, 1150), (7, 301), (70, 20, 63)]
    matrices = [begun_at(first, *shape, dtype=dtype, device="cuda") for shape in shapes]
    matrices.append(torch.randn(33, 9, device="cuda").to(dtype).t())
    for given, matrix in zip(align_rows(*matrices), matrices, strict=True):
        wanted = F.pad(matrix, (0, -matrix.size(-1) % (16 // matrix.element_size())))
        assert given.size(-1) * given.element_size() % 16 == 0
        assert torch.equal(given, wanted)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_get_back_what_they_were_without_a_view(dtype):
    shapes = [(1, 1), (3, 2, 7), (5, 16), (1000, 1150), (7, 301), (70, 20, 63)]
    matrices = [torch.randn(*shape, device="cuda").to(dtype) for shape in shapes]
    aligned = zip(align_rows(*matrices), (shape[-1] for shape in shapes), strict=True)
    for given, matrix in zip(unalign_rows(list(aligned)), matrices, strict=True):
        assert given.is_contiguous()
        assert torch.equal(given, matrix)
