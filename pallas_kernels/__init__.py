"""4-bit operations for JAX: arrays in, arrays out, usable without the rest of this project.

The functions have their folders' names; reach a module inside one by `from`, not by `import … as`:
`from pallas_kernels.dequantize_4bit import xla`.
"""

from pallas_kernels.dequantize_4bit.api import dequantize_4bit as dequantize_4bit
from pallas_kernels.matmul_4bit.api import matmul_4bit as matmul_4bit
from pallas_kernels.quantize_4bit.api import dequantize_absmax as dequantize_absmax
from pallas_kernels.quantize_4bit.api import quantize_4bit as quantize_4bit
from pallas_kernels.quantize_4bit.api import quantize_absmax as quantize_absmax
