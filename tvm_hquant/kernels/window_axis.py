"""A window along one axis of a map: which of its elements lie on the map."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.primitives import Expression
from tvm_hquant.operators import Shape, Window


@dataclass(frozen=True)
class Section:
    """Neighbouring positions of the output whose windows have the same elements on the map.

    Attributes:
        start: the first of the positions.
        begin, end: the elements; both 0 where there are none.
    """

    start: int
    begin: int
    end: int


@dataclass(frozen=True)
class WindowAxis:
    """A window along one axis of a map."""

    size: int
    kernel: int
    stride: int
    before: int
    after: int
    dilation: int
    output_size: int

    def base(self, position: Expression) -> Expression:
        """The input index under the first element of the window; negative in the padding."""
        return position * self.stride - self.before

    def steps(self, position: Expression, margin: tuple[int, int] = (0, 0)) -> tuple[Expression, Expression]:
        """Which elements of the window lie on the map, widened by ``margin``: begin and end."""
        base, (before, after) = self.base(position), margin
        last = (self.output_size - 1) * self.stride - self.before + (self.kernel - 1) * self.dilation
        begin: Expression = T.int32(0)
        end: Expression = T.int32(self.kernel)
        if self.before > before:
            begin = T.max(begin, T.floordiv(self.dilation - 1 - before - base, self.dilation))
        if last >= self.size + after:
            end = T.min(end, T.floordiv(self.size + after - 1 - base, self.dilation) + 1)
        return begin, end

    def reaches(self, position: int, element: int) -> bool:
        """Whether an element of the window lies on the map at a position of the output."""
        return 0 <= position * self.stride - self.before + element * self.dilation < self.size

    def positions(self, element: int) -> range:
        """The positions of the output from which an element of the window lies on the map."""
        reaching = [position for position in range(self.output_size) if self.reaches(position, element)]
        return range(reaching[0], reaching[-1] + 1) if reaching else range(0)

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """The positions of the output by which elements of their windows lie on the map, in order."""
        found: list[Section] = []
        for position in range(self.output_size):
            elements = [element for element in range(self.kernel) if self.reaches(position, element)]
            section = Section(position, elements[0], elements[-1] + 1) if elements else Section(position, 0, 0)
            if not found or (section.begin, section.end) != (found[-1].begin, found[-1].end):
                found.append(section)
        return tuple(found)

    def sections_from(self, start: int, count: int) -> tuple[int, ...]:
        """The numbers of the sections of so many positions."""
        starts = [section.start for section in self.sections]
        return tuple(bisect_right(starts, position) - 1 for position in range(start, start + count))

    def section(self, position: Expression) -> Expression:
        """The number of the section of a position."""
        number: Expression = T.int32(0)
        for section in self.sections[1:]:
            number = number + T.Cast("int32", position >= section.start)
        return number


def window_axes(input_shape: Shape, window: Window) -> tuple[WindowAxis, WindowAxis]:
    """The window along rows and along columns of ``[batch, height, width, channels]``."""
    output_size = window.output_size(*input_shape[1:3])
    return tuple(  # type: ignore[return-value]
        WindowAxis(
            input_shape[axis + 1],
            window.kernel[axis],
            window.strides[axis],
            window.padding[axis],
            window.padding[axis + 2],
            window.dilation[axis],
            output_size[axis],
        )
        for axis in (0, 1)
    )
