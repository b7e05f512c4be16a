"""What a pruned weight looks like: a fraction, equal counts in column blocks, or N of every M, as one value."""

import re
from dataclasses import dataclass

from dlpkit.kernels.select import Cut, all_but, share


@dataclass(frozen=True)
class Pattern:
    """`sparsity` is the fraction removed. `n`, `m`: keep n of every m consecutive inputs. `block`: equal counts per that many columns."""

    sparsity: float
    n: int = 0
    m: int = 0
    block: int = 0

    def __post_init__(self):
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity is the fraction removed and wants 0 <= sparsity < 1, got {self.sparsity}")
        if self.m and not 0 < self.n <= self.m:
            raise ValueError(f"an N:M pattern keeps N of every M and wants 0 < N <= M, got {self.n}:{self.m}")
        if self.block < 0 or self.block == 1:
            raise ValueError(f"a block-balanced pattern wants blocks of 2 columns or more, got @{self.block}")

    @classmethod
    def parse(cls, text: "str | float | Pattern") -> "Pattern":
        """ "0.6", "0.6@256" or "2:4". Raises ValueError for anything else."""
        if isinstance(text, Pattern):
            return text
        text = str(text).strip()
        if match := re.fullmatch(r"(\d+):(\d+)", text):
            n, m = map(int, match.groups())
            if not 0 < n <= m:
                raise ValueError(f"an N:M pattern keeps N of every M and wants 0 < N <= M, got {text}")
            return cls(1 - n / m, n=n, m=m)
        if match := re.fullmatch(r"([-+.\deE]+?)(?:@(\d+))?", text):
            try:
                return cls(float(match[1]), block=int(match[2] or 0))
            except ValueError as error:
                if "convert" not in str(error):
                    raise
        raise ValueError(
            f"pattern wants a fraction '0.6', equal counts per 256 columns '0.6@256' or N:M '2:4', got {text!r}"
        )

    def at(self, sparsity: float) -> "Pattern":
        """The same kind of pattern at another sparsity. For N:M, `sparsity` must be a multiple of 1 / M."""
        if self.m:
            return Pattern.parse(f"{round((1 - sparsity) * self.m)}:{self.m}")
        return Pattern(sparsity, block=self.block)

    def cut(self, shape: tuple[int, int], per: str) -> Cut:
        """What goes from an [N, K] weight whose scores are compared per "row" or per "matrix", where the pattern leaves that open."""
        return all_but(shape, self.n, self.m) if self.m else share(shape, self.sparsity, per, self.block)

    def check(self, K: int, name: str) -> None:
        """Raise ValueError if a weight with K inputs cannot follow the pattern."""
        if self.m and K % self.m:
            raise ValueError(f"{name} has {K} inputs, not a multiple of {self.m}: it cannot be pruned {self}")

    def __str__(self) -> str:
        if self.m:
            return f"{self.n}:{self.m}"
        return f"{self.sparsity:g}@{self.block}" if self.block else f"{self.sparsity:g}"
