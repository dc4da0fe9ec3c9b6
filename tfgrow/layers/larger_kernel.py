"""Where the kernel of a convolution lies in the next larger one."""

from __future__ import annotations

from typing import Any

from tfgrow.layers.growable import Enlargement, KernelLayer


class LargerKernel(KernelLayer):
    """A convolution, depthwise or not, whose kernel can become larger by two along every axis."""

    kernel_size: Any
    strides: Any
    dilation_rate: Any
    padding: Any

    def enlargement(self, input_shape):
        if self.growth_blocked():
            return self.growth_blocked()
        pointwise = all(size == 1 for size in self.kernel_size)
        if self.padding == "valid" and not pointwise:
            return (
                f"layer '{self.name}' has padding='valid', so that a larger kernel would make its "
                "output smaller; build it with padding='same'"
            )
        known = zip(self.kernel_size, self.dilation_rate, input_shape[1:-1], strict=True)
        reach = ((size, (taps + 1) * dilation // 2) for taps, dilation, size in known)
        if all(size is not None and ring >= size for size, ring in reach):
            return f"the kernel of layer '{self.name}' covers its whole input already"
        larger = tuple(size + 2 for size in self.kernel_size)
        offset = tuple(
            self._offset(axis, size, input_shape[axis + 1]) for axis, size in enumerate(larger)
        )
        if None in offset:
            return (
                f"layer '{self.name}' strides over an input of unknown size {tuple(input_shape)}, "
                "so that where its padding begins is unknown; give the model's input a static shape"
            )
        attributes: dict[str, Any] = {"kernel_size": larger}
        if self.padding == "valid":
            attributes["padding"] = "same"  # which for one tap is the same
        return Enlargement(larger, tuple(at for at in offset if at is not None), attributes)

    def _offset(self, axis: int, larger: int, size: int | None) -> int | None:
        """Where the old kernel begins in one that is padded anew, along one spatial axis."""
        if self.padding == "causal":
            return larger - self.kernel_size[axis]
        stride, dilation = self.strides[axis], self.dilation_rate[axis]
        if stride == 1:
            return (larger - self.kernel_size[axis]) // 2
        if size is None:
            return None

        def before(taps):
            reach = (-(-size // stride) - 1) * stride + (taps - 1) * dilation + 1
            return max(reach - size, 0) // 2

        return (before(larger) - before(self.kernel_size[axis])) // dilation
