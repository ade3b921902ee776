"""Weights in formats for decoding on a CPU, multiplied by kernels that come with PyTorch (FBGEMM).

A token that is read alone uses a weight for one multiplication, so its time is that of reading the weights:

    float16   half the bytes. Products and sums are float32; all that is lost is what rounds off the weights, 2^-12
    int8      a quarter of the bytes, with a scale for every row of a matrix. Activations are rounded to 8 bits as well,
              with a scale for every token

Both win at other sizes, too, so that a prompt is read by the same numbers as the tokens after it (RESULTS.md). What did
not win: bfloat16, which PyTorch multiplies slower than FBGEMM float16 and which is eight times coarser, and its int8
kernel without rounding of activations (`torch._weight_int8pack_mm`), which is slower than float16.
"""

import warnings

import torch

FORMATS = ("float16", "int8")


def supported():
    """Whether this build of PyTorch and this processor have the kernels: x86 with AVX2."""
    return torch.backends.quantized.engine in ("x86", "fbgemm") and torch.cpu._is_avx2_supported()


class Packed:
    """A matrix (m, k) in one of the FORMATS, laid out for its kernel. Called with x (..., k), float32 or bfloat16, it
    gives x @ matrix.T, (..., m), without gradient."""

    def __init__(self, matrix, form):
        quantized = torch.ops.quantized
        if form == "float16":
            self.matrix, self.multiply = quantized.linear_prepack_fp16(matrix.float(), None), self._float16
            return
        scale = matrix.float().abs().amax(1).clamp(min=1e-12) / 127
        rounded = (matrix / scale[:, None]).round().to(torch.int8)
        with warnings.catch_warnings():  # PyTorch means to drop tensors of this kind; here they only carry the scales
            warnings.simplefilter("ignore")
            zero = torch.zeros(len(scale), dtype=torch.int64)
            carrier = torch._make_per_channel_quantized_tensor(rounded, scale.double(), zero, 0)
        self.matrix, self.multiply = quantized.linear_prepack(carrier, None), self._int8
        self.saturates = not torch.cpu._is_vnni_supported()  # then sums are 16 bits wide, and activations 7

    def __call__(self, x):
        return self.multiply(x.float()).to(x.dtype)

    def _float16(self, x):
        return torch.ops.quantized.linear_dynamic_fp16(x, self.matrix)

    def _int8(self, x):
        """PyTorch rounds all of x with one scale: rows are brought to one size before."""
        if x.numel() == x.shape[-1]:
            return torch.ops.quantized.linear_dynamic(x, self.matrix, self.saturates)
        size = x.abs().amax(-1, keepdim=True).clamp(min=1e-12)
        return torch.ops.quantized.linear_dynamic(x / size, self.matrix, self.saturates) * size
