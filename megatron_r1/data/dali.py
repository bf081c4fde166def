"""NVIDIA DALI as the way of batches to the device: its `external_source` takes the arrays that threads have read.

What it carries is what the threads read, bit for bit. Optional: package nvidia-dali-cuda120 (or the one for another version).
Works without a GPU too (nothing is gained by it there); docs/data.md has the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_r1.utils.errors import EnvironmentProblem

Step = list[dict[str, Any]]


def require_dali() -> Any:
    """The package. Raises EnvironmentProblem when it is absent or does not load."""
    try:
        from nvidia import dali
    except (ImportError, OSError) as error:
        raise EnvironmentProblem(
            expected="the package nvidia-dali-cuda120 (or that of this machine's version), because loader.backend is dali",
            found=f"{type(error).__name__}: {error}", fix="pip install nvidia-dali-cuda120, or set loader.backend to threads: the samples are the same",
        ) from error
    return dali


class DaliSteps:
    """The steps of `get`, each a list of `per_step` micro-batches of equal shapes, through a DALI pipeline that runs `ahead` micro-batches ahead.

    keys: the arrays [b, ...] to carry; gpu: number of the GPU they end on, None for the CPU; adopt: what is made of the carried
    arrays of a micro-batch while DALI's memory is valid (on the CPU they are numpy arrays), stored as "staged"; without it they
    replace the arrays. An error of `get` is raised by the step it belongs to. Raises EnvironmentProblem without the package.
    """

    def __init__(
        self, get: Callable[[int], Step], end: int, per_step: int, keys: Sequence[str], ahead: int = 2, gpu: int | None = None,
        adopt: Callable[[Mapping[str, Any]], Any] | None = None,
    ) -> None:
        self._dali = require_dali()
        self._get, self._end, self._per_step, self._keys, self._ahead, self._gpu, self._adopt = get, end, per_step, tuple(keys), max(1, ahead), gpu, adopt
        self._pipeline: Any = None
        self._expected = -1

    def get(self, step: int) -> Step:
        """Micro-batches of a step."""
        if step != self._expected or self._pipeline is None:
            self._begin(step)
        self._expected = step + 1
        found = []
        for micro in range(self._per_step):
            outputs = self._pipeline.run()
            batch, error = self._beside.pop((step, micro))
            if error is not None:
                self._pipeline = None
                raise error
            if self._gpu is None:
                carried: dict[str, Any] = {key: np.array(output.as_tensor()) for key, output in zip(self._keys, outputs)}
            else:
                carried = {key: output.as_tensor() for key, output in zip(self._keys, outputs)}
            found.append({**batch, "staged": self._adopt(carried)} if self._adopt is not None else {**batch, **carried})
        return found

    def _begin(self, first: int) -> None:
        """A pipeline from step `first` on: DALI cannot go to another place by itself."""
        steps: dict[int, Step] = {}
        like = self._get(first)
        steps[first] = like
        self._beside: dict[tuple[int, int], tuple[dict[str, Any], BaseException | None]] = {}

        def source(iteration: int) -> list[np.ndarray]:
            step, micro = first + iteration // self._per_step, iteration % self._per_step
            if step >= self._end:
                raise StopIteration
            error: BaseException | None = None
            if step not in steps:
                try:
                    steps[step] = self._get(step)
                except BaseException as caught:
                    error, steps[step] = caught, like
            batch = steps[step][micro]
            if micro + 1 == self._per_step:
                del steps[step]
            self._beside[step, micro] = ({key: value for key, value in batch.items() if self._adopt is not None or key not in self._keys}, error)
            return [np.ascontiguousarray(batch[key]) for key in self._keys]

        types = {np.dtype(np.int32): self._dali.types.INT32, np.dtype(np.float32): self._dali.types.FLOAT}
        arrays = [like[0][key] for key in self._keys]
        self._pipeline = self._dali.Pipeline(
            batch_size=max(len(array) for array in arrays), num_threads=1, device_id=self._gpu, prefetch_queue_depth=self._ahead, exec_async=True,
        )
        with self._pipeline:
            outputs = self._dali.fn.external_source(
                source=source, num_outputs=len(arrays), batch=True, dtype=[types[array.dtype] for array in arrays], ndim=[array.ndim - 1 for array in arrays],
            )
            self._pipeline.set_outputs(*(outputs if self._gpu is None else [output.gpu() for output in outputs]))
        self._pipeline.build()

    def close(self) -> None:
        """Let go of the pipeline."""
        self._pipeline = None
