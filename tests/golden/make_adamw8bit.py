"""Makes `adamw8bit.npz`: 20 steps of bitsandbytes 0.50.2's AdamW8bit on the CPU, and its two maps.

Run it where bitsandbytes is installed (Python 3.11, CPU build of torch):

    TORCHDYNAMO_DISABLE=1 python tests/golden/make_adamw8bit.py

The parameter's rows are whole blocks of 256, so that our blocks are theirs. Gradients are stored in
float16, in which they are exact; their sizes differ from block to block and from step to step, and
one block has none but zeros.
"""

from __future__ import annotations

import pathlib

import bitsandbytes as bnb
import numpy as np
import torch

STEPS, SHAPE = 20, (2, 9, 256)
OPTIONS = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)


def main() -> None:
    rng = np.random.default_rng(0)
    start = rng.standard_normal(SHAPE).astype(np.float32)
    sizes = np.exp(rng.standard_normal((1, 2, 9, 1)) * 2 + rng.standard_normal((STEPS, 1, 1, 1)))
    grads = (rng.standard_normal((STEPS, *SHAPE)) * sizes * 0.01).astype(np.float16)
    grads[:, 1, 3] = 0

    param = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = bnb.optim.AdamW8bit([param], **OPTIONS)
    params = []
    for grad in grads:
        param.grad = torch.from_numpy(grad.astype(np.float32))
        optimizer.step()
        params.append(param.detach().numpy().copy())
    state = {k: np.asarray(v) for k, v in optimizer.state[param].items() if k != "step"}
    assert state["state1"].dtype == np.uint8
    kept = [0, 9, 19]
    path = pathlib.Path(__file__).with_name("adamw8bit.npz")
    np.savez_compressed(path, start=start, grads=grads, params=np.stack(params)[kept], **state)
    print(f"{path.name}: {path.stat().st_size:,} bytes, {', '.join(state)}")


if __name__ == "__main__":
    main()
